"""Ends a process that stands still, so that it is started anew and its work tried again."""

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

EXIT_HUNG = 75


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
        if timeout is not None:
            threading.Thread(target=self._watch, args=(timeout,), daemon=True).start()

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Work that has to get on while the block runs."""
        self._at_work.add(name)
        try:
            yield
        finally:
            self._at_work.discard(name)

    def _watch(self, timeout: float) -> None:
        last, since = None, time.monotonic()
        while True:
            time.sleep(min(1.0, timeout / 4))
            # Work that begins or ends is progress too.
            now = (self._progress(), frozenset(self._at_work))
            if now != last or not self._at_work:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                logger.error(
                    "no progress for %.0f s, ending the process units=%s",
                    timeout,
                    ",".join(sorted(self._at_work)),
                )
                os._exit(EXIT_HUNG)
