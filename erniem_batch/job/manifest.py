"""What a reader should read: `_manifest.json` names the files, `_SUCCESS` says that it is good.

Files appear and go one by one, the manifest changes in one step: a reader who takes the names from
there never sees half of a night.
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from erniem_batch import storage
from erniem_batch.errors import Conflict, DamagedFile, JobError, StorageError
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
TRIES = 5  # to replace a file that a run before this one may write late
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
class Fence:
    """Who published a manifest: the owner of the lease, and its generation."""

    owner: str = ""
    generation: int = 0


class Owner(Protocol):
    """The lease of an output folder, see `lease.Lease`."""

    @property
    def fence(self) -> Fence: ...
    @property
    def taken_over(self) -> int: ...
    def prove(self) -> None: ...
    def write(self, path: str, data: bytes) -> None: ...
    def remove(self, path: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        generation: raised by every --overwrite.
        lease: who published it.
    """

    generation: int
    fingerprint: str
    files: list[Entry]
    dead_letters: list[Entry]
    lease: Fence = Fence()

    def encode(self) -> bytes:
        """As JSON, one file a line."""
        head = {
            "format": FORMAT,
            "generation": self.generation,
            "fingerprint": self.fingerprint,
            "lease": asdict(self.lease),
        }
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
        head = (self.generation, self.fingerprint, self.lease.owner, self.lease.generation)
        digest = hashlib.sha256("\n".join(map(str, head)).encode())
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
    lease = _fence(values.get("lease", {}), path)
    manifest = Manifest(values["generation"], values["fingerprint"], **entries, lease=lease)
    require_checksum_of_newer(values, (*FIELDS, "format", "lease"), path, REMEDY)
    stated = values.get(CHECKSUM)
    if stated is not None and stated != manifest.checksum:
        raise damaged(path, "its checksum does not fit its content", REMEDY)
    return manifest


def _fence(value: object, path: str) -> Fence:
    if not isinstance(value, dict):
        raise damaged(path, "its lease is not an object", REMEDY)
    fence = Fence(value.get("owner", ""), value.get("generation", 0))
    if (type(fence.owner), type(fence.generation)) != (str, int):
        raise damaged(path, "its lease has fields of other types", REMEDY)
    return fence


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


def published_generation(output: str) -> int:
    """Generation of the lease under which the manifest was published; 0: none, or unknown."""
    try:
        manifest = read_manifest(output)
    except DamagedFile:
        return 0
    return 0 if manifest is None else manifest.lease.generation


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


def publish(output: str, manifest: Manifest, owner: Owner) -> bytes:
    """Makes a manifest the valid one, unless a later run has published or taken over.

    One that names the same files stays as it is, unless the lease was taken from a run that may
    still wake up and publish: a new version of the file is what stops it.

    Returns:
        The content of the valid manifest.

    Raises:
        JobError: another run has taken over.
    """
    path = storage.join(output, MANIFEST)
    manifest = replace(manifest, lease=owner.fence)
    for _ in range(TRIES):
        there = storage.read_versioned(path)
        owner.prove()
        if there is not None:
            before = _sound(there[0], path)
            if before is not None and before.lease.generation > owner.fence.generation:
                raise JobError(f"{path}: a later run has published its results")
            if before is not None and _is_to_stay(before, manifest, owner):
                return there[0]
            unmark_success(output, owner)  # it spoke of the one before
        # A Conflict is the late write of a run before this one, or we have lost the lease.
        data = manifest.encode()
        with suppress(Conflict):
            if there is None:
                storage.create(path, data)
            else:
                storage.swap(path, data, there[1])
            return data
    raise restless(path)


def restless(path: str) -> StorageError:
    """The error for a file that changes although we are its only owner."""
    return StorageError(
        f"{path}: it changed {TRIES} times while it was written: something else writes there, or "
        f"this storage does not keep the versions of files"
    )


def _sound(data: bytes, path: str) -> Manifest | None:
    try:
        return _decode(data, path)
    except DamagedFile as error:
        logger.warning("written anew, because %s", error)
        return None


def _is_to_stay(before: Manifest, manifest: Manifest, owner: Owner) -> bool:
    """Whether it names the same files, and no run that may wake up has read its version."""
    same = replace(before, lease=manifest.lease) == manifest
    return same and before.lease.generation >= owner.taken_over


def mark_success(output: str, manifest: bytes, owner: Owner) -> None:
    """Says that the manifest is the outcome of a complete run.

    Args:
        manifest: its content, as `publish` returned it.

    Raises:
        JobError: another run has taken over.
    """
    digest = hashlib.sha256(manifest).hexdigest()
    text = json.dumps({"manifest_sha256": digest})
    path = storage.join(output, SUCCESS)
    if storage.read(path) != text.encode():
        owner.write(path, text.encode())


def unmark_success(output: str, owner: Owner) -> None:
    """Takes the word back, before anything changes.

    Raises:
        JobError: another run has taken over.
    """
    owner.remove(storage.join(output, SUCCESS))
