"""Model inputs of many requests in common forward passes. asyncio only: no Ray, no torch.

While one pass runs, what arrives waits; when it ends, the next batch is made of what waits. So a
lonely request never waits for company, and a busy server fills its batches by itself.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar, cast

from erniem_batch.errors import ErnieMBatchError

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(ErnieMBatchError):
    """More waits than may wait; nothing was accepted.

    Attributes:
        retry_after: seconds after which there should be room.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full: try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class ClosedError(ErnieMBatchError):
    """The batcher takes nothing any more."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One forward pass.

    Attributes:
        n_items: rows of the batch.
        n_tokens: without padding.
        n_padded_tokens: rows x longest.
        waited: seconds that the oldest item had waited.
        seconds: of the pass.
    """

    n_items: int
    n_tokens: int
    n_padded_tokens: int
    waited: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Served(Generic[Result]):
    """What became of the items of a request.

    Attributes:
        results: one an item, in order.
        computed: seconds of all passes with one of its items.
    """

    results: list[Result]
    computed: float


@dataclass(slots=True, eq=False)
class _Request(Generic[Result]):
    """Items that came together, and are answered together."""

    future: asyncio.Future[Served[Result]]
    results: list[Result | None]
    n_left: int
    computed: float = 0.0

    @property
    def is_over(self) -> bool:
        """Answered, failed, or given up by who asked."""
        return self.future.done()


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    length: int
    request: _Request[Result]
    place: int
    since: float


