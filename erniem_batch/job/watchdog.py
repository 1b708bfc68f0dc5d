"""Ends a process that stands still, so that it is started anew and its work tried again.

A thread watches from inside: it can say which units stand still. A call that holds Python's lock
stops that thread too, so a small process watches from outside (`guard.py`) and kills.
"""

import logging
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import IO

from erniem_batch.job import guard

logger = logging.getLogger(__name__)

EXIT_HUNG = 75
# Without work for so long, nothing is watched until work comes again.
IDLE_S = 5.0
# So often the process outside is started, should somebody end it.
MAX_STARTS = 4


class Watchdog:
    """Watches how far work gets while there is any.

    Args:
        timeout: seconds without progress; None: wait for ever.
        progress: any value that changes when something gets done.
    """

    def __init__(self, timeout: float | None, progress: Callable[[], Hashable]) -> None:
        self._timeout = timeout
        self._progress = progress
        self._at_work: set[str] = set()
        self._guard: _Guard | None = None
        self._changing = threading.Lock()

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Work that has to get on while the block runs."""
        if self._timeout is None:
            yield
            return
        self._change(self._at_work.add, name)
        try:
            yield
        finally:
            self._change(self._at_work.discard, name)

    def _change(self, change: Callable[[str], None], name: str) -> None:
        with self._changing:
            change(name)
            if self._guard is None and self._timeout is not None:
                self._guard = _Guard(self._timeout)
                threading.Thread(target=self._watch, args=(self._timeout,), daemon=True).start()
            if self._guard is not None:
                self._guard.tell(self._at_work)

    def _watch(self, timeout: float) -> None:
        """Until there has been no work for some time."""
        pause = min(1.0, timeout / 4)
        last, since = None, time.monotonic()
        idle_since = last_looked = since
        while True:
            time.sleep(pause)
            now = time.monotonic()
            stood_still, last_looked = now - last_looked > 2 * pause + 1.0, now
            if self._at_work:
                idle_since = now
            elif now - idle_since > IDLE_S and self._ended():
                return
            # Work that begins or ends is progress too.
            state = (self._progress(), frozenset(self._at_work))
            if state != last or not self._at_work or stood_still:
                last, since = state, now
                self._tell()
            elif now - since > timeout:
                self._end_process(timeout)

    def _tell(self) -> None:
        with self._changing:
            if self._guard is not None:
                self._guard.tell(self._at_work)

    def _ended(self) -> bool:
        """End the guard, unless work has come meanwhile."""
        with self._changing:
            if self._at_work or self._guard is None:
                return False
            self._guard.close()
            self._guard = None
            return True

    def _end_process(self, timeout: float) -> None:
        logger.error(
            "no progress for %.0f s, ending the process units=%s",
            timeout,
            ",".join(sorted(self._at_work)),
        )
        os._exit(EXIT_HUNG)


class _Guard:
    """The process that watches from outside, and the memory by which it is told.

    Where there is no room for another process, work goes on without.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._n_starts = 0
        self._file = _memory_file()
        self._file.truncate(guard.SIZE)
        self._memory = mmap.mmap(self._file.fileno(), guard.SIZE)
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes] | None":
        self._n_starts += 1
        command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(self._timeout)]
        try:
            return subprocess.Popen(command, stdin=self._file, stdout=subprocess.DEVNULL, cwd="/")
        except OSError as error:
            logger.warning("nothing watches this process from outside: %s", error.strerror)
            return None

    def tell(self, at_work: set[str]) -> None:
        """Say that work gets on, and at what."""
        if self._process is not None and self._process.poll() is not None:  # somebody ended it
            self._process = self._start() if self._n_starts < MAX_STARTS else None
        names = ",".join(sorted(at_work)).encode()[: guard.SIZE - guard.LAYOUT.size]
        head = guard.LAYOUT.pack(len(at_work), time.monotonic(), len(names))
        self._memory[: len(head) + len(names)] = head + names

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._memory.close()
        self._file.close()


def _memory_file() -> IO[bytes]:
    """A file that needs no disk, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("watchdog"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
