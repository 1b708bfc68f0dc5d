"""Model inputs of many requests in common forward passes. asyncio only: no Ray, no torch.

While the device is busy, what arrives waits; when a pass ends, the next batch is made of what
waits. So a lonely request never waits for company, and a busy server fills its batches by itself.
Requests take turns: each adds at most so many tokens to a batch before the next one does. Short and
long requests also take turns, a batch each, and batches of long ones are small while short ones
come. On a CPU a pass of short requests interrupts one of long requests between two steps of the
encoder. So a short request waits for part of a layer, never for all of a long request.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar, cast

from erniem_batch.batching import LEAST_TOKENS
from erniem_batch.errors import ErnieMBatchError

# As many as a window has. Requests with more are long.
TURN_TOKENS = 512
# Part of a full batch that long requests get while short ones come, and so many seconds after.
BESIDE_SHORT = 16
COMPANY_S = 1.0
# How many times `max_queue_tokens` may wait, by kinds of requests, each with room of its own.
SHARES = {"short": 1, "long": 1, "follow-up": 4}

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
        n_items: in the batch.
        n_tokens: of the batch, and of those n_padding that are padding.
        waited: seconds that the oldest item had waited.
        seconds: of the pass.
    """

    n_items: int
    n_tokens: int
    n_padding: int
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
class _Request(Generic[Item, Result]):
    """Items that came together, and are answered together.

    Attributes:
        kind: one of SHARES.
        waiting: items that no pass has taken yet, which have n_tokens tokens.
        n_left: results that are missing.
        computed: seconds of its passes.
    """

    future: asyncio.Future[Served[Result]]
    results: list[Result | None]
    n_left: int
    kind: str
    waiting: "deque[_Waiting[Item, Result]]" = field(default_factory=deque)
    n_tokens: int = 0
    computed: float = 0.0

    @property
    def is_over(self) -> bool:
        """Answered, failed, or given up by who asked."""
        return self.future.done()


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    length: int
    request: _Request[Item, Result]
    place: int
    since: float


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to run one pass, from `Device.take` to `Device.give`.

    Attributes:
        n_lanes: lanes that the pass has; 0: it interrupts a pass of long requests.
        is_long: the pass is one of long requests, and may be interrupted.
    """

    n_lanes: int
    is_long: bool


class Device:
    """Where passes run; batchers that share it take turns, short requests and long ones in turn.

    Args:
        n_lanes: passes that may run side by side. One that would be alone gets more lanes at once.
        interruptible: whether short passes may interrupt long ones, one at a time each.

    Attributes:
        last_short: when a short request came last, for any of the batchers (monotonic seconds).
    """

    def __init__(self, n_lanes: int = 1, *, interruptible: bool = False) -> None:
        self.n_lanes = n_lanes
        self.last_short = -math.inf
        self._interruptible = interruptible
        self._n_free = n_lanes
        self._n_long = 0
        self._n_interrupting = 0
        self._long_was_last = False
        self._waiting: dict[bool, deque[asyncio.Future[Turn]]] = {False: deque(), True: deque()}

    @property
    def n_free(self) -> int:
        """Lanes that nobody holds."""
        return self._n_free

    async def take(self, *, is_long: bool = False) -> Turn:
        """Waits for a turn; first come, first served among requests of one kind."""
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting[is_long].append(future)
        self._pass_on()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    def widen(self, turn: Turn) -> Turn:
        """Adds the lanes that nobody else wants to a turn."""
        if not turn.n_lanes:
            return turn
        n_free, self._n_free = self._n_free, 0
        return Turn(turn.n_lanes + n_free, turn.is_long)

    def give(self, turn: Turn) -> None:
        """Ends a turn."""
        self._n_free += turn.n_lanes
        self._n_long -= turn.is_long
        self._n_interrupting -= not turn.n_lanes
        self._pass_on()

    def _pass_on(self) -> None:
        """Gives turns to those who wait, as many as there are."""
        while any(self._give_turn(is_long) for is_long in self._in_turn()):
            pass

    def _in_turn(self) -> tuple[bool, bool]:
        return (not self._long_was_last, self._long_was_last)

    def _give_turn(self, is_long: bool) -> bool:
        """Give a turn to one waiting request of this kind; return whether one got it."""
        waiting = self._waiting[is_long]
        while waiting and waiting[0].done():  # given up
            waiting.popleft()
        may_interrupt = not is_long and self._interruptible and self._n_interrupting < self._n_long
        if not waiting or not (self._n_free or may_interrupt):
            return False
        turn = Turn(min(1, self._n_free), is_long)
        self._n_free -= turn.n_lanes
        self._n_long += is_long
        self._n_interrupting += not turn.n_lanes
        self._long_was_last = is_long
        waiting.popleft().set_result(turn)
        return True


@dataclass(slots=True, eq=False)
class _Queue(Generic[Item, Result]):
    """Requests that wait, all short or all long."""

    is_long: bool
    requests: deque[_Request[Item, Result]] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Batcher(Generic[Item, Result]):
    """Batches within a budget of tokens, made of the requests in turn.

    Attributes:
        forward: computes a batch in a turn: one result for each item, in order. It must leave the
            event loop free. If it raises, the requests of that batch fail, and no others.
        length: tokens of an item, as the model computes it.
        padding: how many of them are padding.
        max_batch_tokens: of a batch; an item above it goes alone.
        max_queue_tokens: of all that waits, of short and of long requests each (see SHARES); a
            request above it by itself is taken if nothing else of its kind waits.
        turn_tokens: that a request adds to a batch before the next request has its turn. Requests
            with more are long.
        lane_tokens: what waits is shared among free lanes, but in batches of no fewer tokens.
        on_batch: told of every pass.
        device: where they run.

    Example:
        async with Batcher(forward, len, max_batch_tokens=1024, max_queue_tokens=65536) as batcher:
            rows = (await batcher.submit(windows)).results
    """

    forward: Callable[[list[Item], Turn], Awaitable[Sequence[Result]]]
    length: Callable[[Item], int]
    max_batch_tokens: int
    max_queue_tokens: int
    padding: Callable[[Item], int] = lambda item: 0
    lane_tokens: int = LEAST_TOKENS
    turn_tokens: int = TURN_TOKENS
    on_batch: Callable[[BatchReport], None] = lambda report: None
    device: Device = field(default_factory=Device)
    _short: _Queue[Item, Result] = field(default_factory=lambda: _Queue(False), init=False)
    _long: _Queue[Item, Result] = field(default_factory=lambda: _Queue(True), init=False)
    _n_tokens: Counter[str] = field(default_factory=Counter, init=False)
    _closing: bool = field(default=False, init=False)
    _workers: list[asyncio.Task[None]] = field(default_factory=list, init=False)
    _tokens_per_s: float | None = field(default=None, init=False)
    _passes: dict[asyncio.Task[None], float] = field(default_factory=dict, init=False)

    async def __aenter__(self) -> Self:
        self._workers = [
            asyncio.create_task(self._work(queue), name="batcher")
            for queue in (self._short, self._long)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_alive(self) -> bool:
        """Whether batches are still being made; if not, the service is to be replaced."""
        return bool(self._workers) and not any(worker.done() for worker in self._workers)

    @property
    def n_waiting_tokens(self) -> int:
        """Of all items that no pass has taken yet."""
        return self._n_tokens.total()

    @property
    def _waits(self) -> bool:
        return bool(self._short.requests or self._long.requests)

    @property
    def busy_for(self) -> float:
        """Seconds that the oldest pass at hand has taken so far; 0 between passes."""
        return time.monotonic() - min(self._passes.values()) if self._passes else 0.0

    async def submit(self, items: Sequence[Item], *, is_follow_up: bool = False) -> Served[Result]:
        """One result for each item. Cancelled, its items leave the queue.

        Args:
            is_follow_up: they belong to a request that was accepted before, and take no room from
                new requests.

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
        is_long = sum(lengths) > self.turn_tokens
        kind = "follow-up" if is_follow_up else "long" if is_long else "short"
        self._require_room(kind, sum(lengths))
        future: asyncio.Future[Served[Result]] = asyncio.get_running_loop().create_future()
        request = _Request[Item, Result](future, [None] * len(items), len(items), kind)
        now = time.monotonic()
        for place, (item, length) in enumerate(zip(items, lengths, strict=True)):
            request.waiting.append(_Waiting(item, length, request, place, now))
        queue = self._long if is_long else self._short
        queue.requests.append(request)
        if not is_long:
            self.device.last_short = now
        self._count(request, sum(lengths))
        queue.arrived.set()
        try:
            return await future
        except asyncio.CancelledError:  # of the caller, which cancels the future too
            self._forget_finished()
            raise

    async def close(self) -> None:
        """Takes nothing new, and ends when all that was accepted is answered."""
        self._closing = True
        for queue in (self._short, self._long):
            queue.arrived.set()
        await asyncio.gather(*self._workers)

    def _require_room(self, kind: str, n_tokens: int) -> None:
        """Raises a QueueFullError if so many tokens of a kind would be too many."""
        waiting = self._n_tokens[kind]
        if waiting and waiting + n_tokens > SHARES[kind] * self.max_queue_tokens:
            raise QueueFullError(self._seconds_for(self.n_waiting_tokens))

    def _count(self, request: _Request[Item, Result], n_tokens: int) -> None:
        """Adds tokens to those of a request that wait; takes them away if there are less than 0."""
        request.n_tokens += n_tokens
        self._n_tokens[request.kind] += n_tokens

    # ---- the workers: one for short requests, one for long ones --------------------------------

    async def _work(self, queue: _Queue[Item, Result]) -> None:
        while await self._something_waits(queue):
            # The batch is made when it can run: until then more of its kind arrive.
            turn = await self.device.take(is_long=queue.is_long)
            if not queue.requests:  # who asked has gone
                self.device.give(turn)
                continue
            batch = self._take(queue.requests, self._budget(turn))
            if not self._waits:
                turn = self.device.widen(turn)
            running = asyncio.create_task(self._run(batch, turn), name="pass")
            self._passes[running] = time.monotonic()
            running.add_done_callback(self._passes.pop)
        await asyncio.gather(*self._passes)

    async def _something_waits(self, queue: _Queue[Item, Result]) -> bool:
        """Returns when there is something to do; False: there never will be."""
        while not queue.requests:
            if self._closing:
                return False
            queue.arrived.clear()
            await queue.arrived.wait()
        return True

    def _budget(self, turn: Turn) -> int:
        """Tokens of the next batch."""
        share = math.ceil(self.n_waiting_tokens / (1 + self.device.n_free))
        budget = min(self.max_batch_tokens, max(share, self.lane_tokens))
        if turn.is_long and time.monotonic() - self.device.last_short < COMPANY_S:
            return min(budget, max(self.lane_tokens, self.max_batch_tokens // BESIDE_SHORT))
        return budget

    def _take(
        self, turns: deque[_Request[Item, Result]], left: int
    ) -> list[_Waiting[Item, Result]]:
        """Items of some requests in turn, as many as fit, and at least one."""
        batch: list[_Waiting[Item, Result]] = []
        while turns and (not batch or turns[0].waiting[0].length <= left):
            request = turns.popleft()
            some = self._take_turn(request, left, not batch)
            left -= sum(entry.length for entry in some)
            batch += some
            if request.waiting:
                turns.append(request)
        return batch

    def _take_turn(
        self, request: _Request[Item, Result], left: int, is_first: bool
    ) -> list[_Waiting[Item, Result]]:
        """The next items of a request that fit in what is left of a batch, and in its turn.

        Args:
            is_first: the first item is taken however long it is.
        """
        waiting, some, n_tokens = request.waiting, list[_Waiting[Item, Result]](), 0
        while waiting:
            length = n_tokens + waiting[0].length
            fits = length <= left and (not some or length <= self.turn_tokens)
            if not fits and (some or not is_first):
                break
            some.append(waiting.popleft())
            n_tokens = length
        self._count(request, -n_tokens)
        return some

    async def _run(self, batch: list[_Waiting[Item, Result]], turn: Turn) -> None:
        started = time.monotonic()
        try:
            results = await self.forward([entry.item for entry in batch], turn)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception as error:
            for entry in batch:
                if not entry.request.is_over:
                    entry.request.future.set_exception(error)
            self._forget_finished()
            return
        finally:
            self.device.give(turn)
        seconds = max(time.monotonic() - started, 1e-6)
        self._account(batch, started, seconds, max(1, turn.n_lanes))
        for request in {id(entry.request): entry.request for entry in batch}.values():
            request.computed += seconds
        for entry, result in zip(batch, results, strict=True):
            request = entry.request
            request.results[entry.place] = result
            request.n_left -= 1
            if not request.n_left and not request.is_over:
                results = cast(list[Result], request.results)
                request.future.set_result(Served(results, request.computed))

    def _account(
        self, batch: list[_Waiting[Item, Result]], started: float, seconds: float, n_lanes: int
    ) -> None:
        n_tokens = sum(entry.length for entry in batch)
        speed = n_tokens / seconds * self.device.n_lanes / n_lanes
        before = self._tokens_per_s
        self._tokens_per_s = speed if before is None else 0.8 * before + 0.2 * speed
        self.on_batch(
            BatchReport(
                n_items=len(batch),
                n_tokens=n_tokens,
                n_padding=sum(self.padding(entry.item) for entry in batch),
                waited=started - min(entry.since for entry in batch),
                seconds=seconds,
            )
        )

    def _forget_finished(self) -> None:
        """Items of requests that failed or were given up need no pass."""
        for queue in (self._short, self._long):
            for request in queue.requests:
                if request.is_over:
                    self._count(request, -request.n_tokens)
            rest = [request for request in queue.requests if not request.is_over]
            queue.requests.clear()
            queue.requests.extend(rest)

    def _seconds_for(self, n_tokens: int) -> float:
        """How long so many tokens will take, by what was seen."""
        return n_tokens / self._tokens_per_s if self._tokens_per_s else 1.0
