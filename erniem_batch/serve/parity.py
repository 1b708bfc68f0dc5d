"""Whether a service says what a batch run has written: rows of its output, asked once more.

Comes in: an output folder and a client. Goes out: figures by column, and where rows differ; ids and
places only, never text. What the run was told is read from `_run/run.json`, which rows count from
the manifest; nothing of the service is assumed but its API.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from erniem_batch import storage
from erniem_batch.client import Client, Failed, ModelCard, Result, ServiceError
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.job.chunks import CONTENT_ERRORS
from erniem_batch.job.config import COUNTED_COLUMNS, LANGUAGE_COLUMN, TASK_FIELDS, TEXT_FLAGS
from erniem_batch.job.documents import parse_document
from erniem_batch.job.jsonl import parse_line, value_at
from erniem_batch.job.lines import bounded_lines
from erniem_batch.job.manifest import MANIFEST, Entry, Manifest, read_manifest
from erniem_batch.job.rowgroups import take_rows
from erniem_batch.options import (
    OPTIONS,
    ClassifyOptions,
    Options,
    flag_name,
    option_names,
    options_of,
)
from erniem_batch.serve.messages import NOT_ONLINE, TEXT_NAMES
from erniem_batch.terminal import safe_markup

Row = dict[str, Any]
Items = list[dict[str, Any]]
# Asks the service for the results of some items.
Asker = Callable[[Items], list[Result | Failed]]

RUN_INFO = "_run/run.json"
TOLERANCE = 1e-5
# bfloat16 has 8 bits: the last of them depends on what else is in a batch.
HALF_TOLERANCE = 2e-2
MAX_LETTERS = 20
SHOWN = 10
EXIT_DIFFERENT = 1


# ---- what a run was told ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A finished batch run.

    Attributes:
        settings: by name of their flags.
        options: of the task, as a request gives them.
        fields: names of what the task reads beside the text, with their columns.
        columns: with results.
    """

    folder: str
    manifest: Manifest
    task: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    text_column: str
    fields: Mapping[str, str]
    columns: tuple[str, ...]

    def item(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a request says of a row; what is null there is not given."""
        found = {name: _without_null(value_at(row, column)) for name, column in self.fields.items()}
        given = {name: value for name, value in found.items() if value is not None}
        return {TEXT_NAMES.get(self.task, "text"): value_at(row, self.text_column), **given}


def read_run(output: str) -> Run:
    """A run by its output folder.

    Raises:
        ConfigError: no finished run there, or one that cannot be compared; says why.
    """
    folder = storage.normal(output)
    manifest = read_manifest(folder)
    data = storage.read(storage.join(folder, RUN_INFO))
    if manifest is None or data is None:
        raise ConfigError(f"{output}: no finished batch run (no {MANIFEST} or no {RUN_INFO})")
    remedy = "run the command of the run again, which writes it anew where it can"
    fields = {"fingerprint": str, "settings": dict}
    info = parse_document(data, storage.join(folder, RUN_INFO), fields, remedy)
    if info["fingerprint"] != manifest.fingerprint:
        raise ConfigError(
            f"{output}: a run with other settings has begun there: let it finish, then compare"
        )
    settings = info["settings"]
    task = settings["task"]
    names = (*TASK_FIELDS.get(task, ()), "language")
    flags = {name: f"{name.replace('_', '-')}-column" for name in names}
    run = Run(
        folder,
        manifest,
        task,
        settings,
        online_options(task, settings),
        settings[TEXT_FLAGS.get(task, "--text-column").removeprefix("--")],
        {name: settings[flag] for name, flag in flags.items() if settings.get(flag)},
        _result_columns(task, settings),
    )
    _require_carried(output, run)
    return run


def online_options(task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run as those of a request.

    Raises:
        ConfigError: the run has some that requests cannot have.
    """
    values = _told(task, settings)
    loaded = NOT_ONLINE.get(task, set())
    fixed = [flag_name(n) for n in sorted(loaded) if values[n] != getattr(OPTIONS[task], n)]
    if fixed:
        raise ConfigError(f"the run was made with {', '.join(fixed)}, which no request can ask for")
    options = _options(task, settings)
    if isinstance(options, ClassifyOptions) and options.candidate_labels is not None:
        values["candidate_labels"] = options.labels  # of the command line: text
    return {name: value for name, value in values.items() if name not in loaded}


def _told(task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was told of the options of its task."""
    return {name: settings.get(name.replace("_", "-")) for name in option_names(task)}


def _options(task: str, settings: Mapping[str, Any]) -> Options:
    return options_of(task, {n: v for n, v in _told(task, settings).items() if v is not None})


def _result_columns(task: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    language = (LANGUAGE_COLUMN,) if settings.get("detect-language") else ()
    return (*_options(task, settings).added_columns, *language, *COUNTED_COLUMNS)


def _require_carried(output: str, run: Run) -> None:
    """Raises a ConfigError unless the output has what the run has read."""
    carried: list[str] | None = run.settings.get("columns")
    if carried is None:
        return
    tops = {column: column.split(".")[0] for column in (run.text_column, *run.fields.values())}
    absent = [column for column, top in tops.items() if not {column, top} & {*carried}]
    if absent:
        raise ConfigError(
            f"{output}: rows cannot be asked again without {', '.join(absent)}, which the output "
            f"does not carry: make one without --columns {','.join(carried)}, or with these added"
        )


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row of the output.

    Attributes:
        file, number: its place, from 0.
    """

    file: str
    number: int
    row: Row

    @property
    def place(self) -> dict[str, Any]:
        """By which people find it; its own id too, if it has one."""
        ident = self.row.get("id")
        own = {"id": ident} if isinstance(ident, str | int) else {}
        return {"file": self.file, "row": self.number, **own}


def sample_rows(run: Run, n_rows: int, seed: int) -> Iterator[Sampled]:
    """Rows of all files, each as likely as any other, in order; of files only what is needed.

    Raises:
        ConfigError: a file is not what the manifest says.
    """
    columns = [*run.columns, "id", run.text_column, *run.fields.values()]
    for entry, numbers in _places(run.manifest.files, n_rows, seed):
        path = storage.join(run.folder, entry.name)
        read = _jsonl_rows if entry.name.endswith(".jsonl") else _parquet_rows
        with _readable(path):
            rows = list(read(path, numbers, columns))
        if len(rows) != len(numbers):
            raise ConfigError(f"{path} has fewer rows than the manifest says")
        for number, row in zip(numbers, rows, strict=True):
            yield Sampled(entry.name, number, row)


def _places(
    entries: Sequence[Entry], n_rows: int, seed: int
) -> Iterator[tuple[Entry, Sequence[int]]]:
    """Files with the rows that were drawn."""
    total = sum(entry.n_rows for entry in entries)
    drawn = np.sort(random.Random(seed).sample(range(total), min(n_rows, total)))
    start = 0
    for entry in entries:
        first, last = np.searchsorted(drawn, [start, start + entry.n_rows])
        if last > first:
            yield entry, (drawn[first:last] - start).tolist()
        start += entry.n_rows


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (*CONTENT_ERRORS, RecordError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from error


def _parquet_rows(path: str, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
    wanted = {*columns, *(name.partition(".")[0] for name in columns)}  # of nested ones, the top
    for table in take_rows(path, numbers, wanted.__contains__):
        yield from table.to_pylist()


def _jsonl_rows(path: str, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
    wanted = set(numbers)
    for number, line in enumerate(bounded_lines(path)):
        if number in wanted and not isinstance(line, int):
            yield parse_line(line)


def _without_null(value: Any) -> Any:
    """A value as JSON has it: maps of Arrow as objects, and no fields that only other rows have."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)
    if isinstance(value, dict):
        return {name: _without_null(v) for name, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


# ---- dead letters -------------------------------------------------------------------------------


def sample_letters(run: Run, seed: int) -> Iterator[Sampled]:
    """Some dead letters whose content was refused, and which can be sent."""
    draw = random.Random(seed)
    entries = run.manifest.dead_letters
    of_each = -(-MAX_LETTERS // max(1, len(entries)))
    for entry in draw.sample(entries, min(MAX_LETTERS, len(entries))):
        path = storage.join(run.folder, entry.name)
        with _readable(path):
            table = storage.read_table(path)
        stages = table["stage"].to_pylist()
        numbers = [i for i, stage in enumerate(stages) if stage in ("encode", "decode")]
        for number in sorted(draw.sample(numbers, min(of_each, len(numbers)))):
            row = _whole_row(table.slice(number, 1))
            if row is not None and _can_be_sent(run, row):
                yield Sampled(entry.name, number, row)


def _whole_row(letter: pa.Table) -> Row | None:
    """The row of a dead letter; None: it is no text that could be sent."""
    try:
        if "row" in letter.column_names and letter["row"][0].is_valid:
            row: Row = letter["row"][0].as_py()
            return row
        return parse_line(letter["line"][0].as_py() or b"")
    except (UnicodeDecodeError, RecordError):
        return None


def _can_be_sent(run: Run, row: Row) -> bool:
    # To a run, a null second text is an error; to the service, there is none.
    if "text_pair" in run.fields and value_at(row, run.fields["text_pair"]) is None:
        return False
    try:
        json.dumps(run.item(row))
    except (TypeError, ValueError):
        return False
    return True


# ---- comparing ----------------------------------------------------------------------------------


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between the numbers of two values; infinite if they differ in more.

    Of floats it is relative to the larger one above 1, else absolute; all else has to be equal.
    """
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return math.inf
        return max(map(difference, ours, theirs), default=0.0)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            return math.inf
        return max((difference(ours[name], theirs[name]) for name in ours), default=0.0)
    if isinstance(ours, float) and isinstance(theirs, float):
        distance = abs(ours - theirs) / max(1.0, abs(ours), abs(theirs))
        return distance if math.isfinite(distance) else math.inf
    return 0.0 if type(ours) is type(theirs) and ours == theirs else math.inf


def vector_difference(ours: Any, theirs: Any, dtype: str) -> float:
    """The same for vectors, less what rounding to their type may make of nothing.

    Args:
        dtype: float32, float16, or int8, which holds 127 times the number.
    """
    if not (isinstance(ours, list) and isinstance(theirs, list)) or len(ours) != len(theirs):
        return math.inf
    one, other = np.array(ours, np.float64), np.array(theirs, np.float64)
    largest = np.maximum(np.abs(one), np.abs(other))
    scale: float | np.ndarray = np.maximum(1.0, largest)
    step: float | np.ndarray = 0.0
    if dtype == "int8":
        step, scale = 1.0, 127.0
    elif dtype == "float16":
        step = np.spacing(largest.astype(np.float16)).astype(np.float64)
    distance = float((np.maximum(np.abs(one - other) - step, 0.0) / scale).max(initial=0.0))
    return distance if math.isfinite(distance) else math.inf


def tree_of(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Extracted items by name, in each what was found out about it.

    Earlier versions sorted the names of a schema in `_run/run.json`, so that their order, and with
    it the numbers of the items, cannot be asked for again; the order of what has one name can.

    Raises:
        KeyError: an item stands before its parent.
    """
    root: dict[str, Any] = {}
    inside: dict[int | None, dict[str, Any]] = {None: root}
    for item in items:
        own = {k: v for k, v in item.items() if k not in ("id", "parent", "name")}
        own["inside"] = inside[item["id"]] = {}
        inside[item["parent"]].setdefault(item["name"], []).append(own)
    return root


def _column_difference(run: Run, name: str, ours: Any, theirs: Any) -> float:
    if name == "extracted" and isinstance(ours, list) and isinstance(theirs, list):
        try:
            return difference(tree_of(ours), tree_of(theirs))
        except KeyError:
            return math.inf
    if name == "embedding":
        return vector_difference(ours, theirs, str(run.options.get("output_dtype")))
    if name == "extracted_json" and isinstance(ours, str) and isinstance(theirs, str):
        return difference(json.loads(ours), json.loads(theirs))
    return difference(ours, theirs)


@dataclass(slots=True)
class Column:
    """How often a column was equal.

    Attributes:
        largest: difference between numbers.
    """

    n_equal: int = 0
    n_different: int = 0
    largest: float = 0.0


@dataclass(slots=True)
class ParityReport:
    """What came of it.

    Attributes:
        findings: why answers may differ, in words: another model, other windows.
        columns: figures of each column with results.
        different: places of rows that differ, with the columns in which they do, or the code of
            the error that the service gave instead.
        answered_letters: places of dead letters that the service does not refuse.
    """

    task: str
    model: str
    tolerance: float
    findings: list[str]
    columns: dict[str, Column] = field(default_factory=dict)
    n_equal: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    n_letters: int = 0
    answered_letters: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Rows compared."""
        return self.n_equal + len(self.different)

    @property
    def largest(self) -> float:
        """Difference between numbers, where all else was equal."""
        return max((column.largest for column in self.columns.values()), default=0.0)

    @property
    def exit_code(self) -> int:
        """0 equal, 1 not."""
        is_equal = not (self.findings or self.different or self.answered_letters)
        return 0 if is_equal else EXIT_DIFFERENT

    def as_line(self) -> str:
        """The figures as one line of JSON."""
        figures = {
            "task": self.task,
            "model": self.model,
            "rows": self.n_rows,
            "equal": self.n_equal,
            "different": len(self.different),
            "largest_difference": self.largest,
            "tolerance": self.tolerance,
            "dead_letters": self.n_letters,
            "dead_letters_answered": len(self.answered_letters),
            "findings": self.findings,
            "first_different": self.different[:SHOWN],
            "first_answered": self.answered_letters[:SHOWN],
        }
        return json.dumps(figures, ensure_ascii=False)

    def add(self, run: Run, sampled: Sampled, answer: Result | Failed) -> None:
        """One more row."""
        if isinstance(answer, Failed):
            self.different.append(sampled.place | {"error": answer.code})
            return
        theirs = asdict(answer)
        differing = []
        for name in run.columns:
            column = self.columns.setdefault(name, Column())
            found = _column_difference(run, name, sampled.row.get(name), theirs.get(name))
            if math.isfinite(found):
                column.largest = max(column.largest, found)
            if found <= self.tolerance:
                column.n_equal += 1
            else:
                column.n_different += 1
                differing.append(name)
        if differing:
            self.different.append(sampled.place | {"columns": differing})
        else:
            self.n_equal += 1


def compare(
    output: str,
    client: Client,
    *,
    n_rows: int = 200,
    tolerance: float | None = None,
    seed: int = 7,
    model: str | None = None,
) -> ParityReport:
    """Asks a service for rows of a batch output, with the options of the run.

    Args:
        output: folder or URL of a finished run.
        n_rows: drawn from all files.
        tolerance: largest difference between numbers that counts as none; default: TOLERANCE, or
            HALF_TOLERANCE for a run in half precision.
        seed: of the drawing.
        model: name of the model to ask; default: the service's first for the task.

    Raises:
        ConfigError: no such run, rows that cannot be asked again, or a service that has no such
            model, does not let us in, or does not take the options of the run.
        ServiceError: the service cannot be reached, or fails.
    """
    if n_rows < 1:
        raise ConfigError(f"--rows must be at least 1, got {n_rows}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ConfigError(f"--tolerance must be at least 0, got {tolerance}")
    run = read_run(output)
    if tolerance is None:
        tolerance = TOLERANCE if run.settings.get("dtype") == "float32" else HALF_TOLERANCE
    with _refusals_are_usage():
        card = _card(client.models(), run.task, model)
        report = ParityReport(run.task, card.id, tolerance, findings(run, card))

        def ask(items: Items) -> list[Result | Failed]:
            return list(client.stream(run.task, items, model=card.id, **run.options))

        rows = list(sample_rows(run, n_rows, seed))
        for sampled, answer in zip(rows, _answers(ask, run, rows), strict=True):
            report.add(run, sampled, answer)
        for letter in sample_letters(run, seed):
            report.n_letters += 1
            if not isinstance(_answer(ask, run.item(letter.row)), Failed):
                report.answered_letters.append(letter.place)
    return report


@contextmanager
def _refusals_are_usage() -> Iterator[None]:
    """What the caller can mend becomes a ConfigError; a service that is away or fails does not."""
    try:
        yield
    except ServiceError as error:
        if error.status is None or error.status in (408, 429) or error.status >= 500:
            raise
        hints = {401: ": give a token with --token-env", 403: ": give a token with --token-env"}
        hint = hints.get(error.status, "")
        raise ConfigError(f"the service refuses: {error}{hint}") from error


def _card(cards: Sequence[ModelCard], task: str, model: str | None) -> ModelCard:
    able = [card for card in cards if task in card.tasks]
    chosen = [card for card in able if model in (None, card.id)]
    if not chosen:
        there = ", ".join(card.id for card in able) or "none"
        what = f"no model {model!r} for {task}" if model else f"no model for {task}"
        raise ConfigError(f"the service has {what}; there is {there}")
    return chosen[0]


def findings(run: Run, card: ModelCard) -> list[str]:
    """Why a model of a service cannot be trusted to answer as the run did, in words."""
    found = []
    ours, theirs = str(run.settings["model"]), str(card.digests.get(run.task))
    if ours != theirs:
        found.append(f"another model: the run had {ours[:12]}, {card.id} is {theirs[:12]}")
    told = {
        "window-tokens": card.window_tokens,
        "overlap-tokens": card.overlap_tokens,
        "detect-language": card.detect_language,
        "dtype": card.dtype,
    }
    for name, value in told.items():
        if run.settings.get(name) != value:
            found.append(
                f"another --{name}: the run had {run.settings.get(name)}, {card.id} {value}"
            )
    return found


def _answers(ask: Asker, run: Run, rows: Sequence[Sampled]) -> list[Result | Failed]:
    items = [run.item(sampled.row) for sampled in rows]
    try:
        return ask(items)
    except ServiceError as error:
        if not _is_of_an_item(error):
            raise
    # One has a form that is not taken, and the others of its request suffer.
    return [_answer(ask, item) for item in items]


def _answer(ask: Asker, item: dict[str, Any]) -> Result | Failed:
    try:
        return ask([item])[0]
    except ServiceError as error:
        if not _is_of_an_item(error):
            raise
        return Failed("0", error.code, error.message, "invalid_request_error")


def _is_of_an_item(error: ServiceError) -> bool:
    """Whether others of the same request may be answered without it, or with fewer of them."""
    return error.status == 413 or (
        error.status == 422 and (error.param or "").startswith("inputs.")
    )


# ---- for people ---------------------------------------------------------------------------------


def show(report: ParityReport, console: Console) -> None:
    """The figures as a table, then what differs."""
    table = Table(
        "column",
        "equal",
        "different",
        "largest difference",
        title=f"{report.task}: run and service",
    )
    for name, column in report.columns.items():
        style = "bold red" if column.n_different else None
        figures = (f"{column.n_equal:,}", f"{column.n_different:,}", f"{column.largest:.1e}")
        table.add_row(name, *figures, style=style)
    console.print(table)
    for finding in report.findings:
        console.print(f"[bold red]{safe_markup(finding)}[/]", highlight=False, soft_wrap=True)
    for place in report.different[:SHOWN]:
        why = ", ".join(place.get("columns", ())) or f"refused: {place['error']}"
        console.print(safe_markup(f"{_shown(place)}  {why}"), highlight=False, soft_wrap=True)
    for place in report.answered_letters[:SHOWN]:
        text = f"{_shown(place)}  a dead letter of the run, answered by the service"
        console.print(safe_markup(text), highlight=False, soft_wrap=True)
    if report.n_letters:
        refused = report.n_letters - len(report.answered_letters)
        console.print(f"{refused:,} of {report.n_letters:,} dead letters refused as by the run")
    verdict = "[bold red]different" if report.exit_code else "[bold green]equal"
    console.print(f"{verdict}[/]: {report.n_equal:,} of {report.n_rows:,} rows", highlight=False)


def _shown(place: Mapping[str, Any]) -> str:
    own = f" (id {place['id']})" if "id" in place else ""
    return f"{place['file']}:{place['row']}{own}"
