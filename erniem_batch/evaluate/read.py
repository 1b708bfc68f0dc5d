"""Gold rows and predictions of a batch run, put side by side."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from erniem_batch import storage
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.evaluate.values import value_of
from erniem_batch.gold import Annotated, annotated, language_of, rows_of
from erniem_batch.job.documents import parse_document
from erniem_batch.job.jsonl import parse_line
from erniem_batch.job.manifest import MANIFEST, read_manifest
from erniem_batch.job.units import SourceFile, files_of, find_files

logger = logging.getLogger(__name__)

RUN_INFO = "_run/run.json"
SHOWN = 5
# Under which of these names a row has the text that predictions are about.
TEXT_COLUMNS = {"choose": ("premise",), "qa": ("context",), "extract": ("content", "text")}

Row = Mapping[str, Any]
Key = tuple[str, ...]
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch run has left.

    Attributes:
        rows: with their predictions, and a name for those without an id.
        dead: rows that ended as dead letters, as far as they can be read.
        n_unread: dead letters that cannot.
        settings: of the run by name of its flag; empty for plain files.
    """

    path: str
    rows: list[tuple[str, Row]]
    dead: list[tuple[str, Row]] = field(default_factory=list)
    n_unread: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offset_unit(self) -> str:
        """What start and end count."""
        return str(self.settings.get("offset-unit") or "codepoint")


def read_run(path: str, flag: str = "--predictions") -> Run:
    """The rows of an output folder, or of Parquet or JSONL files.

    Args:
        flag: that the path was given with.

    Raises:
        ConfigError: nothing there, a run that is not complete, or a line that is no row.
    """
    folder = storage.normal(path)
    info = storage.read(storage.join(folder, RUN_INFO))
    manifest = read_manifest(folder)
    if manifest is None:
        if info is not None:
            raise ConfigError(
                f"{path}: the run there is not complete (no {MANIFEST}): run it again, it goes on"
            )
        return Run(path, _named_rows(files_of(_found(path, flag))))
    settings = {} if info is None else _settings(info, storage.join(folder, RUN_INFO))
    files = [_source(folder, entry.name) for entry in manifest.files]
    dead, n_unread = _dead_rows([storage.join(folder, e.name) for e in manifest.dead_letters])
    return Run(path, _named_rows(files), dead, n_unread, settings)


def _settings(data: bytes, path: str) -> Mapping[str, Any]:
    remedy = "run the command of the run again, which writes it anew where it can"
    settings: Mapping[str, Any] = parse_document(data, path, {"settings": dict}, remedy)["settings"]
    return settings


def _found(path: str, flag: str) -> Any:
    with named_flag(flag):
        return find_files([path])


