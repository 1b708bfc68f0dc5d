"""Where the time of a unit goes: milliseconds a thousand rows, without Ray.

    python -m tests.benchmarks stages [--texts 400] [--model MODEL]

Sentences from Parquet to Parquet through the class that runs in a Ray actor, with a model of the
size of ErnieM-base and with that of the demo, next to which all else weighs more.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
from cyclopts import App
from rich.console import Console

from erniem_batch.config import DEMO
from erniem_batch.job import actor
from erniem_batch.job.actor import Assignment, UnitTagger
from erniem_batch.job.config import JobConfig
from erniem_batch.job.read import UnitReader
from erniem_batch.job.units import files_of, find_files, plan_units
from erniem_batch.model.fetch import local_folder, model_digest
from tests.benchmarks.forward import workplace
from tests.benchmarks.job import write_corpus

app = App(help=__doc__)
console = Console(stderr=True, width=120)


class _Silent:
    """The handle that progress goes to."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *arguments: Any) -> None:
        """Tells nobody."""


@app.default
def main(
    *,
    texts: int = 400,
    threads: int = 1,
    folder: Path | None = None,
    vocab: Path | None = None,
) -> list[dict[str, Any]]:
    """Prints a line of JSON.

    Args:
        texts: Of the corpus.
        threads: Of the predictor.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
    """
    with workplace(folder, vocab) as (scratch, folder):
        base = folder / "model" / "ner"
        rows = []
        for name, model, count in (
            ("ErnieM-base", base, texts),
            ("demo", local_folder(DEMO, "ner"), 20 * texts),
        ):
            source = scratch / name
            write_corpus(source, base, count)
            rows.append({"model": name, **measure(str(model), source, scratch / "out", threads)})
            console.print(rows[-1])
    print(json.dumps(rows))
    return rows


def measure(model: str, source: Path, output: Path, threads: int) -> dict[str, Any]:
    """Milliseconds a thousand rows, by stage."""
    config = JobConfig(input=[str(source)], output=str(output / source.name), model=model)
    files = list(files_of(find_files(config.input)))
    schema = pq.read_schema(files[0].path)
    digest = model_digest(local_folder(model, config.task))
    run = Assignment(
        config=config, schema=schema, output=str(config.output), fingerprint="none",
        model_digest=digest, predictor=replace(config.predictor, n_threads=threads),
    )  # fmt: skip
    tagger = UnitTagger(run, _Silent())
    units = list(plan_units(files, config.bytes_per_unit, config.text_column, config.limit))
    tagger.tag(units[0])  # warms up
    predictor = tagger._predictor
    before = dict(predictor.counters.seconds)
    spent = {"read": 0.0, "columns": 0.0}
    n_rows = 0
    started = time.perf_counter()
    with (
        patch.object(UnitReader, "chunks", timed_items(UnitReader.chunks, spent)),
        patch.object(actor, "add_predictions", timed(actor.add_predictions, spent, "columns")),
    ):
        for unit in units[1:]:
            receipt = tagger.tag(unit)
            assert not receipt.error, receipt.error
            n_rows += receipt.n_rows
    total = time.perf_counter() - started
    inside = {name: s - before[name] for name, s in predictor.counters.seconds.items()}
    parts = {
        "read": spent["read"],
        "tokenize": inside["encode"],
        "forward": inside["forward"],
        "decode": inside["decode"],
        "columns": spent["columns"],
    }
    parts["write and the rest"] = total - sum(parts.values())
    return {
        "rows": n_rows,
        "ms_per_1000_rows": {k: round(1e6 * s / n_rows, 1) for k, s in parts.items()},
        "share": {k: round(s / total, 4) for k, s in parts.items()},
    }


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Any:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - started

    return wrapped


def timed_items(method: Callable[..., Iterator[Any]], spent: dict[str, float]) -> Any:
    def wrapped(self: Any) -> Iterator[Any]:
        items = method(self)
        while True:
            started = time.perf_counter()
            item = next(items, None)
            spent["read"] += time.perf_counter() - started
            if item is None:
                return
            yield item

    return wrapped
