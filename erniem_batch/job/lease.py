"""One writer at a time: a small file in the run folder that its owner renews every few seconds.

A process may stand still for an hour at any line, wake up after another run has taken the lease
over, and go on. So each effect on the output folder is made in one of two ways:

- a control file is replaced by `Lease.write`: its version is read, then ownership is proven by a
  renewal, then it is swapped against that version. A run that took over in between has changed the
  version, or will replace the file itself;
- a file is deleted by `storage.remove` only if it was listed before ownership was proven: whatever
  was listed then was not made by a later run, and no name is ever used twice.

Each owner has a higher generation than all before it. The manifest says which one published it.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from erniem_batch import storage
from erniem_batch.errors import ConfigError, Conflict, JobError, StorageError
from erniem_batch.job.manifest import TRIES, Fence, published_generation, restless

logger = logging.getLogger(__name__)

BEAT_S = 5.0
STALE_S = 30.0  # nobody has renewed it for so long: its owner is gone

STOPPED = "stopped"  # released after SIGTERM
ENDED = "ended"  # released by a run that came to its end
FAILED = "failed"  # released after an error


@dataclass(frozen=True, slots=True)
class Holder:
    """Who writes.

    Attributes:
        machine: says where `pid` means something.
        beat: counts the renewals.
        released: empty while the run is on.
        generation: higher than that of all owners before.
        taken_over: the last generation whose owner took the lease from one that had not released
            it and may wake up; 0: none.
    """

    owner: str = ""
    machine: str = ""
    host: str = "unknown"
    pid: int = 0
    beat: int = 0
    released: str = ""
    generation: int = 0
    taken_over: int = 0

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The content of a lease file; of a damaged one, an owner of whom nothing is known."""
        try:
            values = json.loads(data)
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            holder = cls(**known)
        except (ValueError, TypeError, RecursionError):
            return cls()
        right = all(type(getattr(holder, f.name)) is type(f.default) for f in fields(cls))
        return holder if right else cls()


