"""Labels, or a number, for whole texts and pairs of texts; and zero-shot, by entailment.

Source: transformers 4.40.2 TextClassificationPipeline and ZeroShotClassificationPipeline.
Differences, all deliberate:
PARITY: texts longer than the model holds are read in windows whose scores are pooled; there, an
error or a silent cut.
PARITY: problem_type="regression" gives the model's outputs as they are; there, sigmoid or softmax.
PARITY: a model without an entailment label is refused; there, its last label is taken, with a
warning.
PARITY: candidate labels are stripped, and those that stand twice count once.
PARITY: exp is taken after subtracting the maximum; there, huge logits overflow to nan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import ConfigError
from erniem_batch.options import ClassifyOptions
from erniem_batch.records import Encoded, Failure, FloatArray, IntArray, Record, Window
from erniem_batch.tasks.base import (
    Task,
    charge_windows,
    encoded_of,
    pool_windows,
    require_finite,
    require_string,
    sigmoid,
    softmax,
    struct_lists,
    windows_by_part,
)
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import PAIR_SPECIALS
from erniem_batch.thresholds import Thresholds

# Of all claims of a request or run together.
MAX_CLAIM_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and how much the model believes in it (regression: the number itself)."""

    label: str
    score: float


LABEL_SCORE = pa.struct([("label", pa.string()), ("score", pa.float32())])


class _LabelTask(Task):
    """What both ways to label a text have in common: which labels are given, and their columns."""

    head: ClassVar[str] = "ErnieMForSequenceClassification"
    schema = pa.schema(
        [
            ("predicted_label", pa.string()),
            ("predicted_score", pa.float32()),
            ("label_scores", pa.list_(LABEL_SCORE)),
        ]
    )

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        options: ClassifyOptions,
        thresholds: Thresholds,
        labels: Sequence[str],
        **windows: int,
    ) -> None:
        super().__init__(tokenizer, **windows)
        self.labels = list(labels)
        self._top_k = len(self.labels) if options.all_scores else options.top_k
        self._pooling = options.pooling
        self._only_first = options.pooling == "first"
        self._first_only_of = self.windows.size if self._only_first else None
        self._thresholds = thresholds

    def _best(self, scores: FloatArray, record: Record) -> list[LabelScore]:
        """Labels by descending score, ties in the order of the labels."""
        language = record.language
        found = []
        for i in np.argsort(-scores, kind="stable")[: self._top_k].tolist():
            label, score = self.labels[i], float(scores[i])
            if score >= self._thresholds(label, language):
                found.append(LabelScore(label, score))
        return found

    def columns(self, values: Sequence[Sequence[LabelScore]]) -> list[pa.Array]:
        """`predicted_label`, `predicted_score` (null where none is left) and `label_scores`."""
        return [
            pa.array([value[0].label if value else None for value in values], pa.string()),
            pa.array([value[0].score if value else None for value in values], pa.float32()),
            struct_lists(LABEL_SCORE, values),
        ]

    def scored_labels(self, value: Sequence[LabelScore]) -> list[tuple[str, float]]:
        """The best label and its score."""
        return [(best.label, best.score) for best in value[:1]]


