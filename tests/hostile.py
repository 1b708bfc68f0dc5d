"""Bodies that ask for more than they look like, and a probe for what they do to an event loop."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from erniem_batch.options import TASKS
from erniem_batch.serve.fields import MODELS, _models_in

# Smallest requests that are answered.
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/ner": {"inputs": [{"text": "Ada in London"}], "options": {}},
    "/v1/classify": {"inputs": [{"text": "the team won"}], "options": {}},
    "/v1/choose": {"inputs": [{"premise": "it fell", "choices": ["a", "b"]}], "options": {}},
    "/v1/qa": {"inputs": [{"question": "Who?", "context": "Ada in London"}], "options": {}},
    "/v1/embed": {"inputs": [{"text": "one"}], "options": {}},
    "/v1/extract": {"inputs": [{"text": "Ada in London"}], "options": {"schema": ["Person"]}},
    "/v1/embeddings": {"input": ["one"]},
}


def hostile_bodies(n: int = 1_000_000) -> Iterator[tuple[str, str, bytes]]:
    """Name, path and body; none of more than about `n` bytes, and `n` is that of the worst."""

    def body(name: str, path: str, value: Any) -> tuple[str, str, bytes]:
        return name, path, json.dumps(value, ensure_ascii=False).encode()

    def extract(name: str, schema: Any) -> Iterator[tuple[str, str, bytes]]:
        inputs = "Ada in London"
        yield body(name, "/v1/extract", {"inputs": inputs, "options": {"schema": schema}})
        inner = {"text": inputs, "schema": schema}
        yield body(f"{name}, of an item", "/v1/extract", {"inputs": inner})

    for size in (n // 50, n // 7, n):
        yield from extract(f"{size} commas", "," * size)
    yield from extract("commas at the limit", "," * 65_000)
    yield from extract("open brackets and commas", "[,a" * 20_000)
    yield from extract("a name of brackets", ["[" * (n // 2)])
    yield from extract("a name of brackets at the limit", ["a [" + "] " * 4000 + "x"])
    yield from extract("YAML at the limit", "- a\n" * 2000)
    yield from extract("nested YAML", "[a, " * 2000)
    yield from extract("YAML of keys", "".join(f"a{i}:\n" for i in range(1200)))
    yield from extract("YAML above the limit", "- a\n" * 200_000)
    yield from extract("JSON at the limit", json.dumps(["a"] * 10_000))
    yield from extract("10,000 names", [f"a{i}" for i in range(10_000)])
    yield from extract("names below names", [{"a": ["b"]}] * 5000)
    yield from extract("parts below a long name", {"x" * 8000: ["a"] * 10_000})
    yield from extract("17 deep", json.loads('{"a":' * 17 + "1" + "}" * 17))
    for path in ("/v1/ner", "/v1/embeddings"):
        name = "input" if path == "/v1/embeddings" else "inputs"
        yield body(f"small items {path}", path, {name: ["a"] * (n // 5)})
        yield (
            f"items of nothing {path}",
            path,
            b'{"%s": [%s1]}' % (name.encode(), b"{}," * (n // 3)),
        )
        yield body(f"30,000 wrong items {path}", path, {name: [1] * 30_000})
        yield body(f"1,000 wrong items {path}", path, {name: [{"a": 1, "b": 2}] * 1000})
    yield "lists of lists", "/v1/ner", b'{"inputs": ' + b"[" * (n // 2) + b"]" * (n // 2) + b"}"
    yield "not closed", "/v1/ner", b'{"inputs": ' + b"[" * n
    yield body("unknown fields", "/v1/ner", {"inputs": "a", **{f"f{i}": 1 for i in range(30_000)}})
    for text in ("ﷺ", "ﷺ ", "\u0301", "a\u0301\u0323", "北", "ᠠ", "\u200b", "[", "\\", '"', "\x00"):
        size = n // len((text * 9).encode()) * 9
        yield body(f"{size} times {text!r}", "/v1/ner", {"inputs": text * size})
        yield body(f"9,000 times {text!r}", "/v1/ner", {"inputs": text * 9000})
        yield body(f"1,000 times {text!r}", "/v1/ner", {"inputs": text * 1000})
    pair = {"text": "a", "text_pair": "ﷺ" * 14_000}
    yield body("a long pair", "/v1/classify", {"inputs": pair})
    for template in (
        "{:>200000000}",
        "{}{0:>9999999}",
        "{0.__class__}",
        "{}" * 9,
        "{} " + "x" * 990,
    ):
        labels = [f"l{i}" for i in range(1000)]
        options = {"candidate_labels": labels, "hypothesis_template": template}
        yield body(f"template {template[:16]}", "/v1/classify", {"inputs": "a", "options": options})
    labels = [f"label {i}" for i in range(10_000)]
    options = {"candidate_labels": labels}
    yield body("10,000 labels", "/v1/classify", {"inputs": "a", "options": options})
    scores = {f"l{i}": {"a": 2} for i in range(9000)}
    yield body("wrong thresholds", "/v1/ner", {"inputs": "a", "options": {"min_score": scores}})
    asked = {"premise": "p" * 1000, "choices": ["a"], "question": "{premise}" * 10_000}
    yield body("a question of premises", "/v1/choose", {"inputs": asked})
    times = {"question_template": ["x=" + "{premise}" * 100]}
    asked |= {"question": "x"}
    yield body("a template of premises", "/v1/choose", {"inputs": asked, "options": times})
    choices = {"premise": "a", "choices": ["a"] * 10_000}
    yield body("10,000 choices", "/v1/choose", {"inputs": choices})
    yield body("a prefix", "/v1/embed", {"inputs": "a " * 900, "options": {"prefix": "p" * 999}})
    for number in ("9" * 4000, "9" * (n // 2), "0." + "1" * (n // 2), "1e400", "-1e-400", "NaN"):
        content = b'{"inputs": "a", "options": {"top_k": %s}}' % number.encode()
        yield f"number {number[:5]} of {len(number)}", "/v1/qa", content


def places_of_fields() -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Path of every route that takes a body, and the place of every field in its smallest request,
    as the messages have them: a new field is here by itself."""
    for path, model in MODELS.items():
        waiting: list[tuple[Any, tuple[str | int, ...]]] = [(model, ())]
        while waiting:
            message, at = waiting.pop()
            for name, field in message.model_fields.items():
                place = (*at, field.alias or name)
                yield path, place
                inside = (*place, 0) if name == "inputs" else place
                waiting += [(inner, inside) for inner in _models_in(field.annotation)]


