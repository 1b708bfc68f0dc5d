"""A job as a YAML file: the flags of a command under their own names.

    # erniem-batch ner --config job.yaml
    task: ner
    input: s3://corpus/${NIGHT}/
    output: s3://tagged/${NIGHT}/
    model: s3://models/ner
    min-score: {PER: 0.7, "*": 0.5}
    actors: "1:8"

Flags of the command line come first, then the file, then defaults. `${NAME}` and `${NAME:-default}`
stand for environment variables; `\\${NAME}` for itself.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from erniem_batch.columns import COLUMNS
from erniem_batch.errors import ConfigError
from erniem_batch.job.config import JobConfig
from erniem_batch.options import OPTIONS, TASKS
from erniem_batch.plain_yaml import read_plain_yaml
from erniem_batch.thresholds import with_numbers

FLAG = "--config"

# What a file may say in YAML's own way, and the command line as text or as a file.
STRUCTURED = ("schema", "min-score", "candidate-labels")
NULLS = ("", "null", "~")
# JSON types that a file may have beside those of the flag.
ALSO = {
    "input": ("string",),
    "schema": ("array", "object"),
    "min-score": ("object",),
    "candidate-labels": ("array",),
}
# Of the command, not of the job.
NOT_IN_FILES = ("config", "print-config")


def apply_job_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Takes what the command line leaves open from the file of its --config; cyclopts calls it.

    Raises:
        ConfigError: there is no such file, or it is not of this form.
        UnknownOptionError: it has a key that is no flag; names the nearest one.
    """
    if not commands or commands[-1] not in TASKS:
        return  # its --config, if it has one, is another
    paths = [a.tokens[0].value for a in arguments if FLAG in a.names and a.tokens]
    for path in paths:
        values = read_job_file(path)
        task = values.pop("task", commands[-1])
        if task != commands[-1]:
            raise ConfigError(f"--config {path} is for the task {task}, not for {commands[-1]}")
        forbidden = [name for name in NOT_IN_FILES if name in values]
        if forbidden:
            raise ConfigError(f"--config {path}: {forbidden[0]} is for the command line only")
        Dict(values, source=path, use_commands_as_keys=False)(app, commands, arguments)


def read_job_file(path: str) -> dict[str, Any]:
    """The content of a file, by name of the flag, with environment variables in their places.

    Raises:
        ConfigError: no such file, not YAML, no mapping, or an environment variable is not set.
    """
    content = read_plain_yaml(path, FLAG)
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {path}: expected a mapping from names of flags to values")
    return {
        name.replace("_", "-"): _plain(name.replace("_", "-"), _expanded(value, path))
        for name, value in content.items()
        if value not in NULLS
    }


def _plain(name: str, value: Any) -> Any:
    """A value as the command line would give it."""
    if name == "candidate-labels" and isinstance(value, list):
        return ", ".join(map(str, value))
    if name == "min-score":
        value = with_numbers(value) if isinstance(value, Mapping) else value
    if name in STRUCTURED and isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return value


def _expanded(value: Any, path: str) -> Any:
    from expandvars import ExpandvarsException, UnboundVariable, expand

    if isinstance(value, Mapping):
        return {name: _expanded(inner, path) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, path) for inner in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    try:
        return expand(value, nounset=True, surrounded_vars_only=True)
    except UnboundVariable as error:
        name = str(error).strip("'").partition(":")[0]
        raise ConfigError(
            f"--config {path}: the environment variable {name} is not set; ${{{name}:-value}} "
            f"gives it a default"
        ) from None
    except ExpandvarsException as error:
        raise ConfigError(f"--config {path}: {error}") from None


# ---- the other way: a job as a file, and what may stand in one ---------------------------------


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of a job.

    Attributes:
        name: without --.
        attribute: name of its field, of JobConfig, of the options or of the columns.
        kind: its type.
    """

    name: str
    attribute: str
    kind: Any
    default: Any
    help: str


def flags_of(task: str) -> Iterator[Flag]:
    """Every flag of a job: columns, options of the task, and those that all have in common."""
    from docstring_parser import parse

    for cls in (COLUMNS[task], OPTIONS[task], JobConfig):
        hints = get_type_hints(cls, include_extras=True)
        helps = {p.arg_name: p.description or "" for p in parse(cls.__doc__ or "").params}
        for field in fields(cls):
            kind, *notes = (
                get_args(hints[field.name])
                if _is_noted(hints[field.name])
                else (hints[field.name],)
            )
            if any(isinstance(note, Parameter) and note.parse is False for note in notes):
                continue
            default = None if field.default is MISSING else field.default
            help_ = " ".join(helps[field.name].split())
            yield Flag(field.name.replace("_", "-"), field.name, kind, default, help_)


def _is_noted(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def as_yaml(config: JobConfig) -> str:
    """The whole configuration of a job, defaults included, as a file for --config."""
    text_column = config.text_flag.removeprefix("--")
    found: dict[str, Any] = {"task": config.task}
    for flag in flags_of(config.task):
        if flag.name == text_column:
            value: Any = config.text_column
        elif flag.name.endswith("-column"):
            value = config.fields.get(flag.attribute.removesuffix("_column"))
        else:
            value = getattr(config.options, flag.attribute, getattr(config, flag.attribute, None))
        if flag.name in STRUCTURED and isinstance(value, str) and value[:1] in ("{", "["):
            value = yaml.load(value, Loader=yaml.BaseLoader)  # as it is read: no is Norwegian
            value = with_numbers(value) if flag.name == "min-score" else value
        if value is not None:
            found[flag.name] = _escaped(list(value) if isinstance(value, tuple) else value)
    return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


def _escaped(value: Any) -> Any:
    """With `${` as it has to stand in the values of a file."""
    if isinstance(value, Mapping):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def json_schema(task: str) -> dict[str, Any]:
    """JSON schema of the files of a task, for editors and for checks before the night.

    Raises:
        ConfigError: no such task.
    """
    from pydantic import TypeAdapter

    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    properties: dict[str, Any] = {"task": {"const": task, "description": "Name of the command."}}
    for flag in flags_of(task):
        schema = TypeAdapter(flag.kind).json_schema()
        more = [{"type": kind} for kind in ALSO.get(flag.name, ())]
        properties[flag.name] = {
            **({"anyOf": [schema, *more]} if more else schema),
            **({} if flag.default is None else {"default": flag.default}),
            "description": flag.help,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"erniem-batch {task} --config",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
