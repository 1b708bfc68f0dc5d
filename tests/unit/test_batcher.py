"""The batcher of the online service, alone: no model, no Ray. Items are their own lengths."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.serve.batcher import (
    Batcher,
    BatchReport,
    ClosedError,
    Device,
    QueueFullError,
    Turn,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


class Engine:
    """Doubles numbers; notes batches, and lets a test hold it."""

    def __init__(self, n_lanes: int = 1) -> None:
        self.n_lanes = n_lanes
        self.batches: list[list[int]] = []
        self.widths: list[int] = []
        self.free = asyncio.Event()
        self.free.set()
        self.n_running = 0

    async def __call__(self, items: list[int], turn: Turn) -> list[int]:
        width = turn.n_lanes
        assert width >= 0
        self.n_running += width
        assert self.n_running <= self.n_lanes, "no more than fit"
        self.batches.append(items)
        self.widths.append(width)
        await ticks(3)  # who asks has time to wait for a turn
        await self.free.wait()
        self.n_running -= width
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


def batcher_of(engine: Engine, max_batch: int = 64, max_queue: int = 10_000, **more) -> Batcher:
    return Batcher(engine, int, max_batch_tokens=max_batch, max_queue_tokens=max_queue, **more)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=30))


async def ticks(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


@settings(deadline=None)
@given(
    st.lists(LENGTHS.map(lambda x: [i for i in x if i != 13]), min_size=1, max_size=12),
    st.integers(1, 4),
    st.booleans(),
)
def test_everybody_gets_their_own_answers(requests, n_lanes, interruptible):
    async def test() -> None:
        engine = Engine(n_lanes)
        device = Device(n_lanes, interruptible=interruptible)
        async with batcher_of(engine, max_queue=10**6, device=device, turn_tokens=100) as batcher:
            answers = await asyncio.gather(*(batcher.submit(items) for items in requests))
        assert device.n_free == n_lanes
        assert [a.results for a in answers] == [[2 * i for i in items] for items in requests]
        sent = sorted(item for batch in engine.batches for item in batch)
        assert sent == sorted(item for items in requests for item in items), "each once"
        assert all(sum(b) <= 64 for b in engine.batches if len(b) > 1)
        assert batcher.n_waiting_tokens == 0

    run(test)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60).filter(lambda x: x != 13), min_size=2, max_size=20), st.data())
def test_who_gives_up_harms_nobody(items, data):
    gone = data.draw(st.sets(st.integers(0, len(items) - 1)))

    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine) as batcher:
            engine.free.clear()
            first = asyncio.create_task(batcher.submit([7]))
            await ticks()
            tasks = [asyncio.create_task(batcher.submit([item])) for item in items]
            await ticks()
            for i in gone:
                tasks[i].cancel()
            await ticks()
            stay = [items[i] for i in range(len(items)) if i not in gone]
            assert batcher.n_waiting_tokens == sum(stay), "their work is dropped"
            engine.free.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert (await first).results == [14]
        for i, answer in enumerate(answers):
            if i in gone:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer.results == [2 * items[i]]
        assert sorted(x for b in engine.batches[1:] for x in b) == sorted(stay)

    run(test)


def test_the_odd_one_out_does_not_starve():
    """A long item among an endless stream of short ones is served next but one."""

    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch=20) as batcher:
            engine.free.clear()
            tasks = [asyncio.create_task(batcher.submit([2])) for _ in range(10)]
            await ticks()
            tasks.append(asyncio.create_task(batcher.submit([50])))
            tasks += [asyncio.create_task(batcher.submit([2])) for _ in range(200)]
            await ticks()
            engine.free.set()
            await asyncio.gather(*tasks)
        at = engine.batches.index([50])
        earlier = [x for batch in engine.batches[:at] for x in batch]
        assert len(earlier) <= 20, "no more than what was there before it, and one batch"

    run(test)


def test_an_error_stays_in_its_batch():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch=26) as batcher:
            answers = await asyncio.gather(
                batcher.submit([13, 40]),
                batcher.submit([13]),
                batcher.submit([40]),
                batcher.submit([5]),
                return_exceptions=True,
            )
            assert batcher.is_alive
            assert (await batcher.submit([6])).results == [12], "and the next is answered"
        assert [type(answer) for answer in answers[:2]] == [ValueError, ValueError]
        assert [a.results for a in answers[2:]] == [[80], [10]]
        forties = [batch for batch in engine.batches if 40 in batch]
        assert forties == [[40]], "what else a failed request wanted is not computed"

    run(test)


def test_results_that_do_not_add_up_are_an_error():
    async def forward(items: list[int], width: int) -> list[int]:
        return items[1:]

    async def test() -> None:
        async with Batcher(forward, int, max_batch_tokens=9, max_queue_tokens=9) as batcher:
            with pytest.raises(RuntimeError, match="1 results for a batch of 2"):
                await batcher.submit([1, 2])
            assert batcher.is_alive

    run(test)


def test_a_full_queue_refuses_and_recovers():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_queue=100) as batcher:
            engine.free.clear()
            running = asyncio.create_task(batcher.submit([60]))
            await ticks()
            huge = asyncio.create_task(batcher.submit([60, 60]))  # alone in the queue: taken
            await ticks()
            with pytest.raises(QueueFullError, match=r"again in 1\.0 s") as caught:
                await batcher.submit([1])
            assert caught.value.retry_after == 1.0, "nothing is known of the speed yet"
            engine.free.set()
            assert (await running).results == [120]
            assert (await huge).results == [120, 120]
            assert (await batcher.submit([1])).results == [2]
            engine.free.clear()
            tasks = [asyncio.create_task(batcher.submit([60]))]
            await ticks()
            tasks.append(asyncio.create_task(batcher.submit([60])))
            await ticks()
            with pytest.raises(QueueFullError) as caught:
                await batcher.submit([60])
            assert 0 < caught.value.retry_after < 1, "by the speed that was seen"
            engine.free.set()
            await asyncio.gather(*tasks)

    run(test)


def test_closing_answers_what_was_accepted():
    async def test() -> None:
        engine = Engine()
        batcher = batcher_of(engine)
        with pytest.raises(ClosedError):
            await batcher.submit([1])
        async with batcher:
            engine.free.clear()
            tasks = [asyncio.create_task(batcher.submit([60])) for _ in range(3)]
            await ticks()
            closing = asyncio.create_task(batcher.close())
            await ticks()
            with pytest.raises(ClosedError):
                await batcher.submit([1])
            engine.free.set()
            await closing
            assert [t.result().results for t in tasks] == [[120]] * 3
        assert not batcher.is_alive

    run(test)


def test_nothing_asked_nothing_computed():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine) as batcher:
            assert (await batcher.submit([])).results == []
        assert engine.batches == []

    run(test)


def test_passes_are_reported():
    reports: list[BatchReport] = []

    async def test() -> None:
        engine = Engine()
        async with batcher_of(
            engine, max_batch=30, on_batch=reports.append, padding=lambda item: 1
        ) as batcher:
            assert (await batcher.submit([10, 8, 9, 60])).results == [20, 16, 18, 120]

    run(test)
    seen = [(r.n_items, r.n_tokens, r.n_padding) for r in reports]
    assert seen == [(3, 27, 3), (1, 60, 1)]
    assert all(r.waited >= 0 and r.seconds > 0 for r in reports)


# ---- lanes --------------------------------------------------------------------------------------


def test_a_lonely_pass_gets_all_lanes():
    async def test() -> None:
        engine = Engine(4)
        async with batcher_of(engine, device=Device(4)) as batcher:
            await batcher.submit([5])
            await batcher.submit([5, 6])
        assert engine.widths == [4, 4]

    run(test)


def test_what_waits_is_shared_among_lanes():
    async def test() -> None:
        engine = Engine(2)
        async with batcher_of(engine, device=Device(2), lane_tokens=20) as batcher:
            engine.free.clear()
            first = asyncio.create_task(batcher.submit([9] * 6))
            await ticks()
            assert engine.batches == [[9] * 3, [9] * 3]
            assert engine.widths == [1, 1]
            engine.free.set()
            await first
            await batcher.submit([10, 10])
        assert engine.batches[2:] == [[10, 10]], "too little to share"

    run(test)


def test_batchers_take_turns_on_their_device():
    async def test() -> None:
        engine, device = Engine(2), Device(2)
        one = batcher_of(engine, max_batch=10, device=device)
        two = batcher_of(engine, max_batch=10, device=device)
        async with one, two:
            engine.free.clear()
            tasks = [asyncio.create_task(one.submit([10])) for _ in range(6)]
            tasks += [asyncio.create_task(two.submit([9])) for _ in range(6)]
            await ticks()
            assert engine.n_running == 2
            engine.free.set()
            await asyncio.gather(*tasks)
        assert device.n_free == 2
        kinds = [batch[0] for batch in engine.batches]
        assert 9 in kinds[:4], "none waits for all of the other"

    run(test)


def test_who_gives_up_its_turn_keeps_no_lane():
    async def test() -> None:
        device = Device(1)
        turn = await device.take()
        waiting = asyncio.create_task(device.take())
        await ticks()
        device.give(turn)
        waiting.cancel()  # its turn has come, and it does not know yet
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(device.take(), timeout=1)

    run(test)


# ---- turns --------------------------------------------------------------------------------------


def test_a_short_request_does_not_wait_for_all_of_a_long_one():
    """Of 60,000 tokens that wait, one turn goes before it, and not the whole."""

    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch=2048, max_queue=10**6) as batcher:
            engine.free.clear()
            long = asyncio.create_task(batcher.submit([500] * 120))
            await ticks()
            short = asyncio.create_task(batcher.submit([20]))
            await ticks()
            engine.free.set()
            assert (await short).results == [40]
            assert engine.batches[1] == [20] or engine.batches[2] == [20]
            assert not long.done()
            assert (await long).results == [1000] * 120

    run(test)


def test_batches_of_long_requests_are_small_while_short_ones_come():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch=2048, max_queue=10**6) as batcher:
            long = asyncio.create_task(batcher.submit([60] * 1000))
            await ticks()
            short = asyncio.create_task(batcher.submit([20]))
            for _ in range(5):
                await short
                short = asyncio.create_task(batcher.submit([20]))
            await asyncio.gather(long, short)
        sizes = [sum(batch) for batch in engine.batches]
        with_short = [i for i, batch in enumerate(engine.batches) if 20 in batch]
        assert len(with_short) == 6
        assert all(sizes[i] == 20 for i in with_short)
        assert all(sizes[i + 1] <= 128 for i in with_short[:-1])
        assert max(sizes) > 2000, "alone, they are full"
        assert all(b - a == 2 for a, b in pairwise(with_short)), "in turn"

    run(test)


def test_many_small_items_are_a_long_request_too():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_batch=100, max_queue=10**6, turn_tokens=50) as batcher:
            engine.free.clear()
            running = asyncio.create_task(batcher.submit([1]))
            await ticks()
            tasks = [asyncio.create_task(batcher.submit([10] * n)) for n in (100, 2, 100, 1)]
            await ticks()
            engine.free.set()
            await asyncio.gather(running, tasks[1], tasks[3])
            assert not tasks[0].done()
            assert not tasks[2].done()
            await asyncio.gather(*tasks)
        assert engine.batches[2] == [10] * 3, "short ones by themselves"
        assert engine.batches[1] == [10] * 10, "of both long ones, 50 each"

    run(test)


def test_a_long_request_that_fills_the_queue_refuses_no_short_one():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_queue=1000) as batcher:
            engine.free.clear()
            running = asyncio.create_task(batcher.submit([1]))
            await ticks()
            long = asyncio.create_task(batcher.submit([100] * 10))
            await ticks()
            with pytest.raises(QueueFullError):
                await batcher.submit([100] * 6)
            short = [asyncio.create_task(batcher.submit([100])) for _ in range(10)]
            await ticks()
            with pytest.raises(QueueFullError):
                await batcher.submit([1])
            engine.free.set()
            await asyncio.gather(running, long, *short)
        assert batcher.n_waiting_tokens == 0

    run(test)


def test_follow_ups_take_no_room_from_others_and_have_a_limit_of_their_own():
    async def test() -> None:
        engine = Engine()
        async with batcher_of(engine, max_queue=100) as batcher:
            engine.free.clear()
            running = asyncio.create_task(batcher.submit([60]))
            await ticks()
            bomb = asyncio.create_task(batcher.submit([50] * 7, is_follow_up=True))
            await ticks()
            assert batcher.n_waiting_tokens == 350
            new = asyncio.create_task(batcher.submit([50, 50]))  # as if nothing else waited
            await ticks()
            assert not new.done()
            with pytest.raises(QueueFullError):
                await batcher.submit([1])
            with pytest.raises(QueueFullError):
                await batcher.submit([51], is_follow_up=True)
            more = asyncio.create_task(batcher.submit([50], is_follow_up=True))
            await ticks()
            bomb.cancel()
            await ticks()
            assert batcher.n_waiting_tokens == 150, "what was given up leaves the queue"
            engine.free.set()
            assert (await new).results == [100, 100]
            assert (await more).results == [100]
            await running
        assert batcher.n_waiting_tokens == 0

    run(test)


# ---- interruptions ------------------------------------------------------------------------------


class InterruptibleEngine(Engine):
    """Long passes stand still until `free` is set; others end at once."""

    async def __call__(self, items: list[int], turn: Turn) -> list[int]:
        self.batches.append(items)
        self.widths.append(turn.n_lanes)
        await ticks(2)
        if turn.is_long:
            await self.free.wait()
        return [2 * item for item in items]


def test_short_passes_interrupt_a_long_one():
    async def test() -> None:
        engine, device = InterruptibleEngine(), Device(1, interruptible=True)
        long_task = batcher_of(engine, max_batch=512, device=device)
        short_task = batcher_of(engine, device=device)
        async with long_task, short_task:
            engine.free.clear()
            long = asyncio.create_task(long_task.submit([500] * 3))
            await ticks()
            for i in range(20):  # one after the other, of both tasks
                batcher = (long_task, short_task)[i % 2]
                answer = await asyncio.wait_for(batcher.submit([i + 20]), timeout=5)
                assert answer.results == [2 * (i + 20)]
            assert not long.done()
            assert engine.widths == [1] + [0] * 20
            engine.free.set()
            assert (await long).results == [1000] * 3
        assert device.n_free == 1

    run(test)


def test_one_pass_at_a_time_interrupts_another():
    """Requests that arrive meanwhile wait and share the next pass."""

    async def test() -> None:
        engine, device = InterruptibleEngine(), Device(1, interruptible=True)
        async with batcher_of(engine, max_batch=512, device=device) as batcher:
            engine.free.clear()
            long = asyncio.create_task(batcher.submit([500] * 2))
            await ticks()
            short = [asyncio.create_task(batcher.submit([i])) for i in range(1, 9)]
            await asyncio.gather(*short)
            assert engine.batches == [[500], [1], [2, 3, 4, 5, 6, 7, 8]] or engine.batches == [
                [500], list(range(1, 9)),
            ]  # fmt: skip
            engine.free.set()
            await long

    run(test)


def test_a_turn_that_was_given_up_interrupts_nobody():
    async def test() -> None:
        device = Device(1, interruptible=True)
        long = await device.take(is_long=True)
        interrupting = await device.take()
        assert interrupting == Turn(0, is_long=False)
        assert device.widen(interrupting) == interrupting
        waiting = asyncio.create_task(device.take())
        await ticks()
        assert not waiting.done()
        device.give(interrupting)
        waiting.cancel()  # its turn has come, and it does not know yet
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.wait_for(device.take(), timeout=1) == interrupting
        device.give(interrupting)
        device.give(long)
        assert await asyncio.wait_for(device.take(), timeout=1) == Turn(1, is_long=False)

    run(test)