class Lease:
    """The right to write into an output folder, from `acquire` to `release`.

    Attributes:
        output: the folder.
        last_ended: how the run before this one released it; empty if it was killed.
    """

    def __init__(self, output: str) -> None:
        self._path = f"{output}/_run/lease.json"
        self.output = output
        self.holder = Holder(uuid.uuid4().hex, _machine(), os.uname().nodename, os.getpid())
        self.last_ended = ENDED
        self._version = ""
        self._renewed = 0.0
        self._beating = threading.Lock()
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._releasing = threading.Lock()
        self._released = False
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> Self:
        """Takes the lease, from a dead owner too.

        Raises:
            ConfigError: another run is writing.
        """
        while True:
            there = storage.read_versioned(self._path)
            self._renewed = time.monotonic()
            try:
                if there is None:
                    data = self._next_to(Holder(released=ENDED))
                    self._version = storage.create(self._path, data)
                else:
                    before = self._require_free(*there)
                    data = self._next_to(before)
                    self._version = storage.swap(self._path, data, there[1])
                break
            except Conflict:  # somebody else was faster: see who
                continue
        self._thread.start()
        return self

    def _next_to(self, before: Holder) -> bytes:
        """Our entry, to follow that of another owner."""
        generation = before.generation
        if not generation:  # the file is new, damaged, or of an older release
            generation = published_generation(self.output)
        generation += 1
        is_gone = before.released or is_dead(before)
        taken_over = before.taken_over if is_gone else generation
        return self._held(generation=generation, taken_over=taken_over).encode()

    def check(self) -> None:
        """Raises a JobError if another run has taken over.

        Raises:
            StorageError: it may have, but storage does not tell.
        """
        if time.monotonic() - self._renewed > 2 * BEAT_S:  # this process or storage stood still
            self._beat()
        self._require_ours()

    def prove(self) -> None:
        """Raises a JobError unless the lease is ours at this moment.

        Raises:
            StorageError: storage does not tell.
        """
        self._beat()
        self._require_ours()

    def write(self, path: str, data: bytes) -> None:
        """Replaces a control file of the output folder, unless another run has taken over.

        Raises:
            JobError: it has.
        """
        for _ in range(TRIES):
            version = storage.version_of(path)
            self.prove()
            # A Conflict is the late write of a run before this one, or we have lost the lease.
            with suppress(Conflict):
                if version is None:
                    storage.create(path, data)
                else:
                    storage.swap(path, data, version)
                return
        raise restless(path)

    def remove(self, path: str) -> None:
        """Deletes a control file of the output folder, unless another run has taken over.

        Raises:
            JobError: it has.
        """
        for _ in range(TRIES):
            info = storage.stat(path)
            if info is None:
                return
            self.prove()
            storage.remove([info])
        if storage.stat(path) is not None:
            raise restless(path)

    def _require_ours(self) -> None:
        if self._released:  # by the thread that ends a process whose main thread cannot
            raise JobError(f"{self.output}: this run is being stopped and writes nothing more")
        if self._lost.is_set():
            raise JobError(
                f"another run has taken over {self.output}, because this one gave no sign of life "
                f"for {STALE_S:.0f} s; the other run completes the work"
            )

    @property
    def fence(self) -> Fence:
        """What a manifest says about who published it."""
        return Fence(self.holder.owner, self.holder.generation)

    @property
    def taken_over(self) -> int:
        """The last generation that had to take the lease from an owner that may wake up."""
        return self.holder.taken_over

    @contextmanager
    def held(
        self, stopped: tuple[type[BaseException], ...] = (), *, as_it_was: bool = False
    ) -> Iterator[Self]:
        """Gives it back after the block; the next run learns how this one ended.

        Args:
            stopped: what a stop raises, which is no failure.
            as_it_was: this is no run: the next one is told of the last.
        """
        how = FAILED
        try:
            yield self
            how = ENDED
        except stopped:
            how = STOPPED
            raise
        finally:
            self.release((as_it_was and self.last_ended) or how)

    def release(self, how: str) -> None:
        """Gives the lease back; once, whichever thread comes first."""
        with self._releasing:
            if not self._released:
                self._released = True
                self._release(how)

    def _release(self, how: str) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)
        if not self._lost.is_set():
            try:
                storage.swap(self._path, self._held(released=how).encode(), self._version)
            except StorageError as error:
                logger.warning("the lease was not released, it will run out: %s", error)

    def replace_file(self, path: str, data: bytes) -> None:
        """Writes a file that may be large in place of an older one, as `replace_file` does."""
        replace_file(path, data, self.prove)

    @staticmethod
    def look(output: str) -> tuple[Holder | None, str]:
        """Who writes, or wrote last, and a word that changes with every sign of life."""
        there = storage.read_versioned(f"{output}/_run/lease.json")
        return (None, "") if there is None else (Holder.decode(there[0]), there[1])

    def _held(self, **changes: object) -> Holder:
        values = asdict(self.holder) | changes
        self.holder = Holder(**values)
        return self.holder

    def _require_free(self, data: bytes, version: str) -> Holder:
        """Its last owner, who is known to be gone.

        Raises:
            ConfigError: another run is writing.
            Conflict: it was released while we waited.
        """
        holder = Holder.decode(data)
        if not holder.owner:
            logger.warning("damaged file=%s: it is written anew", self._path)
        self.last_ended = holder.released
        if holder.released or is_dead(holder):
            return holder
        logger.info("another run seems to be writing into %s, waiting for its sign", self.output)
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 5))
            now = storage.read_versioned(self._path)
            if now is None or now[1] != version:
                holder = holder if now is None else Holder.decode(now[0])
                if holder.released:
                    raise Conflict(f"{self._path}: released just now")
                raise ConfigError(
                    f"--output {self.output}: another run is writing there (host {holder.host}, "
                    f"process {holder.pid}): wait for its end, or choose another folder"
                )
        return holder

    def _renew(self) -> None:
        while not (self._stop.wait(BEAT_S) or self._lost.is_set()):
            try:
                self._beat()
            except StorageError as error:
                logger.warning("the lease could not be renewed, trying again: %s", error)

    def _beat(self) -> None:
        with self._beating:
            now = time.monotonic()
            data = self._held(beat=self.holder.beat + 1).encode()
            try:
                self._version = storage.swap(self._path, data, self._version)
                self._renewed = now
            except Conflict:
                self._version = self._own_version()
                if not self._version:
                    self._lost.set()
                else:
                    self._renewed = now

    def _own_version(self) -> str:
        """The version of our entry; empty if another run has written one.

        It is not the one we know after a renewal that arrived although it seemed to fail.
        """
        there = storage.read_versioned(self._path)
        ours = there is not None and Holder.decode(there[0]).owner == self.holder.owner
        return there[1] if there is not None and ours else ""


def replace_file(path: str, data: bytes, prove: Callable[[], None]) -> None:
    """Writes a file in place of the one that was there when ownership was proven, and of no other.

    For a moment there is none. No lock file stays beside it.

    Args:
        prove: raises an error if another run has taken over.
    """
    for _ in range(TRIES):
        there = storage.stat(path)
        prove()
        if there is not None:
            storage.remove([there])
        with suppress(Conflict):  # the late write of a run before this one, or we have lost
            with storage.new_file(path, exclusive=True) as file:
                file.write(data)
            return
    raise restless(path)


def require_owner(output: str, owner: str) -> None:
    """Raises a JobError unless the lease of a folder is that of this owner; for its workers."""
    holder, _ = Lease.look(output)
    if holder is None or holder.owner != owner:
        raise JobError(f"another run has taken over {output}; it completes the work")


def _machine() -> str:
    """Machine and process namespace, where process numbers can be compared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex


def is_dead(holder: Holder) -> bool:
    """Whether the owner's process is known to be gone; where that cannot be known, time tells."""
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, but somebody else's
        pass
    return False
