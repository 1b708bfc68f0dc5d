"""Bodies of requests, read in bounded time. No work begins before its size is known to be allowed.

Python's parsers of JSON and pydantic hold Python's lock until they are done, so that a thread does
not help: the event loop stands still as long as they run. So the values of a body are counted
before it is parsed, and its texts are measured, as the tokenizer will normalise them, before
pydantic sees them.
"""

import asyncio
import codecs
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from erniem_batch.errors import ConfigError
from erniem_batch.serve.config import AppConfig
from erniem_batch.serve.engine import Refusal
from erniem_batch.serve.limits import (
    MAX_CLAIM_CHARACTERS,
    MAX_COUNT,
    MAX_FIELDS,
    MAX_OPTION_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    MAX_YAML_CHARACTERS,
    SMALL_BODY,
    SMALL_OPTIONS,
)
from erniem_batch.text.length import normal_length
from erniem_batch.text.schema import is_structured, schema_of_text

T = TypeVar("T")

# Bytes that are looked at in one step.
PIECE = 65_536
# Under which names requests have their items.
INPUTS = ("inputs", "input")
INVALID_JSON = Refusal(400, "invalid_json", "the body must be JSON, in UTF-8")
Place = tuple[str | int, ...]


class Refuse(HTTPException):
    """Ends a request with a refusal. FastAPI lets no other error out of the reading of a body."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status, refusal.code)
        self.refusal = refusal


def bounded_route(config: AppConfig) -> type[APIRoute]:
    """The class of routes whose bodies are read by `read_body`."""
    threads = ThreadPoolExecutor(1, "body")

    class BoundedRequest(Request):
        async def json(self) -> Any:
            if not hasattr(self, "_value"):
                self._value = await read_body(await self.body(), config, threads)
            return self._value

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def bounded(request: Request) -> Response:
                return await handle(BoundedRequest(request.scope, request.receive))

            return bounded

    return BoundedRoute


async def read_body(body: bytes, config: AppConfig, threads: ThreadPoolExecutor) -> Any:
    """The JSON value of a body, with its schemas read if they are text.

    Raises:
        Refuse: the body is not JSON, or is above a limit.
    """
    if len(body) <= SMALL_BODY:
        value = parse(body, config)
    else:
        value = await _in_thread(threads, parse, body, config)
    texts = {value: len(value) for value in _schema_texts(value)}
    is_small = sum(texts.values()) <= SMALL_OPTIONS and not any(map(is_structured, texts))
    if texts and not is_small:
        await _in_thread(threads, partial(read_schemas, value, config))
    return value


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def parse(body: bytes, config: AppConfig) -> Any:
    """The JSON value of a body within the limits.

    Raises:
        Refuse: see `read_body`.
    """
    if count_values(body, config.max_values) > config.max_values:
        message = f"the body has more than {config.max_values} values: send fewer at a time"
        raise Refuse(Refusal(413, "too_many_values", message))
    try:
        value = json.loads(body.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError):
        raise Refuse(INVALID_JSON) from None
    if isinstance(value, dict):
        _check_shape(value, config)
    _check_characters(value, config)
    if isinstance(value, dict) and isinstance(value.get("options"), dict):
        _check_claims(value["options"])
    return value


# ---- how many values ----------------------------------------------------------------------------


def count_values(body: bytes, most: int) -> int:
    """At least as many as there are values in a JSON text, and at most twice as many and one.

    The count stops above `most`. Takes linear time; what is no JSON has any number.

    Example:
        >>> count_values(b'{"a": [1, "x, y"]}', 100)
        4
    """
    n, at, is_inside = 1, 0, 0
    while at < len(body) and n <= most:
        piece = body[at : at + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # the next byte belongs to it
            piece = body[at : at + PIECE + 1]
        at += len(piece)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[is_inside::2])
        n += sum(outside.count(mark) for mark in (b",", b"[", b"{"))
        is_inside ^= (len(parts) - 1) & 1
    return n


def _check_shape(value: dict[str, Any], config: AppConfig) -> None:
    """Raises Refuse if there are too many items, or too many fields in an object."""
    _check_fields(value, ())
    _check_fields(value.get("options"), ("options",))
    for name in INPUTS:
        items = value.get(name)
        items = items if isinstance(items, list) else [items]
        if len(items) > config.max_items:
            message = f"{len(items)} inputs; at most {config.max_items} at a time"
            raise Refuse(Refusal(413, "too_many_items", message, name))
        for i, item in enumerate(items):
            _check_fields(item, (name, i))


def _check_fields(value: Any, place: Place) -> None:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        message = f"{len(value)} fields in an object; at most {MAX_FIELDS}"
        raise Refuse(Refusal(422, "too_many_fields", message, _param(place)))


def _param(place: Place) -> str | None:
    return ".".join(map(str, place)) or None


# ---- how many characters ------------------------------------------------------------------------


def _check_characters(value: Any, config: AppConfig) -> None:
    """Raises Refuse if a text, or all texts, or all options become too long when normalised."""
    total = options = 0
    for top, text in _texts(value):
        n = normal_length(text, config.max_text_characters)
        if n > config.max_text_characters:
            message = f"a text of more than {config.max_text_characters} characters"
            came = f"{len(text)} were sent; they are counted as the tokenizer normalises them"
            raise Refuse(Refusal(413, "text_too_long", f"{message}: {came}", top))
        total += n
        options += n if top == "options" else 0
    if total > config.max_characters:
        message = f"texts of {total} characters; at most {config.max_characters} at a time"
        raise Refuse(Refusal(413, "too_many_characters", message))
    if options > MAX_OPTION_CHARACTERS:
        message = f"options of {options} characters; at most {MAX_OPTION_CHARACTERS}"
        raise Refuse(Refusal(413, "options_too_long", message, "options"))


def _check_claims(options: dict[str, Any]) -> None:
    """Raises Refuse if a template stands for too much text when each label is put into it."""
    labels, template = options.get("candidate_labels"), options.get("hypothesis_template")
    if isinstance(labels, list) and isinstance(template, str):
        n = len(labels) * len(template)
        if n > MAX_CLAIM_CHARACTERS:
            message = f"hypotheses of {n} characters; at most {MAX_CLAIM_CHARACTERS}"
            raise Refuse(Refusal(413, "options_too_long", message, "options.hypothesis_template"))


def _texts(value: Any) -> Iterator[tuple[str | None, str]]:
    """All texts in a JSON value, names of fields included, with `options` or the item they stand
    in."""
    if not isinstance(value, dict):
        yield from ((None, text) for text in _strings(value))
        return
    for name, inner in value.items():
        yield None, name
        if name in INPUTS and isinstance(inner, list):
            for i, item in enumerate(inner):
                yield from ((f"{name}.{i}", text) for text in _strings(item))
        else:
            top = name if name in (*INPUTS, "options") else None
            yield from ((top, text) for text in _strings(inner))


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, list):
            waiting += inner
        elif isinstance(inner, dict):
            waiting += inner
            waiting += inner.values()


# ---- schemas that are text ----------------------------------------------------------------------


def _schema_holders(value: Any) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Objects that may have a schema, with their places."""
    if not isinstance(value, dict):
        return
    inputs = value.get("inputs")
    for i, item in enumerate(inputs if isinstance(inputs, list) else ()):
        if isinstance(item, dict):
            yield ("inputs", i), item
    for name in ("inputs", "options"):
        inner = value.get(name)
        if isinstance(inner, dict):
            yield (name,), inner


