"""`pipeline("ner")`: a local call without Ray, in the form Hugging Face users know."""

from collections.abc import Sequence
from typing import Any, overload

from erniem_batch.config import DEMO, PredictorConfig
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.predictor import Predictor
from erniem_batch.records import Entity, Failure, Record

TASK_NAMES = {"ner": "ner", "token-classification": "ner"}


class NerPipeline:
    """Finds named entities; made by `pipeline("ner", ...)`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @overload
    def __call__(self, texts: str) -> list[dict[str, Any]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]: ...
    def __call__(self, texts: str | Sequence[str]) -> Any:
        """Entities of one text, or a list of them for each of several.

        Each is a dictionary with `entity_group` (`entity` and `index` with strategy `none`),
        `score`, `word`, `start` and `end`, in plain Python types; text[start:end] == word unless
        the strategy is `none`.

        Raises:
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(texts, str)
        records = [Record(str(i), text) for i, text in enumerate([texts] if single else texts)]
        answers = []
        for outcome in self.predictor.predict(records):
            if isinstance(outcome, Failure):
                raise RecordError(f"text {outcome.id}: {outcome.stage}: {outcome.reason}")
            answers.append([as_dict(entity) for entity in outcome.value])
        return answers[0] if single else answers


def as_dict(entity: Entity) -> dict[str, Any]:
    """An entity in Hugging Face's form."""
    ends = {"word": entity.word, "start": entity.start, "end": entity.end}
    if entity.index is not None:
        return {"entity": entity.label, "score": entity.score, "index": entity.index, **ends}
    return {"entity_group": entity.label, "score": entity.score, **ends}


def pipeline(task: str, model: str = DEMO, **options: Any) -> NerPipeline:
    """A callable for one task.

    Args:
        task: "ner" or "token-classification".
        model: a model folder, its URL, org/name on the Hugging Face Hub, or "demo".
        options: see PredictorConfig: aggregation_strategy, min_score, device, dtype, …

    Example:
        >>> ner = pipeline("ner", aggregation_strategy="simple")    # doctest: +SKIP
        >>> ner("Ada Lovelace lived in London.")                    # doctest: +SKIP
        [{'entity_group': 'PER', 'score': 0.99, 'word': 'Ada Lovelace', 'start': 0, 'end': 12}, …]
    """
    if task not in TASK_NAMES:
        raise ConfigError(f"task must be one of {', '.join(TASK_NAMES)}, got {task!r}")
    return NerPipeline(
        Predictor.load(PredictorConfig(model=str(model), task=TASK_NAMES[task], **options))
    )
