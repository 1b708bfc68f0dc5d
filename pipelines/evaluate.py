"""Span F1 of a model, language by language.

    python pipelines/evaluate.py --model MODEL --data 'ner/*.dev.jsonl.gz'

Reads JSONL with `text`, `lang` and `spans` ([start, end, label], characters); a span counts only
if start, end and label are all right.
"""

import argparse
import glob
import json
from collections import defaultdict
from typing import Any

from erniem_batch.config import DEMO, PredictorConfig
from erniem_batch.job.jsonl import open_jsonl
from erniem_batch.labels import Span
from erniem_batch.metrics import SpanScores, span_scores
from erniem_batch.options import AGGREGATION_STRATEGIES, NerOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction, Record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO, help="model folder, or demo")
    parser.add_argument("--data", required=True, nargs="+", help="JSONL files or globs")
    parser.add_argument("--aggregation-strategy", choices=AGGREGATION_STRATEGIES, default="simple")
    parser.add_argument("--min-score", type=float, help="default: the model's own")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--markdown", action="store_true", help="print a table for a model card")
    args = parser.parse_args()

    predictor = Predictor.load(
        PredictorConfig(
            model=args.model,
            options=NerOptions(
                aggregation_strategy=args.aggregation_strategy, min_score=args.min_score
            ),
            n_threads=args.threads,
        )
    )
    by_language = read_by_language(args.data)
    scores = {language: evaluate(predictor, by_language[language]) for language in by_language}
    show(scores, args.markdown)
    return 0


def read_by_language(patterns: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Records of all files by their `lang`, sorted."""
    by_language = defaultdict(list)
    for path in sorted({p for pattern in patterns for p in glob.glob(pattern)}):
        with open_jsonl(path) as lines:
            for line in lines:
                record = json.loads(line)
                by_language[record["lang"]].append(record)
    if not by_language:
        raise SystemExit(f"no records in {patterns}: expected JSONL with text, lang and spans")
    return dict(sorted(by_language.items()))


def spans_of(record: dict[str, Any]) -> list[Span]:
    """The gold spans of a record."""
    return [(start, end, label) for start, end, label in record["spans"]]


def evaluate(predictor: Predictor, records: list[dict[str, Any]]) -> SpanScores:
    """Scores of one language."""
    outcomes = predictor.predict([Record(str(i), r["text"]) for i, r in enumerate(records)])
    predicted = [
        [(e.start, e.end, e.label) for e in o.value] if isinstance(o, Prediction) else []
        for o in outcomes
    ]
    return span_scores([spans_of(record) for record in records], predicted)


def show(scores: dict[str, SpanScores], markdown: bool) -> None:
    """One line a language, then the mean."""
    if markdown:
        print("| language | precision | recall | F1 | gold spans |\n|---|--:|--:|--:|--:|")
    line = (
        "| {} | {:.3f} | {:.3f} | {:.3f} | {} |" if markdown else "{:8} {:.3f} {:.3f} {:.3f} {:6}"
    )
    for language, s in scores.items():
        print(line.format(language, s.precision, s.recall, s.f1, s.n_gold))
    means = [
        sum(getattr(s, name) for s in scores.values()) / len(scores)
        for name in ("precision", "recall", "f1")
    ]
    print(line.format("macro", *means, sum(s.n_gold for s in scores.values())))


if __name__ == "__main__":
    raise SystemExit(main())
