"""Named entities: a label for each token becomes spans of the text.

Source of the aggregation strategies: transformers 4.40.2 TokenClassificationPipeline.
Differences, all deliberate:
PARITY: tokens of white space only (a lone "▁") have no label; there, they get one.
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
from collections.abc import Sequence

import numpy as np

from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.records import Encoded, Entity, Failure, FloatArray, Record, Window
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import stitch, window_starts

OUTSIDE = "O"

# Han, kana, Thai, Lao, Khmer, Myanmar: written without spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3038-\u303b\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
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


class NerTask:
    """Token classification with windows for long texts.

    Args:
        labels: names by index, as in the model's config.
        aggregation_strategy: none, simple, first, average or max.
        min_score: entities that score lower are left out.
    """

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        labels: Sequence[str],
        *,
        aggregation_strategy: str = "simple",
        min_score: float = 0.0,
        window_tokens: int = 512,
        overlap_tokens: int = 128,
    ) -> None:
        if OUTSIDE not in labels:
            raise ConfigError(
                f"the model has no {OUTSIDE!r} label, so every token would be an entity; its "
                f"labels are {', '.join(labels[:8])}: is it fine-tuned for named entities?"
            )
        self._tokenizer = tokenizer
        self._scheme = LabelScheme(labels)
        self._strategy = aggregation_strategy
        self._min_score = min_score
        self._size = window_tokens - tokenizer.num_special_tokens_to_add()
        self._overlap = overlap_tokens

    def encode(self, records: Sequence[Record]) -> list[Encoded | Failure]:
        """Tokens and windows of each record."""
        readable = [record for record in records if isinstance(record.text, str)]
        tokens = self._tokenizer.encode_batch([record.text for record in readable])
        splits = tokens.splits.tolist()
        outcomes: list[Encoded | Failure] = []
        at = 0
        for record in records:
            if not isinstance(record.text, str):
                came = "null" if record.text is None else type(record.text).__name__
                outcomes.append(
                    Failure(
                        record.id, "encode", "RecordError", f"text must be a string, got {came}"
                    )
                )
                continue
            part = slice(splits[at], splits[at + 1])
            at += 1
            ids, starts, ends = tokens.ids[part], tokens.starts[part], tokens.ends[part]
            outcomes.append(Encoded(record, ids, starts, ends, self._windows(ids)))
        return outcomes

    def _windows(self, ids: np.ndarray) -> list[Window]:
        cls, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        windows = []
        for first in window_starts(len(ids), self._size, self._overlap):
            body = ids[first : first + self._size]
            windows.append(Window(np.concatenate([[cls], body, [sep]]), first, len(body), offset=1))
        return windows

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[Entity]:
        """Entities in text order."""
        if not outputs:
            return []
        parts = [
            output[window.offset : window.offset + window.n_tokens]
            for window, output in zip(encoded.windows, outputs, strict=True)
        ]
        logits = stitch(parts, [window.first for window in encoded.windows])
        if not np.isfinite(logits).all():
            raise RecordError("the model gave scores that are not numbers: try --dtype float32")
        probs = softmax(logits)
        text: str = encoded.record.text
        starts, ends = encoded.starts, encoded.ends
        if (
            self._strategy in ("none", "simple")
            and not probs.argmax(1).any()
            and self._scheme.kinds[0] == OUTSIDE
        ):
            return []  # most sentences: nothing but "O"
        visible = np.array([not text[a:b].isspace() for a, b in zip(starts, ends, strict=True)])
        index = np.flatnonzero(visible)
        if not len(index):
            return []
        probs, starts, ends = probs[index], starts[index], ends[index]
        unknown = encoded.token_ids[index] == self._tokenizer.unk_token_id
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
        for first, end, kind in self._scheme.group(label_ids.tolist()):
            a, b = int(starts[first]), int(ends[end - 1])
            score = float(scores[first:end].mean())
            if score >= self._min_score:
                entities.append(Entity(a, b, kind, text[a:b], score))
        return entities

    def _tokens(self, encoded: Encoded, index: np.ndarray, probs: FloatArray) -> list[Entity]:
        """Strategy `none`: one entity a token, with its label in full."""
        entities = []
        for i, row in zip(index.tolist(), probs, strict=True):
            label_id = int(row.argmax())
            label, score = self._scheme.labels[label_id], float(row[label_id])
            if label != OUTSIDE and score >= self._min_score:
                word = self._tokenizer.convert_ids_to_tokens(int(encoded.token_ids[i]))
                a, b = int(encoded.starts[i]), int(encoded.ends[i])
                entities.append(Entity(a, b, label, str(word), score, index=i + 1))
        return entities


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities over the last axis, float32."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return probs


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
        opens[i] = apart or bool(_UNSPACED.match(_base(before)) or _UNSPACED.match(char))
    return opens


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
