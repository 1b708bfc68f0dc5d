"""What hostile bodies do to the event loop of the service, and how their cost grows.

Real engines over tiny models. The default tests have generous limits, since other processes may be
at work; the slow one prints the figures.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hostile import PLAIN, hostile_bodies, places_of_fields, watched, with_value

from erniem_batch.predictor import Predictor
from erniem_batch.serve.api import make_api
from erniem_batch.serve.body import count_values, parse
from erniem_batch.serve.config import AppConfig, ModelConfig
from erniem_batch.serve.engine import Engine
from erniem_batch.serve.fields import MODELS, field_names
from erniem_batch.serve.memory import keep_for_good
from erniem_batch.serve.messages import REQUESTS

SIZES = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 4096}
HEADERS = {"content-type": "application/json"}
# Statuses of answers to bodies that are above a limit, wrong, or too much to do in time.
ALLOWED = {200, 400, 404, 413, 422, 429, 504}


@pytest.fixture(scope="module")
def loaded(service_dir) -> Iterator[Engine]:
    """Loaded once; with what a service does against pauses of the whole process."""
    interval = sys.getswitchinterval()
    engine = Engine.load(ModelConfig(name="tiny", model=str(service_dir), **SIZES))
    keep_for_good()
    sys.setswitchinterval(0.0005)
    yield engine
    sys.setswitchinterval(interval)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def open_predictors(monkeypatch) -> None:
    monkeypatch.setattr(Predictor, "close", lambda self: None)


@asynccontextmanager
async def client_of(loaded: Engine, **app: Any) -> AsyncIterator[httpx.AsyncClient]:
    engine = Engine(loaded.config, loaded.predictors, loaded.folders)
    api = make_api(AppConfig(**app), {"tiny": engine})
    transport = httpx.ASGITransport(api)
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for path, body in PLAIN.items():
            answer = await client.post(path, content=json.dumps(body), headers=HEADERS)
            assert answer.status_code == 200, answer.text
        yield client


async def ask(
    client: httpx.AsyncClient, path: str, body: bytes, seconds: str = "50"
) -> httpx.Response:
    headers = {**HEADERS, "x-request-timeout-seconds": seconds}
    answer = await client.post(path, content=body, headers=headers)
    assert answer.status_code in ALLOWED, answer.text
    return answer


# ---- the event loop -----------------------------------------------------------------------------


def test_no_body_holds_up_the_event_loop(loaded: Engine) -> None:
    """The longest step of any task; one of these took 112 s, several took seconds."""

    async def test() -> None:
        async with client_of(loaded) as client:
            for name, path, body in hostile_bodies(300_000):
                if "of an item" in name and "comma" not in name:
                    continue
                async with watched() as loop:
                    await ask(client, path, body, seconds="0.3")
                assert loop.step < 0.25, f"{name}: {loop.step:.3f} s"

    asyncio.run(test())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_figures_of_the_event_loop(loaded: Engine) -> None:
    """Bodies of up to 4 MB, best of three: longest step, and longest wait of a timer."""

    async def test() -> list[tuple[float, float, int, str]]:
        found = []
        async with client_of(loaded) as client:
            for name, path, body in hostile_bodies(4_000_000):
                if len(body) > 4 << 20:
                    continue
                loops = []
                for _ in range(3):
                    async with watched() as loop:
                        answer = await ask(client, path, body, seconds="1")
                    loops.append(loop)
                step, gap = min(i.step for i in loops), min(i.gap for i in loops)
                found.append((step, gap, answer.status_code, name))
        return sorted(found, reverse=True)

    found = asyncio.run(test())
    for step, gap, status, name in found:
        print(f"step {step * 1000:6.1f} ms, gap {gap * 1000:6.1f} ms, {status}, {name}")
    assert found[0][0] < 0.05


def test_a_short_text_does_not_wait_for_a_long_one(loaded: Engine) -> None:
    """Whatever is being tokenized, a short text is on its way within a fraction of a second."""

    async def test() -> None:
        long = json.dumps({"inputs": ["ﷺ" * 14_000] * 10}, ensure_ascii=False).encode()
        short = json.dumps(PLAIN["/v1/ner"]).encode()
        async with client_of(loaded) as client:
            task = asyncio.create_task(ask(client, "/v1/ner", long))
            await asyncio.sleep(0.05)
            seconds = []
            while not task.done():
                started = time.perf_counter()
                await ask(client, "/v1/ner", short)
                seconds.append(time.perf_counter() - started)
            await task
            assert seconds
            assert sorted(seconds)[len(seconds) // 2] < 1

    asyncio.run(test())


# ---- every field --------------------------------------------------------------------------------

# What stands in the place of any field, by size.
VALUES: dict[str, Any] = {
    "text": lambda n: "a b,[ \ufdfa, " * (n // 10),
    "a list": lambda n: ["a"] * n,
    "an object": lambda n: {f"k{i}": 0.5 for i in range(n)},
    "objects": lambda n: [{"a": ["b"]}] * n,
}
N = 400
MOST = 25


def test_every_field_is_tried() -> None:
    """Those of all messages that come in, options and items included."""
    tried = set(places_of_fields())
    for path, model in MODELS.items():
        for name in field_names(model):
            assert (path, (name,)) in tried
    assert {
        ("/v1/classify", ("options", "hypothesis_template")),
        ("/v1/choose", ("inputs", 0, "question")),
        ("/v1/extract", ("inputs", 0, "schema")),
        ("/v1/embeddings", ("encoding_format",)),
    } <= tried
    assert len(tried) > 70
    assert set(MODELS) == set(PLAIN)
    assert set(REQUESTS) <= {path.rpartition("/")[2] for path in MODELS}


def test_the_cost_of_every_field_is_in_proportion(loaded: Engine) -> None:
    """Ten times as much takes about ten times as long, or is refused."""

    async def seconds(client: httpx.AsyncClient, path: str, body: bytes) -> float:
        started = time.process_time()  # which other processes do not change
        await ask(client, path, body, seconds="1")
        return time.process_time() - started

    async def test() -> list[str]:
        slow = []
        async with client_of(loaded) as client:
            for path, place in places_of_fields():
                for kind, value in VALUES.items():
                    bodies = [with_value(path, place, value(n)) for n in (N, 10 * N)]
                    short, long = [await seconds(client, path, body) for body in bodies]
                    if long > max(MOST * short, 0.2):
                        again = min([await seconds(client, path, bodies[1]) for _ in range(2)])
                        if again > max(MOST * short, 0.2):
                            slow.append(f"{path} {place} {kind}: {short:.3f} s, then {again:.3f} s")
        return slow

    assert not asyncio.run(test())


# ---- limits -------------------------------------------------------------------------------------


def test_values_are_counted_as_json_has_them() -> None:
    """At least as many as there are, and not many more; in pieces of any size."""
    values: list[Any] = [
        *(1, "a", [], {}, [1, 2, 3], {"a": 1, "b": [1, {"c": "x"}]}, ['"', "\\", '\\"', ",[{"]),
        *([[[]]], [{}] * 9, {"a,b": "c,d"}, "\\" * 7, ["\\" * n + '"' for n in range(9)]),
    ]
    for value in values:
        for text in (json.dumps(value), json.dumps(value, indent=1)):
            n = count_values(text.encode(), 10_000)
            assert _n_values(value) <= n <= 2 * _n_values(value) + 1, text


def test_values_are_counted_across_pieces(monkeypatch) -> None:
    value = ["a\\\\", '\\"', ",", "\\", '"\\"', {"k": [1, 2, "[[["]}] * 3
    body = json.dumps(value).encode()
    whole = count_values(body, 1000)
    for size in range(1, 40):
        monkeypatch.setattr("erniem_batch.serve.body.PIECE", size)
        assert count_values(body, 1000) == whole


def _n_values(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_n_values, inner))


LIMITS = [
        ({"inputs": ["a"] * 40_000}, 413, "too_many_values", None, "more than 32768 values"),
        ({"inputs": ["a"] * 1025}, 413, "too_many_items", "inputs", "1025 inputs; at most 1024"),
        ({"inputs": "ﷺ" * 15_000}, 413, "text_too_long", "inputs", "more than 262144 char"),
        ({"inputs": ["a", {"text": "b" * 300_000}]}, 413, "text_too_long", "inputs.1", "300000"),
        ({"inputs": ["ﷺ" * 14_000] * 20}, 413, "too_many_characters", None, "at most 4194304"),
        ({"inputs": "a", **{f"{i}": 1 for i in range(40)}}, 422, "too_many_fields", None, "41 f"),
        ({"inputs": [{f"{i}": 1 for i in range(40)}]}, 422, "too_many_fields", "inputs.0", "40 f"),
        ({"inputs": "a", "options": {"prefix": "p" * 1001}}, 422, "invalid_request",
         "options.prefix", "at most 1000"),
        ({"inputs": "a", "model": "m" * 300}, 422, "invalid_request", "model", "at most 256"),
        ({"inputs": "a", "options": {"schema": "a,\n" * 30_000}}, 413, "schema_too_long",
         "options.schema", "90000 characters; at most 65536"),
        ({"inputs": "a", "options": {"schema": "- a\n" * 3000}}, 413, "schema_too_long",
         "options.schema", "12000 characters of YAML; at most 8192"),
        ({"inputs": [{"text": "a", "schema": "a," * 9000}] * 4}, 413, "too_many_values",
         "inputs.3.schema", "more than 32768 names"),
        ({"inputs": "a", "options": {"schema": "a," * 11_000}}, 422, "invalid_request",
         "options.schema", "11001 names; at most 10000"),
        ({"inputs": "a", "options": {"schema": ["a" * 9000]}}, 422, "invalid_request",
         "options.schema", "9000 characters; at most 8192"),
        ({"inputs": "a", "options": {"schema": [f"{i:040}" for i in range(9000)]}}, 413,
         "options_too_long", "options", "at most 262144"),
        ({"inputs": "a", "options": {"candidate_labels": ["a"] * 2000,
                                     "hypothesis_template": "{}" + "x" * 900}},
         413, "options_too_long", "options.hypothesis_template", "at most 1048576"),
        ({"inputs": "a", "options": {"min_score": {"x": {"y": {"z": 1}}}}}, 422,
         "invalid_request", "options.min_score", "number from 0 to 1"),
        ({"inputs": "a", "options": {"min_score": {f"{i}": 0.5 for i in range(10_001)}}}, 422,
     "invalid_request", "options.min_score", "10001 names; at most 10000"),
]  # fmt: skip


def test_limits(loaded: Engine) -> None:
    """Each with the number that is allowed, and the one that came."""

    async def test() -> None:
        async with client_of(loaded) as client:
            for body, status, code, param, words in LIMITS:
                options = body.get("options", {})
                path = "/v1/extract" if "schema" in json.dumps(body)[:60] else "/v1/embed"
                path = "/v1/classify" if {"candidate_labels", "min_score"} & set(options) else path
                content = json.dumps(body, ensure_ascii=False).encode()
                answer = await ask(client, path, content)
                error = answer.json()["error"]
                told = (answer.status_code, error["code"], error["param"])
                assert told == (status, code, param), error
                assert words in error["message"]

    asyncio.run(test())


def test_limits_of_requests_can_be_set(loaded: Engine) -> None:
    limits = {"max_values": 20, "max_text_characters": 20, "max_characters": 60}

    async def test() -> None:
        async with client_of(loaded, **limits) as client:
            for texts, status in (
                (["a" * 10], 200),
                (["a" * 21], 413),
                (["a" * 15] * 4, 413),
                (["a"] * 20, 413),
            ):
                body = json.dumps({"inputs": texts}).encode()
                assert (await ask(client, "/v1/ner", body)).status_code == status

    asyncio.run(test())


def test_no_item_is_no_fault(loaded: Engine) -> None:
    """Found by the fuzz."""

    async def test() -> None:
        async with client_of(loaded) as client:
            for path in PLAIN:
                name = "input" if path == "/v1/embeddings" else "inputs"
                answer = await ask(client, path, json.dumps({name: []}).encode())
                assert answer.status_code == (422 if name == "input" else 200)

    asyncio.run(test())


def test_a_body_has_to_be_utf_8() -> None:
    """A mark of the byte order may stand before it."""
    config = AppConfig()
    text = '{"inputs": "é"}'
    assert parse(text.encode(), config) == parse(text.encode("utf-8-sig"), config)
    for name in ("utf-16", "utf-32", "latin-1"):
        with pytest.raises(Exception, match="invalid_json"):
            parse(text.encode(name), config)


def test_text_of_a_schema_means_what_it_meant(loaded: Engine) -> None:
    """Long texts, JSON and YAML are read in a thread, and give the same answers."""

    async def test() -> None:
        async with client_of(loaded) as client:
            answers = []
            for schema in (
                ["Ada", {"in": ["London"]}],
                '["Ada", {"in": ["London"]}]',
                "- Ada\n- in:\n  - London\n",
                "[Ada, {in: [London]}]",
            ):
                for body in (
                    {"inputs": "Ada in London", "options": {"schema": schema}},
                    {"inputs": [{"text": "Ada in London", "schema": schema}]},
                ):
                    answer = await ask(client, "/v1/extract", json.dumps(body).encode())
                    assert answer.status_code == 200
                    answers.append(answer.json()["results"])
            assert all(answer == answers[0] for answer in answers)
            names = ", ".join(f"a{i}" for i in range(600))
            for schema in (names, names.split(", ")):
                body = {"inputs": "Ada", "options": {"schema": schema, "min_score": 1.0}}
                answer = await ask(client, "/v1/extract", json.dumps(body).encode())
                assert answer.json()["results"][0]["n_windows"] == 600

    asyncio.run(test())
