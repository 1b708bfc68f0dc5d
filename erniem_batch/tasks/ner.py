"""Named entities: a label for each token becomes spans of the text.

Source of the aggregation strategies: transformers 4.40.2 TokenClassificationPipeline.
Differences, all deliberate:
PARITY: tokens of white space only (a lone "▁") have no label; there, they get one.
PARITY: an unknown token shows as [UNK] with strategy `none`, as with ErnieM's own tokenizer; fast
tokenizers show the text. Letters keep their combining marks.
PARITY: `word` is the text itself, so text[start:end] == word; there, tokens are joined, which
loses the spaces before digits. Strategy `none` shows the token, as there.
PARITY: any white space separates words, not only U+0020; and in scripts written without spaces
every token is a word of its own, where there a whole sentence would be one.
PARITY: BIOES and BILOU labels are understood; there, "E-PER" is another kind than "B-PER".
PARITY: overlapping windows are joined before labels are grouped; there, groups of each window
compete, which can lose an entity or cut it in two.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import ConfigError
from erniem_batch.records import Encoded, Failure, FloatArray, Record
from erniem_batch.tasks.base import Task, encoded_of, require_finite, softmax, struct_lists
from erniem_batch.text.offsets import Offsets
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import stitch
from erniem_batch.thresholds import Thresholds

OUTSIDE = "O"

# Han, kana, Thai, Lao, Khmer, Myanmar: written without spaces between words.
_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3038-\u303b\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{_UNSPACED_RANGES}]")
# Characters that stand apart from their neighbours: white space, and those of such scripts.
APART = re.compile(rf"[\s{_UNSPACED_RANGES}]")


@dataclass(frozen=True, slots=True)
class Entity:
    """A named entity; `text[start:end]` is its text.

    Attributes:
        start, end: in code points, unless another unit was asked for.
        word: the text, or the token itself with aggregation strategy `none`.
        index: place of the token in its text, counted from 1; strategy `none` only.
    """

    start: int
    end: int
    label: str
    word: str
    score: float
    index: int | None = None


ENTITY = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("score", pa.float32()),
    ]
)


class LabelScheme:
    """Reads label names: which kind, and whether one opens or closes an entity.

    Understands BIO, IOB1, BIOES, BILOU and plain names, told apart by the prefixes in use.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        prefixes = {label[0] for label in labels if re.match(r"[A-Z]-", label)}
        opening, closing = "B", ""
        if prefixes & {"B", "I"}:  # else "S-Bahn" is a plain name
            opening += "".join(prefixes & {"S", "U"})
            closing = "".join(prefixes & {"E", "L", "S", "U"})
        read = re.compile(rf"([BI{opening}{closing}])-(.+)", re.DOTALL)
        matches = [read.fullmatch(label) for label in labels]
        self.labels = list(labels)
        self.kinds = [m.group(2) if m else name for m, name in zip(matches, labels, strict=True)]
        self.opens = [bool(m and m.group(1) in opening) for m in matches]
        self.closes = [bool(m and m.group(1) in closing) for m in matches]

    def group(self, label_ids: Sequence[int]) -> list[tuple[int, int, str]]:
        """Runs of items that belong together: (first, past the last, kind), outside ones left out.

        Neighbours of the same kind belong together unless the second opens or the first closes an
        entity. PARITY: an I- without its B- opens one.
        """
        groups: list[tuple[int, int, str]] = []
        previous = OUTSIDE
        for i, label_id in enumerate(label_ids):
            kind = self.kinds[label_id]
            if kind != OUTSIDE:
                if kind == previous and not self.opens[label_id]:
                    groups[-1] = (groups[-1][0], i + 1, kind)
                else:
                    groups.append((i, i + 1, kind))
            previous = "" if self.closes[label_id] else kind
        return groups