def _schema_texts(value: Any) -> Iterator[str]:
    for _, holder in _schema_holders(value):
        if isinstance(holder.get("schema"), str):
            yield holder["schema"]


def read_schemas(value: Any, config: AppConfig) -> None:
    """Puts what schemas mean in the place of their texts.

    Raises:
        Refuse: one is no schema, or they are above a limit.
    """
    read: dict[str, Any] = {}
    n_names = n_characters = n_yaml = 0
    for place, holder in _schema_holders(value):
        text = holder.get("schema")
        if not isinstance(text, str):
            continue
        param = _param((*place, "schema"))
        if text not in read:
            n_characters += len(text)
            _require_most(n_characters, MAX_SCHEMA_CHARACTERS, "", param)
            n_yaml += len(text) if is_structured(text) and not _is_json(text) else 0
            _require_most(n_yaml, MAX_YAML_CHARACTERS, " of YAML", param)
            read[text] = _read_schema(text, param)
        n = sum(1 for _ in _strings(read[text]))
        if n > MAX_COUNT:
            message = f"{n} names; at most {MAX_COUNT}"
            raise Refuse(Refusal(422, "invalid_request", message, param))
        n_names += n
        if n_names > config.max_values:
            message = f"schemas of more than {config.max_values} names together"
            raise Refuse(Refusal(413, "too_many_values", message, param))
        holder["schema"] = read[text]


def _require_most(n: int, most: int, kind: str, param: str | None) -> None:
    if n > most:
        message = f"schemas as text of {n} characters{kind}; at most {most}"
        raise Refuse(Refusal(413, "schema_too_long", message, param))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_schema(text: str, param: str | None) -> Any:
    try:
        read = schema_of_text(text)
    except ConfigError:
        message = "text must be JSON, YAML or names with commas between them"
        raise Refuse(Refusal(422, "invalid_request", message, param)) from None
    return [read] if isinstance(read, str) else read
