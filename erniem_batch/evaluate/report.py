"""The outcome of an evaluation for people and machines."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from erniem_batch import storage
from erniem_batch.evaluate.bootstrap import Interval
from erniem_batch.evaluate.calibration import BINS, Bins, picture
from erniem_batch.evaluate.compare import Comparison
from erniem_batch.evaluate.scorers import Figures, known
from erniem_batch.evaluate.tune import Tuning
from erniem_batch.terminal import safe_markup

logger = logging.getLogger(__name__)

EXIT_BELOW = 6


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of an evaluation.

    Attributes:
        source: the model or the run.
        n_missing: gold rows without a prediction; they count as nothing predicted.
        columns: figures that tables show.
        figures: of all rows. `languages`, `labels`: of each.
        intervals: 95 %, of figures of all rows; `language_intervals`: of the headline.
        below: figures that --fail-below does not let pass: name, value, limit.
    """

    task: str
    source: str
    headline: str
    label_noun: str
    columns: Sequence[str]
    n_rows: int
    n_missing: int
    figures: Figures
    languages: dict[str, Figures]
    labels: dict[str, Figures]
    intervals: dict[str, Interval]
    language_intervals: dict[str, Interval]
    bins: Bins | None = None
    tuning: Tuning | None = None
    comparison: Comparison | None = None
    below: list[tuple[str, float | None, float]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """6 if a figure is too low, else 0."""
        return EXIT_BELOW if self.below else 0

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds."""
        found: dict[str, Any] = {
            "task": self.task,
            "source": self.source,
            "headline": self.headline,
            "n_rows": self.n_rows,
            "n_missing": self.n_missing,
            "figures": self.figures,
            "intervals": self.intervals,
            "languages": {
                name: {**figures, **self._interval_of(name)}
                for name, figures in self.languages.items()
            },
            "labels": self.labels,
        }
        if self.bins is not None:
            found["calibration"] = _bins(self.bins)
        if self.tuning is not None:
            found["tune"] = {**self.tuning.figures, "thresholds": self.tuning.thresholds}
        if self.comparison is not None:
            found["compare"] = self.comparison.as_dict()
        found["below"] = [
            {"metric": name, "value": value, "limit": limit} for name, value, limit in self.below
        ]
        return found

    def _interval_of(self, language: str) -> dict[str, Interval]:
        interval = self.language_intervals.get(language)
        return {} if interval is None else {"interval": interval}

    def as_line(self) -> str:
        """The same as one line of JSON."""
        return json.dumps(self.as_dict(), ensure_ascii=False)


def _bins(bins: Bins) -> list[dict[str, Any]]:
    return [
        {
            "up_to": (i + 1) / BINS,
            "n": int(bins.n[i]),
            "confidence": known(bins.confidence[i]),
            "accuracy": known(bins.accuracy[i]),
        }
        for i in range(BINS)
    ]


# ---- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """A table, before anybody has drawn it: a title, names of columns, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(evaluation: Evaluation) -> list[Grid]:
    """Overall and by language, by label, what tuning brings, what has changed."""
    found = [_by_language(evaluation)]
    others = _others(evaluation)
    if others:
        found.append(Grid("further figures", ("figure", "value", "95 %"), others))
    if evaluation.labels:
        columns = _columns(evaluation.columns, evaluation.labels.values())
        rows = [[name, *_cells(f, columns)] for name, f in evaluation.labels.items()]
        title = f"by {evaluation.label_noun}"
        found.append(Grid(title, (evaluation.label_noun, *map(_spaced, columns)), rows))
    if evaluation.tuning is not None:
        found.append(_tuned(evaluation.tuning))
    if evaluation.comparison is not None:
        found.append(_compared(evaluation.comparison))
    return found


def _by_language(evaluation: Evaluation) -> Grid:
    columns = _columns(evaluation.columns, [evaluation.figures, *evaluation.languages.values()])
    intervals = {**evaluation.language_intervals}
    rows = [
        [name, *_cells(figures, columns), _limits(intervals.get(name))]
        for name, figures in evaluation.languages.items()
    ]
    if len(evaluation.languages) > 1:
        macro = f"macro_{evaluation.headline}_languages"
        rows.append(["macro", *_macro(evaluation, columns, macro)])
    limits = _limits(evaluation.intervals.get(evaluation.headline))
    rows.append(["all", *_cells(evaluation.figures, columns), limits])
    heads = ("language", *map(_spaced, columns), f"95 % of {_spaced(evaluation.headline)}")
    return Grid(f"{evaluation.task}: {evaluation.source}", heads, rows)


def _macro(evaluation: Evaluation, columns: Sequence[str], macro: str) -> list[str]:
    """Means over languages of what can be averaged."""
    cells = []
    for name in columns:
        values = [f.get(name) for f in evaluation.languages.values()]
        numbers = [value for value in values if value is not None]
        mean = sum(numbers) / len(numbers) if numbers else None
        cells.append("" if name.startswith("n_") else _number(mean))
    if evaluation.figures.get(macro) is not None and evaluation.headline in columns:
        cells[list(columns).index(evaluation.headline)] = _number(evaluation.figures[macro])
    return [*cells, _limits(evaluation.intervals.get(macro))]


def _others(evaluation: Evaluation) -> list[list[str]]:
    """Figures of all rows that the first table does not show."""
    rows = [
        [_spaced(name), _number(value), _limits(evaluation.intervals.get(name))]
        for name, value in evaluation.figures.items()
        if name not in evaluation.columns
    ]
    rows.append(["rows", f"{evaluation.n_rows:,}", ""])
    if evaluation.n_missing:
        rows.append(["rows without prediction", f"{evaluation.n_missing:,}", ""])
    return rows


def _tuned(tuning: Tuning) -> Grid:
    names = list(tuning.figures["before"])
    stages = ("before", "after", "cross_validated")
    rows = [[_spaced(s), *(_number(tuning.figures[s].get(n)) for n in names)] for s in stages]
    return Grid("thresholds", ("", *map(_spaced, names)), rows)


def _compared(comparison: Comparison) -> Grid:
    parts = {"all": comparison.figures, **comparison.languages}
    rows = [
        [
            name,
            _number(part["before"]),
            _number(part["after"]),
            _number(part["difference"], sign=True),
            _limits(part.get("interval"), sign=True),
            _number(part.get("p_value")),
        ]
        for name, part in parts.items()
    ]
    heads = ("language", "before", "after", "difference", "95 %", "p")
    title = f"{_spaced(comparison.headline)} before and after"
    if comparison.mcnemar is not None:
        title += f"; McNemar's exact test p = {_number(comparison.mcnemar['p_value'])}"
    return Grid(title, heads, rows)


def _columns(wanted: Sequence[str], parts: Any) -> list[str]:
    return [name for name in wanted if any(name in figures for figures in parts)]


def _cells(figures: Mapping[str, float | None], columns: Sequence[str]) -> list[str]:
    return [_number(figures[name]) if name in figures else "" for name in columns]


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _limits(interval: Interval | None, sign: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (_number(value, sign) for value in interval)
    return f"{low} to {high}"


def _spaced(name: str) -> str:
    return {"n_gold": "gold", "n_predicted": "predicted"}.get(name, name.replace("_", " "))


def show(evaluation: Evaluation, console: Console) -> None:
    """Tables on a terminal, and which figures are too low."""
    for grid in grids(evaluation):
        table = Table(title=safe_markup(grid.title), title_justify="left")
        for i, head in enumerate(grid.columns):
            table.add_column(safe_markup(head), justify="right" if i else "left")
        for row in grid.rows:
            table.add_row(*map(safe_markup, row))
        console.print(table)
    for name, value, limit in evaluation.below:
        console.print(f"[bold red]below[/]  {safe_markup(name)} {_number(value)} < {limit}")


def markdown(evaluation: Evaluation) -> str:
    """The same tables as Markdown, fit for a model card."""
    parts = []
    for grid in grids(evaluation):
        head = "| " + " | ".join(map(_cell, grid.columns)) + " |"
        line = "|---|" + "--:|" * (len(grid.columns) - 1)
        rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in grid.rows]
        parts.append("\n".join([f"**{grid.title}**", "", head, line, *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_report(folder: str, evaluation: Evaluation) -> None:
    """metrics.json, table.md, and if there are any reliability.png and changed.jsonl.

    Raises:
        StorageError: a file cannot be written.
    """
    files = {
        "metrics.json": json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False) + "\n",
        "table.md": markdown(evaluation),
    }
    if evaluation.comparison is not None:
        rows = evaluation.comparison.changed
        files["changed.jsonl"] = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    target = storage.normal(folder)
    for name, text in files.items():
        storage.write(storage.join(target, name), text.encode())
    if evaluation.bins is not None:
        storage.write(storage.join(target, "reliability.png"), picture(evaluation.bins))
    logger.info("report written folder=%s", folder)