def with_value(path: str, place: tuple[str | int, ...], value: Any) -> bytes:
    """The smallest request of a path with a value at a place."""
    body = json.loads(json.dumps(PLAIN[path]))
    inner = body
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    return json.dumps(body, ensure_ascii=False).encode()


@dataclass
class Loop:
    """What an event loop did while it was watched, in seconds.

    Attributes:
        step: CPU time of the longest step of a task or callback.
        gap: by how much it came too late to a timer, at worst; with all waits for Python's lock and
            for a core.
    """

    step: float = 0.0
    gap: float = 0.0


@asynccontextmanager
async def watched() -> AsyncIterator[Loop]:
    """The running event loop, watched as long as it is inside."""
    loop = Loop()
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        started = time.thread_time()
        run(handle)
        loop.step = max(loop.step, time.thread_time() - started)

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            loop.gap = max(loop.gap, time.perf_counter() - started - 0.001)

    task = asyncio.create_task(tick())
    await asyncio.sleep(0.005)
    loop.gap = 0.0
    asyncio.Handle._run = timed
    try:
        yield loop
        await asyncio.sleep(0.002)
    finally:
        asyncio.Handle._run = run
        task.cancel()


assert set(PLAIN) == {f"/v1/{task}" for task in TASKS} | {"/v1/embeddings"}
