"""What each task may be told, one class a task: flags, their help and their defaults.

Options that people give as a file or as text (thresholds, schemas) are read once, on the driver, by
`resolved`; what travels to the actors is their content.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Parameter

from erniem_batch.errors import ConfigError
from erniem_batch.text.offsets import OFFSET_UNITS
from erniem_batch.text.schema import Schema, parse_schema, read_schema
from erniem_batch.thresholds import Thresholds, read_thresholds


def flag_name(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


# What the command line takes is text; from Python also a mapping.
MinScore = Annotated[float | str | None, Parameter(negative=())]
OffsetUnit = Literal["codepoint", "utf16", "byte"]
Pooling = Literal["mean", "max", "first"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all tasks have in common."""

    task: ClassVar[str]
    # Columns that the task adds to those of the input.
    output_columns: ClassVar[tuple[str, ...]]
    # What the report counts.
    noun: ClassVar[str]

    def resolved(self) -> Self:
        """The same with files read, ready to travel."""
        min_score = getattr(self, "min_score", None)
        if isinstance(min_score, str):
            return replace(self, min_score=read_thresholds(min_score))  # type: ignore[call-arg]
        return self

    @property
    def added_columns(self) -> tuple[str, ...]:
        """Names of the columns that the task adds with these options."""
        return self.output_columns

    def _choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    def _at_least(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {value}")

    def _min_score(self) -> None:
        value = getattr(self, "min_score", None)
        if value is not None and not isinstance(value, str):
            Thresholds(value)  # checks itself


AGGREGATION_STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True, kw_only=True)
class NerOptions(Options):
    """Named entities.

    Args:
        aggregation_strategy: How token labels become entities: none gives tokens; simple groups
            neighbours of one kind; first, average and max first give each word one label.
        min_score: Leave out entities that score lower: a number from 0 to 1, or a JSON or YAML file
            with a number for each label ("*": all others), also by language: {de: {PER: 0.6}}.
            Default: what the model's config.json recommends
            (task_specific_params.ner.min_score), else 0.
        offset_unit: What start and end count: codepoint (Python), utf16 (JavaScript, Java) or byte
            (of UTF-8; Rust, Go).
    """

    task: ClassVar[str] = "ner"
    output_columns: ClassVar[tuple[str, ...]] = ("entities",)
    noun: ClassVar[str] = "entities"

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    min_score: MinScore = None
    offset_unit: OffsetUnit = "codepoint"

    def __post_init__(self) -> None:
        self._choice("aggregation_strategy", AGGREGATION_STRATEGIES)
        self._choice("offset_unit", OFFSET_UNITS)
        self._min_score()


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(Options):
    """Labels, or a number, for whole texts and pairs of texts.

    Args:
        function_to_apply: What turns the model's outputs into scores: softmax, sigmoid or none.
            Default, as Hugging Face chooses: sigmoid for multi_label_classification or a single
            label, else softmax; none for regression.
        top_k: How many labels to give, best first.
        all_scores: Give every label, best first, instead of top_k.
        min_score: Leave out labels that score lower: a number, or a JSON or YAML file with a number
            for each label ("*": all others), also by language: {de: {sports: 0.6}}.
        pooling: How scores of the windows of a long text become one: mean (by length), max, or
            first, which reads the first window only and says so in the column truncated.
        candidate_labels: Zero-shot: labels to choose from, comma-separated; needs a model with an
            entailment label.
        hypothesis_template: Zero-shot: what a label claims of the text; {} stands for the label.
            There are no other braces in it.
        multi_label: Zero-shot: score each label by itself; several may be true.
    """

    task: ClassVar[str] = "classify"
    output_columns: ClassVar[tuple[str, ...]] = (
        "predicted_label",
        "predicted_score",
        "label_scores",
    )
    noun: ClassVar[str] = "labels"

    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    top_k: int = 1
    all_scores: Annotated[bool, Parameter(negative=())] = False
    min_score: MinScore = None
    pooling: Pooling = "mean"
    candidate_labels: Annotated[str | tuple[str, ...] | None, Parameter(n_tokens=1)] = None
    hypothesis_template: str = "This example is {}."
    multi_label: Annotated[bool, Parameter(negative=())] = False

    def __post_init__(self) -> None:
        if self.function_to_apply is not None:
            self._choice("function_to_apply", ("softmax", "sigmoid", "none"))
        self._choice("pooling", ("mean", "max", "first"))
        self._at_least("top_k", 1)
        self._min_score()
        if self.candidate_labels is None and self.multi_label:
            raise ConfigError("multi_label goes with candidate_labels (zero-shot)")
        if self.candidate_labels is not None and not self.labels:
            raise ConfigError("candidate_labels must name at least one label")
        given = self.hypothesis_template
        if [given.count(mark) for mark in ("{}", "{", "}")] != [1, 1, 1]:
            raise ConfigError(
                "hypothesis_template must have a place {} for the label: exactly one, and no other "
                "braces"
            )

    @property
    def labels(self) -> list[str]:
        """The candidate labels of zero-shot, each once."""
        given = self.candidate_labels or ()
        names = (name.strip() for name in (given.split(",") if isinstance(given, str) else given))
        return list(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(Options):
    """The best of several choices for a premise.

    Args:
        min_score: Give no best choice where it scores lower; a number from 0 to 1, or a file
            with a number for each language: {de: {"*": 0.6}}.
        pooling: How scores of the windows of a long premise become one: mean (by length), max, or
            first, which reads the first window only and says so in the column truncated.
        question_template: VALUE=TEMPLATE: what a value of the question column adds to the premise;
            {premise} and {question} stand for the two. Repeatable. Default: templates for cause
            and effect, else "{premise} {question}".
    """

    task: ClassVar[str] = "choose"
    output_columns: ClassVar[tuple[str, ...]] = ("predicted_choice", "choice_scores")
    noun: ClassVar[str] = "choices"

    min_score: MinScore = None
    pooling: Pooling = "mean"
    question_template: Annotated[tuple[str, ...], Parameter(negative=())] = ()

    def __post_init__(self) -> None:
        self._choice("pooling", ("mean", "max", "first"))
        self._min_score()
        for given in self.question_template:
            template = given.partition("=")[2]
            if template.count("{premise}") != 1 or template.count("{question}") > 1:
                raise ConfigError(
                    "question_template must be VALUE=TEMPLATE, with {premise} in TEMPLATE, exactly "
                    "once, and {question} at most once"
                )


@dataclass(frozen=True, kw_only=True)
class QaOptions(Options):
    """Answers that stand in a text.

    Args:
        top_k: How many answers to give, best first.
        max_answer_tokens: Longest answer, in tokens.
        null_threshold: Let a question have no answer: it has none where the score of "no answer"
            is higher than that of the best answer by more than this. 0 is Hugging Face's
            handle_impossible_answer. Default: there is always an answer.
        align_to_words: Widen answers to whole words (up to white space), as Hugging Face does
            unless told otherwise; then they often end with punctuation.
        min_score: Leave out answers that score lower; a number from 0 to 1, or a file with a number
            for each language: {de: {"*": 0.6}}.
        offset_unit: What start and end count: codepoint (Python), utf16 (JavaScript, Java) or byte
            (of UTF-8; Rust, Go).
    """

    task: ClassVar[str] = "qa"
    output_columns: ClassVar[tuple[str, ...]] = (
        "predicted_answer",
        "predicted_answers",
        "null_score",
    )
    noun: ClassVar[str] = "answers"

    top_k: int = 1
    max_answer_tokens: int = 15
    null_threshold: float | None = None
    align_to_words: Annotated[bool, Parameter(negative=())] = False
    min_score: MinScore = None
    offset_unit: OffsetUnit = "codepoint"

    def __post_init__(self) -> None:
        self._at_least("top_k", 1)
        self._at_least("max_answer_tokens", 1)
        self._choice("offset_unit", OFFSET_UNITS)
        self._min_score()


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(Options):
    """Vectors of texts.

    Args:
        pooling: Which vector stands for a text: mean or max over all its tokens, special ones
            included, cls, or pooler (a trained layer on top of cls); none, the vectors of all
            tokens, is for `pipeline("feature-extraction")` alone.
        normalize: Scale vectors to length 1.
        prefix: Text put before every text, such as "query: " for models that want it; before
            every window of a long one.
        dimensions: Keep only the first so many numbers, normalised again.
        output_dtype: float32, float16 or int8 (127 times the normalised numbers, rounded).
    """

    task: ClassVar[str] = "embed"
    output_columns: ClassVar[tuple[str, ...]] = ("embedding",)
    noun: ClassVar[str] = "embeddings"

    pooling: Literal["mean", "cls", "max", "pooler", "none"] = "mean"
    normalize: bool = True
    prefix: str = ""
    dimensions: int | None = None
    output_dtype: Literal["float32", "float16", "int8"] = "float32"

    def __post_init__(self) -> None:
        self._choice("pooling", ("mean", "cls", "max", "pooler", "none"))
        self._choice("output_dtype", ("float32", "float16", "int8"))
        self._at_least("dimensions", 1)
        if self.output_dtype == "int8" and not self.normalize:
            raise ConfigError("output_dtype int8 needs normalize: it stores numbers from -1 to 1")


SPAN_PAIRINGS = ("nearest", "nested", "all")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Options):
    """Universal information extraction: spans named by a schema.

    Args:
        schema: What to extract: a JSON or YAML file, or the same as text: names, lists of names,
            and {NAME: what to find out about each} to any depth; NAME[a, b] chooses options.
            Needed unless there is a schema column.
        schema_lang: Language of the prompts made of the schema: zh (or ch) or en.
        position_prob: A token starts or ends a span if the model gives it more than this.
        min_score: Leave out what has a lower probability: a number from 0 to 1, or a JSON or YAML
            file with a number for each name ("*": all others), also by language.
        split_sentence: Read sentence by sentence; faster, with less context.
        span_pairing: How starts and ends of one name become spans: nearest (as Taskflow, spans
            never overlap), nested (also spans within spans), all (every start with every end
            after it in the same window).
        taskflow_compat: Answer exactly as PaddleNLP 2.8.1 Taskflow does, with all its bugs; a row
            counts as one call.
        output_json: Add a column extracted_json with Taskflow's nested JSON.
        offset_unit: What start and end count: codepoint (Python), utf16 (JavaScript, Java) or byte
            (of UTF-8; Rust, Go).
    """

    task: ClassVar[str] = "extract"
    output_columns: ClassVar[tuple[str, ...]] = ("extracted",)
    noun: ClassVar[str] = "items"

    schema: Annotated[str | None, Parameter(negative=())] = None
    schema_lang: Literal["zh", "ch", "en"] = "zh"
    position_prob: float = 0.5
    min_score: MinScore = None
    split_sentence: Annotated[bool, Parameter(negative=())] = False
    span_pairing: Literal["nearest", "nested", "all"] = "nearest"
    taskflow_compat: Annotated[bool, Parameter(negative=())] = False
    output_json: Annotated[bool, Parameter(negative=())] = False
    offset_unit: OffsetUnit = "codepoint"

    def __post_init__(self) -> None:
        self._choice("schema_lang", ("zh", "ch", "en"))
        self._choice("span_pairing", SPAN_PAIRINGS)
        self._choice("offset_unit", OFFSET_UNITS)
        self._min_score()
        if not 0 <= self.position_prob < 1:
            raise ConfigError(f"position_prob must be from 0 to 1, got {self.position_prob}")
        if self.taskflow_compat:
            for name, only in (("span_pairing", "nearest"), ("offset_unit", "codepoint")):
                if getattr(self, name) != only:
                    raise ConfigError(f"taskflow_compat knows {name}={only} only")
            if self.min_score is not None:
                raise ConfigError("taskflow_compat knows no min_score")

    def resolved(self) -> Self:
        """The same with files read, ready to travel."""
        new = super().resolved()
        if isinstance(new.schema, str):
            # PARITY: to Taskflow, a string is one name, whatever is in it.
            content = read_schema(new.schema, may_split=not new.taskflow_compat)
            new = replace(new, schema=content)
        return new

    @property
    def nodes(self) -> Schema | None:
        """The schema of all records that bring none of their own."""
        return None if self.schema is None else parse_schema(self.schema)

    @property
    def added_columns(self) -> tuple[str, ...]:
        """Names of the columns that the task adds with these options."""
        return (*self.output_columns, *(["extracted_json"] if self.output_json else []))


