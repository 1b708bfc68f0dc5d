"""The predictor without a service, as a mark: prints a line of JSON.

    python tests/benchmarks/serve/bare.py MODEL_FOLDER TASK TEXTS SECONDS|in-turns

`in-turns`: lists of 32 texts, as many seconds as each line of the input says, with a line for each.
Else `one`: texts one at a time; its milliseconds are the medians of a single forward pass and of
all of a prediction. `lists`: lists of 32 texts. `all`: the whole file in one call, once.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from erniem_batch.config import PredictorConfig
from erniem_batch.options import options_of
from erniem_batch.predictor import Predictor
from erniem_batch.records import Encoded, Prediction, Record

LIST = 32


def main() -> None:
    model, task, texts, seconds = sys.argv[1:]
    predictor = make_predictor(model, task)
    given = json.loads(Path(texts).read_text())
    records = [Record(str(i), text) for i, text in enumerate(given)]
    predictor.predict(records[:LIST])  # warms up
    if seconds == "in-turns":
        lists = lists_of(records)
        for line in sys.stdin:
            print(json.dumps(in_lists(predictor, lists, float(line))), flush=True)
        return predictor.close()
    report = {
        "one": one_by_one(predictor, records, float(seconds)),
        "lists": in_lists(predictor, lists_of(records), float(seconds)),
        "all": in_lists(predictor, iter([records]), float("inf")),
    }
    print(json.dumps(report))
    predictor.close()


def make_predictor(model: str, task: str) -> Predictor:
    return Predictor.load(
        PredictorConfig(
            model=model,
            options=options_of(task, {}),
            device="cpu",
            n_threads=int(os.environ["OMP_NUM_THREADS"]),
        )
    )


def one_by_one(predictor: Predictor, records: Sequence[Record], seconds: float) -> dict[str, float]:
    forward, whole = [], []
    end = time.perf_counter() + seconds
    for record in cycle(records):
        started = time.perf_counter()
        if started > end:
            break
        (item,) = predictor.encode([record])
        assert isinstance(item, Encoded)
        encoded = time.perf_counter()
        rows = predictor.forward(item.windows)
        forward.append(time.perf_counter() - encoded)
        predictor.decode(item, rows)
        whole.append(time.perf_counter() - started)
    return {
        "texts_per_s": len(whole) / sum(whole),
        "forward_ms": 1000 * statistics.median(forward),
        "predict_ms": 1000 * statistics.median(whole),
    }


def in_lists(
    predictor: Predictor, lists: Iterator[Sequence[Record]], seconds: float
) -> dict[str, float]:
    n_texts = n_tokens = 0
    started = time.perf_counter()
    for records in lists:
        outcomes = predictor.predict(records)
        n_texts += len(outcomes)
        n_tokens += sum(o.n_tokens for o in outcomes if isinstance(o, Prediction))
        if time.perf_counter() - started > seconds:
            break
    spent = time.perf_counter() - started
    return {"texts_per_s": n_texts / spent, "tokens_per_s": n_tokens / spent}


def lists_of(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """As many texts as would wait at a time, endlessly."""
    source = cycle(records)
    while True:
        yield [next(source) for _ in range(LIST)]


if __name__ == "__main__":
    main()
