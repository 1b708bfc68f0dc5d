"""Long token sequences cut into overlapping windows, and scores of windows put together again.

A B C D E F G H I      size=5, overlap=2
<------->              D E are seen twice: D's scores come from the first window, E's from the
      <------->        second, where each has more text around it.

One policy for all tasks: nothing is cut off. Of two texts that share a window, a question, prompt
or label stays whole in every window, and the other one is read piece by piece.
"""

from collections.abc import Sequence

import numpy as np

from erniem_batch.errors import RecordError
from erniem_batch.records import FloatArray, IntArray, Window

# With less room than this for the text beside a long prompt, windows would see next to nothing.
MIN_ROOM = 16
PAIR_SPECIALS = 4
SINGLE_SPECIALS = 2


def window_starts(
    n_tokens: int, size: int, overlap: int, *, last_is_full: bool = True
) -> list[int]:
    """First token of each window; the last window ends with the last token.

    Args:
        last_is_full: the last window reaches back until it is full; else it keeps the step of the
            others, as those of Hugging Face's fast tokenizers do.

    Example:
        >>> window_starts(9, size=5, overlap=2), window_starts(10, 5, 2, last_is_full=False)
        ([0, 3, 4], [0, 3, 6])
    """
    if n_tokens <= size:
        return [0] if n_tokens else []
    starts = list(range(0, n_tokens - size, size - overlap))
    return [*starts, n_tokens - size if last_is_full else starts[-1] + size - overlap]


