"""What a reader should read: `_manifest.json` names the files, `_SUCCESS` says that it is good.

Files appear and go one by one, the manifest changes in one step: a reader who takes the names from
there never sees half of a night.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from erniem_batch import storage
from erniem_batch.errors import JobError

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that counts."""

    name: str
    n_rows: int
    n_bytes: int | None = None

    def encode(self) -> bytes:
        """As JSON."""
        size = "" if self.n_bytes is None else f', "n_bytes": {self.n_bytes}'
        return f'{{"name": {json.dumps(self.name)}, "n_rows": {self.n_rows}{size}}}'.encode()


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
        text.write(b"}\n")
        return text.getvalue()

    @property
    def names(self) -> set[str]:
        """All files it names."""
        return {entry.name for entry in (*self.files, *self.dead_letters)}


def read_manifest(output: str) -> Manifest | None:
    """The manifest of an output folder; None if nothing has been completed there yet."""
    data = storage.read(storage.join(output, MANIFEST))
    return None if data is None else _decode(data)


def _decode(data: bytes) -> Manifest:
    values: dict[str, Any] = json.loads(data)
    entries = {
        name: [Entry(**entry) for entry in values[name]] for name in ("files", "dead_letters")
    }
    return Manifest(values["generation"], values["fingerprint"], **entries)


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
    return _decode(there[0]).names - manifest.names


def mark_success(output: str, manifest: Manifest) -> None:
    """Says that the manifest is the outcome of a complete run."""
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    text = json.dumps({"manifest_sha256": digest})
    storage.write(storage.join(output, SUCCESS), text.encode())


def unmark_success(output: str) -> None:
    """Takes the word back, before anything changes."""
    storage.delete([storage.join(output, SUCCESS)])
