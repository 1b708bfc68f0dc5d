"""What a reader should read: `_manifest.json` names the files, `_SUCCESS` says that it is good.

Files appear and go one by one, the manifest changes in one step: a reader who takes the names from
there never sees half of a night.
"""

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from erniem_batch import storage
from erniem_batch.errors import Conflict, JobError

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
    lease = Fence(**values.get("lease", {}))
    return Manifest(values["generation"], values["fingerprint"], **entries, lease=lease)


def published_generation(output: str) -> int:
    """Generation of the lease under which the manifest was published; 0: none, or unknown."""
    manifest = read_manifest(output)
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
    while True:
        there = storage.read_versioned(path)
        owner.prove()
        if there is not None:
            before = _decode(there[0])
            if before.lease.generation > owner.fence.generation:
                raise JobError(f"{path}: a later run has published its results")
            if before.lease.generation >= owner.taken_over and _same_files(before, manifest):
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


def _same_files(one: Manifest, other: Manifest) -> bool:
    return replace(one, lease=other.lease) == other


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
