"""Request bodies that make much work out of few bytes: each was seen to stall or exhaust a service.

Tests and `tests.benchmarks.hostile` send them. A body never needs an answer with 200: a refusal
that names the limit is right, and so is an answer in time. What is wrong is a fault (500), memory
that is not given back, and other clients who have to wait.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

# A body may be answered, refused with a reason, or given up; anything else is a fault.
EXPECTED_STATUSES = frozenset({200, 400, 408, 413, 422, 429, 504})
WORDS = "Ada Lovelace met Charles Babbage in London. "


@dataclass(frozen=True, slots=True)
class HostileBody:
    """One request body.

    Attributes:
        name: names the attack in reports.
        path: where it is posted.
        make: builds the bytes; large bodies are built only when they are sent.
        is_costly: it makes a service compute or allocate, rather than parse.
    """

    name: str
    path: str
    make: Callable[[], bytes]
    is_costly: bool = False


def _json(**body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def text_of(n_characters: int) -> str:
    """Plain English text of that length."""
    return (WORDS * (n_characters // len(WORDS) + 1))[:n_characters]


def _extract(text: str, **options: Any) -> bytes:
    return _json(inputs=text, options=options)


def _nested(depth: int) -> Any:
    """A schema that asks about each thing found, `depth` levels deep."""
    return {"a": _nested(depth - 1)} if depth > 1 else "a"


def _small_items() -> bytes:
    return b'{"inputs": [' + b",".join([b'"a"'] * 1_000_000) + b"]}"


def _choose(n_choices: int, premise: str, **options: Any) -> bytes:
    choices = [f"choice {i}" for i in range(n_choices)]
    return _json(inputs={"premise": premise, "choices": choices, "question": "q"}, options=options)


def _qa(context: str, **options: Any) -> bytes:
    return _json(inputs={"question": "Who?", "context": context}, options=options)


def _labels(n: int) -> list[str]:
    return [f"label {i}" for i in range(n)]


def _parsing() -> list[HostileBody]:
    """Bodies that were slow to read and check."""
    extract, classify = "/v1/extract", "/v1/classify"
    return [
        HostileBody("schema: 20 kB of commas", extract, lambda: _extract("x", schema="," * 20_000)),
        HostileBody("schema: 150 kB of commas", extract,
                    lambda: _extract("x", schema="," * 150_000)),
        HostileBody("schema: brackets", extract, lambda: _extract("x", schema=["[" * 50_000])),
        HostileBody("schema: spaces in brackets", extract,
                    lambda: _extract("x", schema=["[a]" + " " * 100_000 + "x"])),
        HostileBody("schema: brackets and commas", extract,
                    lambda: _extract("x", schema="[a, " * 20_000)),
        HostileBody("schema: YAML lists", extract,
                    lambda: _extract("x", schema="\n" + "- a\n" * 50_000)),
        HostileBody("schema: YAML nesting", extract,
                    lambda: _extract("x", schema="\n" + "- " * 20_000)),
        HostileBody("4 MB of small items", "/v1/ner", _small_items),
        HostileBody("300 kB that grows 18-fold", "/v1/ner", lambda: _json(inputs="ﷺ" * 100_000)),
        HostileBody("template with a width", classify,
                    lambda: _json(inputs="x", options={
                        "candidate_labels": ["a"], "hypothesis_template": "{:>200000000}{}"})),
        HostileBody("thresholds: 100,000 labels", "/v1/ner",
                    lambda: _json(inputs="x", options={
                        "min_score": {f"label {i}": 0.5 for i in range(100_000)}})),
    ]  # fmt: skip


def _work() -> list[HostileBody]:
    """Bodies that were cheap to read and made far too much to compute."""
    extract, classify, choose, qa = "/v1/extract", "/v1/classify", "/v1/choose", "/v1/qa"
    every_span = {"span_pairing": "all", "position_prob": 0}
    bodies = {
        "2,000 names by a 400 kB text": (extract, lambda: _extract(
            text_of(400_000), schema=[f"name {i}" for i in range(2000)])),
        "names by sentences": (extract, lambda: _extract(
            "Yes? " * 20_000, schema=[f"n{i}" for i in range(2000)], split_sentence=True)),
        "1,000 choices by a long text": (choose, lambda: _choose(1000, text_of(40_000))),
        "1,000 labels by a long text": (classify, lambda: _json(
            inputs=text_of(100_000), options={"candidate_labels": _labels(1000)})),
        "1,000 items by 60 labels": (classify, lambda: _json(
            inputs=[text_of(100)] * 1000, options={"candidate_labels": _labels(60)})),
        "pair of two long texts": (classify, lambda: _json(
            inputs={"text": text_of(200_000), "text_pair": text_of(400)})),
        "template that repeats the premise": (choose, lambda: _choose(
            2, text_of(100_000), question_template=["q=" + "{premise}" * 50_000])),
        "template that repeats the label": (classify, lambda: _json(
            inputs="x", options={"candidate_labels": ["a" * 100_000],
                                 "hypothesis_template": "{}" * 20_000})),
        "prefix by 1,000 items": ("/v1/embed", lambda: _json(
            inputs=["x"] * 1000, options={"prefix": text_of(1_000_000)})),
        "context with every answer": (qa, lambda: _qa(
            text_of(90_000), top_k=10_000, max_answer_tokens=10_000)),
        "context of one long word": (qa, lambda: _qa(
            "xy" * 15_000, top_k=10_000, max_answer_tokens=10_000, align_to_words=True)),
        "follow-up questions": (extract, lambda: _extract(
            text_of(60), schema=_nested(10), position_prob=0)),
        "follow-up questions of a long name": (extract, lambda: _extract(
            text_of(400), schema={"a": ["b" * 100_000 + str(i) for i in range(20)]},
            position_prob=0)),
        "every span of a short text": (extract, lambda: _extract(
            text_of(2000), schema="a", **every_span)),
        "every span of a long text": (extract, lambda: _extract(
            text_of(150_000), schema="a", **every_span)),
        "every span of many texts": (extract, lambda: _json(
            inputs=[text_of(250)] * 300, options={"schema": "a", **every_span})),
    }  # fmt: skip
    return [HostileBody(name, path, make, True) for name, (path, make) in bodies.items()]


HOSTILE_BODIES: tuple[HostileBody, ...] = (*_parsing(), *_work())


@contextmanager
def half_requests(host: str, port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connections that have announced a body and never send the rest of it."""
    head = b"POST /v1/ner HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((host, port), timeout=5))
            connection.sendall(head + b'Content-Length: 1000\r\n\r\n{"inputs": "')
            connections.append(connection)
        yield connections
