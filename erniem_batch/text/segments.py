"""Plain text segments in, token ids with character offsets out, a whole batch at a time.

SentencePiece's C++ does the cutting and normalising; what is left is arithmetic on arrays:
pieces are looked up in a PieceTable, and since the pieces of a text, joined, are its normalised
form, a token's place in the normalised text follows from the lengths before it. The normaliser's
own alignment leads from there to the original. Nothing is ever searched for.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
import sentencepiece

from erniem_batch.text.pieces import UNDERLINE, IntArray, PieceTable, split_piece

_SURROGATES = re.compile("[\ud800-\udfff]")
# So many are given to SentencePiece one by one.
FEW_TEXTS = 16
# Texts are encoded in groups of about so many characters: SentencePiece's results become Python
# lists, and no other thread runs while a list is made.
GROUP_CHARACTERS = 65_536


class Tokens(NamedTuple):
    """Tokens of many texts, end to end.

    Attributes:
        ids: token ids.
        starts, ends: characters of the original texts, half-open, one pair a token.
        splits: (texts + 1,); the tokens of text i are [splits[i]:splits[i + 1]].
    """

    ids: IntArray
    starts: IntArray
    ends: IntArray
    splits: IntArray

    def of(self, i: int) -> "Tokens":
        """The tokens of text i alone."""
        a, b = self.splits[i], self.splits[i + 1]
        return Tokens(self.ids[a:b], self.starts[a:b], self.ends[a:b], np.array([0, b - a]))

    @classmethod
    def join(cls, parts: Sequence[Self], row_of_part: Sequence[int], n_rows: int) -> "Tokens":
        """Parts of one text each, in order, put together into rows."""
        lengths = np.zeros(n_rows, dtype=np.int64)
        for part, row in zip(parts, row_of_part, strict=True):
            lengths[row] += len(part.ids)
        flat = (
            np.concatenate([np.zeros(0, np.int64), *arrays])
            for arrays in (
                [p.ids for p in parts],
                [p.starts for p in parts],
                [p.ends for p in parts],
            )
        )
        ids, starts, ends = flat
        return Tokens(ids, starts, ends, _splits(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Tokens of several batches of texts as those of one batch."""
        ids, starts, ends = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return cls(ids, starts, ends, _splits(np.concatenate([np.diff(p.splits) for p in parts])))


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbouring texts with about GROUP_CHARACTERS together; at least one group."""
    first = n_characters = 0
    for i, text in enumerate(texts):
        if n_characters and n_characters + len(text) > GROUP_CHARACTERS:
            yield texts[first:i]
            first, n_characters = i, 0
        n_characters += len(text)
    yield texts[first:]


def has_surrogates(text: str) -> bool:
    """Whether there is a lone surrogate in the text."""
    try:
        text.encode()  # faster than a search, which would hold up other threads
    except UnicodeEncodeError:
        return True
    return False


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which no encoding can write, turned one for one into U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


class SegmentEncoder:
    """Tokens of plain text (no special tokens in it).

    Args:
        processor: the SentencePiece model.
        table: how its pieces become tokens.
        drop_underlines: PaddleNLP's rule: no lone "▁" token is ever kept.
        num_threads: SentencePiece's own threads; its default would take every core in every actor.
        sampling: `enable_sampling`, `nbest_size` and `alpha` of SentencePiece.
        literal: special tokens as they are written.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        table: PieceTable,
        *,
        drop_underlines: bool,
        num_threads: int,
        sampling: dict[str, Any],
        literal: re.Pattern[str],
    ) -> None:
        self._processor = processor
        self._table = table
        self._drop_underlines = drop_underlines
        self._literal = literal
        self._options = {"num_threads": num_threads, **sampling}
        self._is_sampling = bool(sampling.get("enable_sampling"))
        self._unknown_id = processor.unk_id()
        self._vanishes = lru_cache(maxsize=65536)(self._vanishes_uncached)

    def encode(self, texts: Sequence[str], lower: bool = False, offsets: bool = True) -> Tokens:
        """Tokens of each text; without `offsets`, starts and ends are all zero (and it is faster).

        Args:
            texts: without lone surrogates (see `replace_surrogates`).
            lower: lower-case first, character by character, as the reference does.
        """
        parts = []
        for group in _groups(texts):
            fed = [self._lower(text) for text in group] if lower else group
            parts.append(self._encode(group, fed, offsets))
        return parts[0] if len(parts) == 1 else Tokens.concatenate(parts)

    def _encode(self, texts: Sequence[str], fed: Sequence[str], offsets: bool) -> Tokens:
        table = self._roomy_table()
        index, piece_splits = self._pieces(list(fed), table)
        counts = table.n_tokens[index]
        counts[self._dropped(index, piece_splits, table)] = 0

        # One entry a token: which piece it comes from, and its place in the table.
        piece_of = np.repeat(np.arange(len(index)), counts)
        before = np.cumsum(counts) - counts
        entry = (table.first[index] - before)[piece_of] + np.arange(len(piece_of))
        ids = table.ids[entry]
        splits = np.append(0, np.cumsum(counts))[piece_splits]
        if not offsets:
            return Tokens(ids, zeros := np.zeros_like(ids), zeros, splits)

        row_of = np.repeat(np.arange(len(texts)), np.diff(splits))
        chars = table.n_chars[index]
        piece_start = np.cumsum(chars) - chars
        row_start = np.append(piece_start, chars.sum())[piece_splits[:-1]]
        in_row = piece_start[piece_of] - row_start[row_of]
        starts, ends = self._to_original(
            texts, fed, row_of, in_row + table.starts[entry], in_row + table.ends[entry]
        )
        return Tokens(ids, starts, ends, splits)

    def _roomy_table(self) -> PieceTable:
        """The table that all threads share; a new one once it is full.

        A thread that still uses the old one keeps it.
        """
        if self._table.is_full:
            self._table = self._table.empty()
        return self._table

    def _pieces(self, fed: list[str], table: PieceTable) -> tuple[IntArray, IntArray]:
        """Pieces of all texts by their index in the table, and where those of each text begin."""
        if self._is_sampling:  # two calls would draw two different cuts
            pieces = self._cut(fed, return_type=str)
            index = table.indices(chain.from_iterable(pieces))
            return index, _splits(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        rows = self._cut(fed)
        splits = _splits(np.fromiter(map(len, rows), np.int64, len(rows)))
        ids = np.fromiter(chain.from_iterable(rows), np.int64, int(splits[-1]))
        index = table.indices_of_ids(ids, self._processor.id_to_piece)
        # Unknown pieces share one id: their rows are cut once more, into strings.
        unknown = np.flatnonzero(ids == self._unknown_id)
        if len(unknown):
            row_of = np.searchsorted(splits, unknown, side="right") - 1
            rows_again = np.unique(row_of).tolist()
            pieces = self._cut([fed[row] for row in rows_again], return_type=str)
            of_row = dict(zip(rows_again, pieces, strict=True))
            places = zip(row_of.tolist(), (unknown - splits[row_of]).tolist(), strict=True)
            index[unknown] = table.indices([of_row[row][place] for row, place in places])
        return index, splits

    def _cut(self, texts: list[str], **form: Any) -> list[Any]:
        """What SentencePiece makes of each text.

        It starts a thread for every list, which takes as long as ten short texts, and on a busy
        machine waits for a core besides. So it gets few texts one by one.
        """
        if len(texts) <= FEW_TEXTS and self._options["num_threads"] == 1:
            return [self._processor.encode(text, **form, **self._options) for text in texts]
        rows: list[Any] = self._processor.encode(texts, **form, **self._options)
        return rows

    def tokens(self, text: str, lower: bool) -> list[str]:
        """Token strings of one text, unknown ones as they stand in the normalised text."""
        pieces = self._processor.encode(
            self._lower(text) if lower else text, return_type=str, **self._options
        )
        table = self._roomy_table()
        index = table.indices(pieces)
        dropped = self._dropped(index, np.array([0, len(index)]), table)
        return [
            piece[start:end]
            for piece, drop in zip(pieces, dropped, strict=True)
            if not drop
            for start, end in ([(0, 1)] if piece == UNDERLINE else split_piece(piece))
        ]

    def _dropped(self, index: IntArray, piece_splits: IntArray, table: PieceTable) -> Any:
        """Which pieces are a lone "▁" that makes no token."""
        lone = table.is_underline[index]
        if self._drop_underlines or not lone.any():
            return lone
        # PARITY: transformers keeps a lone "▁" unless it is first or a word follows. A last one,
        # where it raises, is dropped.
        first, last = np.zeros(len(index) + 1, dtype=bool), np.ones(len(index), dtype=bool)
        first[piece_splits] = True
        last[:-1] = table.opens_word[index][1:]
        last |= first[1:]
        return lone & (first[:-1] | last)

    def _to_original(
        self,
        texts: Sequence[str],
        fed: Sequence[str],
        row_of: IntArray,
        starts: IntArray,
        ends: IntArray,
    ) -> tuple[IntArray, IntArray]:
        """Places in the normalised text turned into places in the original text."""
        # Most texts are their own normal form but for the spaces: there, only the "▁" that is put
        # before every text shifts the places by one.
        plain = np.fromiter(
            (
                text is source and UNDERLINE + text.replace(" ", UNDERLINE) == normal
                for text, source, normal in zip(
                    texts, fed, self._processor.normalize(list(fed)), strict=True
                )
            ),
            bool,
            len(texts),
        )
        new_starts, new_ends = starts - 1, ends - 1
        aligned = [row for row in np.flatnonzero(~plain).tolist() if fed[row]]
        if not aligned:
            return new_starts, new_ends
        maps = [self._alignment(texts[row], fed[row]) for row in aligned]
        sizes = np.array([len(m) for m in maps])
        offset_of = np.fromiter(chain.from_iterable(maps), np.int64, int(sizes.sum()))
        map_start = np.zeros(len(texts), dtype=np.int64)
        map_start[aligned] = np.cumsum(sizes) - sizes
        todo = np.flatnonzero(~plain[row_of])
        base = map_start[row_of[todo]]
        # A character that became several ends where the next original character begins.
        changes = np.flatnonzero(offset_of[1:] > offset_of[:-1])
        first, last = base + starts[todo], base + ends[todo] - 1
        new_starts[todo] = offset_of[first]
        new_ends[todo] = offset_of[changes[np.searchsorted(changes, last)] + 1]
        # Characters that vanish count as part of the one before; a token does not end with them.
        longer = new_ends[todo] - offset_of[last] > 1
        for token in todo[longer]:
            text, start = texts[row_of[token]], int(new_starts[token])
            end = int(new_ends[token])
            while end - 1 > start and self._vanishes(text[end - 1]):
                end -= 1
            new_ends[token] = end
        return new_starts, new_ends

    def _alignment(self, text: str, fed: str) -> list[int]:
        """For each character of the normal form, and one past it, its place in the original."""
        offsets: list[int] = self._processor.normalize(fed, with_offsets=True)[1]
        if text is fed:
            return offsets
        origin = [i for i, low in enumerate(self._lower_characters(text)) for _ in low]
        origin.append(len(text))
        return [origin[offset] for offset in offsets]

    def _lower(self, text: str) -> str:
        lowered = "".join(self._lower_characters(text))
        return text if lowered == text else lowered

    def _lower_characters(self, text: str) -> list[str]:
        """What becomes of each character of a text that is lower-cased."""
        # PARITY: one character at a time, so a final sigma stays a common one; and special tokens
        # stay as they are even when they are to be read as plain text.
        lowered = [char.lower() for char in text]
        for match in self._literal.finditer(text):
            lowered[match.start() : match.end()] = match.group()
        return lowered

    def _vanishes_uncached(self, char: str) -> bool:
        """Whether the normaliser removes the character without a trace."""
        return bool(self._processor.normalize(f"a{char}a") == self._processor.normalize("aa"))


def _splits(lengths: IntArray) -> IntArray:
    return np.append(0, np.cumsum(lengths))