def stitch(parts: Sequence[FloatArray], starts: Sequence[int]) -> FloatArray:
    """One row a token from the rows of overlapping windows; the middle of an overlap divides them.

    Args:
        parts: for each window, (its tokens, columns).
        starts: as given by `window_starts`.
    """
    if len(parts) == 1:
        return parts[0]
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    middles = [(start + end) // 2 for start, end in zip(starts[1:], ends, strict=False)]
    lows, highs = [0, *middles], [*middles, ends[-1]]
    return np.concatenate(
        [p[a - s : b - s] for p, s, a, b in zip(parts, starts, lows, highs, strict=True)]
    )


class WindowMaker:
    """Puts special tokens around tokens and cuts what is too long.

    Args:
        cls, sep: ids of [CLS] and [SEP].
        size: tokens of a window, special ones included.
        overlap: tokens of a text that neighbouring windows share; beside a long prompt at most
            three quarters of the room that is left.
    """

    def __init__(self, cls: int, sep: int, size: int, overlap: int) -> None:
        self._cls, self._sep = np.array([cls]), np.array([sep])
        self._seps = np.array([sep, sep])
        self.size = size
        self._overlap = overlap

    def count(
        self, n_taken: int, lengths: Sequence[int], *, what: str, last_is_full: bool = True
    ) -> tuple[int, int]:
        """Tokens and windows that the methods below would make, without making them.

        Args:
            n_taken: tokens of the prompt and special tokens, in each window.
            lengths: tokens of each text that is read by itself.
            what: name of the prompt in errors.

        Raises:
            RecordError: the prompt leaves no room for the text.

        Example:
            >>> WindowMaker(0, 2, size=7, overlap=2).count(2, [9], what="the prefix")
            (21, 3)
        """
        room = self._room(n_taken, max(lengths, default=0), what)
        overlap = self._overlap_in(room)
        step = max(1, room - overlap)
        n_tokens = n_windows = 0
        for length in lengths:
            n_more = -(-max(0, length - room) // step)  # rounded up
            n_tokens += n_taken * (1 + n_more)
            if n_more and last_is_full:
                n_tokens += room * (1 + n_more)
            else:
                n_tokens += length + overlap * n_more
            n_windows += 1 + n_more
        return n_tokens, n_windows

    def single(
        self, ids: IntArray, prefix: IntArray | None = None, *, only_first: bool = False
    ) -> list[Window]:
        """[CLS] prefix ids [SEP]; a text without tokens gives one window without any.

        Args:
            only_first: windows behind the first one are left out.
        """
        prefix = ids[:0] if prefix is None else prefix
        room = self._room(len(prefix) + SINGLE_SPECIALS, len(ids), "the prefix")
        windows = []
        for first in self._starts(len(ids), room, only_first):
            body = ids[first : first + room]
            whole = np.concatenate([self._cls, prefix, body, self._sep])
            windows.append(Window(whole, first, len(body), offset=1 + len(prefix)))
        return windows

    def behind(
        self,
        prompt: IntArray,
        ids: IntArray,
        *,
        what: str,
        part: int = 0,
        slices: Sequence[tuple[int, int]] | None = None,
        last_is_full: bool = True,
        only_first: bool = False,
    ) -> list[Window]:
        """[CLS] prompt [SEP] [SEP] ids [SEP], the prompt whole in each.

        Args:
            what: name of the prompt in errors.
            part: which of the record's questions this is.
            slices: parts of `ids` that are read by themselves, (first, past the last).

        Raises:
            RecordError: the prompt leaves no room for the text.
        """
        longest = max((b - a for a, b in slices), default=0) if slices else len(ids)
        room = self._room(len(prompt) + PAIR_SPECIALS, longest, what)
        head = np.concatenate([self._cls, prompt, self._seps])
        windows = []
        for low, high in slices or [(0, len(ids))]:
            for first in self._starts(high - low, room, only_first, last_is_full):
                body = ids[low + first : min(low + first + room, high)]
                whole = np.concatenate([head, body, self._sep])
                windows.append(Window(whole, low + first, len(body), len(head), part))
        return windows

    def before(
        self,
        ids: IntArray,
        claim: IntArray,
        *,
        what: str,
        part: int = 0,
        only_first: bool = False,
    ) -> list[Window]:
        """[CLS] ids [SEP] [SEP] claim [SEP], the claim whole in each.

        Raises:
            RecordError: the claim leaves no room for the text.
        """
        room = self._room(len(claim) + PAIR_SPECIALS, len(ids), what)
        tail = np.concatenate([self._seps, claim, self._sep])
        windows = []
        for first in self._starts(len(ids), room, only_first):
            body = ids[first : first + room]
            whole = np.concatenate([self._cls, body, tail])
            windows.append(Window(whole, first, len(body), offset=1, part=part))
        return windows

    def pair(
        self, a: IntArray, b: IntArray, *, what: str, part: int = 0, only_first: bool = False
    ) -> list[Window]:
        """[CLS] a [SEP] [SEP] b [SEP]; of a pair that is too long, the longer one is cut."""
        if len(a) >= len(b):
            return self.before(a, b, what=what, part=part, only_first=only_first)
        return self.behind(a, b, what="the text", part=part, only_first=only_first)

    def count_single(self, n_tokens: int, n_prefix: int = 0) -> tuple[int, int]:
        """What `single` would make of so many tokens, see `count`."""
        return self.count(n_prefix + SINGLE_SPECIALS, [n_tokens], what="the prefix")

    def count_pair(self, n_a: int, n_b: int, *, what: str) -> tuple[int, int]:
        """What `pair` would make of texts with so many tokens, see `count`."""
        shorter, longer = sorted((n_a, n_b))
        name = what if n_a >= n_b else "the text"
        return self.count(shorter + PAIR_SPECIALS, [longer], what=name)

    def _room(self, n_taken: int, n_tokens: int, what: str) -> int:
        room = self.size - n_taken
        if room < n_tokens and room < MIN_ROOM and n_taken > 2:
            raise RecordError(
                f"{what} and special tokens take {n_taken} of {self.size} tokens of a window, "
                f"which leaves no room for {n_tokens} tokens of text: shorten it, or raise "
                f"--window-tokens"
            )
        return room

    def _starts(
        self, n_tokens: int, room: int, only_first: bool, last_is_full: bool = True
    ) -> list[int]:
        overlap = self._overlap_in(room)
        starts = window_starts(n_tokens, room, overlap, last_is_full=last_is_full) or [0]
        return starts[:1] if only_first else starts

    def _overlap_in(self, room: int) -> int:
        alone = room == self.size - 2
        return self._overlap if alone else min(self._overlap, 3 * room // 4)
