"""What comes in and goes out over HTTP, as strict pydantic models; the OpenAPI document is theirs.

Options are those of `erniem_batch.options`, results the columns of the batch output, under the same
names: a request and a row of a batch run differ in nothing but the way they travel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from docstring_parser import parse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
)

from erniem_batch.errors import ConfigError
from erniem_batch.options import OPTIONS, TASKS
from erniem_batch.serve.limits import (
    MAX_COUNT,
    MAX_ID_CHARACTERS,
    MAX_LANGUAGE_CHARACTERS,
    MAX_MODEL_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    MAX_USER_CHARACTERS,
)
from erniem_batch.text.schema import MAX_DEPTH, schema_of_text


class Message(BaseModel):
    """Nothing is converted, nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


# ---- options ------------------------------------------------------------------------------------

Score = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


def _whole(text: str) -> str:
    """Text as it is, if UTF-8 can hold it; in a batch run the rest ends as dead letters too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text must not have halves of surrogate pairs") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


def _all_whole(texts: list[str]) -> list[str]:
    """The same for a list, in one step: a call for each of ten thousand takes too long."""
    _whole("\n".join(texts))
    return texts


Template = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARACTERS)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
Names = Annotated[list[Name], Field(fail_fast=True, min_length=1, max_length=MAX_COUNT),
                  AfterValidator(_all_whole)]  # fmt: skip
Templates = Annotated[list[Template], Field(fail_fast=True, max_length=MAX_COUNT),
                      AfterValidator(_all_whole)]  # fmt: skip
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1), AfterValidator(_all_whole)]
Choices = Annotated[Texts, Field(max_length=MAX_COUNT)]


def _scores(value: Any) -> Any:
    """Thresholds whose names are of usable length. The first wrong one ends the look at them, which
    pydantic alone would go on with to the last."""
    tables = [value]
    while tables:
        table = tables.pop()
        if not isinstance(table, dict):
            continue
        _check_names(list(table))
        for score in table.values():
            if isinstance(score, dict) and table is value:
                tables.append(score)
            elif isinstance(score, bool) or not isinstance(score, int | float):
                raise ValueError("each threshold must be a number from 0 to 1")
            elif not 0 <= score <= 1:
                raise ValueError("each threshold must be from 0 to 1")
    return value


def _check_names(names: list[str]) -> None:
    if len(names) > MAX_COUNT:
        raise ValueError(f"{len(names)} names; at most {MAX_COUNT}")
    longest = max(map(len, names), default=0)
    if longest > MAX_NAME_CHARACTERS:
        raise ValueError(f"a name of {longest} characters; at most {MAX_NAME_CHARACTERS}")
    _all_whole(names)


MinScore = Annotated[Score | dict[str, Score | dict[str, Score]], BeforeValidator(_scores)]


def _schema(value: Any) -> Any:
    """A schema that can be asked, as a list; text is read here, so that nobody takes it for the
    name of a file. What is wrong is said without any name in it."""
    try:
        read = schema_of_text(value) if isinstance(value, str) else value
    except ConfigError:
        raise ValueError("text must be JSON, YAML or names with commas between them") from None
    _check_names(list(_names_of(read)))
    return [read] if isinstance(read, str) else read


def _names_of(value: Any) -> Iterator[str]:
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(part, str):
            yield part
        elif isinstance(part, list) and depth < MAX_DEPTH and set(map(type, part)) == {str}:
            yield from part
        elif isinstance(part, list):
            waiting += [(item, depth + 1) for item in part]
        elif isinstance(part, dict):
            yield from part
            waiting += [(inner, depth + 1) for inner in part.values() if inner is not None]
        else:
            raise ValueError("each part must be a name, a list or an object")


Schema = Annotated[str | list[Any] | dict[str, Any], AfterValidator(_schema)]

# What the command line reads from files and from text is given in full here: a server opens no file
# because a request names it.
ONLINE_TYPES: dict[str, Any] = {
    "hypothesis_template": Annotated[Template, AfterValidator(_whole)],
    "prefix": Annotated[Template, AfterValidator(_whole)],
    "min_score": MinScore | None,
    "schema": Schema | None,
    "candidate_labels": Names | None,
    "question_template": Templates,
    "top_k": Count,
    "max_answer_tokens": Count,
    "dimensions": Count | None,
    "position_prob": Annotated[float, Field(ge=0, lt=1)],
    "null_threshold": Annotated[float, Field(allow_inf_nan=False)] | None,
}
ONLINE_HELP = {
    "min_score": "Leave out what scores lower: a number, or one for each label ('*': all others), "
    "also by language: {'de': {'PER': 0.6}}. Default: what the model recommends.",
    "schema": "What to extract: names, lists of names, and {NAME: what to find out about each} to "
    "any depth; as JSON, or as text (JSON, YAML, or names with commas between them).",
    "candidate_labels": "Zero-shot: labels to choose from; needs a model with an entailment label.",
}
# Lists here, in Python what nobody can change.
TUPLES = {"candidate_labels", "question_template"}
# Decided when a model is loaded: see ModelConfig.options.
NOT_ONLINE = {"extract": {"taskflow_compat"}, "embed": {"pooling"}}


def _options_model(task: str) -> type[Message]:
    """The options of a task as a message; what is not given stays as the service was told."""
    source = OPTIONS[task]
    hints = get_type_hints(source)
    helps = {param.arg_name: param.description for param in parse(source.__doc__ or "").params}
    definitions: dict[str, Any] = {}
    for field in fields(source):
        name = field.name
        if name in NOT_ONLINE.get(task, ()):
            continue
        type_ = ONLINE_TYPES.get(name, hints[name])
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        text = ONLINE_HELP.get(name) or " ".join((helps.get(name) or "").split())
        # `schema` is a method of pydantic's models.
        attribute = "schema_" if name == "schema" else name
        definitions[attribute] = (type_, Field(default=default, description=text, alias=name))
    return create_model(
        f"{task.title()}Options",
        __base__=Message,
        __doc__="Options of this request only; what is not given is as the service was told.",
        **definitions,
    )


OPTION_MODELS = {task: _options_model(task) for task in TASKS}


def given_options(options: BaseModel) -> dict[str, Any]:
    """The options that a request names, as `Predictor.with_options` takes them."""
    given = options.model_dump(exclude_unset=True, by_alias=True)
    return {name: tuple(v) if name in TUPLES and v else v for name, v in given.items()}


# ---- inputs -------------------------------------------------------------------------------------


class Item(Message):
    """One thing to work on. `id` comes back with its result; default: its place."""

    id: Annotated[Text, Field(max_length=MAX_ID_CHARACTERS)] | None = None
    language: Annotated[Text, Field(max_length=MAX_LANGUAGE_CHARACTERS)] | None = Field(
        None, description="Of the text, such as de: for thresholds by language."
    )


class TextItem(Item):
    """A text."""

    text: Text


class ClassifyItem(TextItem):
    """A text, or a pair of texts."""

    text_pair: Text | None = None


class ChooseItem(Item):
    """A premise and its choices."""

    premise: Text
    choices: Choices
    question: Text | None = Field(None, description="Such as cause or effect.")


class QaItem(Item):
    """A question, and the text in which the answer stands."""

    question: Text
    context: Text


class ExtractItem(TextItem):
    """A text, perhaps with a schema of its own."""

    schema_: Schema | None = Field(None, alias="schema", description="Instead of options.schema.")


# Under which name each task has its text.
TEXT_NAMES = {"choose": "premise", "qa": "context"}
ITEMS: dict[str, type[Item]] = {
    "ner": TextItem,
    "classify": ClassifyItem,
    "choose": ChooseItem,
    "qa": QaItem,
    "embed": TextItem,
    "extract": ExtractItem,
}


def _as_list(value: Any) -> Any:
    """One item or many, plain texts or objects, as a list of objects."""
    many = value if isinstance(value, list) else [value]
    return [{"text": item} if isinstance(item, str) else item for item in many]


Model = Annotated[str, Field(max_length=MAX_MODEL_CHARACTERS)] | None


def _request_model(task: str) -> type[Message]:
    item: Any = ITEMS[task]
    takes_text = issubclass(item, TextItem)
    one: Any = str | item if takes_text else item
    inputs: Any = Annotated[
        list[item],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=one | list[one]),
    ]
    options: Any = OPTION_MODELS[task]
    return create_model(
        f"{task.title()}Request",
        __base__=Message,
        inputs=(inputs, Field(description="One item or a list; a text alone may be a string.")),
        options=(options, Field(default_factory=options)),
        model=(Model, Field(None, description="Name of a model; see GET /v1/models.")),
    )


REQUESTS = {task: _request_model(task) for task in TASKS}


def items_of(task: str, inputs: list[Any]) -> list[dict[str, Any]]:
    """Items as plain mappings: `id`, `text`, and in `fields` what else the task reads."""
    name = TEXT_NAMES.get(task, "text")
    items = []
    for i, item in enumerate(inputs):
        values = item.model_dump(exclude_none=True, by_alias=True)
        ident, text = values.pop("id", str(i)), values.pop(name)
        items.append({"id": ident, "text": text, "fields": values})
    return items


# ---- results ------------------------------------------------------------------------------------


class Problem(Message):
    """What was wrong, in the form of the OpenAI API."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error",
                  "server_error"]  # fmt: skip
    code: str
    param: str | None = None
    request_id: str | None = None


