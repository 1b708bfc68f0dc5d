"""The thresholds with the best F1, by label and language, in the form that --min-score reads."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.classify import LabelScorer, LabelsScorer
from erniem_batch.evaluate.extract import ExtractScorer, found_in
from erniem_batch.evaluate.make import make_scorer
from erniem_batch.evaluate.measure import Array, Index, mean_of_groups
from erniem_batch.evaluate.ner import NerScorer
from erniem_batch.evaluate.scorers import Figures, Scorer, known
from erniem_batch.evaluate.values import passing
from erniem_batch.gold import Annotated
from erniem_batch.model.files import read_json_object
from erniem_batch.thresholds import ANY, Thresholds

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """All that was predicted at threshold 0, and all that was to be found, as columns.

    Attributes:
        names, rows, scores, correct: of each prediction: its label as predicted, its row, whether
            it is right.
        gold_labels, gold_rows: of each gold item.
        languages: of each row.
        renamed: gold labels by predicted ones.
    """

    names: npt.NDArray[Any]
    rows: Index
    scores: Array
    correct: Booleans
    gold_labels: npt.NDArray[Any]
    gold_rows: Index
    languages: npt.NDArray[Any]
    renamed: Mapping[str, str]

    def of(self, rows: Index) -> "Candidates":
        """Those of some of the rows."""
        mine, gold = np.isin(self.rows, rows), np.isin(self.gold_rows, rows)
        return Candidates(
            self.names[mine],
            self.rows[mine],
            self.scores[mine],
            self.correct[mine],
            self.gold_labels[gold],
            self.gold_rows[gold],
            self.languages,
            self.renamed,
        )


def candidates_of(scorer: Scorer) -> Candidates:
    """The predictions of a scorer, made at threshold 0."""
    predicted = [(*item, i) for i in range(len(scorer.gold)) for item in _predicted(scorer, i)]
    gold = [(label, i) for i in range(len(scorer.gold)) for label in _gold(scorer, i)]
    names, scores, correct, rows = zip(*predicted, strict=True) if predicted else ((),) * 4
    labels, gold_rows = zip(*gold, strict=True) if gold else ((),) * 2
    return Candidates(
        np.array(names, dtype=object),
        np.array(rows, dtype=np.int64),
        np.array(scores, dtype=np.float64),
        np.array(correct, dtype=bool),
        np.array(labels, dtype=object),
        np.array(gold_rows, dtype=np.int64),
        np.array([row.language for row in scorer.gold], dtype=object),
        scorer.names,
    )


def _predicted(scorer: Scorer, i: int) -> Iterator[tuple[str, float, bool]]:
    """Label, score and whether it is right, of each prediction of a row."""
    value, names = scorer.values[i] or (), scorer.names
    if isinstance(scorer, NerScorer):
        for s in value:
            right = (s.start, s.end, names.get(s.label, s.label)) in scorer.gold_spans[i]
            yield s.label, s.score, right
    elif isinstance(scorer, LabelScorer):
        for found in value[:1]:
            yield found.label, found.score, bool(scorer.right[i])
    elif isinstance(scorer, LabelsScorer):
        for found in value:
            yield found.label, found.score, names.get(found.label, found.label) in scorer.true[i]
    elif isinstance(scorer, ExtractScorer):
        spans, relations = found_in(value, scorer.gold[i].gold, names)
        for span, item in spans:
            yield item.name, item.score, span in scorer.gold_spans[i]
        for relation, item in relations if scorer.has_relations else ():
            yield item.name, item.score, relation in scorer.gold_relations[i]


def _gold(scorer: Scorer, i: int) -> Iterator[str]:
    """Labels of what is to be found in a row."""
    if isinstance(scorer, LabelScorer):
        yield scorer.true[i]
    elif isinstance(scorer, LabelsScorer):
        yield from scorer.true[i]
    elif isinstance(scorer, NerScorer | ExtractScorer):
        yield from (label for _, _, label in scorer.gold_spans[i])
        if isinstance(scorer, ExtractScorer):
            yield from (name for _, name, _ in scorer.gold_relations[i])


# ---- the search -------------------------------------------------------------------------------


def search(candidates: Candidates, min_support: int) -> dict[str, Any]:
    """A threshold for each label, also by language, and "*" for the rest.

    Args:
        min_support: gold items a label must have (in a language) for a threshold of its own; the
            others go by that of the label in all languages, else by "*".
    """
    all_gold = len(candidates.gold_labels)
    found: dict[str, Any] = {ANY: best_threshold(candidates.scores, candidates.correct, all_gold)}
    by_language: dict[str, dict[str, float]] = {}
    languages = candidates.languages[candidates.rows]
    gold_languages = candidates.languages[candidates.gold_rows]
    for name in sorted(set(candidates.names)):
        mine = candidates.names == name
        gold = candidates.gold_labels == candidates.renamed.get(name, name)
        if gold.sum() < min_support:
            continue
        found[name] = _best(candidates, mine, gold)
        for language in sorted(set(languages[mine]) - {""}):
            here, gold_here = mine & (languages == language), gold & (gold_languages == language)
            if gold_here.sum() >= min_support:
                by_language.setdefault(language, {})[name] = _best(candidates, here, gold_here)
    clash = [language for language in by_language if language in found]
    if clash:
        raise ConfigError(
            f"--tune: {clash[0]!r} is a label and a language: such a file cannot be read. Raise "
            f"--min-support to more than {all_gold} for one threshold only"
        )
    return {**found, **by_language}


def _best(candidates: Candidates, mine: Booleans, gold: Booleans) -> float:
    return best_threshold(candidates.scores[mine], candidates.correct[mine], int(gold.sum()))


def best_threshold(scores: Array, correct: Booleans, n_gold: int) -> float:
    """The threshold with the highest F1; of equal ones that with the fewest predictions.

    A short number between the last score that passes and the first that does not; 0 if all pass,
    1 if nothing is right.
    """
    order = np.argsort(-scores, kind="stable")
    scores, n_right = scores[order], np.cumsum(correct[order])
    if not len(scores) or not n_right[-1]:
        return 1.0 if len(scores) else 0.0
    f1 = 2 * n_right / (np.arange(1, len(scores) + 1) + n_gold)
    # Equal scores pass or fail together.
    f1[:-1][scores[:-1] == scores[1:]] = -1.0
    last = int(f1.argmax())
    return 0.0 if last == len(scores) - 1 else _between(scores[last + 1], scores[last])


def _between(low: float, high: float) -> float:
    """A number with few digits above one score and below another."""
    for digits in range(2, 12):
        number = round((low + high) / 2, digits)
        if low < number < high:
            return float(number)
    return float(high)


# ---- what it brings ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuning:
    """Thresholds and what they bring.

    Attributes:
        thresholds: as --min-score reads them.
        figures: before; after, by the rows that they were searched with; cross_validated: each
            half by the thresholds of the other, the figure to believe.
    """

    thresholds: dict[str, Any]
    figures: dict[str, Figures]


def tune(
    task: str,
    all_values: Scorer,
    before: Scorer,
    min_support: int,
    seed: int,
) -> Tuning:
    """Searches thresholds.

    Args:
        all_values: predictions made at threshold 0.
        before: the same at the thresholds in force.
    """
    candidates, rows = candidates_of(all_values), np.arange(len(all_values.gold))
    thresholds = search(candidates, min_support)
    after = _filtered(task, all_values, [(thresholds, rows)])
    order = np.random.default_rng(seed).permutation(len(rows))
    halves = order[::2], order[1::2]
    # A half has half of the gold items: the same labels get thresholds of their own.
    half_support = max(1, min_support // 2)
    crossed = [
        (search(candidates.of(other), half_support), mine) for mine, other in (halves, halves[::-1])
    ]
    cross_validated = _filtered(task, all_values, crossed)
    scorers = {"before": before, "after": after, "cross_validated": cross_validated}
    return Tuning(thresholds, {name: _figures(scorer) for name, scorer in scorers.items()})


def _filtered(
    task: str, scorer: Scorer, parts: Sequence[tuple[Mapping[str, Any], Index]]
) -> Scorer:
    """The same predictions with thresholds, which may be others for other rows."""
    values = list(scorer.values)
    for thresholds, rows in parts:
        for i, value in zip(
            rows.tolist(), filtered(task, scorer.gold, values, thresholds, rows), strict=True
        ):
            values[i] = value
    return make_scorer(task, scorer.gold, values, scorer.names)


def filtered(
    task: str,
    gold: Sequence[Annotated],
    values: Sequence[Any],
    thresholds: float | Mapping[str, Any],
    rows: Index | None = None,
) -> list[Any]:
    """What of the predictions of some rows scores high enough; None: of all rows."""
    table = Thresholds(thresholds)
    chosen = range(len(gold)) if rows is None else rows.tolist()
    return [passing(task, values[i], table, gold[i].language) for i in chosen]


def _figures(scorer: Scorer) -> Figures:
    name = scorer.tuned
    found = {name: known(scorer.measures[name].value)}
    if len(scorer.languages) > 1:
        mean = mean_of_groups(scorer.measures[name], list(scorer.languages.values()))
        found[f"macro_{name}_languages"] = known(mean.value)
    return found


def write_thresholds(path: str, thresholds: Mapping[str, Any]) -> None:
    """The file that --min-score reads."""
    text = json.dumps(thresholds, indent=2, ensure_ascii=False)
    storage.write(storage.normal(path), (text + "\n").encode())


def require_config(model: str) -> Path:
    """The config.json of a model folder on this machine.

    Raises:
        ConfigError: there is none.
    """
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        raise ConfigError(f"--write-default changes {path}, and there is no such file")
    return path


def write_default(path: Path, task: str, min_score: float) -> None:
    """Recommends a threshold for a task in a model's config.json."""
    config = read_json_object(path)
    tasks = config.get("task_specific_params") or {}
    config["task_specific_params"] = {
        **tasks,
        task: {**(tasks.get(task) or {}), "min_score": min_score},
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    storage.write(storage.normal(str(path)), (text + "\n").encode())
