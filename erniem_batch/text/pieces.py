"""ErnieM's second splitting: what becomes of one SentencePiece piece.

SentencePiece cuts a text into pieces; ErnieM cuts some of them again, at Chinese characters,
punctuation and digit borders. What a piece becomes depends on the piece alone, so every distinct
piece is split once, and whole batches are then looked up in arrays.
Source: transformers 4.40.2 ErnieMTokenizer._tokenize.
"""

from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt

UNDERLINE = "▁"  # how SentencePiece writes a space
SPLIT_PUNCTUATION = frozenset(",;:.?!~，；：。？！《》【】")

# Unknown pieces are remembered like known ones; past this many the table starts anew.
MAX_REMEMBERED_PIECES = 1_000_000
# An unknown piece may be as long as its text, so characters are counted too.
MAX_REMEMBERED_CHARS = 16_000_000

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

    Attributes (one entry a piece, by the index that `indices` gives):
        n_chars: length of the piece.
        n_tokens: how many tokens it becomes.
        first: where its tokens begin in `ids`, `starts` and `ends`.
        is_underline: the piece is a lone "▁"; it has one token, which the caller may drop.
        opens_word: the piece begins with "▁".
    """

    def __init__(self, id_of: Callable[[str], int]) -> None:
        self._id_of = id_of
        self._clear()

    def _clear(self) -> None:
        self._index_of: dict[str, int] = {}
        self._n_chars_kept = 0
        self._index_of_id = np.zeros(0, dtype=np.int64)
        empty = np.zeros(0, dtype=np.int64)
        self.n_chars = self.n_tokens = self.first = empty
        self.is_underline = self.opens_word = np.zeros(0, dtype=bool)
        self.ids = self.starts = self.ends = empty

    def make_room(self) -> None:
        """Forgets all pieces once there are too many; indices given before mean nothing then."""
        n_pieces, n_chars = len(self._index_of), self._n_chars_kept
        if n_pieces > MAX_REMEMBERED_PIECES or n_chars > MAX_REMEMBERED_CHARS:
            self._clear()

    def indices_of_ids(self, ids: IntArray, piece_of: Callable[[list[int]], list[str]]) -> IntArray:
        """The index of each piece by its SentencePiece id.

        Args:
            piece_of: gives the pieces of ids that haven't been seen yet.
        """
        size = int(ids.max(initial=-1)) + 1
        if size > len(self._index_of_id):
            unseen = np.full(size - len(self._index_of_id), -1, dtype=np.int64)
            self._index_of_id = np.append(self._index_of_id, unseen)
        index: IntArray = self._index_of_id[ids]
        new = np.unique(ids[index < 0])
        if len(new):
            self._index_of_id[new] = self.indices(piece_of(new.tolist()))
            index = self._index_of_id[ids]
        return index

    def indices(self, pieces: Iterable[str]) -> IntArray:
        """The index of each piece; new ones are split and added first."""
        pieces = list(pieces)
        new = list(dict.fromkeys(p for p in pieces if p not in self._index_of))
        if new:
            self._add(new)
        return np.fromiter(map(self._index_of.__getitem__, pieces), np.int64, len(pieces))

    def _add(self, pieces: list[str]) -> None:
        known = len(self._index_of)
        self._n_chars_kept += sum(map(len, pieces))
        self._index_of.update((piece, known + i) for i, piece in enumerate(pieces))
        spans = [[(0, 1)] if piece == UNDERLINE else split_piece(piece) for piece in pieces]
        counts = np.array([len(s) for s in spans], dtype=np.int64)
        ids = [
            self._id_of(piece[start:end])
            for piece, piece_spans in zip(pieces, spans, strict=True)
            for start, end in piece_spans
        ]
        bounds = np.array(list(chain.from_iterable(spans)), dtype=np.int64).reshape(-1, 2)
        starts = bounds[:, 0].copy()
        # "▁" stands for the space before a token, which isn't part of it.
        leading = [
            end - start > 1 and piece[start] == UNDERLINE
            for piece, piece_spans in zip(pieces, spans, strict=True)
            for start, end in piece_spans
        ]
        starts += np.array(leading, dtype=np.int64)

        self.first = np.append(self.first, len(self.ids) + np.cumsum(counts) - counts)
        self.n_tokens = np.append(self.n_tokens, counts)
        self.n_chars = np.append(self.n_chars, [len(piece) for piece in pieces])
        self.is_underline = np.append(self.is_underline, [p == UNDERLINE for p in pieces])
        self.opens_word = np.append(self.opens_word, [p.startswith(UNDERLINE) for p in pieces])
        self.ids = np.append(self.ids, np.array(ids, dtype=np.int64))
        self.starts = np.append(self.starts, starts)
        self.ends = np.append(self.ends, bounds[:, 1])
