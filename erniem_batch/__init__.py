"""Multilingual tagging with ErnieM, at any scale.

The model, the tokenizer and `pipeline` work without Ray; the batch job is in `erniem_batch.job`.
"""

from erniem_batch.local import pipeline
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import (
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)
from erniem_batch.text.tokenizer import ErnieMTokenizer

__version__ = "0.1.0"

__all__ = [
    "ErnieMConfig",
    "ErnieMForInformationExtraction",
    "ErnieMForMultipleChoice",
    "ErnieMForQuestionAnswering",
    "ErnieMForSequenceClassification",
    "ErnieMForTokenClassification",
    "ErnieMModel",
    "ErnieMTokenizer",
    "__version__",
    "pipeline",
]