class Refused(Message):
    """The answer to a request that was not served."""

    error: Problem


class Done(Message):
    """What all results have."""

    id: str
    n_tokens: int = Field(description="Without special tokens.")
    n_windows: int = Field(description="Model inputs it took.")
    truncated: bool = Field(description="Whether a part went unread, as was asked for.")
    detected_language: str | None = None


class Failed(Message):
    """An item that could not be processed; the others of its request were."""

    id: str
    error: Problem


class Entity(Message):
    """`text` from `start` to before `end`, counted in the `offset_unit` that was asked for."""

    start: int
    end: int
    label: str
    text: str
    score: float


class NerResult(Done):
    """Entities in the order of the text."""

    entities: list[Entity]


class LabelScore(Message):
    """A label and how sure it is."""

    label: str
    score: float


class ClassifyResult(Done):
    """The best label, null where none scores high enough; and the others, best first."""

    predicted_label: str | None
    predicted_score: float | None
    label_scores: list[LabelScore]


class ChooseResult(Done):
    """The best choice, counted from 0; null where it scores too low."""

    predicted_choice: int | None
    choice_scores: list[float]


class Answer(Message):
    """`text` from `start` to before `end` of the context."""

    start: int
    end: int
    text: str
    score: float


class QaResult(Done):
    """The best answer, null where there is none; and the others, best first."""

    predicted_answer: str | None
    predicted_answers: list[Answer]
    null_score: float | None


