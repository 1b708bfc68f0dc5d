"""Predictions in the form that is compared with gold, read from the columns of a batch run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from erniem_batch.errors import RecordError
from erniem_batch.text.offsets import Offsets
from erniem_batch.thresholds import ANY, Thresholds

Row = Mapping[str, Any]


class FoundSpan(NamedTuple):
    """An entity; code points, half-open."""

    start: int
    end: int
    label: str
    score: float


class FoundLabel(NamedTuple):
    """A label of a text, or a number in `score` (regression)."""

    label: str
    score: float


class FoundChoice(NamedTuple):
    """The index that was chosen; None: none scored high enough."""

    best: int | None
    score: float


class FoundAnswer(NamedTuple):
    """The answer to a question; None: there is none."""

    text: str | None
    score: float


class FoundItem(NamedTuple):
    """An extracted item; `parent` is the id of another one; options have no place."""

    id: int
    parent: int | None
    name: str
    text: str
    start: int | None
    end: int | None
    score: float


class Places:
    """Places of a text in another unit, as code points."""

    def __init__(self, text: str, unit: str) -> None:
        place = Offsets(text, unit)
        self._unit = unit
        self._points: dict[int, int] | None = None
        if unit != "codepoint":
            self._points = {place(i): i for i in range(len(text) + 1)}

    def __call__(self, place: int) -> int:
        if self._points is None:
            return place
        if place not in self._points:
            raise RecordError(f"a place of the run ({self._unit} {place}) is inside a character")
        return self._points[place]


def value_of(task: str, row: Row, text: str, unit: str = "codepoint") -> Any:
    """The prediction in a row of a batch run.

    Args:
        text: that was read.
        unit: of start and end in the row.

    Raises:
        RecordError: the row has not the columns of the task, or a place outside of the text.
    """
    return READERS[task](row, Places(text, unit))


def _ner(row: Row, place: Places) -> list[FoundSpan]:
    return [
        FoundSpan(place(e["start"]), place(e["end"]), e["label"], e["score"])
        for e in _column(row, "entities")
    ]


def _classify(row: Row, place: Places) -> list[FoundLabel]:
    return [FoundLabel(e["label"], e["score"]) for e in _column(row, "label_scores")]


def _choose(row: Row, place: Places) -> FoundChoice:
    scores = _column(row, "choice_scores")
    return FoundChoice(row.get("predicted_choice"), max(scores, default=0.0))


def _qa(row: Row, place: Places) -> FoundAnswer:
    answers = _column(row, "predicted_answers")
    score = answers[0]["score"] if answers else 0.0
    return FoundAnswer(row.get("predicted_answer"), score)


def _extract(row: Row, place: Places) -> list[FoundItem]:
    items = []
    for e in _column(row, "extracted"):
        start, end = (None if e[n] is None else place(e[n]) for n in ("start", "end"))
        items.append(
            FoundItem(e["id"], e["parent"], e["name"], e["text"], start, end, e["probability"])
        )
    return items


def _embed(row: Row, place: Places) -> np.ndarray:
    return np.asarray(_column(row, "embedding"), np.float32)


READERS: dict[str, Callable[[Row, Places], Any]] = {
    "ner": _ner,
    "classify": _classify,
    "choose": _choose,
    "qa": _qa,
    "extract": _extract,
    "embed": _embed,
}


def _column(row: Row, name: str) -> Sequence[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        came = "no such column" if name not in row else type(value).__name__
        raise RecordError(f"{name}: expected a list, as a batch run writes it, got {came}")
    return value


# ---- thresholds -------------------------------------------------------------------------------


def passing(task: str, value: Any, thresholds: Thresholds, language: str) -> Any:
    """What of a prediction scores high enough; None stays None."""
    if value is None or task == "embed":
        return value
    if task == "choose":
        kept = value.score >= thresholds(ANY, language)
        return value if kept else value._replace(best=None)
    if task == "qa":
        kept = value.score >= thresholds(ANY, language)
        return value if kept else value._replace(text=None)
    if task == "extract":
        return _passing_items(value, thresholds, language)
    return [item for item in value if item.score >= thresholds(item.label, language)]


def _passing_items(
    items: Sequence[FoundItem], thresholds: Thresholds, language: str
) -> list[FoundItem]:
    """Items whose parents pass too: about others nothing would have been asked."""
    kept: dict[int, FoundItem] = {}
    for item in items:  # parents come before their children
        has_parent = item.parent is None or item.parent in kept
        if has_parent and item.score >= thresholds(item.name, language):
            kept[item.id] = item
    return list(kept.values())
