"""One writer at a time: a small file in the run folder that its owner renews every few seconds."""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from erniem_batch import storage
from erniem_batch.errors import ConfigError, Conflict, JobError, StorageError

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
    """

    owner: str
    machine: str
    host: str
    pid: int
    beat: int = 0
    released: str = ""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


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
                    self._version = storage.create(self._path, self.holder.encode())
                else:
                    self._require_free(*there)
                    self._version = storage.swap(self._path, self.holder.encode(), there[1])
                break
            except Conflict:  # somebody else was faster: see who
                continue
        self._thread.start()
        return self

    def check(self) -> None:
        """Raises a JobError if another run has taken over.

        Raises:
            StorageError: it may have, but storage does not tell.
        """
        if time.monotonic() - self._renewed > 2 * BEAT_S:  # this process or storage stood still
            self._beat()
        if self._lost.is_set():
            raise JobError(
                f"another run has taken over {self.output}, since this one did not say for "
                f"{STALE_S:.0f} s that it is alive; it goes on with the rest"
            )

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

    @staticmethod
    def look(output: str) -> tuple[Holder | None, str]:
        """Who writes, or wrote last, and a word that changes with every sign of life."""
        there = storage.read_versioned(f"{output}/_run/lease.json")
        return (None, "") if there is None else (Holder(**json.loads(there[0])), there[1])

    def _held(self, **changes: object) -> Holder:
        values = asdict(self.holder) | changes
        self.holder = Holder(**values)
        return self.holder

    def _require_free(self, data: bytes, version: str) -> None:
        holder = Holder(**json.loads(data))
        self.last_ended = holder.released
        if holder.released or is_dead(holder):
            return
        logger.info("another run seems to be writing into %s, waiting for its sign", self.output)
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 5))
            now = storage.read_versioned(self._path)
            if now is None or now[1] != version:
                holder = holder if now is None else Holder(**json.loads(now[0]))
                if holder.released:
                    raise Conflict(f"{self._path}: released just now")
                raise ConfigError(
                    f"--output {self.output}: another run is writing there (host {holder.host}, "
                    f"process {holder.pid}): wait for its end, or choose another folder"
                )

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
                self._lost.set()


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
