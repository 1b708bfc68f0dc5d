"""Two models on the same rows: the difference, how sure it is, and which rows changed."""

from dataclasses import dataclass
from typing import Any

from erniem_batch.evaluate.bootstrap import mcnemar, paired
from erniem_batch.evaluate.measure import Measure
from erniem_batch.evaluate.scorers import UNKNOWN_LANGUAGE, Figures, Scorer, known


@dataclass(frozen=True, slots=True)
class Comparison:
    """This model and the one before.

    Attributes:
        figures: before, after, difference (after less before) and p_value of the headline, with
            its interval.
        languages: the same by language.
        mcnemar: rows that only one has right, and the p value; None where rows are not simply
            right or wrong.
        changed: one mapping for each row whose outcome differs; no text.
    """

    headline: str
    figures: dict[str, Any]
    languages: dict[str, dict[str, Any]]
    mcnemar: Figures | None
    changed: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For the report: with the number of changed rows in place of the rows."""
        found = {"metric": self.headline, **self.figures, "n_changed": len(self.changed)}
        if self.mcnemar is not None:
            found["mcnemar"] = self.mcnemar
        return {**found, "languages": self.languages}


def compare(after: Scorer, before: Scorer, n_resamples: int, seed: int) -> Comparison:
    """This model against the one before, both over the same gold rows in the same order."""
    name = after.headline
    whole = _difference(after.measures[name], before.measures[name], n_resamples, seed)
    languages = {
        language: _difference(
            after.of_language(language)[name],
            before.of_language(language)[name],
            n_resamples,
            seed,
        )
        for language in after.languages
    }
    changed, counts = changed_rows(after, before)
    test: Figures | None = None
    if after.paired:
        only_after, only_before = counts
        test = {
            "n_only_after_right": only_after,
            "n_only_before_right": only_before,
            "p_value": mcnemar(only_after, only_before),
        }
    return Comparison(name, whole, languages, test, changed)


def _difference(after: Measure, before: Measure, n: int, seed: int) -> dict[str, Any]:
    values = known(after.value), known(before.value)
    found: dict[str, Any] = {"after": values[0], "before": values[1], "difference": None}
    if values[0] is None or values[1] is None:
        return found
    found["difference"] = values[0] - values[1]
    if n:
        found["interval"], found["p_value"] = paired(after, before, n, seed)
    return found


def changed_rows(after: Scorer, before: Scorer) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Rows whose outcome differs, and how many only one of the two has right."""
    changed = []
    only_after = only_before = 0
    for i, row in enumerate(after.gold):
        new, old = after.detail(i), before.detail(i)
        if new == old:
            continue
        changed.append(
            {
                "id": row.record.id,
                "language": row.language or UNKNOWN_LANGUAGE,
                "right_before": old.pop("right"),
                "right_after": new.pop("right"),
                "before": old,
                "after": new,
            }
        )
        only_after += changed[-1]["right_after"] and not changed[-1]["right_before"]
        only_before += changed[-1]["right_before"] and not changed[-1]["right_after"]
    return changed, (only_after, only_before)
