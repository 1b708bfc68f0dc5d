"""One output file for a unit: made visible in one step, with marks that say what it is."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import Conflict
from erniem_batch.job.config import LANGUAGE_COLUMN
from erniem_batch.records import Prediction
from erniem_batch.tasks.base import Task

MARKS = b"erniem_batch"
SIDECARS = "_run/sidecars"

COUNTED_SCHEMA = pa.schema(
    [
        ("n_tokens", pa.int32()),
        ("n_windows", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


def add_predictions(
    table: pa.Table, predictions: Sequence[Prediction], task: Task, *, language: bool = False
) -> pa.Table:
    """The table with the task's columns and those of COUNTED_SCHEMA; one prediction a row.

    The types are the same however many predictions there are.

    Args:
        language: whether the language that was found is a column too.
    """
    added = dict(zip(task.schema, task.columns([p.value for p in predictions]), strict=True))
    if language:
        found = pa.array([p.language for p in predictions], pa.string())
        added[pa.field(LANGUAGE_COLUMN, pa.string())] = found
    for field in COUNTED_SCHEMA:
        values = [getattr(p, field.name) for p in predictions]
        added[field] = pa.array(values, field.type)
    for field, column in added.items():
        table = table.append_column(field, column)
    return table


@dataclass(frozen=True, slots=True)
class Marks:
    """What an output file says about itself; from it alone a unit is known to be done.

    Attributes:
        unit: id of the unit.
        fingerprint: of the settings it was made with.
        source: file, version and slice.
        counts: as in the receipt.
        findings: as in the receipt.
        n_bytes: size of the file; JSONL only, whose marks are kept apart.
        letters: file of the dead letters of the attempt that wrote this file, in the output
            folder; empty: there are none, or an older release wrote it.
    """

    unit: str
    fingerprint: str
    source: dict[str, Any]
    counts: dict[str, int]
    n_bytes: int | None = None
    findings: str = ""
    letters: str = ""


def write_tables(
    output: str, name: str, tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> tuple[int, int]:
    """Writes tables into one file, which appears when all of it is there, with its marks.

    Args:
        name: of the file in the output folder; its suffix says the format.
        marks: asked for when the last table has been written.

    Returns:
        Rows and bytes of the file.

    Raises:
        Conflict: another attempt at the unit has written the file meanwhile.
    """
    n_rows = 0
    jsonl = name.endswith(".jsonl")
    with storage.new_file(storage.join(output, name), exclusive=True) as file:
        for table in (_write_jsonl if jsonl else _write_parquet)(file, tables, marks):
            n_rows += len(table)
        n_bytes = file.tell()
    if jsonl:  # after the data, which without it counts for nothing
        _write_sidecar(output, name, replace(marks(), n_bytes=n_bytes))
    return n_rows, n_bytes


def _write_sidecar(output: str, name: str, marks: Marks) -> None:
    """The marks of a JSONL file that this attempt has just written.

    Raises:
        Conflict: another attempt has replaced the file.
    """
    path = sidecar(output, name)
    text = json.dumps(asdict(marks), sort_keys=True)
    while True:
        try:
            with storage.new_file(path, exclusive=True) as file:
                file.write(text.encode())
            return
        except Conflict:
            if read_marks(output, name) is not None:
                raise
            _remove_if_there(path)  # of an attempt whose file is gone


def clear(output: str, name: str) -> None:
    """Removes an output file that does not count, so that a new one can be written."""
    _remove_if_there(storage.join(output, name))
    if name.endswith(".jsonl"):
        _remove_if_there(sidecar(output, name))


def _remove_if_there(path: str) -> None:
    info = storage.stat(path)
    if info is not None:
        storage.remove([info])


def read_marks(output: str, name: str) -> Marks | None:
    """The marks of an output file; None if there is no such file, or it is not one of ours."""
    path = storage.join(output, name)
    try:
        if name.endswith(".jsonl"):
            info, text = storage.stat(path), storage.read(sidecar(output, name))
            marks = None if info is None or text is None else Marks(**json.loads(text))
            return marks if marks and info and marks.n_bytes == info.size else None
        with storage.InputFile(path) as source:
            metadata = pq.read_metadata(pa.PythonFile(source, mode="r")).metadata
        return Marks(**json.loads(metadata[MARKS]))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def sidecar(output: str, name: str) -> str:
    """Where the marks of a JSONL file are."""
    return f"{output}/{SIDECARS}/{name}.json"


def _write_jsonl(
    file: IO[bytes], tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> Iterator[pa.Table]:
    for table in tables:
        for row in table.to_pylist():
            line = json.dumps(row, ensure_ascii=False, default=_plain)
            file.write(line.encode("utf-8") + b"\n")
        yield table


def _plain(value: Any) -> str:
    """What JSON has no type for: bytes in base64, all else as Python writes it."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _write_parquet(
    file: IO[bytes], tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> Iterator[pa.Table]:
    writer = None
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            yield table
        if writer is not None:
            text = json.dumps(asdict(marks()), sort_keys=True)
            writer.add_key_value_metadata({MARKS: text.encode()})
    finally:
        # After an error too: left to the garbage collector it writes to a closed file. What it
        # writes here then is thrown away with the file.
        if writer is not None:
            writer.close()
