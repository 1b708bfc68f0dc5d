"""Where each task finds what it reads: flags of columns, one class a task."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

Column = Annotated[str | None, Parameter(negative=())]

# Under which of these names a task has its text.
TEXT_COLUMNS = ("text_column", "premise_column", "context_column")


@dataclass(frozen=True, kw_only=True)
class TextColumn:
    """Where the text is.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        language_column: Column with the language of the text, for thresholds by language.
    """

    text_column: str = "text"
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ClassifyColumns(TextColumn):
    """Where the texts are.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        text_pair_column: Column with a second text, read together with the first.
        language_column: Column with the language of the text, for thresholds by language.
    """

    text_pair_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ChooseColumns:
    """Where premise and choices are.

    Args:
        premise_column: Column with the premise; a dot goes into nested ones: doc.body.
        choices_column: Column with a list of choices, any number of them in each row.
        question_column: Column with a question about the premise, such as cause or effect.
        language_column: Column with the language of the text, for thresholds by language.
    """

    premise_column: str = "premise"
    choices_column: str = "choices"
    question_column: Column = None
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class QaColumns:
    """Where question and context are.

    Args:
        context_column: Column with the text to find answers in; a dot goes into nested ones.
        question_column: Column with the question.
        language_column: Column with the language of the text, for thresholds by language.
    """

    context_column: str = "context"
    question_column: str = "question"
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ExtractColumns(TextColumn):
    """Where text and schema are.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        schema_column: Column with a schema for each row, as text (JSON or YAML), list or mapping;
            where it is null, --schema counts.
        language_column: Column with the language of the text, for thresholds by language.
    """

    schema_column: Column = None


Columns = TextColumn | ChooseColumns | QaColumns

COLUMNS: dict[str, type[Columns]] = {
    "ner": TextColumn,
    "classify": ClassifyColumns,
    "choose": ChooseColumns,
    "qa": QaColumns,
    "embed": TextColumn,
    "extract": ExtractColumns,
}


def columns_of(columns: Columns) -> tuple[str, Mapping[str, str]]:
    """The column of the text, and those of what else is read, by name in `Record.fields`."""
    named = {field.name: getattr(columns, field.name) for field in fields(columns)}
    (text,) = (named.pop(name) for name in TEXT_COLUMNS if name in named)
    others = {n.removesuffix("_column"): c for n, c in named.items() if c is not None}
    return text, others