class NerTask(Task):
    """Token classification with windows for long texts.

    Args:
        labels: names by index, as in the model's config.
        aggregation_strategy: none, simple, first, average or max.
        min_score: entities that score lower are left out.
        offset_unit: of start and end.
    """

    head: ClassVar[str] = "ErnieMForTokenClassification"
    schema = pa.schema([("entities", pa.list_(ENTITY))])

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        labels: Sequence[str],
        *,
        aggregation_strategy: str = "simple",
        min_score: Thresholds | float = 0.0,
        offset_unit: str = "codepoint",
        window_tokens: int = 512,
        overlap_tokens: int = 128,
    ) -> None:
        if OUTSIDE not in labels:
            raise ConfigError(
                f"the model has no {OUTSIDE!r} label, so every token would be an entity; its "
                f"labels are {', '.join(labels[:8])}: is it fine-tuned for named entities?"
            )
        super().__init__(tokenizer, window_tokens=window_tokens, overlap_tokens=overlap_tokens)
        self._scheme = LabelScheme(labels)
        self._strategy = aggregation_strategy
        self._min_score = min_score if isinstance(min_score, Thresholds) else Thresholds(min_score)
        self._unit = offset_unit

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Tokens and windows of each record."""

        def read(_: int, record: Record, tokens: Tokens) -> Encoded:
            if not len(tokens.ids):
                return encoded_of(record, tokens, [])
            record.work.charge(*self.windows.count_single(len(tokens.ids)))
            return encoded_of(record, tokens, self.windows.single(tokens.ids))

        return self.encode_texts(records, read)

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[Entity]:
        """Entities in text order."""
        if not outputs:
            return []
        parts = [
            output[window.offset : window.offset + window.n_tokens]
            for window, output in zip(encoded.windows, outputs, strict=True)
        ]
        logits = stitch(parts, [window.first for window in encoded.windows])
        require_finite(logits)
        probs = softmax(logits)
        text: str = encoded.record.text
        starts, ends = encoded.starts, encoded.ends
        if (
            self._strategy in ("none", "simple")
            and not probs.argmax(1).any()
            and self._scheme.kinds[0] == OUTSIDE
        ):
            return []  # most sentences: nothing but "O"
        index = np.flatnonzero(~self.is_blank(encoded))
        if not len(index):
            return []
        probs, starts, ends = probs[index], starts[index], ends[index]
        unknown = encoded.token_ids[index] == self.tokenizer.unk_token_id
        if self._strategy == "none":
            return self._tokens(encoded, index, probs)
        if self._strategy != "simple":
            opens = word_starts(text, starts, unknown)
            firsts = np.flatnonzero(opens)
            starts, ends = starts[firsts], ends[np.append(firsts[1:], len(ends)) - 1]
            probs = merge_words(probs, firsts, self._strategy)
        label_ids = probs.argmax(1)
        scores = probs[np.arange(len(probs)), label_ids]
        entities = []
        place, language = Offsets(text, self._unit), encoded.record.language
        for first, end, kind in self._scheme.group(label_ids.tolist()):
            a, b = int(starts[first]), int(ends[end - 1])
            score = float(scores[first:end].mean())
            if score >= self._min_score(kind, language):
                entities.append(Entity(place(a), place(b), kind, text[a:b], score))
        return entities

    def _tokens(self, encoded: Encoded, index: np.ndarray, probs: FloatArray) -> list[Entity]:
        """Strategy `none`: one entity a token, with its label in full."""
        entities = []
        place, language = Offsets(encoded.record.text, self._unit), encoded.record.language
        for i, row in zip(index.tolist(), probs, strict=True):
            label_id = int(row.argmax())
            label, score = self._scheme.labels[label_id], float(row[label_id])
            kind = self._scheme.kinds[label_id]
            if label != OUTSIDE and score >= self._min_score(kind, language):
                word = self.tokenizer.convert_ids_to_tokens(int(encoded.token_ids[i]))
                a, b = place(int(encoded.starts[i])), place(int(encoded.ends[i]))
                entities.append(Entity(a, b, label, str(word), score, index=i + 1))
        return entities

    def scored_labels(self, value: Sequence[Entity]) -> list[tuple[str, float]]:
        """Label and score of each entity."""
        return [(entity.label, entity.score) for entity in value]

    def columns(self, values: Sequence[Sequence[Entity]]) -> list[pa.Array]:
        """`entities`."""
        return [struct_lists(ENTITY, values, ("start", "end", "label", "word", "score"))]


def word_starts(text: str, starts: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Which tokens begin a word.

    A token goes on with the word before it unless white space stands between, or it is unknown,
    or one of the two is of a script written without spaces.
    """
    opens = np.ones(len(starts), dtype=bool)
    for i, start in enumerate(starts.tolist()):
        if i == 0 or unknown[i]:
            continue
        before, char = text[start - 1], text[start]
        apart = before.isspace() or char.isspace()
        opens[i] = apart or is_unspaced(_base(before)) or is_unspaced(char)
    return opens


def is_unspaced(char: str) -> bool:
    """Whether a character is of a script written without spaces between words."""
    return _UNSPACED.match(char) is not None


def _base(char: str) -> str:
    """Full-width and compatibility forms by what they stand for."""
    return unicodedata.normalize("NFKC", char)[-1:]


def merge_words(probs: FloatArray, firsts: np.ndarray, strategy: str) -> FloatArray:
    """Probabilities of words from those of their tokens.

    Args:
        probs: (tokens, labels).
        firsts: first token of each word.
        strategy: first; average; max: those of the token with the highest single one.
    """
    if strategy == "first":
        first_rows: FloatArray = probs[firsts]
        return first_rows
    if strategy == "average":
        counts = np.diff(np.append(firsts, len(probs)))
        sums: FloatArray = np.add.reduceat(probs, firsts, axis=0)
        means: FloatArray = np.divide(sums, counts[:, None], dtype=np.float32)
        return means
    best = probs.max(axis=1)
    groups = np.split(best, firsts[1:])
    chosen = [int(first) + int(g.argmax()) for first, g in zip(firsts, groups, strict=True)]
    rows: FloatArray = probs[chosen]
    return rows
