"""Jobs and rows for every task, as many as wanted, that tests of whole runs share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from fakes import write_jsonl, write_parquet

Row = dict[str, Any]

SENTENCES = [
    "Ada Lovelace lived in London with {i} cats.",
    "北京は{i}番目に大きい都市です。",
    "Сергей живёт в Москве, дом {i} 😀",
    "👩‍👧 ﬁne é in Zürich № {i}",
    "The number {i} is in the news again?",
    "عاش {i} في القاهرة",
    "Die Kinder gingen in den Wald {i}",
]


def text_of(i: int) -> str | None:
    """The text of a row: in several scripts; some are empty, long or null."""
    if i % 97 == 11:
        return None
    if i % 41 == 3:
        return "" if i % 2 else " \t\n"
    text = SENTENCES[i % len(SENTENCES)].format(i=i)
    if i % 53 == 7:
        return " ".join(sentence.format(i=i) for sentence in SENTENCES * 3)
    return text


def _choices_of(i: int) -> list[str | None] | None:
    if i % 89 == 5:
        return None
    if i % 89 == 6:
        return []
    if i % 89 == 7:
        return ["one", None]
    return [f"choice {j} of {i}" for j in range(1 + i % 4)]


@dataclass(frozen=True)
class TaskJob:
    """A pipeline as a user starts it.

    Attributes:
        flags: of the command line, beside input, output and model.
        columns: of the input, beside the id.
        row: the values of row i.
        is_bad: whether a row ends as a dead letter.
    """

    flags: list[str]
    columns: list[tuple[str, pa.DataType]]
    row: Callable[[int], Row]
    is_bad: Callable[[Row], bool]


def _no_text(row: Row) -> bool:
    return row["text"] is None


JOBS = {
    "ner": TaskJob([], [("text", pa.string())], lambda i: {"text": text_of(i)}, _no_text),
    "classify": TaskJob(
        ["--text-pair-column", "pair", "--top-k", "2"],
        [("text", pa.string()), ("pair", pa.string())],
        lambda i: {"text": text_of(i), "pair": None if i % 101 == 50 else f"and {i % 9}"},
        lambda row: row["text"] is None or row["pair"] is None,
    ),
    "choose": TaskJob(
        ["--question-column", "question"],
        [
            ("premise", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("question", pa.string()),
        ],
        lambda i: {
            "premise": text_of(i),
            "choices": _choices_of(i),
            "question": ("cause", "effect", "why?", "", None)[i % 5],
        },
        lambda row: row["premise"] is None or not row["choices"] or None in row["choices"],
    ),
    "qa": TaskJob(
        ["--top-k", "2", "--null-threshold", "0", "--question-column", "q.text"],
        [("context", pa.string()), ("q", pa.struct([("text", pa.string())]))],
        lambda i: {
            "context": text_of(i),
            "q": None if i % 83 == 9 else {"text": "" if i % 83 == 10 else f"Who is {i % 7}?"},
        },
        lambda row: not (row["context"] or "").strip() or not row["q"] or not row["q"]["text"],
    ),
    "embed": TaskJob([], [("text", pa.string())], lambda i: {"text": text_of(i)}, _no_text),
    "extract": TaskJob(
        [
            *("--schema", '{"Person": ["City"], "Mood [good, bad]": null}'),
            *("--schema-lang", "en", "--schema-column", "wanted", "--output-json"),
        ],
        [("text", pa.string()), ("wanted", pa.string())],
        lambda i: {
            "text": text_of(i),
            "wanted": "[unfinished" if i % 79 == 20 else ("Time" if i % 10 == 0 else None),
        },
        lambda row: row["text"] is None or row["wanted"] == "[unfinished",
    ),
}


def rows_of(task: str, n: int) -> list[Row]:
    """The first n rows of a task, with ids."""
    return [{"id": f"{i:06}", **JOBS[task].row(i)} for i in range(n)]


def write_rows(folder: Path, task: str, rows: list[Row], kind: str, per_file: int) -> Path:
    """Rows as files of one format."""
    schema = pa.schema([("id", pa.string()), *JOBS[task].columns])
    for part, start in enumerate(range(0, len(rows), per_file)):
        some = rows[start : start + per_file]
        path = folder / f"part-{part:05}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, some)
        else:
            write_parquet(path, pa.Table.from_pylist(some, schema))
    return folder
