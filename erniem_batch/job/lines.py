"""Lines of JSONL files, plain or compressed, in bounded memory: one stream, each line at most once.

A line that is longer than its reader admits is read in steps to its end, and never held.
"""

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.job.chunks import CONTENT_ERRORS, Place
from erniem_batch.job.config import MAX_ROW_BYTES
from erniem_batch.job.units import COMPRESSED_SUFFIXES, Unit

# Lines before a slice are only counted, to name the row of a dead letter, while that is cheap.
COUNTED_BYTES = 64 << 20
# Steps in which a line is skipped that is too long to be held.
SKIPPED_BYTES = 1 << 20
LINE_END = b"\r\n"
BOM = b"\xef\xbb\xbf"

Opener = Callable[[], storage.InputFile]


def rows_of(unit: Unit, open_file: Opener, most: int) -> Iterator[Place]:
    """Lines that are rows of the unit: those between skip_rows and max_rows."""
    rows = lines_of(unit, open_file, most)
    last = None if unit.max_rows is None else unit.skip_rows + unit.max_rows
    return islice(rows, unit.skip_rows, last)


def lines_of(unit: Unit, open_file: Opener, most: int, until: int | None = None) -> Iterator[Place]:
    """Lines that begin inside the slice, without blank ones, which only count as lines.

    Args:
        most: bytes of the longest line that is held in memory.
        until: bytes after which the reading of a line that is too long may stop.
    """
    source = open_file()
    with decompressed(unit.path, source) as file:
        at = unit.start
        if unit.start:
            # A line that begins exactly at `start` is ours: look from the byte before.
            file.seek(unit.start - 1)
            before = _read_line(file, SKIPPED_BYTES)
            at += before.n_bytes - 1 if before else 0
        number = 0
        while unit.end is None or at < unit.end:
            line = _read_line(file, most, until)
            if line is None:
                return
            if not line.is_blank:
                row = None if unit.start else number
                n_bytes = line.n_bytes if line.content is None else 0
                yield Place(row, at, line.content, unit.path, n_bytes)
            at += line.n_bytes
            number += 1


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a file.

    Attributes:
        content: with the end of the line; None if it is too long.
        n_bytes: with the end of the line.
        is_blank: whether it holds nothing but white space.
    """

    content: bytes | None
    n_bytes: int
    is_blank: bool


def _read_line(file: IO[bytes], most: int, until: int | None = None) -> _Line | None:
    """The next line; None at the end. One that is too long is read in steps, to be skipped.

    Args:
        most: bytes of the longest line, without its end.
        until: of a line that is too long, bytes after which reading may stop.
    """
    line = file.readline(most + len(LINE_END))
    if not line:
        return None
    if len(line) <= most or len(line.rstrip(LINE_END)) <= most:
        return _Line(line, len(line), _is_blank(line))
    n_bytes, is_blank = len(line), _is_blank(line)
    is_whole = line.endswith(b"\n")
    del line
    while not is_whole and (until is None or n_bytes < until):
        step = file.readline(SKIPPED_BYTES)
        n_bytes += len(step)
        is_blank = is_blank and not step.strip()
        is_whole = not step or step.endswith(b"\n")
    return _Line(None, n_bytes, is_blank)


def _is_blank(line: bytes) -> bool:
    # Its beginning is enough, nearly always, and a line may be large.
    return not line[:64].removeprefix(BOM).strip() and not line.removeprefix(BOM).strip()


@contextmanager
def decompressed(path: str, source: storage.InputFile) -> Iterator[IO[bytes]]:
    """The text of a JSONL file, decompressed by its name."""
    if path.lower().endswith(".gz"):
        buffered = io.BufferedReader(source, storage.READ_BYTES)
        with gzip.open(buffered) as file:
            yield file  # type: ignore[misc]
    elif path.lower().endswith(".zst"):
        with pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        yield io.BufferedReader(source, storage.READ_BYTES)


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED_SUFFIXES)


def bounded_lines(path: str, most: int = MAX_ROW_BYTES) -> Iterator[bytes | int]:
    """Lines of a JSONL file, decompressed by its name; of one that is too long, its length.

    Args:
        most: bytes of the longest line that is held in memory.
    """
    with storage.InputFile(path) as source, decompressed(path, source) as file:
        while line := _read_line(file, most):
            yield line.n_bytes if line.content is None else line.content


def count_rows(unit: Unit, limit: int) -> int | None:
    """Rows of a unit, counted up to a limit; None if it is damaged before that."""
    if unit.format == "parquet":  # whose footer could not be read
        return None
    with ExitStack() as files:
        rows = rows_of(
            unit, lambda: files.enter_context(storage.InputFile(unit.path, unit.end)), SKIPPED_BYTES
        )
        try:
            return sum(1 for _ in islice(rows, limit))
        except CONTENT_ERRORS:
            return None


def row_number(place: Place) -> int | None:
    """The row of a place in a JSONL file, counted from its byte if that is cheap."""
    if place.row is not None or place.byte is None or place.byte > COUNTED_BYTES:
        return place.row
    count = 0
    with storage.open_input(place.source, place.byte) as file:
        left = place.byte
        while left and (block := file.read(min(left, storage.READ_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