class EmbedResult(Done):
    """A vector."""

    embedding: list[float] | list[int]


class Extracted(Message):
    """Something found under a name of the schema; `parent` is the `id` of what it was asked about.
    Options, which stand in no text, have no offsets."""

    id: int
    parent: int | None
    name: str
    text: str
    start: int | None
    end: int | None
    probability: float


class ExtractResult(Done):
    """A tree as a flat list, each item behind its parent."""

    extracted: list[Extracted]
    extracted_json: str | None = None


RESULTS: dict[str, type[Done]] = {
    "ner": NerResult,
    "classify": ClassifyResult,
    "choose": ChooseResult,
    "qa": QaResult,
    "embed": EmbedResult,
    "extract": ExtractResult,
}


class Usage(Message):
    """Of a whole request."""

    n_tokens: int
    n_windows: int


def _response_model(task: str) -> type[Message]:
    result: Any = RESULTS[task]
    return create_model(
        f"{task.title()}Response",
        __base__=Message,
        model=(str, ...),
        results=(list[result | Failed], Field(description="One an item, in order.")),
        usage=(Usage, ...),
    )


RESPONSES = {task: _response_model(task) for task in TASKS}


# ---- OpenAI's embeddings ------------------------------------------------------------------------


class EmbeddingsRequest(Message):
    """As OpenAI's, for texts; token ids are those of other models, so are not taken."""

    input: Text | Texts
    model: Model = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = Field(
        None, description="Taken, and not looked at."
    )


class Embedding(Message):
    """A vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Message):
    """Tokens as OpenAI counts them."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Message):
    """As OpenAI's."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


# ---- models -------------------------------------------------------------------------------------


class ModelCard(Message):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    tasks: list[str]
    labels: dict[str, list[str]] = Field(description="Of the tasks that have them.")
    digests: dict[str, str] = Field(description="SHA-256 of the model folder, for each task.")
    window_tokens: int
    overlap_tokens: int
    detect_language: bool
    dtype: str


class ModelList(Message):
    """All models of the service."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Message):
    """Whether it works, and if not, what does not."""

    status: Literal["ok", "unavailable"]
    problems: list[str] = []


# ---- examples -----------------------------------------------------------------------------------

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "ner": {
        "one text": {"inputs": "Ada Lovelace met Charles Babbage in London."},
        "two texts, places for JavaScript": {
            "inputs": [
                {"id": "a", "text": "Angela Merkel wurde in Hamburg geboren.", "language": "de"},
                {"id": "b", "text": "😀 村上春樹は京都で生まれた。", "language": "ja"},
            ],
            "options": {"offset_unit": "utf16", "min_score": 0.5},
        },
    },
    "classify": {
        "three best labels": {
            "inputs": "The team won the cup after extra time.",
            "options": {"top_k": 3},
        }
    },
    "choose": {
        "what happened?": {
            "inputs": {
                "premise": "The glass fell off the table.",
                "choices": ["It broke.", "It was blue."],
                "question": "effect",
            }
        }
    },
    "qa": {
        "a question": {
            "inputs": {
                "question": "Where did Ada Lovelace live?",
                "context": "Ada Lovelace lived in London.",
            }
        }
    },
    "embed": {"two vectors": {"inputs": ["Good morning", "Guten Morgen"]}},
    "extract": {
        "persons and places": {
            "inputs": "Ada Lovelace met Charles Babbage in London.",
            "options": {"schema": ["Person", "Location"], "schema_lang": "en"},
        }
    },
}
