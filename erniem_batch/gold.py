"""Annotated rows, one form for each task: what training learns and evaluation compares with.

Every form is checked when it is read, because a wrong annotation teaches a model silently. All
places are in characters (code points), half-open.

| task | columns |
|---|---|
| ner | text, spans [[start, end, label], ...]; or tokens, tags (BIO, IOB1, BIOES) |
| classify | text, label: a name, a list of names (several may be true), or a number; text_pair |
| choose | premise, choices, label (index of the right one); question |
| qa | question, context, answers [{text, start}, ...]; none: there is no answer |
| extract | text, spans, and relations [[subject, name, object], ...] as indices of spans; or |
|         | PaddleNLP's content, prompt, result_list [{text, start, end}, ...] |
| embed | text |

and in all of them `id` and `lang` or `language`, if there are any.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.job.chunks import CONTENT_ERRORS
from erniem_batch.job.config import MAX_ROW_BYTES
from erniem_batch.job.jsonl import parse_line
from erniem_batch.job.lines import bounded_lines
from erniem_batch.job.units import SourceFile, files_of, find_files
from erniem_batch.labels import Span, labels_to_spans
from erniem_batch.records import Record

LIST_COLUMNS = (
    "spans",
    "tokens",
    "tags",
    "ner_tags",
    "choices",
    "answers",
    "relations",
    "result_list",
)
LANGUAGE_COLUMNS = ("lang", "language", "detected_language")
MAX_PROBLEMS_SHOWN = 5
# Tokens of these languages are joined without spaces where a row has no text of its own.
WRITTEN_WITHOUT_SPACES = frozenset({"ja", "zh", "zh-Hans", "zh-Hant", "th", "lo", "km", "my"})

Relation = tuple[Span, str, Span]

_TAG = re.compile("O|[BIESLU]-.+")


@dataclass(frozen=True, slots=True)
class Answer:
    """A right answer: its first character in the context, and its text."""

    start: int
    text: str

    @property
    def end(self) -> int:
        """First character behind it."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to extract from a text.

    Attributes:
        spans: by their labels, or by the one prompt.
        relations: subject, name, object.
        prompt: the one prompt that was asked; None: the spans are complete for all labels.
    """

    spans: tuple[Span, ...]
    relations: tuple[Relation, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Annotated:
    """A row with what is right for it.

    Attributes:
        record: as the predictor takes it.
        language: "" where it is unknown.
        gold: ner: list of Span. classify: str, tuple of str, or float. choose: int. qa: tuple of
            Answer. extract: Facts. embed: None.
    """

    record: Record
    language: str
    gold: Any
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_annotated(task: str, inputs: Sequence[str]) -> list[Annotated]:
    """All rows of Parquet and JSONL files, folders, globs or URLs, in the order of the file names.

    Raises:
        ConfigError: no such files, or rows that are not of the task's form; names the first few.
    """
    rows, problems = [], []
    for file in files_of(find_files(inputs)):
        for number, row in enumerate(rows_of(file)):
            try:
                if isinstance(row, RecordError):
                    raise row
                rows.append(annotated(task, row, default_id=f"{file.name}:{number}"))
            except RecordError as error:
                problems.append(f"{file.path} row {number}: {error}")
    if problems:
        shown = "; ".join(problems[:MAX_PROBLEMS_SHOWN])
        raise ConfigError(
            f"{len(problems)} of {len(rows) + len(problems)} rows are not annotated for {task}, "
            f"the first: {shown}. Mend or remove them: a wrong annotation teaches silently"
        )
    if not rows:
        raise ConfigError(f"{', '.join(inputs)}: there are no rows")
    return rows


def rows_of(file: SourceFile) -> Iterator[dict[str, Any] | RecordError]:
    """Rows as mappings; an error in place of a line that is none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        yield from _rows_of(file)
    except CONTENT_ERRORS as error:
        raise ConfigError(f"{file.path}: cannot be read: {type(error).__name__}") from error


def _rows_of(file: SourceFile) -> Iterator[dict[str, Any] | RecordError]:
    if file.format == "parquet":
        with storage.open_input(file.path) as source:
            for batch in pq.ParquetFile(source).iter_batches():
                yield from batch.to_pylist()
        return
    for line in bounded_lines(file.path):
        if isinstance(line, int):
            yield RecordError(f"a line of {line} bytes: at most {MAX_ROW_BYTES} are read")
        elif line.strip():
            try:
                yield parse_line(line)
            except RecordError as error:
                yield error