OPTIONS: dict[str, type[Options]] = {
    cls.task: cls
    for cls in (
        NerOptions,
        ClassifyOptions,
        ChooseOptions,
        QaOptions,
        EmbedOptions,
        ExtractOptions,
    )
}
TASKS = tuple(OPTIONS)


def option_names(task: str) -> list[str]:
    """Names of the options of a task."""
    return [field.name for field in fields(OPTIONS[task])]


def options_of(task: str, values: Mapping[str, Any]) -> Options:
    """Options of a task by name.

    Raises:
        ConfigError: no such task, no such option, or an impossible value.
    """
    if task not in OPTIONS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    unknown = [name for name in values if name not in option_names(task)]
    if unknown:
        names = ", ".join(option_names(task))
        raise ConfigError(f"{task} has no option {unknown[0]!r}; there are {names}")
    return OPTIONS[task](**values)


DEMO_FOLDER = Path(__file__).parent / "demo"


def demo_model(task: str) -> Path:
    """The model folder that comes with the package for a task: a head, which lies over the encoder,
    or the encoder itself."""
    return DEMO_FOLDER / ("encoder" if task == "embed" else task)


def demo_data(task: str) -> Path:
    """Sample input for a task."""
    own = DEMO_FOLDER / f"data_{task}"
    return own if own.is_dir() else DEMO_FOLDER / "data"
