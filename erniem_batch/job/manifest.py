"""What a reader should read: `_manifest.json` names the files, `_SUCCESS` says that it is good.

Files appear and go one by one, the manifest changes in one step: a reader who takes the names from
there never sees half of a night.
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from erniem_batch import storage
from erniem_batch.errors import DamagedFile, JobError
from erniem_batch.job.documents import (
    CHECKSUM,
    damaged,
    parse_document,
    require_checksum_of_newer,
)

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
FORMAT = 1
FIELDS = {"generation": int, "fingerprint": str, "files": list, "dead_letters": list}
REMEDY = (
    "delete it and run the same command again, which writes it anew from the data files (a second "
    "dataset: erniem-batch compact)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that counts.

    Attributes:
        sha256: Of its bytes; empty if it is not known, as in folders of older releases.
    """

    name: str
    n_rows: int
    n_bytes: int | None = None
    sha256: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        size = "" if self.n_bytes is None else f', "n_bytes": {self.n_bytes}'
        digest = f', "sha256": "{self.sha256}"' if self.sha256 else ""
        name = json.dumps(self.name)
        return f'{{"name": {name}, "n_rows": {self.n_rows}{size}{digest}}}'.encode()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        generation: raised by every --overwrite.
    """

    generation: int
    fingerprint: str
    files: list[Entry]
    dead_letters: list[Entry]

    def encode(self) -> bytes:
        """As JSON, one file a line."""
        head = {"format": FORMAT, "generation": self.generation, "fingerprint": self.fingerprint}
        text = io.BytesIO()
        text.write(json.dumps(head)[:-1].encode())
        for name in ("files", "dead_letters"):
            text.write(f',\n"{name}": ['.encode())
            for i, entry in enumerate(getattr(self, name)):
                text.write(b",\n  " if i else b"\n  ")
                text.write(entry.encode())
            text.write(b"]")
        text.write(f',\n"{CHECKSUM}": "{self.checksum}"}}\n'.encode())
        return text.getvalue()

    @property
    def checksum(self) -> str:
        """The SHA-256 of all that says which rows count."""
        digest = hashlib.sha256(f"{self.generation}\n{self.fingerprint}".encode())
        for entries in (self.files, self.dead_letters):
            digest.update(b"\n")
            for e in entries:
                text = f"\n{json.dumps(e.name)} {e.n_rows} {e.n_bytes} {e.sha256}"
                digest.update(text.encode())
        return digest.hexdigest()

    @property
    def names(self) -> set[str]:
        """All files it names."""
        return {entry.name for entry in (*self.files, *self.dead_letters)}


def read_manifest(output: str) -> Manifest | None:
    """The manifest of an output folder; None if nothing has been completed there yet.

    Raises:
        DamagedFile: There is one that cannot be read.
    """
    path = storage.join(output, MANIFEST)
    data = storage.read(path)
    return None if data is None else _decode(data, path)


def _decode(data: bytes, path: str = MANIFEST) -> Manifest:
    values = parse_document(data, path, FIELDS, REMEDY)
    entries = {name: _entries(values[name], path) for name in ("files", "dead_letters")}
    manifest = Manifest(values["generation"], values["fingerprint"], **entries)
    require_checksum_of_newer(values, (*FIELDS, "format"), path, REMEDY)
    stated = values.get(CHECKSUM)
    if stated is not None and stated != manifest.checksum:
        raise damaged(path, "its checksum does not fit its content", REMEDY)
    return manifest


def _entries(values: Sequence[object], path: str) -> list[Entry]:
    """Entries of a manifest; fields that a newer release may have added are ignored."""
    entries = []
    for value in values:
        if not isinstance(value, dict):
            raise damaged(path, "an entry is not an object", REMEDY)
        name: Any = value.get("name")
        n_rows: Any = value.get("n_rows")
        n_bytes, digest = value.get("n_bytes"), value.get("sha256", "")
        kinds = type(name), type(n_rows), type(n_bytes), type(digest)
        if kinds not in ((str, int, int, str), (str, int, type(None), str)):
            raise damaged(path, "an entry has fields that are missing or of other types", REMEDY)
        if not is_inside(name):
            raise damaged(path, "it names a file outside its folder", REMEDY)
        entries.append(Entry(name, n_rows, n_bytes, digest))
    return entries


def is_inside(name: str) -> bool:
    """Whether a name leads to no place outside the folder that it is relative to."""
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def result_files(output: str) -> list[str]:
    """Paths of the files with results that count, in order; those of an output folder.

    Raises:
        JobError: no run into this folder has been completed yet.
    """
    folder = storage.normal(output)
    manifest = read_manifest(folder)
    if manifest is None:
        raise JobError(f"{output}: no run has been completed there yet (no {MANIFEST})")
    return [storage.join(folder, entry.name) for entry in manifest.files]


def publish(output: str, manifest: Manifest) -> set[str]:
    """Makes a manifest the valid one; gives the names that only the one before had.

    Raises:
        Conflict: another run has published meanwhile.
    """
    path = storage.join(output, MANIFEST)
    data = manifest.encode()
    there = storage.read_versioned(path)
    if there is None:
        storage.create(path, data)
        return set()
    if there[0] != data:
        unmark_success(output)  # it spoke of the one before
        storage.swap(path, data, there[1])
    try:
        return _decode(there[0], path).names - manifest.names
    except DamagedFile as error:
        logger.warning("written anew, because %s", error)
        return set()


def mark_success(output: str, manifest: Manifest) -> None:
    """Says that the manifest is the outcome of a complete run."""
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    text = json.dumps({"manifest_sha256": digest})
    storage.write(storage.join(output, SUCCESS), text.encode())


def unmark_success(output: str) -> None:
    """Takes the word back, before anything changes."""
    storage.delete([storage.join(output, SUCCESS)])
