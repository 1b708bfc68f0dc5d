"""A unit's rows as chunks, whatever format they are in; and the columns that a run has."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.job.chunks import (
    CONTENT_ERRORS,
    Chunk,
    flag_of,
    require_no_clash,
    select,
)
from erniem_batch.job.config import MAX_ROW_BYTES, JobConfig
from erniem_batch.job.jsonl import read_jsonl
from erniem_batch.job.jsonsample import NotLines, sample, schema_of_sample
from erniem_batch.job.jsontypes import ColumnTypes
from erniem_batch.job.parquet import parquet_schema, read_parquet, require_column, require_text
from erniem_batch.job.units import SourceFile, Unit

SAMPLED_FILES = 8  # JSONL files that have a say in the types of columns
SAMPLED_BYTES = 12 << 20


class UnitReader:
    """Reads the rows of one unit, in order.

    Args:
        columns: to carry; None: all.
        schema: of the carried columns, as `input_schema` found it.
        fields: what else the task reads: name by name, its column.
        added: columns that the job adds.
        text_flag: that names the text column.
        max_row_bytes: a larger row is not read.

    Attributes:
        n_bytes: read from storage so far.
    """

    def __init__(
        self,
        unit: Unit,
        text_column: str,
        columns: Sequence[str] | None,
        schema: pa.Schema,
        *,
        fields: Mapping[str, str] | None = None,
        added: Sequence[str] = (),
        text_flag: str = "--text-column",
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        self.unit = unit
        self.max_row_bytes = max_row_bytes
        self.fields = dict(fields or {})
        self.added = added
        self.text_flag = text_flag
        self.text_column = text_column
        self.columns = columns
        self.schema = schema
        self._sources: list[storage.InputFile] = []

    @classmethod
    def of_job(cls, config: JobConfig, unit: Unit, schema: pa.Schema) -> Self:
        """With the columns of a job."""
        return cls(
            unit,
            config.text_column,
            config.carried_columns,
            schema,
            fields=config.fields,
            added=config.added_columns,
            text_flag=config.text_flag,
            max_row_bytes=config.max_row_bytes,
        )

    @property
    def n_bytes(self) -> int:
        return sum(source.n_bytes for source in self._sources)

    def chunks(self) -> Iterator[Chunk]:
        """All rows.

        Raises:
            StorageError: storage failed, or the file is no longer the one that was planned.
        """
        yield from self.slice_chunks(self.unit)
        info = storage.stat(self.unit.path) if self.unit.version else None
        if info is not None and not storage.same_version(self.unit.version, info.version):
            raise _changed(self.unit)

    def slice_chunks(self, unit: Unit, types: ColumnTypes | None = None) -> Iterator[Chunk]:
        """The rows of a slice of an input file.

        Args:
            types: of JSONL rows of the same unit that were read before.
        """
        if unit.format == "parquet":
            yield from read_parquet(self, unit)
        else:
            yield from read_jsonl(self, unit, types)

    def open(self, unit: Unit) -> storage.InputFile:
        """The unit's file, if it is still the one that was planned."""
        source = storage.InputFile(unit.path, unit.end)
        self._sources.append(source)
        if unit.version and not storage.same_version(unit.version, source.info.version):
            source.close()
            raise _changed(unit)
        return source


def _changed(unit: Unit) -> StorageError:
    return StorageError(
        f"{unit.path}: changed since this run was planned; run the same command again when it is "
        f"complete"
    )


def input_schema(
    files: Iterable[SourceFile],
    text_column: str,
    columns: Sequence[str] | None,
    *,
    fields: Mapping[str, str] | None = None,
    added: Sequence[str] = (),
    text_flag: str = "--text-column",
) -> pa.Schema:
    """The carried columns and their types, from the first files that can be read.

    A later file may have other columns: its output then has them too.

    Args:
        fields, added, text_flag: as for UnitReader.

    Raises:
        ConfigError: no file can be used, one is JSON but not JSON Lines, the text column or a
            carried one doesn't exist, or the text is no text.
    """
    fields = fields or {}
    rows: list[dict[str, Any]] = []
    n_sampled = n_sampled_bytes = 0
    problems: list[Exception] = []
    schema: pa.Schema | None = None
    for file in files:
        try:
            if file.format == "parquet":
                schema = _usable_schema(file, text_column, columns, fields, text_flag)
                break
            found, n_bytes = sample(file)
            rows += found
            n_sampled += bool(found)
            n_sampled_bytes += n_bytes
        except NotLines:
            raise
        except (*CONTENT_ERRORS, ConfigError) as error:
            problems.append(error)  # a dead letter later, if other files are better
        if n_sampled == SAMPLED_FILES or n_sampled_bytes > SAMPLED_BYTES:
            break
    if schema is None and rows:
        schema = schema_of_sample(rows, text_column, fields, text_flag)
    if schema is None and problems:
        _raise_worst(problems)
    schema = pa.schema([]) if schema is None else schema
    schema = schema if columns is None else select(schema, columns, "the input")
    require_no_clash(schema, added)
    return schema


def _usable_schema(
    file: SourceFile,
    text_column: str,
    columns: Sequence[str] | None,
    fields: Mapping[str, str],
    text_flag: str,
) -> pa.Schema:
    schema = parquet_schema(file.path)
    require_text(schema, text_column, file.path, text_flag)
    for name, column in fields.items():
        require_column(schema, column, file.path, flag_of(name))
    return schema if columns is None else select(schema, columns, file.path)


def _raise_worst(problems: Sequence[Exception]) -> None:
    """No file can be used: a wrong setting says more than a damaged file."""
    for problem in problems:
        if isinstance(problem, ConfigError):
            raise problem
    raise ConfigError(f"none of the input files can be read: {problems[0]}") from problems[0]
