"""Dead letters: rows without a prediction, kept whole, with the reason.

Those of a unit are one Parquet file under `_dead_letters/`, with the name of the unit's output. The
row itself is in `row` (Parquet input) or `line` (JSONL input), so that it can be tried again even
when the input is gone.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.job.chunks import CONTENT_ERRORS, BadRow, Chunk, Place
from erniem_batch.job.jsonl import jsonl_chunks, row_number
from erniem_batch.job.parquet import table_chunk, whole_rows
from erniem_batch.job.read import UnitReader
from erniem_batch.job.units import Unit
from erniem_batch.records import Failure

DEAD_LETTERS = "_dead_letters"

# `n_rows` is 1, or how many rows of a damaged file could not be reached (null: nobody knows); what
# to read again for them is in `rest`.
LETTER_SCHEMA = pa.schema(
    [
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("source_byte", pa.int64()),
        ("n_rows", pa.int64()),
        ("unit", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("reason", pa.string()),
        ("attempts", pa.int32()),
        ("model", pa.string()),
        ("time", pa.timestamp("us", "UTC")),
        ("line", pa.binary()),
        ("rest", pa.string()),
    ]
)


def letters_name(output: str, attempt: str = "") -> str:
    """Where the dead letters of an output are, in the output folder.

    Args:
        attempt: a name that no other attempt at the unit has: two attempts may differ in their
            dead letters, and those of the attempt whose output counts must stay. Empty: the name
            that older releases gave.
    """
    return f"{DEAD_LETTERS}/{output}{f'.try-{attempt}' if attempt else ''}.parquet"


def output_of_letters(name: str) -> str:
    """The output that a file of dead letters belongs to, both without suffix."""
    stem = name[len(DEAD_LETTERS) + 1 :].removesuffix(".parquet")
    return re.sub(r"\.try-[0-9a-f]{8}$", "", stem)


def write_letters(
    folder: str, name: str, unit: Unit, bad: Sequence[BadRow], attempts: int, model: str
) -> None:
    """The dead letters of a unit, in the order of the input.

    Args:
        name: of the file, in the folder.
        attempts: how often the unit has been worked on, this time included.
        model: digest of the model.
    """
    now = datetime.now(UTC)
    bad = sorted(bad, key=lambda b: (_or_last(b.place.row), _or_last(b.place.byte)))
    rows: list[dict[str, Any]] = []
    for item in bad:
        rest = None if item.rest is None else json.dumps(item.rest.to_row())
        why = asdict(item.failure)
        del why["id"]
        rows.append(
            {
                "source_file": item.place.source or unit.path,
                "source_row": item.place.row if rest else row_number(item.place),
                "source_byte": item.place.byte,
                "n_rows": item.n_rows,
                "unit": unit.id,
                **why,
                "attempts": attempts,
                "model": model,
                "time": now,
                "line": item.place.line,
                "rest": rest,
            }
        )
    table = pa.Table.from_pylist(rows, LETTER_SCHEMA)
    whole = _whole_rows(unit, bad)
    if whole is not None:
        table = table.append_column("row", whole)
    storage.write_table(storage.join(folder, name), table)


def _or_last(number: int | None) -> float:
    return float("inf") if number is None else number


def _whole_rows(unit: Unit, bad: Sequence[BadRow]) -> pa.Array | None:
    """Each bad row as a struct of all its columns; null where it is not one row of Parquet."""
    known = {i: item.whole for i, item in enumerate(bad) if item.whole is not None}
    wanted = {
        i: item.place.row
        for i, item in enumerate(bad)
        if unit.format == "parquet" and item.rest is None and i not in known
    }
    tables = list(known.values())
    order = list(known)
    if wanted:
        try:
            tables.append(whole_rows(unit, [row for row in wanted.values() if row is not None]))
            order += wanted
        except CONTENT_ERRORS:
            # Rows that were read a moment ago cannot be read now: the reader will have said so.
            pass
    if not tables:
        return None
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    columns = [column.combine_chunks() for column in table.columns]
    rows = pa.StructArray.from_arrays(columns, fields=list(table.schema))
    place = {i: n for n, i in enumerate(order)}
    return rows.take(pa.array([place.get(i) for i in range(len(bad))], pa.int64()))


# ---- reading them again -----------------------------------------------------------------------


def read_letters(reader: UnitReader, output: str) -> Iterator[Chunk]:
    """The rows of a file of dead letters, as chunks to work on.

    What could not be reached is read again if its file is still the one it was; else it stays a
    dead letter, and the next run takes the changed file as a whole.
    """
    table = _letters_of(reader.unit, output)
    letters = table.drop_columns([n for n in ("row",) if n in table.column_names]).to_pylist()
    single = [i for i, letter in enumerate(letters) if letter["rest"] is None]
    if reader.unit.format == "jsonl":
        yield from jsonl_chunks(reader, (_place(letters[i]) for i in single))
    elif single:
        if "row" not in table.column_names:
            raise ConfigError(f"{reader.unit.letters}: dead letters without their rows")
        rows = table["row"].combine_chunks().take(pa.array(single, pa.int64()))
        whole = pa.Table.from_arrays(rows.flatten(), schema=pa.schema(list(rows.type)))
        yield replace(table_chunk(reader, whole, [_place(letters[i]) for i in single]), whole=whole)
    for letter in letters:
        if letter["rest"] is not None:
            yield from _read_rest(reader, letter)


def _letters_of(unit: Unit, output: str) -> pa.Table:
    try:
        return storage.read_table(storage.join(output, unit.letters))
    except FileNotFoundError:
        raise StorageError(
            f"{unit.letters}: these dead letters are gone: delete the data file of {unit.retires} "
            f"and run the same command again until both are made"
        ) from None


def _place(letter: dict[str, Any]) -> Place:
    return Place(letter["source_row"], letter["source_byte"], letter["line"], letter["source_file"])


def _read_rest(reader: UnitReader, letter: dict[str, Any]) -> Iterator[Chunk]:
    unit = Unit.from_row(json.loads(letter["rest"]))
    info = storage.stat(unit.path)
    if info is not None and storage.same_version(unit.version, info.version):
        yield from reader.slice_chunks(unit)
        return
    failure = Failure("", letter["stage"], letter["error"], letter["reason"])
    place = replace(_place(letter), line=None)
    bad = BadRow(place, failure, n_rows=letter["n_rows"], rest=unit)
    yield Chunk(reader.schema.empty_table(), [], [], [bad])
