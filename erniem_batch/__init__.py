"""Multilingual tagging with ErnieM, at any scale.

The model, the tokenizer and `pipeline` work without Ray; the batch job is in `erniem_batch.job`,
the service in `erniem_batch.serve`, which `erniem_batch.client` asks.
"""

from typing import TYPE_CHECKING

from erniem_batch.lazy import lazily

if TYPE_CHECKING:
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

# Where each name comes from, once it is asked for: torch takes seconds, and the client of the
# service and help texts do without.
_MODULES = {
    "ErnieMConfig": "model.config",
    "ErnieMForInformationExtraction": "model.heads",
    "ErnieMForMultipleChoice": "model.heads",
    "ErnieMForQuestionAnswering": "model.heads",
    "ErnieMForSequenceClassification": "model.heads",
    "ErnieMForTokenClassification": "model.heads",
    "ErnieMModel": "model.encoder",
    "ErnieMTokenizer": "text.tokenizer",
    "pipeline": "local",
}

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


__getattr__ = lazily(__name__, _MODULES, globals())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
