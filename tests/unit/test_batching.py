from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.batching import LEAST_TOKENS, plan_batches

LENGTHS = st.lists(st.integers(1, 600), max_size=60)


@given(LENGTHS, st.integers(1, 2000))
def test_every_window_is_in_one_batch_and_batches_fit_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(LENGTHS, st.integers(1, 2000))
def test_longest_comes_first(lengths, budget):
    longest = [lengths[batch[0]] for batch in plan_batches(lengths, budget)]
    assert longest == sorted(lengths, reverse=True)[:1] + longest[1:]
    assert longest == sorted(longest, reverse=True)


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 4))
def test_lanes_share_what_they_have_room_for(lengths, budget, n_lanes):
    batches = plan_batches(lengths, budget, n_lanes)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(
        size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
    )
    if n_lanes > 1 and len(batches) == n_lanes and batches != plan_batches(lengths, budget):
        assert max(sizes) - min(sizes) <= max(lengths), "as even as can be"


@given(st.lists(st.integers(1, 100), min_size=40, max_size=400), st.integers(2, 4))
def test_lanes_end_together(lengths, n_lanes):
    lanes = [0] * n_lanes
    for batch in plan_batches(lengths, 512, n_lanes):
        lanes[lanes.index(min(lanes))] += sum(lengths[i] for i in batch)
    assert max(lanes) - min(lanes) <= LEAST_TOKENS + max(lengths)


def test_a_little_is_not_dealt_out():
    assert plan_batches([60, 60], 1024, n_lanes=2) == [[0, 1]]
    assert plan_batches([128, 128], 1024, n_lanes=2) == [[0], [1]]
    assert plan_batches([200, 100, 90, 60], 1024, n_lanes=2) == [[0, 2], [1, 3]]


def test_nothing_makes_no_batch():
    assert plan_batches([], 100) == []


def test_equal_lengths_keep_their_order():
    assert plan_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
