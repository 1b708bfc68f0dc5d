import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.text.windows import stitch, window_starts


@st.composite
def _cuts(draw):
    size = draw(st.integers(1, 40))
    return draw(st.integers(0, 400)), size, draw(st.integers(0, size - 1))


@given(_cuts())
def test_windows_cover_every_token_and_overlap_enough(cut):
    n_tokens, size, overlap = cut
    starts = window_starts(n_tokens, size, overlap)
    ends = [min(start + size, n_tokens) for start in starts]
    assert starts == sorted(set(starts))
    assert {i for a, b in zip(starts, ends, strict=True) for i in range(a, b)} == set(
        range(n_tokens)
    )
    assert all(end - start >= overlap for start, end in zip(starts[1:], ends, strict=False))
    if n_tokens > size:
        assert ends[-1] == n_tokens
        assert all(end - start == size for start, end in zip(starts, ends, strict=True))


@given(_cuts())
def test_stitch_gives_each_token_its_row_from_the_window_where_it_has_most_context(cut):
    n_tokens, size, overlap = cut
    starts = window_starts(n_tokens, size, overlap)
    if not starts:
        return
    parts = []
    for window, start in enumerate(starts):
        tokens = np.arange(start, min(start + size, n_tokens))
        parts.append(np.stack([tokens, np.full_like(tokens, window)], axis=1).astype(np.float32))
    rows = stitch(parts, starts)
    assert rows[:, 0].tolist() == list(range(n_tokens))
    for token, window in rows.astype(int).tolist():

        def context(i: int, token: int = token) -> int:
            end = min(starts[i] + size, n_tokens)
            before = token - starts[i] if i > 0 else n_tokens
            after = end - 1 - token if i < len(starts) - 1 else n_tokens
            return min(before, after)

        seen_by = [i for i, s in enumerate(starts) if s <= token < s + size]
        # Where only two windows see a token, the better one gives its row, or one as good but for
        # the odd token in the middle. A last window pushed back may bring a third.
        if len(seen_by) <= 2:
            assert context(window) >= max(map(context, seen_by)) - 1


@pytest.mark.parametrize(("n_tokens", "expected"), [(0, []), (1, [0]), (5, [0]), (6, [0, 1])])
def test_short_texts(n_tokens, expected):
    assert window_starts(n_tokens, size=5, overlap=2) == expected
