"""What to extract: the schema language of PaddleNLP's Taskflow, as a tree of nodes and prompts.

"Person"                                     one name
["Person", "City"]                           several
{"Person": ["Company", "Position"]}          about each person: company and position
{"Person": {"Company": {"Boss": "Age"}}}     to any depth; Taskflow refuses nested mappings
"Mood [good, bad]"                           choose among options
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from erniem_batch import storage
from erniem_batch.cache import ByteCache
from erniem_batch.errors import ConfigError

MAX_DEPTH = 16
# Brackets of YAML that are open at once, those in quoted names included.
MAX_BRACKETS = 100

# Full-width forms are asked for by their ASCII twins, as the models were trained.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# PARITY: Taskflow leaves the ideographic space alone, though it means to replace it.
_ASCII = {**_HALF_WIDTH, 0x3000: 0x20}

_BRACKET = re.compile(r"[\[\]{}]")
_MARK = re.compile(r"[,，\[［\]］]")
# Schemas read lately; a name takes much more memory parsed than as text.
BYTES_PER_CHARACTER = 64
_SCHEMAS: ByteCache[tuple[str, bool], tuple[Any]] = ByteCache(16 << 20)


@dataclass(frozen=True, slots=True)
class Node:
    """One name of a schema, and what is asked about each thing found under it."""

    name: str
    children: tuple["Node", ...] = ()


Schema = tuple[Node, ...]


def parse_schema(value: Any) -> Schema:
    """The tree of a schema.

    Raises:
        ConfigError: something in it is neither a name, a list nor a mapping; says where.
    """
    return _nodes(value, ("schema",))


# Where a part stands: "schema", then names and places. It becomes text only in an error.
Path = tuple[str | int, ...]


def _nodes(value: Any, path: Path) -> Schema:
    if len(path) > MAX_DEPTH + 1:
        raise ConfigError(f"{_place(path)}: nested more than {MAX_DEPTH} levels deep")
    if value is None:
        return ()
    if isinstance(value, str):
        return (Node(_name(value, path)),)
    if isinstance(value, Mapping):
        return tuple(
            Node(_name(name, path), _nodes(inner, (*path, name))) for name, inner in value.items()
        )
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return tuple(
            node
            for i, item in enumerate(value)
            for node in _nodes(_present(item, (*path, i)), (*path, i))
        )
    came = type(value).__name__
    raise ConfigError(f"{_place(path)} must be a name, a list of names or a mapping, got {came}")


def _place(path: Path) -> str:
    first, *rest = path
    return f"{first}" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in rest)


def _name(name: Any, path: Path) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{_place(path)}: a name must be a string, got {type(name).__name__}")
    if not name.strip():
        # Names around it are not told: they may be those of a request.
        depth = len(path) - 1
        where = f"{path[0]}, {depth} levels deep" if depth else f"{path[0]}"
        raise ConfigError(f"{where}: a name is blank")
    return name


def _present(item: Any, path: Path) -> Any:
    if item is None:
        raise ConfigError(f"{_place(path)} must be a name, a list of names or a mapping, got null")
    return item


def read_schema(given: str, *, may_split: bool = True) -> Any:
    """The content of a schema file (.json, .yaml or .yml; a path or URL), or of the text itself.

    Args:
        may_split: commas separate names.

    Raises:
        ConfigError: no such file, or neither JSON nor YAML.
    """
    if PurePosixPath(given).suffix.lower() not in (".json", ".yaml", ".yml"):
        return schema_of_text(given, may_split)
    data = storage.read(storage.normal(given))
    if data is None:
        raise ConfigError(f"--schema: there is no file {given}")
    try:
        return _parse_text(data.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"--schema {given}: {error}") from None


def is_structured(text: str) -> bool:
    """Whether a schema text is JSON or YAML, and not only names with commas between them."""
    bare = text.strip()
    return bare[:1] in ("[", "{") or "\n" in bare


def schema_of_text(text: str, may_split: bool = True) -> Any:
    """A schema written as text: JSON, YAML, or names with commas between them.

    Raises:
        ConfigError: neither.
    """
    key = (text, may_split)
    if (known := _SCHEMAS.get(key)) is None:
        known = (_schema_of_text(text, may_split),)
        _SCHEMAS.put(key, known, BYTES_PER_CHARACTER * len(text) + 1000)
    return known[0]


def _schema_of_text(text: str, may_split: bool) -> Any:
    if is_structured(text):
        try:
            return _parse_text(text)
        except ValueError as error:
            raise ConfigError(f"the schema is no JSON or YAML: {error}") from None
    names = list(split_names(text)) if may_split else [text]
    return [name.strip() for name in names] if len(names) > 1 else text


def split_names(text: str) -> Iterator[str]:
    """Yield the parts of a text between its commas, except commas inside brackets.

    A comma is inside brackets if the next bracket closes. Takes linear time.

    Example:
        >>> list(split_names("Mood [good, bad], City"))
        ['Mood [good, bad]', ' City']
    """
    at = 0
    for comma in _commas_outside(text):
        yield text[at:comma]
        at = comma + 1
    yield text[at:]


def _commas_outside(text: str) -> Iterator[int]:
    commas: list[int] = []
    for match in _MARK.finditer(text):
        mark = match.group()
        if mark in ",，":
            commas.append(match.start())
            continue
        if mark in "[［":
            yield from commas
        commas = []
    yield from commas


def _parse_text(text: str) -> Any:
    """JSON or YAML. In YAML every name stays a string: "No" is no boolean here."""
    try:
        try:
            return json.loads(text)
        except ValueError:
            _check_brackets(text)
            return _without_empty(yaml.load(text, Loader=_PlainLoader))
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"neither JSON nor YAML{where}") from None


def _check_brackets(text: str) -> None:
    """Raises a RecursionError if more brackets are open than any schema has. The YAML loader would
    take seconds to find that out."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match.group() in "[{" else -1
        if depth > MAX_BRACKETS:
            raise RecursionError


class _PlainLoader(yaml.BaseLoader):  # type: ignore[misc]
    """YAML without aliases, of which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


def _without_empty(value: Any) -> Any:
    """YAML's "NAME:" with nothing behind it is a name without children."""
    if isinstance(value, dict):
        return {
            name: _without_empty(inner) if inner != "" else None for name, inner in value.items()
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


# ---- prompts ----------------------------------------------------------------------------------


def half_width(text: str) -> str:
    """Full-width ASCII as ASCII, exactly as Taskflow does it."""
    return text.translate(_HALF_WIDTH)


def prompt_of(name: str, parent: str | None, lang: str) -> str:
    """What the model is asked for a name, about a thing found before.

    Example:
        >>> prompt_of("Company", "Ada", "en"), prompt_of("公司", "张三", "zh")
        ('Company of Ada', '张三的公司')
        >>> prompt_of("Mood [good, bad]", "soup", "en")
        'Mood of soup [good, bad]'
    """
    return _ask(name, parent, lang).translate(_ASCII).strip()


def taskflow_prompt(name: str, parent: str | None, lang: str) -> str:
    """The same, with Taskflow's faults."""
    return half_width(_ask(name, parent, lang))


def _ask(name: str, parent: str | None, lang: str) -> str:
    if parent is None:
        return name
    if lang != "en":
        return f"{parent}的{name}"
    # Taskflow looks before it makes full-width brackets ASCII, so that only "[" counts.
    options = _options_at_end(name)
    if options:
        return f"{name[: name.find('[', 1)].strip()} of {parent} {options}"
    return f"{name} of {parent}"


def _options_at_end(name: str) -> str:
    """The longest "[...]" of one line at the end of a name, or "". Takes linear time."""
    end = len(name) - 1 if name.endswith("\n") else len(name)
    if end < 1 or name[end - 1] != "]":
        return ""
    start = name.find("[", name.rfind("\n", 0, end) + 1, end)
    return "" if start < 0 else name[start:end]


def options_of_prompt(prompt: str) -> list[tuple[int, int]]:
    """Characters of each option in a prompt that ends with [option, option]; empty if it does not.

    Example:
        >>> [("Mood [good, bad]")[a:b] for a, b in options_of_prompt("Mood [good, bad]")]
        ['good', 'bad']
    """
    whole = prompt.rstrip()
    at = whole.find("[") + 1
    if not at or not whole.endswith("]"):
        return []
    spans = []
    for part in whole[at:-1].split(","):
        start = at + len(part) - len(part.lstrip())
        if part.strip():
            spans.append((start, start + len(part.strip())))
        at += len(part) + 1
    return spans
