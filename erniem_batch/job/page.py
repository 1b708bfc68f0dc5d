"""report.html: a run's report for people, in one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from erniem_batch.job import charts

TEMPLATE = "report.html.jinja"
MOST_LABELS, MOST_LANGUAGES = 10, 25


def page(report: Mapping[str, Any], samples: Sequence[Any] = ()) -> str:
    """The report as HTML.

    Args:
        report: content of report.json.
        samples: rows to show, see `samples`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("erniem_batch.job", "."),
        autoescape=select_autoescape(("html", "jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {
        chart.__name__: chart(report)
        for chart in (charts.timeline, charts.stages, charts.labels, charts.scores, charts.lengths)
    }
    template = environment.get_template(TEMPLATE)
    return template.render(
        report=report, charts=pictures, samples=samples, grid=by_language(report)
    )


def by_language(report: Mapping[str, Any]) -> dict[str, Any]:
    """Labels by language, as a table of shares and mean scores."""
    labels = [item for item in report["labels"] if item["label"]][:MOST_LABELS]
    languages = [item["language"] for item in report["languages"] if item["language"]]
    rows = []
    for language in languages[:MOST_LANGUAGES]:
        total = sum(item["languages"].get(language, 0) for item in report["labels"])
        if total:
            cells = [
                (item["languages"].get(language, 0) / total, item["mean_scores"].get(language))
                for item in labels
            ]
            rows.append({"language": language, "n": total, "cells": cells})
    return {"labels": [item["label"] for item in labels], "rows": rows}