def annotated(task: str, row: Mapping[str, Any], default_id: str = "") -> Annotated:
    """One row in the form of a task.

    Raises:
        RecordError: it is not; says what was expected and what came.
    """
    row = {name: _loaded(name, value) for name, value in row.items()}
    language = language_of(row)
    id_ = row.get("id")
    text, fields, gold = READERS[task](row)
    if language:
        fields["language"] = language
    record = Record(default_id if id_ is None else str(id_), text, fields)
    return Annotated(record, language, gold, row)


def language_of(row: Mapping[str, Any]) -> str:
    """The language of a row; "" where it is unknown."""
    return next((row[c] for c in LANGUAGE_COLUMNS if isinstance(row.get(c), str)), "")


def held_out(rows: Sequence[Annotated], share: float) -> list[bool]:
    """Which rows are kept out of the training, by a hash: of the id, so that translations with the
    same id stay together; of questions by the smallest id of their context."""
    together = [
        row.record.text if "question" in row.record.fields else row.record.id for row in rows
    ]
    smallest: dict[str, str] = {}
    for name, row in zip(together, rows, strict=True):
        smallest[name] = min(smallest.get(name, row.record.id), row.record.id)

    def is_out(name: str) -> bool:
        digest = hashlib.sha256(smallest[name].encode()).hexdigest()
        return int(digest[:8], 16) < share * 2**32

    return [is_out(name) for name in together]


# ---- forms ------------------------------------------------------------------------------------

Form = tuple[str, dict[str, Any], Any]


def _ner(row: Mapping[str, Any]) -> Form:
    text, spans = _spans(row)
    return text, {}, spans


def _classify(row: Mapping[str, Any]) -> Form:
    label = row.get("label")
    label = row.get("labels") if label is None else label
    gold: Any
    if isinstance(label, str):
        gold = label
    elif isinstance(label, Sequence) and all(isinstance(name, str) for name in label):
        gold = tuple(label)
    elif isinstance(label, int | float) and not isinstance(label, bool) and abs(label) < 1e38:
        gold = float(label)  # nothing that is not finite, as float32 neither
    else:
        raise _expected("label", "a name, a list of names or a number", label)
    pair = row.get("text_pair")
    fields = {} if pair is None else {"text_pair": _string(row, "text_pair")}
    return _string(row, "text"), fields, gold


def _choose(row: Mapping[str, Any]) -> Form:
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise _expected("choices", "a list of strings", choices)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise _expected("label", f"an index from 0 to {len(choices) - 1}", label)
    fields: dict[str, Any] = {"choices": choices}
    if row.get("question") is not None:
        fields["question"] = _string(row, "question")
    return _string(row, "premise"), fields, label


