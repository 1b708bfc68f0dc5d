import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.isolation import run_isolated

GUILTY = "guilty"


class Passes:
    """Squares numbers; a pass with one of the poison numbers fails, as do passes told to."""

    def __init__(self, poison=(), fails_at=()):
        self.poison = set(poison)
        self.fails_at = set(fails_at)
        self.sizes = []

    def __call__(self, items):
        self.sizes.append(len(items))
        if self.poison.intersection(items) or len(self.sizes) - 1 in self.fails_at:
            raise RuntimeError(f"{len(items)} items")
        return [item * item for item in items]


def _most_extra_passes(n_items, n_poison):
    return n_poison * (math.ceil(math.log2(n_items)) + 1)


def _check(n_items, poison):
    run = Passes(poison)
    results = run_isolated(range(n_items), run, lambda error: GUILTY)
    assert results == [GUILTY if i in poison else i * i for i in range(n_items)]
    assert len(run.sizes) - 1 <= _most_extra_passes(n_items, len(poison))
    assert all(size < n_items for size in run.sizes[1:]) or n_items == 1
    return run


@pytest.mark.parametrize("n_items", range(1, 65))
def test_one_guilty_item_at_any_place_is_found_in_few_passes(n_items):
    for place in range(n_items):
        _check(n_items, {place})


def test_any_guilty_items_of_a_small_batch():
    for n_items in range(1, 11):
        for bits in range(1, 2**n_items):
            _check(n_items, {i for i in range(n_items) if bits >> i & 1})


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_any_guilty_items_of_any_batch(case):
    _check(*case)


def test_nothing_extra_when_all_is_well():
    run = Passes()
    assert run_isolated(range(5), run, lambda error: GUILTY) == [0, 1, 4, 9, 16]
    assert run.sizes == [5]
    assert run_isolated([], run, lambda error: GUILTY) == []
    assert run.sizes == [5]


@pytest.mark.parametrize("n_items", [1, 2, 7, 64])
def test_an_error_that_does_not_come_again_accuses_nobody(n_items):
    run = Passes(fails_at={0})
    results = run_isolated(range(n_items), run, lambda error: GUILTY)
    assert results == [i * i for i in range(n_items)]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 60), max_size=20), st.data())
def test_who_is_accused_was_in_two_failing_passes(n_items, fails_at, data):
    """Errors that come and go at any pass, poison besides: each item gets one result."""
    poison = data.draw(st.sets(st.integers(0, n_items - 1), max_size=4))
    run, failed = Passes(poison, fails_at), []

    def recorded(items):
        try:
            return run(items)
        except RuntimeError:
            failed.append(set(items))
            raise

    results = run_isolated(range(n_items), recorded, lambda error: GUILTY)
    for item, result in enumerate(results):
        if result == GUILTY:
            assert sum(item in items for items in failed) >= 2
        else:
            assert item not in poison
            assert result == item * item


def test_the_error_of_the_last_pass_tells_why():
    for place, reason in ((0, "1 items"), (3, "4 items"), (4, "1 items"), (7, "1 items")):
        assert run_isolated(range(8), Passes({place}), str)[place] == reason


def test_other_errors_go_up():
    def run(items):
        raise TypeError("not the fault of an item")

    with pytest.raises(TypeError, match="not the fault"):
        run_isolated(range(4), run, str)


def test_a_pass_must_give_a_result_for_each_item():
    with pytest.raises(ValueError, match="zip"):
        run_isolated(range(4), lambda items: items[1:], str)
