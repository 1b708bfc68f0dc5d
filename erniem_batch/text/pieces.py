"""ErnieM's second splitting: what becomes of one SentencePiece piece.

SentencePiece cuts a text into pieces; ErnieM cuts some of them again, at Chinese characters,
punctuation and digit borders. What a piece becomes depends on the piece alone, so every distinct
piece is split once, and whole batches are then looked up in arrays.
Source: transformers 4.40.2 ErnieMTokenizer._tokenize.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

UNDERLINE = "▁"  # how SentencePiece writes a space
SPLIT_PUNCTUATION = frozenset(",;:.?!~，；：。？！《》【】")

# Unknown pieces are remembered like known ones; past one of these limits a new table is begun.
MAX_REMEMBERED_PIECES = 1_000_000
MAX_REMEMBERED_CHARACTERS = 16_000_000
# New pieces are added so many at a time, so that no thread holds the lock for long.
ADDED_AT_ONCE = 256

IntArray = npt.NDArray[np.int64]


def split_piece(piece: str) -> list[tuple[int, int]]:
    """Where ErnieM cuts a piece: half-open character ranges, each one token.

    Example:
        >>> [piece[a:b] for piece in ["▁2月8日"] for a, b in split_piece(piece)]
        ['2', '月', '8', '日']
    """
    spans: list[tuple[int, int]] = []
    start = 0

    def flush(end: int) -> None:
        if end > start and piece[start:end] != UNDERLINE:
            spans.append((start, end))

    for i, char in enumerate(piece):
        if char == UNDERLINE:
            continue
        # PARITY: digits are compared with the character before, even one already given out.
        digit, after_digit = char.isdigit(), i > 0 and piece[i - 1].isdigit()
        if "\u4e00" <= char <= "\u9fff" or char in SPLIT_PUNCTUATION:
            flush(i)
            spans.append((i, i + 1))
            start = i + 1
        elif i > 0 and digit != after_digit:
            flush(i)
            start = i
    if len(piece) > start:
        spans.append((start, len(piece)))
    return spans


class PieceTable:
    """Token ids and ranges of every piece seen so far, as arrays to be indexed by whole batches.

    Threads may share a table. An index stays valid as long as the table exists.

    Attributes (one entry a piece, by the index that `indices` gives):
        n_chars: length of the piece.
        n_tokens: how many tokens it becomes.
        first: where its tokens begin in `ids`, `starts` and `ends`.
        is_underline: the piece is a lone "▁"; it has one token, which the caller may drop.
        opens_word: the piece begins with "▁".
    """

    def __init__(self, id_of: Callable[[str], int]) -> None:
        self._id_of = id_of
        self._lock = Lock()
        self._index_of: dict[str, int] = {}
        self._index_of_id = np.zeros(0, dtype=np.int64)
        self._n_tokens = self._n_characters = 0
        empty = np.zeros(0, dtype=np.int64)
        self.n_chars = self.n_tokens = self.first = empty
        self.is_underline = self.opens_word = np.zeros(0, dtype=bool)
        self.ids = self.starts = self.ends = empty

    @property
    def is_full(self) -> bool:
        """Whether a new table should be begun."""
        return (
            len(self._index_of) > MAX_REMEMBERED_PIECES
            or self._n_characters > MAX_REMEMBERED_CHARACTERS
        )

    def empty(self) -> "PieceTable":
        """A new table of the same tokenizer."""
        return PieceTable(self._id_of)

    def indices_of_ids(self, ids: IntArray, piece_of: Callable[[list[int]], list[str]]) -> IntArray:
        """The index of each piece by its SentencePiece id.

        Args:
            piece_of: gives the pieces of ids that haven't been seen yet.
        """
        size = int(ids.max(initial=-1)) + 1
        if size > len(self._index_of_id):
            with self._lock:
                self._index_of_id = _grown(self._index_of_id, size, filler=-1)
        index: IntArray = self._index_of_id[ids]
        new = np.unique(ids[index < 0])
        if len(new):
            indices = self.indices(piece_of(new.tolist()))
            with self._lock:
                self._index_of_id[new] = indices
                index = self._index_of_id[ids]
        return index

    def indices(self, pieces: Iterable[str]) -> IntArray:
        """The index of each piece; new ones are split and added first."""
        pieces = list(pieces)
        new = iter(list(dict.fromkeys(p for p in pieces if p not in self._index_of)))
        while some := list(islice(new, ADDED_AT_ONCE)):
            spans = [[(0, 1)] if piece == UNDERLINE else split_piece(piece) for piece in some]
            with self._lock:
                self._add(some, spans)
        return np.fromiter(map(self._index_of.__getitem__, pieces), np.int64, len(pieces))

    def _add(self, pieces: list[str], spans_of: list[list[tuple[int, int]]]) -> None:
        """Add pieces that no other thread has added meanwhile."""
        new = [item for item in zip(pieces, spans_of, strict=True) if item[0] not in self._index_of]
        counts = np.array([len(spans) for _, spans in new], dtype=np.int64)
        flat = [(piece, start, end) for piece, spans in new for start, end in spans]
        ids = [self._id_of(piece[start:end]) for piece, start, end in flat]
        # "▁" stands for the space before a token, which isn't part of it.
        starts = [start + (end - start > 1 and p[start] == UNDERLINE) for p, start, end in flat]
        at, known = self._n_tokens, len(self._index_of)
        self.ids = _with(self.ids, at, ids)
        self.starts = _with(self.starts, at, starts)
        self.ends = _with(self.ends, at, [end for _, _, end in flat])
        self.first = _with(self.first, known, at + np.cumsum(counts) - counts)
        self.n_tokens = _with(self.n_tokens, known, counts)
        self.n_chars = _with(self.n_chars, known, [len(piece) for piece, _ in new])
        underlines = [piece == UNDERLINE for piece, _ in new]
        self.is_underline = _with(self.is_underline, known, underlines)
        opening = [piece.startswith(UNDERLINE) for piece, _ in new]
        self.opens_word = _with(self.opens_word, known, opening)
        self._n_tokens += len(flat)
        self._n_characters += sum(len(piece) for piece, _ in new)
        # Last, because other threads read without the lock.
        self._index_of.update((piece, known + i) for i, (piece, _) in enumerate(new))


def _grown(array: Any, size: int, filler: int = 0) -> Any:
    """The array, or a copy with room for at least `size` entries. Copies are rare."""
    if size <= len(array):
        return array
    new = np.full(max(size, 2 * len(array), 1024), filler, dtype=array.dtype)
    new[: len(array)] = array
    return new


def _with(array: Any, at: int, values: Sequence[int] | Sequence[bool] | IntArray) -> Any:
    """The array, grown where necessary, with values written from a place on."""
    array = _grown(array, at + len(values))
    array[at : at + len(values)] = values
    return array
