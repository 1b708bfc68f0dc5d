"""Vectors of texts: the encoder's vectors of all tokens pooled into one.

The mean goes over all tokens that are not padding, [CLS] and [SEP] among them, as
sentence-transformers does it. transformers 4.40.2 has only `feature-extraction`, which gives the
vectors of all tokens, with the padding of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import ConfigError
from erniem_batch.options import EmbedOptions
from erniem_batch.records import Encoded, Failure, FloatArray, IntArray, Record
from erniem_batch.tasks.base import Task, encoded_of, pool_windows, require_finite
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import stitch

# Of a prefix, for each token of a window: a longer one would not fit.
PREFIX_CHARACTERS = 16
_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


class EmbedTask(Task):
    """One vector a text; those of the windows of a long one are weighted by their tokens.

    The value of a record is an array (dimensions,) of the type asked for.

    Args:
        hidden_size: of the model.
    """

    head: ClassVar[str] = "ErnieMForEmbedding"

    def __init__(
        self, tokenizer: ErnieMTokenizer, options: EmbedOptions, hidden_size: int, **windows: int
    ) -> None:
        super().__init__(tokenizer, **windows)
        self._options = options
        self._size = options.dimensions or hidden_size
        if self._size > hidden_size:
            raise ConfigError(
                f"dimensions={self._size} is more than the {hidden_size} of the model"
            )
        self.head_options = {"pooling": options.pooling}
        self._type = pa.list_(_TYPES[options.output_dtype], self._size)
        self.schema = pa.schema([("embedding", self._type)])
        self._require_short(options.prefix)
        self._prefix = self.tokens_of([options.prefix])[0].ids

    def _require_short(self, prefix: str) -> None:
        """Raises a ConfigError if the prefix could not stand before every text."""
        most = PREFIX_CHARACTERS * self.windows.size
        if len(prefix) > most:
            raise ConfigError(
                f"prefix has {len(prefix)} characters; at most {most}, since it stands before "
                f"every window of {self.windows.size} tokens"
            )

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each text, the prefix before each."""
        prefix = self._options.prefix
        texts = [r.text if isinstance(r.text, str) else "" for r in records] if prefix else []
        # Tokenized together, as models with a prefix saw it in training.
        joined = self.tokens_of([prefix + text for text in texts])

        def read(i: int, record: Record, tokens: Tokens) -> Encoded:
            ids = self._without_prefix(joined[i].ids, tokens.ids) if prefix else tokens.ids
            record.work.charge(*self.windows.count_single(len(ids), len(self._prefix)))
            return encoded_of(record, tokens, self.windows.single(ids, self._prefix))

        return self.encode_texts(records, read)

    def _without_prefix(self, joined: IntArray, alone: IntArray) -> IntArray:
        n = len(self._prefix)
        return joined[n:] if np.array_equal(joined[:n], self._prefix) else alone

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> np.ndarray:
        """The vector; with pooling `none` one for each token (tokens with special ones, hidden)."""
        if self._options.pooling == "none":
            return token_vectors(encoded, outputs)
        vectors_WH = np.concatenate(outputs)
        require_finite(vectors_WH)
        vector = pool_windows(vectors_WH, encoded.windows, "mean")[: self._size]
        if self._options.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        if self._options.output_dtype == "int8":
            return np.round(vector * 127).astype(np.int8)
        return vector.astype(self._options.output_dtype)

    def columns(self, values: Sequence[np.ndarray]) -> list[pa.Array]:
        """`embedding`, a list of fixed size."""
        flat = np.concatenate(values) if len(values) else np.zeros(0)
        items = pa.array(flat.astype(self._options.output_dtype), self._type.value_type)
        return [pa.FixedSizeListArray.from_arrays(items, type=self._type)]

    def count(self, value: np.ndarray) -> int:
        """One a text."""
        return 1


def token_vectors(encoded: Encoded, outputs: Sequence[FloatArray]) -> FloatArray:
    """One vector a token of the whole text, [CLS] of its first and [SEP] of its last window."""
    windows = encoded.windows
    ends = [window.offset + window.n_tokens for window in windows]
    bodies = [o[w.offset : end] for o, w, end in zip(outputs, windows, ends, strict=True)]
    body = stitch(bodies, [window.first for window in windows])
    return np.concatenate([outputs[0][: windows[0].offset], body, outputs[-1][ends[-1] :]])
