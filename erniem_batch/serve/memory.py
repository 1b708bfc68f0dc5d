"""Memory that was freed goes back to the system.

glibc keeps what threads free: forward passes of ever other shapes, and texts that come and go on
several threads, leave holes in which nothing fits, and a service that runs for weeks grows.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress


def _malloc_trim() -> Callable[[int], int] | None:
    with suppress(OSError, AttributeError):  # another C library: it has its own ways
        function: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
        return function
    return None


class Trimmer:
    """Gives memory back, but not too often: it takes some milliseconds for each gigabyte."""

    def __init__(self, every_s: float = 60.0) -> None:
        self._every = every_s
        self._trim = _malloc_trim()
        self._next = time.monotonic() + every_s

    def __call__(self) -> None:
        """Call it often, from a thread that may wait."""
        if self._trim is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._trim(0)  # ctypes lets other threads run meanwhile


def keep_for_good() -> None:
    """Takes everything that is there now out of the searches for garbage.

    After a start there are a million objects of modules and models. Python looks at all of them
    now and then, for a quarter of a second, in which no other thread runs.
    """
    gc.collect()
    gc.freeze()