class ClassifyTask(_LabelTask):
    """Sequence classification and regression.

    The value of a record is a list of LabelScore, best first.

    Args:
        labels: names by index, as in the model's config.
        problem_type: of the model's config; None where it says nothing.
    """

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        options: ClassifyOptions,
        thresholds: Thresholds,
        labels: Sequence[str],
        problem_type: str | None,
        **windows: int,
    ) -> None:
        super().__init__(tokenizer, options, thresholds, labels, **windows)
        self.function = options.function_to_apply or default_function(problem_type, len(labels))
        if self.function == "none" and options.min_score is None:
            self._thresholds = Thresholds(None, default=-np.inf)  # numbers may be negative

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each text, or of each text and its pair."""
        pairs = self.tokens_of([record.fields.get("text_pair") for record in records])

        def read(i: int, record: Record, tokens: Tokens) -> Encoded:
            if "text_pair" not in record.fields:
                return self._alone(record, tokens)
            require_string(record.fields["text_pair"], "text_pair")
            return self._with_pair(record, tokens, pairs[i].ids)

        return self.encode_texts(records, read)

    def _alone(self, record: Record, tokens: Tokens) -> Encoded:
        counts = [self.windows.count_single(len(tokens.ids))]
        n_windows = charge_windows(record, counts, self._first_only_of)
        windows = self.windows.single(tokens.ids, only_first=self._only_first)
        return encoded_of(record, tokens, windows, truncated=len(windows) < n_windows)

    def _with_pair(self, record: Record, tokens: Tokens, pair_ids: IntArray) -> Encoded:
        what = "the second text"
        counts = [self.windows.count_pair(len(tokens.ids), len(pair_ids), what=what)]
        n_windows = charge_windows(record, counts, self._first_only_of)
        windows = self.windows.pair(tokens.ids, pair_ids, what=what, only_first=self._only_first)
        cut = len(windows) < n_windows
        return encoded_of(record, tokens, windows, n_other_tokens=len(pair_ids), truncated=cut)

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[LabelScore]:
        """Labels by descending score."""
        logits_WC = np.concatenate(outputs)
        require_finite(logits_WC)
        scores_WC = apply_function(logits_WC, self.function)
        scores = pool_windows(scores_WC, encoded.windows, self._pooling)
        return self._best(scores, encoded.record)


def default_function(problem_type: str | None, n_labels: int) -> str:
    """What turns logits into scores, chosen as Hugging Face does (and see PARITY above)."""
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or n_labels == 1:
        return "sigmoid"
    return "softmax"


def apply_function(logits: FloatArray, name: str) -> FloatArray:
    """softmax, sigmoid or none over the last axis."""
    if name == "none":
        return logits
    return softmax(logits) if name == "softmax" else sigmoid(logits)


def _require_short_claims(template: str, labels: Sequence[str]) -> None:
    """Raises a ConfigError if the claims that are about to be put together are too long."""
    n_places = template.count("{}")
    n_characters = sum(len(template) + n_places * len(label) for label in labels)
    if n_characters > MAX_CLAIM_CHARACTERS:
        raise ConfigError(
            f"candidate_labels beside hypothesis_template make {n_characters} characters; at most "
            f"{MAX_CLAIM_CHARACTERS}: give fewer or shorter labels, or a shorter template"
        )


class ZeroShotTask(_LabelTask):
    """Which of some labels fits a text, by a model that knows what follows from what.

    The value of a record is a list of LabelScore, best first.

    Args:
        labels: of the model, one of which begins with "entail".
    """

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        options: ClassifyOptions,
        thresholds: Thresholds,
        labels: Sequence[str],
        **windows: int,
    ) -> None:
        super().__init__(tokenizer, options, thresholds, options.labels, **windows)
        found = [i for i, label in enumerate(labels) if label.lower().startswith("entail")]
        if not found:
            raise ConfigError(
                f"candidate_labels need a model that was trained for entailment; the labels of "
                f"this one are {', '.join(labels[:8])}"
            )
        self._entailment = found[0]
        self._contradiction = len(labels) - 1 if self._entailment == 0 else 0
        self._one_by_one = options.multi_label or len(self.labels) == 1
        _require_short_claims(options.hypothesis_template, self.labels)
        claims = [options.hypothesis_template.replace("{}", label) for label in self.labels]
        self._claims = [tokens.ids for tokens in self.tokens_of(claims)]

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each text beside each claim."""

        def read(_: int, record: Record, tokens: Tokens) -> Encoded:
            what, n_tokens = "a candidate label", len(tokens.ids)
            counts = [
                self.windows.count(len(claim) + PAIR_SPECIALS, [n_tokens], what=what)
                for claim in self._claims
            ]
            n_windows = charge_windows(record, counts, self._first_only_of)
            windows: list[Window] = []
            for part, claim in enumerate(self._claims):
                record.work.check()
                windows += self.windows.before(
                    tokens.ids, claim, what=what, part=part, only_first=self._only_first
                )
            return encoded_of(record, tokens, windows, truncated=len(windows) < n_windows)

        return self.encode_texts(records, read)

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[LabelScore]:
        """Candidate labels by descending score."""
        logits_WC = np.concatenate(outputs)
        require_finite(logits_WC)
        by_label = []
        for rows in windows_by_part(encoded.windows, len(self.labels)):
            windows = [encoded.windows[i] for i in rows]
            pair_WC = logits_WC[rows][:, [self._contradiction, self._entailment]]
            values = softmax(pair_WC) if self._one_by_one else pair_WC
            by_label.append(pool_windows(values, windows, self._pooling)[1])
        scores = np.array(by_label, dtype=np.float32)
        return self._best(scores if self._one_by_one else softmax(scores), encoded.record)
