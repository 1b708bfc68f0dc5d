"""Dead letters: rows without a prediction, kept whole, with the reason.

Those of a unit are one Parquet file under `_dead_letters/`, with the name of the unit's output. The
row itself is in `row` (Parquet input) or `line` (JSONL input), so that it can be tried again even
when the input is gone.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.job.chunks import BadRow, Chunk, Place
from erniem_batch.job.config import MAX_ROW_BYTES
from erniem_batch.job.jsonl import jsonl_chunks
from erniem_batch.job.jsontypes import ColumnTypes
from erniem_batch.job.lines import row_number
from erniem_batch.job.parquet import WholeRows, table_chunk
from erniem_batch.job.read import UnitReader
from erniem_batch.job.rowgroups import RowGroups
from erniem_batch.job.settle import OneSchema, in_groups, in_order
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


def letters_name(output: str, digest: str = "") -> str:
    """Where the dead letters of an output are, in the output folder.

    Args:
        digest: of the dead letters. Two attempts at a unit may differ in them, and those of the
            attempt whose output counts must stay. Empty: the name that older releases gave.
    """
    return f"{DEAD_LETTERS}/{output}{f'.rows-{digest}' if digest else ''}.parquet"


def output_of_letters(name: str) -> str:
    """The output that a file of dead letters belongs to, both without suffix."""
    stem = name[len(DEAD_LETTERS) + 1 :].removesuffix(".parquet")
    return re.sub(r"\.rows-[0-9a-f]{8}$", "", stem)


def write_letters(
    folder: str,
    name: str,
    unit: Unit,
    bad: Iterable[BadRow],
    attempts: int,
    model: str,
    most: int = MAX_ROW_BYTES,
) -> None:
    """The dead letters of a unit, in the order of the input; written in groups of bounded size.

    Args:
        name: of the file, in the folder.
        attempts: how often the unit has been worked on, this time included.
        model: digest of the model.
        most: bytes of the largest row that is kept whole.
    """
    bad = sorted(bad, key=in_order) if isinstance(bad, list) else bad
    with WholeRows(unit, most) as source, OneSchema(folder) as one:
        groups = in_groups(iter(bad))
        group = next(groups)
        following = next(groups, None)
        tables = one.add(_table(unit, group, attempts, model, source), following is None)
        written = list(tables)
        while following is not None:
            group, following = following, next(groups, None)
            written += one.add(_table(unit, group, attempts, model, source), False)
        path = storage.join(folder, name)
        storage.write_tables(path, chain(written, one.rest()), large="line")


def _table(
    unit: Unit, bad: Sequence[BadRow], attempts: int, model: str, source: WholeRows
) -> pa.Table:
    """Dead letters as a table of LETTER_SCHEMA, and `row` if there are rows of Parquet."""
    now = datetime.now(UTC)
    wholes = _whole_rows(unit, bad, source)
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
    return table if wholes is None else table.append_column("row", wholes)


def _whole_rows(unit: Unit, bad: Sequence[BadRow], source: WholeRows) -> pa.Array | None:
    """Each bad row as a struct of all its columns; null where it is not one row of Parquet."""
    known = {i: item.whole for i, item in enumerate(bad) if item.whole is not None}
    wanted = {
        i: item.place.row
        for i, item in enumerate(bad)
        if unit.format == "parquet" and item.rest is None and i not in known
    }
    found = source.take([row for row in wanted.values() if row is not None])
    known |= {i: found[row] for i, row in wanted.items() if row in found}
    if not known:
        return None
    table = pa.concat_tables(known.values(), promote_options="permissive").combine_chunks()
    columns = [column.combine_chunks() for column in table.columns]
    rows = pa.StructArray.from_arrays(columns, fields=list(table.schema.remove_metadata()))
    place = {i: n for n, i in enumerate(known)}
    return rows.take(pa.array([place.get(i) for i in range(len(bad))], pa.int64()))


# ---- reading them again -----------------------------------------------------------------------


def read_letters(reader: UnitReader, output: str) -> Iterator[Chunk]:
    """The rows of a file of dead letters, as chunks to work on.

    What could not be reached is read again if its file is still the one it was; else it stays a
    dead letter, and the next run takes the changed file as a whole.
    """
    path = storage.join(output, reader.unit.letters)
    rest = _letters_with_rest(path, reader.unit)
    types = ColumnTypes(reader.schema, reader.columns)
    if reader.unit.format == "jsonl":
        places = (place for table in _single(path) for place in map(_place, _plain(table)))
        chunks = jsonl_chunks(reader, places, types=types)
    else:
        chunks = (_row_chunk(reader, table) for table in _single(path))
    for chunk in chunks:
        yield replace(chunk, settled=chunk.settled and not rest)
    for letter in rest:
        for chunk in _read_rest(reader, letter, types):
            yield replace(chunk, settled=False)


def _tables(path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A file of dead letters in tables of bounded size."""
    with storage.InputFile(path) as source:
        file = RowGroups(source)
        for group in range(file.metadata.num_row_groups):
            for piece in file.tables(group, columns):
                yield piece.table


def _letters_with_rest(path: str, unit: Unit) -> list[dict[str, Any]]:
    """Letters of what could not be reached."""
    found: list[dict[str, Any]] = []
    try:
        for table in _tables(path, LETTER_SCHEMA.names):
            found += table.filter(pc.is_valid(table["rest"])).to_pylist()
    except FileNotFoundError:
        raise StorageError(
            f"{unit.letters}: these dead letters are gone: delete the data file of {unit.retires} "
            f"and run the same command again until both are made"
        ) from None
    return found


def _single(path: str) -> Iterator[pa.Table]:
    """Letters of single rows."""
    for table in _tables(path):
        single = table.filter(pc.is_null(table["rest"]))
        if len(single):
            yield single


def _plain(letters: pa.Table) -> list[dict[str, Any]]:
    """All but the rows themselves, which may hold what Python has no values for."""
    plain: list[dict[str, Any]] = letters.select(
        [name for name in letters.column_names if name != "row"]
    ).to_pylist()
    return plain


def _row_chunk(reader: UnitReader, letters: pa.Table) -> Chunk:
    """Letters of rows of Parquet."""
    if "row" not in letters.column_names:
        raise ConfigError(f"{reader.unit.letters}: dead letters without their rows")
    rows = letters["row"].combine_chunks()
    whole = pa.Table.from_arrays(rows.flatten(), schema=pa.schema(list(rows.type)))
    return replace(table_chunk(reader, whole, list(map(_place, _plain(letters)))), whole=whole)


def _place(letter: dict[str, Any]) -> Place:
    return Place(letter["source_row"], letter["source_byte"], letter["line"], letter["source_file"])


def _read_rest(reader: UnitReader, letter: dict[str, Any], types: ColumnTypes) -> Iterator[Chunk]:
    unit = Unit.from_row(json.loads(letter["rest"]))
    info = storage.stat(unit.path)
    if info is not None and storage.same_version(unit.version, info.version):
        yield from reader.slice_chunks(unit, types)
        return
    failure = Failure("", letter["stage"], letter["error"], letter["reason"])
    place = replace(_place(letter), line=None)
    bad = BadRow(place, failure, n_rows=letter["n_rows"], rest=unit)
    yield Chunk(reader.schema.empty_table(), [], [], [bad])
