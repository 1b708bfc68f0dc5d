"""Threads of forward passes: how many of torch each gets."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import save_tiny_ner_model

from erniem_batch import ErnieMTokenizer
from erniem_batch.config import PredictorConfig
from erniem_batch.lanes import Lanes, lanes_of
from erniem_batch.options import options_of
from erniem_batch.predictor import Predictor
from erniem_batch.records import Record

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_tokenizer"


@pytest.fixture
def threads_stay():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_threads", "n_lanes", "expected"),
    [(1, 4, {1: 1}), (2, 4, {1: 1, 2: 2}), (8, 4, {1: 2, 3: 6, 4: 8}), (3, 2, {1: 1, 2: 3})],
)
def test_width_decides(threads_stay, n_threads, n_lanes, expected):
    lanes = Lanes(n_threads, n_lanes)
    got = {width: lanes.submit(width, torch.get_num_threads).result() for width in expected}
    lanes.close()
    assert got == expected


def test_lanes_run_side_by_side():
    lanes = Lanes(2, 2)
    both = threading.Barrier(2, timeout=10)
    passes = [lanes.submit(1, both.wait) for _ in range(2)]
    assert sorted(each.result() for each in passes) == [0, 1]
    lanes.close()


def test_one_lane_where_torch_decides():
    assert Lanes(None, 4).n_lanes == 1


def test_as_many_lanes_as_are_worth_it():
    assert lanes_of(2, "cpu").n_lanes == 2
    assert lanes_of(16, "cpu").n_lanes == 4
    assert lanes_of(None, "cpu").n_lanes == min(4, torch.get_num_threads())
    assert lanes_of(8, "cuda").n_lanes == 1


# ---- interruptions ------------------------------------------------------------------------------


def test_a_short_pass_runs_between_two_steps_of_a_long_one():
    lanes = Lanes(1, 1)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def long() -> str:
        begun.set()
        assert go_on.wait(10)
        for number in range(3):
            order.append(number)
            lanes.between_steps()
        return "long"

    def short(name: str) -> str:
        order.append(name)
        lanes.between_steps()  # is not interrupted itself
        return name

    running = lanes.submit_interruptible(1, long)
    assert begun.wait(10)
    behind = lanes.submit(1, short, "behind")
    first, second = lanes.interrupt(short, "first"), lanes.interrupt(short, "second")
    go_on.set()
    assert [each.result(10) for each in (running, first, second, behind)] == [
        "long", "first", "second", "behind",
    ]  # fmt: skip
    assert order == [0, "first", 1, "second", 2, "behind"]
    lanes.close()


def test_what_interrupts_runs_even_if_nothing_can_be_interrupted():
    lanes = Lanes(2, 2)
    assert lanes.interrupt(threading.get_ident).result(10) != threading.get_ident()
    begun, go_on = threading.Event(), threading.Event()

    def without_steps() -> None:
        begun.set()
        assert go_on.wait(10)

    running = lanes.submit_interruptible(1, without_steps)
    assert begun.wait(10)
    late = [lanes.interrupt(int, str(i)) for i in range(3)]
    assert not any(each.done() for each in late)
    go_on.set()
    assert [each.result(10) for each in late] == [0, 1, 2]
    assert running.result(10) is None
    lanes.close()


def test_an_interruptible_pass_that_was_cancelled_holds_nobody_up():
    lanes = Lanes(1, 1)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(10)

    running = lanes.submit(1, wait)
    assert begun.wait(10)
    never = lanes.submit_interruptible(1, int, "1")
    waiting = lanes.interrupt(int, "2")
    assert never.cancel()
    go_on.set()
    assert waiting.result(10) == 2
    assert lanes.interrupt(int, "3").result(10) == 3
    running.result(10)
    lanes.close()


def test_nothing_gets_lost_among_many(threads_stay):
    """Short and long passes of many threads, some cancelled: all end, and nothing is left."""
    lanes = Lanes(2, 2)

    def long(n: int) -> int:
        for _ in range(n):
            lanes.between_steps()
        return n

    def caller(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            kind = draw.randrange(4)
            if kind == 0:
                future = lanes.submit_interruptible(draw.choice([1, 2]), long, 20)
                if draw.random() < 0.3 and future.cancel():
                    continue
                assert future.result(10) == 20
            elif kind == 1:
                assert lanes.submit(draw.choice([1, 2]), int, "5").result(10) == 5
            else:
                assert lanes.interrupt(int, "6").result(10) == 6

    with ThreadPoolExecutor(8) as callers:
        for done in [callers.submit(caller, seed) for seed in range(8)]:
            done.result(60)
    assert lanes._n_interruptible == 0
    assert not lanes._interrupting
    lanes.close()


def test_an_error_of_what_interrupts_is_its_own():
    lanes = Lanes(1, 1)
    begun, go_on = threading.Event(), threading.Event()

    def long() -> str:
        begun.set()
        assert go_on.wait(10)
        lanes.between_steps()
        lanes.between_steps()
        return "long"

    running = lanes.submit_interruptible(1, long)
    assert begun.wait(10)
    bad, good = lanes.interrupt(int, "x"), lanes.interrupt(int, "1")
    cancelled = lanes.interrupt(int, "2")
    assert cancelled.cancel()
    go_on.set()
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result(10)
    assert good.result(10) == 1
    assert running.result(10) == "long"
    lanes.close()


def test_interrupted_passes_give_the_same_rows(tmp_path):
    """A short pass interrupts a long one before each of its steps in turn."""
    tokenizer = ErnieMTokenizer.from_pretrained(TOKENIZER)
    lanes = Lanes(1, 1)
    save_tiny_ner_model(tmp_path, tokenizer)
    sizes = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 64}
    config = PredictorConfig(model=str(tmp_path), options=options_of("ner", {}), **sizes)
    predictor = Predictor.load(config, lanes)
    texts = ["Ada Lovelace lived in London. " * 8, "Berlin"]
    long, short = (
        [w for w in item.windows]
        for item in predictor.encode([Record(str(i), text) for i, text in enumerate(texts)])
    )
    expected = predictor.forward(long), predictor.forward(short)
    n_steps = 0
    original = lanes.between_steps

    def count() -> None:
        nonlocal n_steps
        n_steps += 1
        original()

    lanes.between_steps = count
    predictor.forward(long)
    assert n_steps >= 4
    for at in range(1, n_steps + 1):
        passed = 0
        interrupting = []

        def interrupt(at: int = at, interrupting: list = interrupting) -> None:
            nonlocal passed
            passed += 1
            if passed == at:
                interrupting.append(predictor.begin_forward(short, 0))
            original()

        lanes.between_steps = interrupt
        running = predictor.begin_forward(long, 1, interruptible=True)
        found = running.result(10), interrupting[0].result(10)
        for rows, others in zip(found, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(rows, others, strict=True))
    predictor.close()
