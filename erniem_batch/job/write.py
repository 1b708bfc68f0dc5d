"""One output file for a unit: made visible in one step, with marks that say what it is."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import Conflict, DamagedFile
from erniem_batch.job.config import LANGUAGE_COLUMN
from erniem_batch.job.documents import (
    damaged,
    known,
    parse_document,
    require_checksum_of_newer,
    with_checksum,
)
from erniem_batch.job.findings import is_findings
from erniem_batch.job.jsonvalues import json_line, json_values
from erniem_batch.records import Prediction
from erniem_batch.storage import FileInfo
from erniem_batch.tasks.base import Task

logger = logging.getLogger(__name__)

MARKS = b"erniem_batch"
SIDECARS = "_run/sidecars"
COUNTS = ("n_rows", "n_ok", "n_dead", "n_found", "n_tokens", "n_windows", "n_truncated")
MARK_FIELDS = {"unit": str, "fingerprint": str, "source": dict, "counts": dict}
# What the checksum of marks covers.
MARKED = (*MARK_FIELDS, "n_bytes", "findings", "sha256", "letters")
REMEDY = "run the same command again"

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
        n_bytes, sha256: of the file; JSONL only, whose marks are kept apart.
        letters: file of the dead letters of the attempt that wrote this file, in the output
            folder; empty: there are none, or an older release wrote it.
    """

    unit: str
    fingerprint: str
    source: dict[str, Any]
    counts: dict[str, int]
    n_bytes: int | None = None
    findings: str = ""
    sha256: str | None = None
    letters: str = ""

    def encode(self, **changes: Any) -> bytes:
        """The marks as JSON, with a checksum."""
        values = with_checksum(asdict(replace(self, **changes)), MARKED)
        return json.dumps(values, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, path: str) -> Self:
        """The marks of an encode.

        Raises:
            DamagedFile: Something is missing, of another type or changed.
        """
        values = parse_document(data, path, MARK_FIELDS, REMEDY, MARKED)
        require_checksum_of_newer(values, MARKED, path, REMEDY)
        values["counts"] = known(values["counts"], COUNTS)
        marks = cls(**known(values, [f.name for f in fields(cls)]))
        is_sound = {type(n) for n in marks.counts.values()} <= {int}
        is_sound = is_sound and type(marks.n_bytes) in (int, type(None))
        is_sound = is_sound and type(marks.letters) is str
        if not (is_sound and type(marks.sha256) in (str, type(None))):
            raise damaged(path, "it has fields of other types", REMEDY)
        if not is_findings(marks.findings):
            raise damaged(path, "its findings are not a list of counts", REMEDY)
        return marks


def write_tables(
    output: str, name: str, tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> tuple[int, int, str]:
    """Writes tables into one file, which appears when all of it is there, with its marks.

    Args:
        name: of the file in the output folder; its suffix says the format.
        marks: asked for when the last table has been written.

    Returns:
        Rows, bytes and SHA-256 of the file.

    Raises:
        Conflict: another attempt at the unit has written the file meanwhile.
    """
    n_rows = 0
    jsonl = name.endswith(".jsonl")
    with storage.new_file(storage.join(output, name), exclusive=True) as plain:
        file = storage.Hashed(plain)
        for table in (_write_jsonl if jsonl else _write_parquet)(file, tables, marks):
            n_rows += len(table)
        n_bytes = file.tell()
        apart = marks().encode(n_bytes=n_bytes, sha256=file.sha256()) if jsonl else b""
    if jsonl:  # after the data, which without it counts for nothing
        _write_sidecar(output, name, apart)
    return n_rows, n_bytes, file.sha256()


def _write_sidecar(output: str, name: str, marks: bytes) -> None:
    """The marks of a JSONL file that this attempt has just written.

    Raises:
        Conflict: another attempt has replaced the file.
    """
    path = sidecar(output, name)
    while True:
        there = storage.stat(path)
        try:
            with storage.new_file(path, exclusive=True) as file:
                file.write(marks)
            return
        except Conflict:
            if read_marks(output, name) is not None:
                raise
            # Of an attempt whose file is gone: what was there before the look at the marks.
            storage.remove([] if there is None else [there])


def files_of_output(output: str, name: str) -> list[FileInfo]:
    """List the files that stand at an output's name now: the file, and for JSONL its sidecar.

    To be asked before the marks are read: if these do not count, `storage.remove` removes exactly
    these files, and nothing that another attempt has written since, however late that is.
    """
    paths = [storage.join(output, name)]
    if name.endswith(".jsonl"):
        paths.append(sidecar(output, name))
    return [info for info in map(storage.stat, paths) if info is not None]


def read_marks(output: str, name: str) -> Marks | None:
    """The marks of an output file; None if there is no such file, or it is not one of ours."""
    path = storage.join(output, name)
    try:
        if name.endswith(".jsonl"):
            info, text = storage.stat(path), storage.read(sidecar(output, name))
            if info is None or text is None:
                return None
            marks = Marks.decode(text, sidecar(output, name))
            return marks if marks.n_bytes == info.size else None
        with storage.InputFile(path) as source:
            metadata = pq.read_metadata(pa.PythonFile(source, mode="r")).metadata
        return Marks.decode(metadata[MARKS], path)
    except DamagedFile as error:
        logger.warning("not used, so the unit is made again: %s", error)
        return None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def sidecar(output: str, name: str) -> str:
    """Where the marks of a JSONL file are."""
    return f"{output}/{SIDECARS}/{name}.json"


def _write_jsonl(
    file: storage.Hashed, tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> Iterator[pa.Table]:
    for table in tables:
        columns = [json_values(column) for column in table.columns]
        for values in zip(*columns, strict=True):
            line = json_line(dict(zip(table.column_names, values, strict=True)))
            file.write(line.encode("utf-8") + b"\n")
        yield table


def _write_parquet(
    file: storage.Hashed, tables: Iterable[pa.Table], marks: Callable[[], Marks]
) -> Iterator[pa.Table]:
    writer = None
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(
                    file, table.schema, compression="zstd", write_page_checksum=True
                )
            writer.write_table(table)
            yield table
        if writer is not None:
            writer.add_key_value_metadata({MARKS: marks().encode()})
    finally:
        # After an error too: left to the garbage collector it writes to a closed file. What it
        # writes here then is thrown away with the file.
        if writer is not None:
            writer.close()
