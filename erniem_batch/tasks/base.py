"""What a task is: how records become windows and how the model's rows become a value.

A task knows nothing of batches, devices or Ray; the predictor knows nothing of labels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from erniem_batch.errors import RecordError
from erniem_batch.records import Encoded, Failure, FloatArray, Record, Window
from erniem_batch.text.pieces import UNDERLINE
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import WindowMaker

# Place of a record in its batch, the record, and the tokens of its text.
Reader = Callable[[int, Record, Tokens], Encoded]


class Task(ABC):
    """One head of ErnieM put to use.

    Attributes:
        text_name: what the record's text is called in errors.
        head: name of the class in `erniem_batch.model.heads`.
        head_options: arguments of its constructor.
        mask_mode: instead of the one in the model's config.
        padding_position_zero: padding stands at position 0, as in PaddleNLP's Taskflow.
        schema: of the columns that hold the values.
    """

    head: ClassVar[str]
    text_name: ClassVar[str] = "text"
    head_options: Mapping[str, Any] = {}
    mask_mode: str | None = None
    padding_position_zero: bool = False
    schema: pa.Schema

    def __init__(
        self, tokenizer: ErnieMTokenizer, *, window_tokens: int = 512, overlap_tokens: int = 128
    ) -> None:
        self.tokenizer = tokenizer
        self.windows = WindowMaker(
            tokenizer.cls_token_id, tokenizer.sep_token_id, window_tokens, overlap_tokens
        )

    def is_blank(self, encoded: Encoded, part: slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Which tokens are nothing to see: white space, and the lone "▁", which also stands for
        characters without width such as U+200B.
        """
        text: str = encoded.record.text
        bounds = zip(encoded.starts[part].tolist(), encoded.ends[part].tolist(), strict=True)
        spaces = np.array([text[a:b].isspace() for a, b in bounds], dtype=bool)
        underline = self.tokenizer.convert_tokens_to_ids(UNDERLINE)
        if underline != self.tokenizer.unk_token_id:
            spaces |= encoded.token_ids[part] == underline
        return spaces

    @abstractmethod
    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Tokens and windows of each record; a record that cannot be read becomes a Failure.

        Lazy: windows of a record are built when it is asked for, after `record.work` has allowed
        them.

        Raises:
            RequestTooLargeError, WorkCancelledError: see `Work`; all records are given up.
        """

    def follow_up(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Encoded | None:
        """What else has to be asked, once these windows are read. Most tasks ask only once.

        Args:
            outputs: as in `decode`.

        Raises:
            RecordError: the outputs are unusable.
            RequestTooLargeError, WorkCancelledError: see `Work`.
        """
        return None

    @abstractmethod
    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Any:
        """The value of one record, when there is nothing more to ask.

        Args:
            outputs: for each window, the model's rows, float32: (tokens with special ones, columns)
                of heads that look at tokens, (1, columns) of heads that look at texts. Windows
                may share one array: never change it.

        Raises:
            RecordError: the outputs are unusable.
        """

    @abstractmethod
    def columns(self, values: Sequence[Any]) -> list[pa.Array]:
        """Values of many records as columns, in the order of `schema`."""

    def count(self, value: Any) -> int:
        """How many things were found, for the report."""
        return len(value)

    def scored_labels(self, value: Any) -> list[tuple[str, float]] | None:
        """Names of what was found, with their scores, for the report; None: it has no names."""
        return None

    # ---- for encode ---------------------------------------------------------------------------

    def encode_texts(self, records: Sequence[Record], read: Reader) -> Iterator[Encoded | Failure]:
        """Tokenizes all texts at once and lets `read` make windows of each when it is its turn."""
        texts = [record.text if isinstance(record.text, str) else "" for record in records]
        tokens = self.tokenizer.encode_batch(texts)
        for i, record in enumerate(records):
            record.work.start()
            try:
                require_string(record.text, self.text_name)
                item: Encoded | Failure = read(i, record, tokens.of(i))
            except RecordError as error:
                item = Failure(record.id, "encode", type(error).__name__, str(error))
            yield item

    def tokens_of(self, values: Sequence[Any]) -> list[Tokens]:
        """Tokens of each value; none for what is not a string."""
        texts = [value if isinstance(value, str) else "" for value in values]
        tokens = self.tokenizer.encode_batch(texts)
        return [tokens.of(i) for i in range(len(texts))]


def require_string(value: Any, name: str) -> str:
    """The value, if it is a string.

    Raises:
        RecordError: it is not; says what it is, never its content.
    """
    if isinstance(value, bytes):
        raise RecordError(f"{name} {_not_utf8(value)}")
    if not isinstance(value, str):
        came = "null" if value is None else type(value).__name__
        raise RecordError(f"{name} must be a string, got {came}")
    return value


def _not_utf8(value: bytes) -> str:
    """What is wrong with bytes in place of a string: readers give them if they are not UTF-8."""
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start}"
    return "must be a string, got bytes"


def require_finite(scores: FloatArray) -> None:
    """Raises a RecordError unless all are numbers."""
    if not np.isfinite(scores).all():
        raise RecordError("the model gave scores that are not numbers: try --dtype float32")


def encoded_of(record: Record, tokens: Tokens, windows: Sequence[Window], **more: Any) -> Encoded:
    """A record with its tokens and windows."""
    return Encoded(record, tokens.ids, tokens.starts, tokens.ends, windows, **more)


# ---- for columns -------------------------------------------------------------------------------


def struct_lists(
    struct: pa.StructType, values: Sequence[Sequence[Any]], attributes: Sequence[str] | None = None
) -> pa.ListArray:
    """Lists of items as a column of lists of structs; no values give the same type.

    Args:
        attributes: of an item, in the order of the struct's fields; None: named like these.
    """
    items = [item for value in values for item in value]
    names = [field.name for field in struct] if attributes is None else attributes
    fields = [
        pa.array([getattr(item, name) for item in items], field.type)
        for name, field in zip(names, struct, strict=True)
    ]
    counts = np.array([0, *map(len, values)], dtype=np.int32)
    column = pa.StructArray.from_arrays(fields, fields=list(struct))
    return pa.ListArray.from_arrays(np.cumsum(counts, dtype=np.int32), column)


# ---- scores of whole texts ---------------------------------------------------------------------


def charge_windows(
    record: Record, counts: Sequence[tuple[int, int]], first_only_of: int | None = None
) -> int:
    """Counts windows that are about to be built; returns how many whole texts would give.

    Args:
        counts: tokens and windows of each part.
        first_only_of: only the first window of each part is built, of at most so many tokens.

    Raises:
        RecordError or RequestTooLargeError: they are above the limit.
    """
    n_windows = sum(windows for _, windows in counts)
    if first_only_of is None:
        record.work.charge(sum(tokens for tokens, _ in counts), n_windows)
    else:
        record.work.charge(sum(min(tokens, first_only_of) for tokens, _ in counts), len(counts))
    return n_windows


def windows_by_part(windows: Sequence[Window], n_parts: int) -> list[list[int]]:
    """Places of the windows of each part."""
    places: list[list[int]] = [[] for _ in range(n_parts)]
    for place, window in enumerate(windows):
        places[window.part].append(place)
    return places


def pool_windows(scores_WC: FloatArray, windows: Sequence[Window], pooling: str) -> FloatArray:
    """One row of scores from those of several windows.

    Args:
        scores_WC: (windows, columns).
        pooling: mean, weighted by the tokens of each window; max of each column; first.
    """
    if len(scores_WC) == 1 or pooling == "first":
        first: FloatArray = scores_WC[0]
        return first
    if pooling == "max":
        highest: FloatArray = scores_WC.max(axis=0)
        return highest
    weights = np.array([max(window.n_tokens, 1) for window in windows], dtype=np.float32)
    mean: FloatArray = (scores_WC * (weights / weights.sum())[:, None]).sum(axis=0)
    return mean


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities over the last axis, float32."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return probs


def sigmoid(logits: FloatArray) -> FloatArray:
    """Each logit as a probability, float32."""
    # By the sign, so that exp never overflows.
    small = np.exp(-np.abs(logits))
    probs: FloatArray = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return probs
