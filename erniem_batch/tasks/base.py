"""What a task is: how records become windows and how the model's rows become a value.

A task knows nothing of batches, devices or Ray; the predictor knows nothing of labels.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from erniem_batch.records import Encoded, Failure, FloatArray, Record


class Task(Protocol):
    """One head of ErnieM put to use."""

    def encode(self, records: Sequence[Record]) -> list[Encoded | Failure]:
        """Tokens and windows of each record; a record that cannot be read becomes a Failure."""
        ...

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Any:
        """The value of one record.

        Args:
            outputs: for each window, the model's rows (tokens with special ones, columns).

        Raises:
            RecordError: the outputs are unusable.
        """
        ...
