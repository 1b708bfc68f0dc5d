"""How good a model or a batch run is, by annotated rows.

The way of an evaluation: `read` takes the predictions of a batch run (or `predict` makes them) and
joins them with the gold rows -> `scorers` counts what is right in each row (`ner`, `classify`,
`choose`, `qa`, `extract`, `embed`) -> figures, intervals and comparisons follow from sums of these
counts (`measure`, `bootstrap`, `compare`), thresholds from the scores (`tune`) -> `report`.
"""

from erniem_batch.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig"]
