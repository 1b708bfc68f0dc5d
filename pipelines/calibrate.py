"""Find the score from which a fine-tuned model's entities are to be believed.

    python pipelines/calibrate.py --model MODEL --data 'ner/*.dev.jsonl.gz'

A model that was trained on texts full of entities sees them everywhere. Tries several thresholds on
held-out data, takes the one with the best span F1 (mean over languages) and writes it into the
model's config.json, where --min-score has its default from.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from evaluate import read_by_language, spans_of

from erniem_batch.config import PredictorConfig
from erniem_batch.metrics import span_scores
from erniem_batch.options import NerOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction, Record
from erniem_batch.tasks.ner import Entity


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="its config.json is changed")
    parser.add_argument("--data", required=True, nargs="+", help="JSONL files or globs")
    parser.add_argument("--step", type=float, default=0.05)
    args = parser.parse_args()

    predictor = Predictor.load(
        PredictorConfig(model=str(args.model), options=NerOptions(min_score=0.0))
    )
    by_language = read_by_language(args.data)
    found = {language: predict(predictor, records) for language, records in by_language.items()}
    best = (-1.0, 0.0)
    for threshold in np.arange(0.0, 1.0, args.step).round(4).tolist():
        scores = [
            span_scores(
                [spans_of(record) for record in by_language[language]],
                [
                    [(e.start, e.end, e.label) for e in es if e.score >= threshold]
                    for es in entities
                ],
            )
            for language, entities in found.items()
        ]
        macro = sum(s.f1 for s in scores) / len(scores)
        print(f"min_score={threshold:.2f} macro_f1={macro:.4f}", flush=True)
        best = max(best, (macro, threshold))
    write_default(args.model / "config.json", best[1])
    print(f"min_score={best[1]:.2f} written to {args.model / 'config.json'}")
    return 0


def predict(predictor: Predictor, records: list[dict]) -> list[list[Entity]]:
    outcomes = predictor.predict([Record(str(i), r["text"]) for i, r in enumerate(records)])
    return [outcome.value if isinstance(outcome, Prediction) else [] for outcome in outcomes]


def write_default(path: Path, min_score: float) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    tasks = config.get("task_specific_params") or {}
    config["task_specific_params"] = {
        **tasks,
        "ner": {**tasks.get("ner", {}), "min_score": min_score},
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
