"""One output file for a unit: written under a temporary name, made visible in one step."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch.job.units import Unit
from erniem_batch.records import Entity, Failure, Prediction

DEAD_LETTERS = "_dead_letters"

ENTITY = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("score", pa.float32()),
    ]
)
ADDED_SCHEMA = pa.schema(
    [
        ("entities", pa.list_(ENTITY)),
        ("n_tokens", pa.int32()),
        ("n_windows", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


def add_predictions(table: pa.Table, predictions: Sequence[Prediction]) -> pa.Table:
    """The table with the columns of ADDED_SCHEMA; one prediction a row, in order."""
    entities: list[Entity] = [entity for p in predictions for entity in p.value]
    counts = np.array([0, *(len(p.value) for p in predictions)], dtype=np.int32)
    struct = pa.StructArray.from_arrays(
        [
            pa.array([e.start for e in entities], pa.int32()),
            pa.array([e.end for e in entities], pa.int32()),
            pa.array([e.label for e in entities], pa.string()),
            pa.array([e.word for e in entities], pa.string()),
            pa.array([e.score for e in entities], pa.float32()),
        ],
        fields=list(ENTITY),
    )
    added = [
        pa.ListArray.from_arrays(np.cumsum(counts, dtype=np.int32), struct),
        pa.array([p.n_tokens for p in predictions], pa.int32()),
        pa.array([p.n_windows for p in predictions], pa.int32()),
        pa.array([p.truncated for p in predictions], pa.bool_()),
    ]
    for field, column in zip(ADDED_SCHEMA, added, strict=True):
        table = table.append_column(field, column)
    return table


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when all of it is on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tables(path: Path, tables: Iterable[pa.Table], output_format: str) -> int:
    """Writes tables of one schema into one file; gives the number of rows."""
    n_rows = 0
    with atomic_file(path) as file:
        write = _write_jsonl if output_format == "jsonl" else _write_parquet
        for table in write(file, tables):
            n_rows += len(table)
    return n_rows


def _write_jsonl(file: IO[bytes], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for row in table.to_pylist():
            line = json.dumps(row, ensure_ascii=False, default=str)
            file.write(line.encode("utf-8") + b"\n")
        yield table


def _write_parquet(file: IO[bytes], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    writer = None
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            yield table
    finally:  # also after an error: left to the garbage collector, it writes to a closed file
        if writer is not None:
            writer.close()


def write_dead_letters(folder: Path, unit: Unit, failures: dict[int, Failure]) -> None:
    """Why rows of a unit have no output: one JSON line each, in the order of the input.

    The file has the name of the unit's output file, under `_dead_letters/`.
    """
    with atomic_file(folder / DEAD_LETTERS / f"{unit.output}.jsonl") as file:
        for row, failure in sorted(failures.items()):
            why = asdict(failure)
            del why["id"]
            letter: dict[str, Any] = {
                "source_file": unit.path,
                "source_row": row,
                "unit": unit.id,
                **why,
            }
            file.write(json.dumps(letter, ensure_ascii=False).encode("utf-8") + b"\n")
