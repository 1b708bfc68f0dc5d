from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.batching import plan_batches

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


def test_nothing_makes_no_batch():
    assert plan_batches([], 100) == []


def test_equal_lengths_keep_their_order():
    assert plan_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