@dataclass(eq=False)
class Batcher(Generic[Item, Result]):
    """Batches within a budget of padded tokens, one at a time, the oldest item always in the next.

    Attributes:
        forward: computes a batch: one result for each item, in order. It must leave the event loop
            free. If it raises, the requests of that batch fail, and no others.
        length: tokens of an item.
        max_batch_tokens: rows x longest of a batch; an item above it goes alone.
        max_queue_tokens: of all that waits; a request above it by itself is taken if nothing else
            waits.
        pass_tokens: what a pass costs beside its tokens, in tokens; see `pick`.
        on_batch: told of every pass.
        turn: held during a pass; batchers that share a device share it, and take turns.

    Example:
        async with Batcher(forward, len, max_batch_tokens=1024, max_queue_tokens=65536) as batcher:
            rows = (await batcher.submit(windows)).results
    """

    forward: Callable[[list[Item]], Awaitable[Sequence[Result]]]
    length: Callable[[Item], int]
    max_batch_tokens: int
    max_queue_tokens: int
    pass_tokens: int = 1 << 20
    on_batch: Callable[[BatchReport], None] = lambda report: None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _queue: deque[_Waiting[Item, Result]] = field(default_factory=deque, init=False)
    _n_tokens: int = field(default=0, init=False)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _closing: bool = field(default=False, init=False)
    _worker: asyncio.Task[None] | None = field(default=None, init=False)
    _tokens_per_s: float | None = field(default=None, init=False)
    _busy_since: float | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work(), name="batcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_alive(self) -> bool:
        """Whether batches are still being made; if not, the service is to be replaced."""
        return self._worker is not None and not self._worker.done()

    @property
    def n_waiting_tokens(self) -> int:
        """Of all items that no pass has taken yet."""
        return self._n_tokens

    @property
    def busy_for(self) -> float:
        """Seconds that the pass at hand has taken so far; 0 between passes."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    async def submit(self, items: Sequence[Item], *, accepted: bool = False) -> Served[Result]:
        """One result for each item. Cancelled, its items leave the queue.

        Args:
            accepted: they belong to a request that was accepted before, so room is not asked for.

        Raises:
            QueueFullError: nothing was accepted.
            ClosedError: nothing is accepted any more.
            Exception: what `forward` raised for a batch with one of the items.
        """
        if self._closing or not self.is_alive:
            raise ClosedError("the batcher is closed")
        if not items:
            return Served([], 0.0)
        lengths = [self.length(item) for item in items]
        if not accepted and self._queue and self._n_tokens + sum(lengths) > self.max_queue_tokens:
            raise QueueFullError(self._seconds_for(self._n_tokens))
        future: asyncio.Future[Served[Result]] = asyncio.get_running_loop().create_future()
        request = _Request[Result](future, [None] * len(items), len(items))
        now = time.monotonic()
        for place, (item, length) in enumerate(zip(items, lengths, strict=True)):
            self._queue.append(_Waiting(item, length, request, place, now))
        self._n_tokens += sum(lengths)
        self._arrived.set()
        try:
            return await future
        except asyncio.CancelledError:  # of the caller, which cancels the future too
            self._forget_finished()
            raise

    async def close(self) -> None:
        """Takes nothing new, and ends when all that was accepted is answered."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker

    # ---- the worker ---------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            # The batch is made when it can run: until then more of its kind arrive.
            async with self.turn:
                if self._queue:
                    await self._run(self._next_batch())

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """The oldest item, and those of the most similar length within the budget."""
        waiting = list(self._queue)
        chosen = pick([entry.length for entry in waiting], self.max_batch_tokens, self.pass_tokens)
        taken = set(chosen)
        self._queue = deque(entry for i, entry in enumerate(waiting) if i not in taken)
        batch = [waiting[i] for i in chosen]
        self._n_tokens -= sum(entry.length for entry in batch)
        return batch

    async def _run(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = self._busy_since = time.monotonic()
        try:
            results = await self.forward([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception as error:
            for entry in batch:
                if not entry.request.is_over:
                    entry.request.future.set_exception(error)
            self._forget_finished()
            return
        finally:
            self._busy_since = None
        self._account(batch, started, seconds := max(time.monotonic() - started, 1e-6))
        for request in {id(entry.request): entry.request for entry in batch}.values():
            request.computed += seconds
        for entry, result in zip(batch, results, strict=True):
            request = entry.request
            request.results[entry.place] = result
            request.n_left -= 1
            if not request.n_left and not request.is_over:
                results = cast(list[Result], request.results)
                request.future.set_result(Served(results, request.computed))

    def _account(self, batch: list[_Waiting[Item, Result]], started: float, seconds: float) -> None:
        n_padded = len(batch) * max(entry.length for entry in batch)
        speed = n_padded / seconds
        before = self._tokens_per_s
        self._tokens_per_s = speed if before is None else 0.8 * before + 0.2 * speed
        self.on_batch(
            BatchReport(
                n_items=len(batch),
                n_tokens=sum(entry.length for entry in batch),
                n_padded_tokens=n_padded,
                waited=started - min(entry.since for entry in batch),
                seconds=seconds,
            )
        )

    def _forget_finished(self) -> None:
        """Items of requests that failed or were given up need no pass."""
        if any(entry.request.is_over for entry in self._queue):
            self._queue = deque(entry for entry in self._queue if not entry.request.is_over)
            self._n_tokens = sum(entry.length for entry in self._queue)

    def _seconds_for(self, n_tokens: int) -> float:
        """How long so many tokens will take, by what was seen."""
        return n_tokens / self._tokens_per_s if self._tokens_per_s else 1.0


def pick(lengths: Sequence[int], max_tokens: int, pass_tokens: int = 0) -> list[int]:
    """Which of the waiting items, oldest first, go into the next batch: the oldest, then those
    nearest to its length, as long as rows x longest stays within the budget and a token gets no
    dearer by them.

    Args:
        pass_tokens: what a pass costs beside its tokens, in tokens. The smaller, the more a batch
            of its own pays for items of another length.

    Example:
        >>> pick([8, 100, 9, 7, 8], max_tokens=32, pass_tokens=100)
        [0, 4, 2]
        >>> pick([8, 100, 9, 7, 8], max_tokens=1024, pass_tokens=10)
        [0, 4, 2, 3]
    """
    if not lengths:
        return []
    chosen, longest, real = [0], lengths[0], lengths[0]
    # Of two that are as near, the older.
    for i in sorted(range(1, len(lengths)), key=lambda i: (abs(lengths[i] - lengths[0]), i)):
        wider, n = max(longest, lengths[i]), len(chosen) + 1
        before, after = pass_tokens + longest * (n - 1), pass_tokens + wider * n
        if wider * n <= max_tokens and after * real <= before * (real + lengths[i]):
            chosen.append(i)
            longest, real = wider, real + lengths[i]
    return chosen
