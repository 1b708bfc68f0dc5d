"""One output file for a unit: made visible in one step, with marks that say what it is."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.job.config import LANGUAGE_COLUMN
from erniem_batch.job.jsonvalues import json_line, json_values
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
    """

    unit: str
    fingerprint: str
    source: dict[str, Any]
    counts: dict[str, int]
    n_bytes: int | None = None
    findings: str = ""


def write_tables(
    output: str, name: str, tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> tuple[int, int]:
    """Writes tables into one file, which appears when all of it is there, with its marks.

    Args:
        name: of the file in the output folder; its suffix says the format.
        marks: asked for when the last table has been written.

    Returns:
        Rows and bytes of the file.
    """
    n_rows = 0
    with storage.new_file(storage.join(output, name)) as file:
        jsonl = name.endswith(".jsonl")
        for table in (_write_jsonl if jsonl else _write_parquet)(file, tables, marks):
            n_rows += len(table)
        n_bytes = file.tell()
        if jsonl:  # before the data, which without it would count for nothing
            text = json.dumps(asdict(replace(marks(), n_bytes=n_bytes)), sort_keys=True)
            storage.write(sidecar(output, name), text.encode())
    return n_rows, n_bytes


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
        columns = [json_values(column) for column in table.columns]
        for values in zip(*columns, strict=True):
            line = json_line(dict(zip(table.column_names, values, strict=True)))
            file.write(line.encode("utf-8") + b"\n")
        yield table


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
