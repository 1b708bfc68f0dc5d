"""A look at JSONL files before the work: columns, types, and whether they are JSON Lines."""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.job.chunks import CONTENT_ERRORS, flag_of, no_column
from erniem_batch.job.jsonl import is_usable, parse_line, value_at
from erniem_batch.job.jsontypes import infer_schema
from erniem_batch.job.lines import BOM, decompressed, lines_of
from erniem_batch.job.units import BATCH, FOOTER_THREADS, SourceFile, Unit

SAMPLE_BYTES = 1 << 20
# A longer line has no say in the types of columns; the sample ends where none is shorter.
SAMPLED_LINE_BYTES = 8 << 20
SAMPLE_SKIPPED_BYTES = 256 << 20
HEAD_BYTES = 64 << 10  # that tell JSON from JSON Lines
NAMED_JSON = re.compile(r"\.json(\.gz|\.zst)?$", re.IGNORECASE)


class NotLines(ConfigError):
    """A file of JSON that is not JSON Lines."""


def schema_of_sample(
    sample: list[dict[str, Any]],
    text_column: str,
    fields: Mapping[str, str],
    text_flag: str = "--text-column",
) -> pa.Schema:
    flags = {text_flag: text_column, **{flag_of(name): column for name, column in fields.items()}}
    for flag, column in flags.items():
        if not any(_has(row, column) for row in sample):
            names = sorted({name for row in sample for name in row})
            raise ConfigError(no_column(column, names, "the JSONL input", flag))
    # As in read_jsonl: rows that will be refused have no say in the types of the others.
    usable = [row for row in sample if is_usable(row, text_column, fields)]
    return infer_schema(usable or sample)


def _has(value: dict[str, Any], column: str) -> bool:
    """Whether the column is there, be it null."""
    *outer, last = column.split(".")
    inner = value_at(value, ".".join(outer)) if outer else value
    return column in value or (isinstance(inner, dict) and last in inner)


def sample(file: SourceFile) -> tuple[list[dict[str, Any]], int]:
    """The first megabyte or so of rows that can be read, and how many bytes they have.

    Raises:
        NotLines: the file is JSON, but not JSON Lines.
    """
    unit = Unit(id="", path=file.path, format="jsonl", output="", n_bytes=file.size)
    rows: list[dict[str, Any]] = []
    n_bytes = n_skipped = n_lines = 0
    with ExitStack() as files:
        lines = lines_of(
            unit,
            lambda: files.enter_context(storage.InputFile(file.path)),
            SAMPLED_LINE_BYTES,
            SAMPLE_SKIPPED_BYTES,
        )
        with suppress(*CONTENT_ERRORS):  # what could be read before counts; the rest is dead
            for place in lines:
                with suppress(RecordError):  # a dead letter later
                    rows.append(parse_line(place.line or b""))
                n_lines += 1
                n_bytes += len(place.line or b"")
                n_skipped += place.n_bytes
                if n_lines == 1 and not rows:
                    require_lines(file)
                if n_bytes > SAMPLE_BYTES or n_skipped > SAMPLE_SKIPPED_BYTES:
                    break
    return rows, n_bytes


def require_all_lines(files: Iterable[SourceFile]) -> None:
    """Raises NotLines if a file of JSON, by its name, is not JSON Lines.

    Files named .jsonl or .ndjson are believed: they may be a million.
    """
    named = (file for file in files if file.format == "jsonl" and NAMED_JSON.search(file.path))
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        while some := list(islice(named, BATCH)):
            list(pool.map(require_lines, some))


def require_lines(file: SourceFile) -> None:
    """Raises NotLines if a file is one JSON array or object over several lines."""
    head = b""
    with (
        suppress(*CONTENT_ERRORS),
        storage.InputFile(file.path) as source,
        decompressed(file.path, source) as stream,
    ):
        head = stream.read(HEAD_BYTES)
    what = _not_lines(head.removeprefix(BOM).decode("utf-8", errors="ignore").lstrip())
    if what:
        remedy = "jq -c '.[]'" if what == "a JSON array" else "jq -c ."
        raise NotLines(
            f"{file.path}: {what}, not JSON Lines: one object a line is expected; "
            f"{remedy} makes such a file, or leave this one out"
        )


def _not_lines(head: str) -> str:
    """What a text is that begins with no row; empty if it may be lines, good or bad."""
    kind = {"[": "a JSON array", "{": "a JSON object over several lines"}.get(head[:1], "")
    if not kind:
        return ""
    try:
        value, end = json.JSONDecoder().raw_decode(head)
    except json.JSONDecodeError as error:
        # Right up to where the text was cut: the rest is not in it.
        is_cut = len(head.encode()) >= HEAD_BYTES // 2 and (
            error.pos >= len(head) - 64 or error.msg.startswith("Unterminated string")
        )
        is_array = re.match(r"\[\s*\{", head) is not None
        return kind if is_cut and (is_array or "\n" in head[: error.pos]) else ""
    except (ValueError, RecursionError):
        return ""
    several_lines = "\n" in head[:end]
    return kind if several_lines or _is_array_of_rows(value) else ""


def _is_array_of_rows(value: Any) -> bool:
    """Whether this is a corpus in one line; not a row that happens to be a list."""
    return isinstance(value, list) and (not value or all(isinstance(row, dict) for row in value))
