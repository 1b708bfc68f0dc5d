"""Files mapped into memory."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erniem_batch.errors import CheckpointError


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped into memory: writing to them changes a private copy.

    The map lasts as long as anything that was made of it.

    Raises:
        CheckpointError: the file is empty or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path}: damaged: {error}") from error
    yield data
