"""Threads on which forward passes run: several side by side on a CPU, one at a time on a GPU."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock, local
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# Of a CPU; each reads all weights from memory, so many of them would wait for it.
MAX_LANES = 4


class Lanes:
    """As many passes at a time as there are lanes; all predictors of a process should share them.

    On a CPU two passes of one thread each do more than two passes of two threads, one after the
    other: threads of one pass wait for each other in every layer, and what else the machine does
    holds up all of them. A lonely pass still ends sooner with all threads.

    Args:
        n_threads: of torch, for all lanes together; None: as torch likes.
        n_lanes: at most so many as there are threads.
    """

    def __init__(self, n_threads: int | None = None, n_lanes: int = 1) -> None:
        self.n_threads = n_threads
        self.n_lanes = min(n_lanes, n_threads or 1)
        # Threads of torch belong to the thread that calls it, and they idle well only while there
        # are no more of them than cores: so a pass on all lanes always has the same caller.
        self._wide = ThreadPoolExecutor(1, "forward")
        self._narrow = ThreadPoolExecutor(self.n_lanes, "forward-lane")
        self._lock = Lock()
        self._n_interruptible = 0
        self._interrupting: deque[Callable[[], None]] = deque()
        self._of_thread = local()

    def submit(
        self, width: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Runs a function when a lane is free.

        Args:
            width: lanes whose threads it gets; only the caller knows what else runs.
        """
        pool = self._wide if width == self.n_lanes else self._narrow
        return pool.submit(self._run, width, partial(function, *args, **kwargs))

    def submit_interruptible(
        self, width: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Runs a function that calls `between_steps`, where others may interrupt it."""
        with self._lock:
            self._n_interruptible += 1
        run = partial(self._run_interruptible, partial(function, *args, **kwargs))
        future = self.submit(width, run)
        future.add_done_callback(self._interruptible_is_over)  # cancelled ones too
        return future

    def interrupt(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a function between two steps of an interruptible one, or else on a free lane."""
        future: Future[T] = Future()
        work = partial(_settle, future, partial(function, *args, **kwargs))
        with self._lock:
            if self._n_interruptible:
                self._interrupting.append(work)
                return future
        self.submit(1, work)
        return future

    def between_steps(self) -> None:
        """Runs one function that interrupts, if one waits and this thread may be interrupted."""
        if not self._interrupting or not getattr(self._of_thread, "may_be_interrupted", False):
            return
        self._of_thread.may_be_interrupted = False
        try:
            self._run_interrupting()
        finally:
            self._of_thread.may_be_interrupted = True

    def close(self) -> None:
        """Ends the threads when what was submitted is done."""
        self._wide.shutdown()
        self._narrow.shutdown()

    def _run_interruptible(self, function: Callable[[], T]) -> T:
        self._of_thread.may_be_interrupted = True
        try:
            return function()
        finally:
            self._of_thread.may_be_interrupted = False

    def _interruptible_is_over(self, _: object) -> None:
        """Starts the functions that waited to interrupt, if this pass was the last one."""
        left: list[Callable[[], None]] = []
        with self._lock:
            self._n_interruptible -= 1
            if not self._n_interruptible:
                left += self._interrupting
                self._interrupting.clear()
        for work in left:
            self.submit(1, work)

    def _run_interrupting(self) -> None:
        with self._lock:
            work = self._interrupting.popleft() if self._interrupting else None
        if work is not None:
            work()

    def _run(self, width: int, function: Callable[[], T]) -> T:
        if self.n_threads is not None:
            n_threads = max(1, self.n_threads * width // self.n_lanes)
            if torch.get_num_threads() != n_threads:  # of this thread, not of the process
                torch.set_num_threads(n_threads)
        return function()


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Runs a function for a future, as an executor does."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def lanes_of(n_threads: int | None, device_type: str) -> Lanes:
    """As many as are worth it.

    Args:
        n_threads: of torch; None: as many as it would take, on a CPU.
    """
    if device_type != "cpu":
        return Lanes(n_threads)
    return Lanes(n_threads or torch.get_num_threads(), MAX_LANES)
