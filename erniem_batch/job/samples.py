"""Rows of an output as people like to read them: the text, with what was found in it marked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.job.config import JobConfig
from erniem_batch.job.rowgroups import take_rows

MOST_CHARACTERS = 600
SIZES = {"utf16": ("utf-16-le", 2), "byte": ("utf-8", 1)}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to show.

    Attributes:
        parts: pieces of its text, each with its label or "".
    """

    title: str
    parts: list[tuple[str, str]]


def samples(config: JobConfig, output: str, files: Sequence[str], wanted: int) -> list[Sample]:
    """Some rows of an output, of as many of its files as possible.

    Args:
        files: names of output files with rows in them.
    """
    if config.output_format != "parquet" or not files or not wanted:
        return []
    n_files = min(wanted, len(files))
    chosen = [files[i * len(files) // n_files] for i in range(n_files)]
    found = []
    for i, name in enumerate(chosen):
        path = storage.join(output, name)
        n_there = _n_rows(path)
        n_rows = min(n_there, wanted // n_files + (i < wanted % n_files))
        places = [j * n_there // n_rows for j in range(n_rows)]
        for table in take_rows(path, places, _shown_columns(config).__contains__):
            found += [sample_of(config, row) for row in table.to_pylist()]
    return found


def _n_rows(path: str) -> int:
    with storage.InputFile(path) as source:
        return int(pq.read_metadata(pa.PythonFile(source, mode="r")).num_rows)


def _shown_columns(config: JobConfig) -> set[str]:
    """No others: Python has no values for every date or time that Arrow has."""
    read = [config.text_column, *config.fields.values()]
    return {*read, *(name.partition(".")[0] for name in read), *config.options.added_columns}


def sample_of(config: JobConfig, row: Row) -> Sample:
    """One row."""
    row = {**row, **{name: _value(row, column) for name, column in config.fields.items()}}
    text = _value(row, config.text_column)
    text = text if isinstance(text, str) else ""
    unit = getattr(config.options, "offset_unit", "codepoint")
    show = SHOWN[config.task]
    title, spans = show(row)
    return Sample(title, list(marked(text, spans, unit)))


def marked(
    text: str, spans: Sequence[tuple[int, int, str]], unit: str = "codepoint"
) -> Iterator[tuple[str, str]]:
    """A text in pieces, with the label of each or "".

    Args:
        spans: start, end and label; of those that overlap, the first counts.
        unit: of start and end.
    """
    coding, size = SIZES.get(unit, ("utf-32-le", 4))
    data = text.encode(coding, "surrogatepass")

    def piece(start: int, end: int | None) -> str:
        stop = None if end is None else end * size
        return data[start * size : stop].decode(coding, errors="replace")

    at = 0
    for start, end, label in sorted(spans):
        if start < at or end <= start or start >= MOST_CHARACTERS:
            continue
        if start > at:
            yield piece(at, start), ""
        yield piece(start, end), label
        at = end
    rest = piece(at, None)
    most = max(0, MOST_CHARACTERS - at)
    if rest:
        yield rest if len(rest) <= most else rest[:most] + " …", ""


def _value(row: Row, column: str) -> Any:
    value: Any = row
    for name in [column] if column in row else column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


Shown = tuple[str, list[tuple[int, int, str]]]


def _entities(row: Row) -> Shown:
    return "", [(e["start"], e["end"], e["label"]) for e in row["entities"]]


def _items(row: Row) -> Shown:
    items = row["extracted"]
    options = [f"{i['name']}: {i['text']}" for i in items if i["start"] is None]
    spans = [(i["start"], i["end"], i["name"]) for i in items if i["start"] is not None]
    return ", ".join(options), spans


def _label(row: Row) -> Shown:
    label, score = row["predicted_label"], row["predicted_score"]
    return "no label" if label is None else f"{label} {score:.2f}", []


def _choice(row: Row) -> Shown:
    best = row["predicted_choice"]
    if best is None:
        return "no choice", []
    choices = row.get("choices")
    name = choices[best] if isinstance(choices, list) else f"choice {best + 1}"
    return f"{name} {row['choice_scores'][best]:.2f}", []


def _answer(row: Row) -> Shown:
    answers = row["predicted_answers"][:1] if row["predicted_answer"] is not None else []
    spans = [(a["start"], a["end"], f"{a['score']:.2f}") for a in answers]
    return str(row.get("question") or ""), spans


def _vector(row: Row) -> Shown:
    numbers = ", ".join(f"{x:+.3f}" for x in row["embedding"][:6])
    return f"[{numbers}, …]", []


SHOWN = {
    "ner": _entities,
    "extract": _items,
    "classify": _label,
    "choose": _choice,
    "qa": _answer,
    "embed": _vector,
}
