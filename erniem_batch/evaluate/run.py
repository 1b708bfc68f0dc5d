"""One evaluation, from its settings to its figures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.bootstrap import intervals
from erniem_batch.evaluate.calibration import bins_of
from erniem_batch.evaluate.classify import LabelScorer, LabelsScorer, NumberScorer
from erniem_batch.evaluate.compare import Comparison, compare
from erniem_batch.evaluate.config import WITH_LABELS, EvaluateConfig
from erniem_batch.evaluate.libraries import require_libraries
from erniem_batch.evaluate.make import make_scorer, scorer_class
from erniem_batch.evaluate.read import Run, joined, named_flag, own_gold, read_run
from erniem_batch.evaluate.report import Evaluation, write_report
from erniem_batch.evaluate.scorers import Figures, Scorer, known
from erniem_batch.evaluate.tune import (
    Tuning,
    filtered,
    require_config,
    tune,
    write_default,
    write_thresholds,
)
from erniem_batch.gold import Annotated, held_out, read_annotated
from erniem_batch.options import options_of
from erniem_batch.thresholds import ANY

logger = logging.getLogger(__name__)

# What several labels a text must score where nobody said anything: more likely than not.
SEVERAL_MIN_SCORE = 0.5
LIBRARIES = {"ner": ("seqeval.metrics",), "classify": ("sklearn.metrics", "scipy.stats")}


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions for the gold rows.

    Attributes:
        everything: what was found at any score, if thresholds are searched, else None.
        values: what counts.
    """

    values: Sequence[Any]
    everything: Sequence[Any] | None = None


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Figures of a run or a model; writes the report, thresholds and default that were asked for.

    Raises:
        ConfigError: settings, gold rows and predictions do not go together; says what and where.
        StorageError: something cannot be read or written.
    """
    model_config = require_config(config.model) if config.write_default and config.model else None
    run = None if config.predictions is None else read_run(config.predictions)
    task = _task(config, run)
    config.check_task(task)
    _require_libraries(config, task)
    gold, values = _gold(config, task, run)
    kind = scorer_class(task, gold)
    if config.tunes and not kind.tuned:
        raise ConfigError("--tune: the gold rows have numbers as labels; these have no threshold")
    if config.limits:  # found out now, not after an hour of work
        blank = make_scorer(task, gold, [None] * len(gold), config.names)
        _require_known(config, blank)
    if run is None:
        assert config.model is not None
        predicted = _of_model(config, config.model, task, gold)
    else:
        predicted = _of_run(config, task, gold, values or [], run)
    scorer = make_scorer(task, gold, predicted.values, config.names)
    _warn_about_names(task, scorer)
    tuning = _tuned(config, task, scorer, predicted)
    comparison = _compared(config, task, scorer)
    outcome = _figures(config, task, scorer, tuning, comparison)
    outcome = replace(outcome, below=_below(config, outcome))
    if config.report is not None:
        write_report(config.report, outcome)
    if tuning is not None and config.tune is not None:
        write_thresholds(config.tune, tuning.thresholds)
    if tuning is not None and model_config is not None:
        write_default(model_config, task, tuning.thresholds[ANY])
    return outcome


def _task(config: EvaluateConfig, run: Run | None) -> str:
    """The task asked for, else the one of the run."""
    task = config.task or (None if run is None else run.settings.get("task"))
    if task is None:
        raise ConfigError(
            f"{config.predictions} does not say of which task it is: give --task ner, classify, "
            f"choose, qa or extract"
        )
    if run is not None:
        _require_task(run, task)
    return str(task)


def _require_task(run: Run, task: str) -> None:
    ran = run.settings.get("task")
    if ran not in (None, task):
        raise ConfigError(f"{run.path} is a run of {ran}, not of {task}")


def _require_libraries(config: EvaluateConfig, task: str) -> None:
    names = LIBRARIES.get(task, ())
    if config.compares:
        names = (*names, "scipy.stats")
    if config.report is not None and task == "classify":
        names = (*names, "matplotlib.figure")
    require_libraries(names)


def _gold(
    config: EvaluateConfig, task: str, run: Run | None
) -> tuple[list[Annotated], list[Any] | None]:
    """Gold rows, and the predictions of a run."""
    if not config.gold:
        assert run is not None
        return own_gold(task, run)
    with named_flag("--gold"):
        gold = read_annotated(task, config.gold)
    values = None if run is None else joined(task, gold, run)
    if config.hold_out is None:
        return gold, values
    chosen = [i for i, is_out in enumerate(held_out(gold, config.hold_out)) if is_out]
    return [gold[i] for i in chosen], None if values is None else [values[i] for i in chosen]


# ---- predictions ------------------------------------------------------------------------------


def _of_run(
    config: EvaluateConfig, task: str, gold: Sequence[Annotated], values: Sequence[Any], run: Run
) -> Predicted:
    ran_with = run.settings.get("min-score")
    if config.tunes and ran_with not in (None, 0, 0.0):
        raise ConfigError(
            f"--tune needs everything that the model finds, but {run.path} was made with "
            f"min_score {ran_with}: run it again with --min-score 0"
        )
    thresholds = config.thresholds
    if thresholds is None and not ran_with:
        thresholds = _default(task, gold)
    kept = values if thresholds is None else filtered(task, gold, values, thresholds)
    return Predicted(kept, values if config.tunes else None)


def _of_model(
    config: EvaluateConfig, model: str, task: str, gold: Sequence[Annotated]
) -> Predicted:
    # Later than at the top: a finished run needs no torch.
    from erniem_batch.evaluate.predict import options_for, predictions_of

    several = scorer_class(task, gold) is LabelsScorer
    keep_all = config.tunes or several
    asked = {} if config.thresholds is None else {"min_score": config.thresholds}
    if task == "embed" and asked:
        raise ConfigError("--min-score: vectors have no score")
    options = options_of(task, {**config.option_values, **asked})
    options = options_for(options, gold, config.names, several)
    settings = replace(config.predictor_settings, model=model, options=options)
    values, in_force = predictions_of(settings, gold, keep_all)
    if not keep_all:
        return Predicted(values)
    if config.thresholds is None:
        in_force = in_force or _default(task, gold) or 0.0
    return Predicted(filtered(task, gold, values, in_force), values)


def _default(task: str, gold: Sequence[Annotated]) -> float | None:
    """The threshold where neither the user nor the model has one."""
    return SEVERAL_MIN_SCORE if scorer_class(task, gold) is LabelsScorer else None


def _warn_about_names(task: str, scorer: Scorer) -> None:
    """Says so if the gold rows do not know predicted labels: often only the names differ."""
    if task not in WITH_LABELS or isinstance(scorer, NumberScorer):
        return
    labels = scorer.by_label()
    gold = [name for name, figures in labels.items() if figures["n_gold"]]
    others = [name for name, figures in labels.items() if not figures["n_gold"]]
    if others and gold:
        logger.warning(
            "labels that no gold row has labels=%s gold=%s; --rename PREDICTED=GOLD if they have "
            "other names there",
            ",".join(others[:8]),
            ",".join(gold[:8]),
        )


# ---- figures ----------------------------------------------------------------------------------


def _figures(
    config: EvaluateConfig,
    task: str,
    scorer: Scorer,
    tuning: Tuning | None,
    comparison: Comparison | None,
) -> Evaluation:
    n, seed, headline = config.bootstrap, config.seed, scorer.headline
    by_language = {
        language: intervals({headline: scorer.of_language(language)[headline]}, n, seed)
        for language in scorer.languages
    }
    bins = None
    if isinstance(scorer, LabelScorer):
        bins = bins_of(scorer.confidence, scorer.right)
    return Evaluation(
        task=task,
        source=str(config.model or config.predictions),
        headline=headline,
        label_noun=scorer.label_noun,
        columns=scorer.columns,
        n_rows=len(scorer.gold),
        n_missing=sum(value is None for value in scorer.values),
        figures=scorer.all_figures(),
        languages={name: scorer.figures_of_language(name) for name in scorer.languages},
        labels=scorer.by_label(),
        intervals=intervals(scorer.overall, n, seed),
        language_intervals={
            name: found[headline] for name, found in by_language.items() if headline in found
        },
        bins=bins,
        tuning=tuning,
        comparison=comparison,
    )


def _tuned(
    config: EvaluateConfig, task: str, scorer: Scorer, predicted: Predicted
) -> Tuning | None:
    if not config.tunes:
        return None
    everything = make_scorer(task, scorer.gold, predicted.everything or [], scorer.names)
    return tune(task, everything, scorer, config.min_support, config.seed)


def _compared(config: EvaluateConfig, task: str, scorer: Scorer) -> Comparison | None:
    if not config.compares:
        return None
    plain = replace(config, tune=None, write_default=False)
    if config.compare_model is not None:
        other = _of_model(plain, config.compare_model, task, scorer.gold)
    else:
        run = read_run(str(config.compare), "--compare")
        _require_task(run, task)
        values = joined(task, scorer.gold, run)
        other = _of_run(plain, task, scorer.gold, values, run)
    before = make_scorer(task, scorer.gold, other.values, config.names)
    return compare(scorer, before, config.bootstrap, config.seed)


# ---- limits -----------------------------------------------------------------------------------


def _require_known(config: EvaluateConfig, scorer: Scorer) -> None:
    """Raises a ConfigError for limits of figures that there will not be."""
    figures, labels = scorer.all_figures(), scorer.by_label()
    for limit, _ in config.limits:
        name, _, part = limit.partition(".")
        if name == "difference":
            known_name, parts = True, [*scorer.languages]
        else:
            known_name, parts = name in figures, [*scorer.languages, *labels]
            known_name |= bool(part) and any(name in f for f in labels.values())
        if not known_name:
            raise ConfigError(
                f"--fail-below {limit}: there is no such figure; there are {', '.join(figures)}"
            )
        if part and part not in parts:
            raise ConfigError(
                f"--fail-below {limit}: {part} is no language or {scorer.label_noun} of the gold "
                f"rows; there are {', '.join(parts)}"
            )


def _below(config: EvaluateConfig, outcome: Evaluation) -> list[tuple[str, float | None, float]]:
    """Figures under their limit; one that cannot be computed is under any."""
    found = []
    for limit, lowest in config.limits:
        value = _value(limit, outcome)
        if value is None or known(value) is None or value < lowest:
            found.append((limit, value, lowest))
    return found


def _value(limit: str, outcome: Evaluation) -> float | None:
    name, _, part = limit.partition(".")
    table: Figures | dict[str, Any]
    if name == "difference" and outcome.comparison is not None:
        whole, languages = outcome.comparison.figures, outcome.comparison.languages
        table = languages.get(part, {}) if part else whole
    elif not part:
        table = outcome.figures
    else:
        table = outcome.languages.get(part) or outcome.labels.get(part) or {}
    return table.get(name)