def _qa(row: Mapping[str, Any]) -> Form:
    context, question = _string(row, "context"), _string(row, "question")
    given = row.get("answers")
    if isinstance(given, Mapping):  # the form of Hugging Face's SQuAD: {text: [], answer_start: []}
        texts, starts = given.get("text"), given.get("answer_start", given.get("start"))
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise _expected("answers", "lists text and answer_start of the same length", given)
        given = [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(given, list):
        raise _expected("answers", "a list of {text, start}", given)
    answers = []
    for i, item in enumerate(given):
        start = item.get("start", item.get("answer_start")) if isinstance(item, Mapping) else None
        text = item.get("text") if isinstance(item, Mapping) else None
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise _expected(f"answers[{i}]", "{text, start}", item)
        if context[start : start + len(text)] != text or start < 0 or not text:
            raise RecordError(
                f"answers[{i}]: its text does not stand at {start} of the context, which has "
                f"{len(context)} characters; start counts characters (code points)"
            )
        answers.append(Answer(start, text))
    return context, {"question": question}, tuple(answers)


def _extract(row: Mapping[str, Any]) -> Form:
    # A Parquet file has null where rows of another form have a column.
    if row.get("prompt") is not None or row.get("result_list") is not None:
        return _prompted(row)
    text, spans = _spans(row)
    given = row.get("relations")
    if not isinstance(given, list | None):
        raise _expected("relations", "a list of [subject, name, object]", given)
    relations = []
    for i, item in enumerate(given or ()):
        if not isinstance(item, Sequence) or len(item) != 3 or not isinstance(item[1], str):
            raise _expected(f"relations[{i}]", "[index of a span, name, index of a span]", item)
        subject, object_ = places = _as_index(item[0]), _as_index(item[2])
        if not all(isinstance(p, int) and 0 <= p < len(spans) for p in places):
            raise RecordError(f"relations[{i}]: expected indices of the {len(spans)} spans")
        relations.append((spans[subject], item[1], spans[object_]))
    return text, {}, Facts(tuple(spans), tuple(relations))


def _prompted(row: Mapping[str, Any]) -> Form:
    has_content = row.get("content") is not None or row.get("text") is None
    text, prompt = _string(row, "content" if has_content else "text"), _string(row, "prompt")
    spans: list[Span] = []
    given = row.get("result_list")
    given = [] if given is None else given
    if not isinstance(given, list):
        raise _expected("result_list", "a list of {text, start, end}", given)
    for i, item in enumerate(given):
        start: Any = item.get("start") if isinstance(item, Mapping) else None
        end: Any = item.get("end") if isinstance(item, Mapping) else None
        _require_place(f"result_list[{i}]", start, end, text)
        if item.get("text") not in (None, text[start:end]):
            raise RecordError(f"result_list[{i}]: its text does not stand at {start} to {end}")
        spans.append((start, end, prompt))
    return text, {"prompt": prompt}, Facts(tuple(spans), prompt=prompt)


def _embed(row: Mapping[str, Any]) -> Form:
    return _string(row, "text"), {}, None


READERS: dict[str, Callable[[Mapping[str, Any]], Form]] = {
    "ner": _ner,
    "classify": _classify,
    "choose": _choose,
    "qa": _qa,
    "extract": _extract,
    "embed": _embed,
}


# ---- parts ------------------------------------------------------------------------------------


def _spans(row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """Text and spans, from spans or from tokens and tags."""
    if row.get("spans") is None and row.get("tokens") is not None:
        return _from_tags(row)
    text, given = _string(row, "text"), row.get("spans")
    if not isinstance(given, list):
        raise _expected("spans", "a list of [start, end, label] (or tokens and tags)", given)
    spans: list[Span] = []
    for i, item in enumerate(given):
        if isinstance(item, Mapping):
            item = [item.get(name) for name in ("start", "end", "label")]
        if not isinstance(item, Sequence) or len(item) != 3:
            raise _expected(f"spans[{i}]", "[start, end, label]", item)
        start, end = (_as_index(x) for x in item[:2])
        _require_place(f"spans[{i}]", start, end, text)
        if not isinstance(item[2], str) or not item[2]:
            raise _expected(f"spans[{i}] label", "a name", item[2])
        spans.append((start, end, item[2]))
    return text, spans


def _from_tags(row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    tokens, tags = row.get("tokens"), row.get("tags", row.get("ner_tags"))
    for name, value in (("tokens", tokens), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise _expected(name, "a list of strings", value)
    assert isinstance(tokens, list)
    assert isinstance(tags, list)
    if len(tokens) != len(tags):
        raise RecordError(f"{len(tokens)} tokens but {len(tags)} tags")
    unknown = next((i for i, tag in enumerate(tags) if not _TAG.fullmatch(tag)), None)
    if unknown is not None:  # "PER" would be read as O
        raise RecordError(f"tags[{unknown}]: expected O, or a name behind B-, I-, E-, S-, L- or U-")
    space = "" if language_of(row) in WRITTEN_WITHOUT_SPACES else " "
    text = row["text"] if isinstance(row.get("text"), str) else space.join(tokens)
    offsets, at = [], 0
    for i, token in enumerate(tokens):
        start = text.find(token, at)
        if start < 0:
            raise RecordError(f"tokens[{i}] does not stand in the text behind the one before it")
        at = start + len(token)
        offsets.append((start, at))
    return text, labels_to_spans(tags, offsets)


def _require_place(where: str, start: Any, end: Any, text: str) -> None:
    numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, end))
    if not numbers or not 0 <= start < end <= len(text):
        what = f"{start} to {end}" if numbers else f"{type(start).__name__}, {type(end).__name__}"
        raise RecordError(
            f"{where}: expected 0 <= start < end <= {len(text)} characters (code points), got "
            f"{what}"
        )


def _loaded(name: str, value: Any) -> Any:
    """A list that a batch job has carried as JSON text: no type holds [0, 3, "PER"]."""
    if name not in LIST_COLUMNS or not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_index(value: Any) -> Any:
    """A Parquet list has values of one type only: there "3" is a number too."""
    if isinstance(value, bool):
        return None
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _expected(name, "a string", value)
    return value


def _expected(name: str, what: str, value: Any) -> RecordError:
    came = "null or no such column" if value is None else type(value).__name__
    return RecordError(f"{name}: expected {what}, got {came}")