@contextmanager
def named_flag(flag: str) -> Iterator[None]:
    """Errors about files name the flag that they were given with."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"^--input\b", flag, str(error))) from None


def _source(folder: str, name: str) -> SourceFile:
    format_ = "parquet" if name.endswith(".parquet") else "jsonl"
    return SourceFile(storage.join(folder, name), name, format_)


def _named_rows(files: Iterable[SourceFile]) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    for file in files:
        for number, row in enumerate(rows_of(file)):
            if isinstance(row, RecordError):
                raise ConfigError(f"{file.path} row {number}: {row}")
            rows.append((f"{file.name}:{number}", row))
    return rows


def _dead_rows(paths: Sequence[str]) -> tuple[list[tuple[str, Row]], int]:
    """The rows in files of dead letters, and how many of them hold none that can be read."""
    rows: list[tuple[str, Row]] = []
    n_unread = 0
    for path in paths:
        for number, letter in enumerate(storage.read_table(path).to_pylist()):
            try:
                row: Row = letter.get("row") or parse_line(letter["line"] or b"")
            except RecordError:
                n_unread += letter["n_rows"] or 1
            else:
                rows.append((f"{path}:{number}", row))
    return rows, n_unread


# ---- gold and predictions ---------------------------------------------------------------------


def own_gold(task: str, run: Run) -> tuple[list[Annotated], list[Any]]:
    """The gold columns that a run has carried along, and its predictions, None for dead letters.

    Raises:
        ConfigError: the rows are not annotated, or have no predictions; names the first few.
    """

    def read(named: tuple[str, Row]) -> tuple[Annotated, Any]:
        name, row = named
        gold = annotated(task, row, name)
        return gold, value_of(task, row, gold.record.text, run.offset_unit)

    pairs = _all_of(
        [f"{run.path} row {name}" for name, _ in run.rows],
        run.rows,
        read,
        f"are not annotated for {task} with predictions: give the gold rows with --gold",
    )
    gold, values = [gold for gold, _ in pairs], [value for _, value in pairs]
    n_unread = run.n_unread
    for name, row in run.dead:
        try:
            gold.append(annotated(task, row, name))
            values.append(None)
        except RecordError:
            n_unread += 1
    if n_unread:
        logger.warning("dead letters without a gold row are left out n=%d", n_unread)
    if not gold:
        raise ConfigError(f"{run.path}: there are no rows")
    return gold, values


def _all_of(
    names: Sequence[str], items: Sequence[Item], read: Callable[[Item], Value], remedy: str
) -> list[Value]:
    """All items read; one error for all that cannot be."""
    found: list[Value] = []
    problems = []
    for name, item in zip(names, items, strict=True):
        try:
            found.append(read(item))
        except RecordError as error:
            problems.append(f"{name}: {error}")
    if problems:
        shown = "; ".join(problems[:SHOWN])
        raise ConfigError(f"{len(problems)} of {len(items)} rows {remedy}. The first: {shown}")
    return found


def joined(task: str, gold: Sequence[Annotated], run: Run) -> list[Any]:
    """The prediction of each gold row, None where the run has none.

    Rows belong together by their id; where one id stands in several languages, by both.

    Raises:
        ConfigError: rows without id, ids that stand twice or that no gold row has, or a row whose
            text is another than that of its gold row; says which.
    """
    keys, key_of = _keys(gold)
    places = {key: i for i, key in enumerate(keys)}
    without = [name for name, row in run.rows if row.get("id") is None]
    if without:
        raise ConfigError(
            f"{run.path}: {len(without)} rows have no id to be joined by, the first: "
            f"{_shown(without)}: carry the column id through the run"
        )
    found = [key_of(row) for _, row in run.rows]
    _require_once(found, run.path)
    unknown = [key for key in found if key not in places]
    if unknown:
        raise ConfigError(
            f"{run.path}: {len(unknown)} rows have an id that no gold row has, the first: "
            f"{_shown(unknown)}: evaluate with the gold rows of the same input"
        )
    values: list[Any] = [None] * len(gold)

    def read(item: tuple[int, Row]) -> None:
        i, row = item
        text = gold[i].record.text
        _require_same_text(task, row, text)
        values[i] = value_of(task, row, text, run.offset_unit)

    _all_of(
        [f"row {_name(key)}" for key in found],
        [(places[key], row) for key, (_, row) in zip(found, run.rows, strict=True)],
        read,
        f"of {run.path} are no predictions for the gold rows of {task}",
    )
    return values


def _keys(gold: Sequence[Annotated]) -> tuple[list[Key], Callable[[Row], Key]]:
    """A key of each gold row, and what makes the same of another row."""
    without = [row.record.id for row in gold if row.row.get("id") is None]
    if without:
        raise ConfigError(
            f"--gold: {len(without)} rows have no id to be joined by, the first: {_shown(without)}"
        )
    ids: list[Key] = [(row.record.id,) for row in gold]
    if len(set(ids)) == len(ids):
        return ids, lambda row: (str(row["id"]),)
    both: list[Key] = [(row.record.id, row.language) for row in gold]
    _require_once(both, "--gold")
    return both, lambda row: (str(row["id"]), language_of(row))


def _require_once(keys: Sequence[Key], where: str) -> None:
    doubled = [key for key, n in Counter(keys).items() if n > 1]
    if doubled:
        raise ConfigError(
            f"{where}: {len(doubled)} ids stand in several rows, the first: {_shown(doubled)}: "
            f"each row needs an id of its own (in its language)"
        )


def _require_same_text(task: str, row: Row, text: str) -> None:
    for name in TEXT_COLUMNS.get(task, ("text",)):
        if isinstance(row.get(name), str) and row[name] != text:
            raise RecordError(
                f"its {name} has {len(row[name])} characters and is not the same as in the gold "
                f"row, which has {len(text)}"
            )


def _name(key: Key) -> str:
    return repr(key[0]) if len(key) == 1 else f"{key[0]!r} ({key[1] or 'no language'})"


def _shown(keys: Sequence[Key | str]) -> str:
    names = [_name((key,) if isinstance(key, str) else key) for key in keys]
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
