"""`pipeline(...)`: local calls without Ray, in forms that users of Hugging Face and Taskflow know.

Each class turns arguments into records, asks the one Predictor, and turns values into plain Python
types. What is given in a call counts for that call only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields
from typing import Any, overload

from erniem_batch.config import DEMO, PredictorConfig
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.options import (
    ClassifyOptions,
    ExtractOptions,
    option_names,
    options_of,
)
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Record
from erniem_batch.tasks.choose import Choice
from erniem_batch.tasks.classify import LabelScore
from erniem_batch.tasks.extract import taskflow_json
from erniem_batch.tasks.ner import Entity
from erniem_batch.tasks.qa import Answer, Answers

GIVEN = object()


def _listed(given: Any, name: str, item: str = "strings", remedy: str = "") -> list[Any]:
    """Several values as a list.

    Args:
        name: of the argument.
        item: what it holds.
        remedy: how to give one value, for what is no list.

    Raises:
        TypeError: the value is of a kind that is iterated over by something else than its rows.
    """
    table = hasattr(given, "columns")  # of pandas, polars or Arrow: iterating gives columns
    if isinstance(given, Mapping | Set | bytes) or table or not isinstance(given, Iterable):
        if table:
            remedy = "give one of its columns as a list"
        elif isinstance(given, Mapping) and not remedy:
            remedy = "give the value of its text"
        raise TypeError(
            f"{name} must be a list of {item}, got {type(given).__name__}"
            f"{': ' if remedy else ''}{remedy}"
        )
    return list(given)


class Pipeline:
    """A predictor with the calling convention of one task; made by `pipeline(task, ...)`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def _values(
        self,
        texts: Sequence[Any],
        fields: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[Any]:
        """The value of each text.

        Args:
            more: what else the task reads, one mapping a text.
            options: of this call only.

        Raises:
            RecordError: a text cannot be processed; names its place.
        """
        given = fields or [{}] * len(texts)
        records = [
            Record(str(i), text, more)
            for i, (text, more) in enumerate(zip(texts, given, strict=True))
        ]
        outcomes = self.predictor.with_options(**options).predict(records)
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                raise RecordError(f"text {outcome.id}: {outcome.stage}: {outcome.reason}")
        return [outcome.value for outcome in outcomes if not isinstance(outcome, Failure)]


class NerPipeline(Pipeline):
    """Finds named entities."""

    @overload
    def __call__(self, texts: str) -> list[dict[str, Any]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]: ...
    def __call__(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Entities of one text, or a list of them for each of several.

        Each is a dictionary with `entity_group` (`entity` and `index` with strategy `none`),
        `score`, `word`, `start` and `end`, in plain Python types; text[start:end] == word unless
        the strategy is `none`.

        Args:
            options: of NerOptions, for this call only.

        Raises:
            TypeError: neither a string nor a list of strings.
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(texts, str)
        values = self._values([texts] if single else _listed(texts, "texts"), **options)
        answers = [[as_dict(entity) for entity in value] for value in values]
        return answers[0] if single else answers


def as_dict(entity: Entity) -> dict[str, Any]:
    """An entity in Hugging Face's form."""
    ends = {"word": entity.word, "start": entity.start, "end": entity.end}
    if entity.index is not None:
        return {"entity": entity.label, "score": entity.score, "index": entity.index, **ends}
    return {"entity_group": entity.label, "score": entity.score, **ends}


class TextClassificationPipeline(Pipeline):
    """Labels texts and pairs of texts."""

    def __call__(self, inputs: Any, top_k: Any = GIVEN, **options: Any) -> Any:
        """Labels with scores, in Hugging Face's shapes.

        Args:
            inputs: a string, {"text": …, "text_pair": …}, or a list of either.
            top_k: how many labels, best first; None: all. Not given: the best one alone, not in a
                list of its own.
            options: of ClassifyOptions, for this call only.

        Raises:
            TypeError: of another kind.
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(inputs, str | Mapping)
        items = [inputs] if single else _listed(inputs, "inputs", 'strings or {"text": …}')
        texts = [item.get("text") if isinstance(item, Mapping) else item for item in items]
        pairs = [
            {"text_pair": item["text_pair"]}
            if isinstance(item, Mapping) and "text_pair" in item
            else {}
            for item in items
        ]
        if top_k is not GIVEN:
            options |= {"all_scores": True} if top_k is None else {"top_k": top_k}
        values = [[_label(s) for s in value] for value in self._values(texts, pairs, **options)]
        if top_k is not GIVEN:
            return values[0] if single else values
        best = [value[0] if value else None for value in values]
        return best[0] if isinstance(inputs, Mapping) else best


def _label(score: LabelScore) -> dict[str, Any]:
    return {"label": score.label, "score": score.score}


class ZeroShotClassificationPipeline(Pipeline):
    """Chooses among labels that are given with the call."""

    def __call__(
        self,
        sequences: str | Sequence[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = ClassifyOptions.hypothesis_template,
        multi_label: bool = False,
        **options: Any,
    ) -> Any:
        """{"sequence", "labels", "scores"}, labels by falling score; a list of them for a list.

        Args:
            candidate_labels: a list, or one string with commas.
            hypothesis_template: what a label claims; {} stands for it.
            multi_label: score each label by itself.
            options: of ClassifyOptions, for this call only.

        Raises:
            ConfigError: no labels, or no {} in the template.
            TypeError: neither strings nor lists of strings.
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(sequences, str)
        texts = [sequences] if isinstance(sequences, str) else _listed(sequences, "sequences")
        options |= {"hypothesis_template": hypothesis_template, "multi_label": multi_label}
        labels: str | tuple[str, ...]
        if isinstance(candidate_labels, str):
            labels = candidate_labels
        else:
            labels = tuple(_listed(candidate_labels, "candidate_labels"))
        values = self._values(texts, candidate_labels=labels, all_scores=True, **options)
        answers = [
            {
                "sequence": text,
                "labels": [score.label for score in value],
                "scores": [score.score for score in value],
            }
            for text, value in zip(texts, values, strict=True)
        ]
        return answers[0] if single else answers


class MultipleChoicePipeline(Pipeline):
    """Chooses one of several continuations; transformers has no pipeline for it."""

    def __call__(
        self,
        premise: str | Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        question: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """{"choice": index, "scores": one a choice}; a list of them for a list of premises.

        Args:
            choices: of the premise; for a list of premises, a list for each.
            question: see ChooseOptions.question_template; one for all, or one a premise.
            options: of ChooseOptions, for this call only.

        Raises:
            TypeError: neither strings nor lists of strings.
            RecordError: a row cannot be processed; names its place.
        """
        single = isinstance(premise, str)
        premises = [premise] if isinstance(premise, str) else _listed(premise, "premise")
        lists = [choices] if single else _listed(choices, "choices", "lists of strings")
        questions = _spread("" if question is None else question, len(premises))
        more = [
            {"choices": _choices(mine), "question": asked}
            for mine, asked in zip(lists, questions, strict=True)
        ]
        values: list[Choice] = self._values(premises, more, **options)
        answers = [{"choice": value.best, "scores": value.scores} for value in values]
        return answers[0] if single else answers


def _choices(given: Any) -> list[Any]:
    """The choices of one premise. A string is iterated over by its characters."""
    if isinstance(given, str):
        raise TypeError("choices must be a list of strings, got str")
    return _listed(given, "choices")


def _spread(value: Any, n: int) -> list[Any]:
    """One value for all, or one each."""
    return [value] * n if isinstance(value, str) else _listed(value, "question")


class QuestionAnsweringPipeline(Pipeline):
    """Finds answers in a context."""

    def __call__(
        self,
        inputs: Any = None,
        context_text: str | None = None,
        *,
        question: Any = None,
        context: Any = None,
        top_k: int = 1,
        max_answer_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        **options: Any,
    ) -> Any:
        """{"score", "start", "end", "answer"}, or a list of them, in Hugging Face's shapes.

        Args:
            inputs: {"question": …, "context": …}, or a list of them; or the question as a string,
                with the context behind it. Or give `question` and `context`, strings or lists; one
                context may serve many questions.
            max_answer_len: longest answer in tokens (`max_answer_tokens`).
            handle_impossible_answer: let "no answer" compete: {"score", 0, 0, ""}.
            options: of QaOptions, for this call only.

        Raises:
            ValueError: arguments that do not go together.
            TypeError: arguments of other kinds.
            RecordError: a row cannot be processed; names its place.
        """
        rows, single = _qa_rows(inputs, context_text, question, context)
        if max_answer_len is not None:
            options["max_answer_tokens"] = max_answer_len
        if handle_impossible_answer is not None:
            options["null_threshold"] = 0.0 if handle_impossible_answer else None
        values: list[Answers] = self._values(
            [row["context"] for row in rows],
            [{"question": row["question"]} for row in rows],
            top_k=top_k,
            **options,
        )
        answers = [_answers(value, top_k) for value in values]
        return answers[0] if single else answers


QA_ROW = '{"question": …, "context": …}'


def _qa_rows(
    inputs: Any, context_text: str | None, question: Any, context: Any
) -> tuple[list[Mapping[str, Any]], bool]:
    """Rows with question and context, and whether there was only one."""
    if isinstance(inputs, str):
        question, context = inputs, context_text
    elif isinstance(inputs, Mapping):
        return [_qa_row(inputs)], True
    elif inputs is not None:
        rows = _listed(inputs, "inputs", QA_ROW)
        return list(map(_qa_row, rows)), False
    single = isinstance(question, str)
    questions = [question] if single else _listed([] if question is None else question, "question")
    if isinstance(context, str):
        contexts = [context] * len(questions)
    else:
        contexts = _listed([] if context is None else context, "context")
    if not questions or len(questions) != len(contexts):
        raise ValueError(
            f"{len(questions)} questions and {len(contexts)} contexts: give as many of each, or "
            f"one context for all"
        )
    pairs = zip(questions, contexts, strict=True)
    return [{"question": question, "context": context} for question, context in pairs], single


def _qa_row(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"inputs must be {QA_ROW}, got {type(row).__name__}")
    absent = [name for name in ("question", "context") if name not in row]
    if absent:
        raise ValueError(f"inputs must be {QA_ROW}: there is no {absent[0]!r}")
    return row


def _answers(value: Answers, top_k: int) -> Any:
    found = [_answer(answer) for answer in value.answers]
    if value.null_score is not None:
        found.append({"score": value.null_score, "start": 0, "end": 0, "answer": ""})
    found = sorted(found, key=lambda answer: -answer["score"])[:top_k]
    return found[0] if len(found) == 1 else found


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "score": answer.score,
        "start": answer.start,
        "end": answer.end,
        "answer": answer.text,
    }


class FeatureExtractionPipeline(Pipeline):
    """Vectors of tokens, or with `pooling` vectors of texts."""

    def __call__(self, inputs: str | Sequence[str]) -> Any:
        """Nested lists. Without pooling, as in Hugging Face: [1][tokens][hidden], special tokens
        included; with pooling: [dimensions]. A list of them for a list of texts.

        Raises:
            TypeError: neither a string nor a list of strings.
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(inputs, str)
        values = self._values([inputs] if single else _listed(inputs, "inputs"))
        by_token = self.predictor.config.options.pooling == "none"  # type: ignore[attr-defined]
        answers = [[value.tolist()] if by_token else value.tolist() for value in values]
        return answers[0] if single else answers


class ExtractPipeline(Pipeline):
    """Universal information extraction, called as PaddleNLP's Taskflow is."""

    def __call__(self, inputs: Any, schema: Any = None) -> list[dict[str, Any]]:
        """Taskflow's JSON, one mapping for each text: {name: [{text, start, end, probability,
        relations}]}.

        Args:
            inputs: a text, {"text": …}, or a list of either.
            schema: for this call only.

        Raises:
            TypeError: of another kind.
            RecordError: a text cannot be processed; names its place.
        """
        single = isinstance(inputs, str | Mapping)
        items = [inputs] if single else _listed(inputs, "inputs", 'strings or {"text": …}')
        texts = [item.get("text") if isinstance(item, Mapping) else item for item in items]
        own = [{} if schema is None else {"schema": schema}] * len(texts)
        options = self.predictor.config.options
        if isinstance(options, ExtractOptions) and options.taskflow_compat:
            # The texts of a call change each other's answers: they are one record.
            values = self._values([texts], own[:1])[0] if texts else []
        else:
            values = self._values(texts, own)
        return [taskflow_json(value) for value in values]


_PIPELINES: dict[str, tuple[str, Callable[[Predictor], Pipeline]]] = {
    "ner": ("ner", NerPipeline),
    "token-classification": ("ner", NerPipeline),
    "text-classification": ("classify", TextClassificationPipeline),
    "zero-shot-classification": ("classify", ZeroShotClassificationPipeline),
    "multiple-choice": ("choose", MultipleChoicePipeline),
    "question-answering": ("qa", QuestionAnsweringPipeline),
    "feature-extraction": ("embed", FeatureExtractionPipeline),
    "extract": ("extract", ExtractPipeline),
}

# Names of Hugging Face and Taskflow for what has another name here.
_SIZES = {"max_seq_len": "window_tokens", "doc_stride": "overlap_tokens"}


def pipeline(task: str, model: str = DEMO, **options: Any) -> Any:
    """A callable for one task.

    Args:
        task: ner (or token-classification), text-classification, zero-shot-classification,
            multiple-choice, question-answering, feature-extraction or extract.
        model: a model folder, its URL, hf://org/name of the Hugging Face Hub, or "demo".
        options: of the task (see `erniem_batch.options`) and of the predictor (see
            PredictorConfig): aggregation_strategy, schema, min_score, device, dtype, …;
            `max_seq_len` is window_tokens, `doc_stride` is overlap_tokens.

    Raises:
        ConfigError: an option is unknown or impossible, or the model does not fit.

    Example:
        >>> ner = pipeline("ner", aggregation_strategy="simple")    # doctest: +SKIP
        >>> ner("Ada Lovelace lived in London.")                    # doctest: +SKIP
        [{'entity_group': 'PER', 'score': 0.99, 'word': 'Ada Lovelace', 'start': 0, 'end': 12}, …]
    """
    if task not in _PIPELINES:
        raise ConfigError(f"task must be one of {', '.join(_PIPELINES)}, got {task!r}")
    name, make = _PIPELINES[task]
    options = {_SIZES.get(key, key): value for key, value in options.items()}
    window = options.get("window_tokens")
    if isinstance(window, int) and "overlap_tokens" not in options:
        options["overlap_tokens"] = min(PredictorConfig.overlap_tokens, max(window // 2 - 2, 0))
    if task == "feature-extraction":
        options.setdefault("pooling", "none")
    if task == "zero-shot-classification" and str(model) == DEMO:
        raise ConfigError(
            "there is no demo model for zero-shot classification, since no data at hand teaches "
            "it: give a model trained for entailment"
        )
    general = {f.name for f in fields(PredictorConfig)} - {"options"}
    own = {key: value for key, value in options.items() if key in option_names(name)}
    rest = {key: value for key, value in options.items() if key not in own}
    unknown = [key for key in rest if key not in general]
    if unknown:
        raise ConfigError(
            f"{task} has no option {unknown[0]!r}; there are "
            f"{', '.join([*option_names(name), *sorted(general - {'model'})])}"
        )
    config = PredictorConfig(model=str(model), options=options_of(name, own), **rest)
    return make(Predictor.load(config))
