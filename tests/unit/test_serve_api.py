"""The service without Ray: real engines over tiny models, through the real web application."""

import asyncio
import base64
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hostile_bodies import HOSTILE_BODIES
from serving import served

from erniem_batch.client import AsyncClient, Failed
from erniem_batch.errors import DeviceError
from erniem_batch.options import TASKS
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Prediction, Record
from erniem_batch.serve.api import make_api
from erniem_batch.serve.config import AppConfig, ModelConfig
from erniem_batch.serve.engine import Ask, Engine, EngineError, Refusal, Served
from erniem_batch.serve.messages import EXAMPLES, RESPONSES
from erniem_batch.serve.models import load_predictors, model_folders
from erniem_batch.serve.tokens import new_token

LONG = "Ada Lovelace lived in London for long, 北京は大きい都市です。 " * 40
TEXTS = [
    "Ada Lovelace lived in London.",
    "",
    "北京は大きい都市です。",
    LONG,
    "😀 x",
    "Ünïcode \u200b",
]
POISON = "poison"
SIZES = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 256}
Test = Callable[[httpx.AsyncClient, Engine], Awaitable[None]]


@pytest.fixture(scope="module")
def config(service_dir) -> ModelConfig:
    return ModelConfig(name="tiny", model=str(service_dir), **SIZES)


@pytest.fixture(scope="module")
def loaded(config) -> Engine:
    """Loaded once; `run` makes new engines of its predictors, since these end with their loop."""
    return Engine.load(config)


@pytest.fixture
def run(loaded, monkeypatch):
    """Runs a test with a client of a service that has started, and its engine."""
    monkeypatch.setattr(Predictor, "close", lambda self: None)

    def start(test: Test, app: AppConfig | None = None, **changes: Any) -> None:
        config = loaded.config.model_copy(update=changes)

        async def inside() -> None:
            engine = Engine(config, loaded.predictors, loaded.folders)
            api = make_api(app or AppConfig(), {"tiny": engine}, watch)
            transport = httpx.ASGITransport(api, raise_app_exceptions=False)
            async with (
                api.router.lifespan_context(api),
                httpx.AsyncClient(transport=transport, base_url="http://test") as client,
            ):
                await test(client, engine)

        asyncio.run(inside())  # pytest's timeout shows where every thread is, should it hang

    watched: list[tuple[str, int]] = []

    def watch(path: str, status: int, seconds: float) -> None:
        watched.append((path, status))

    start.watched = watched
    return start


async def ask(client: httpx.AsyncClient, task: str, inputs: Any, **options: Any) -> list[Any]:
    response = await client.post(f"/v1/{task}", json={"inputs": inputs, "options": options})
    assert response.status_code == 200, response.text
    return response.json()["results"]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    return error


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_answered_as_the_schema_says(run, task):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for body in EXAMPLES[task].values():
            response = await client.post(f"/v1/{task}", json=body)
            assert response.status_code == 200
            answer = RESPONSES[task].model_validate_json(response.content)
            n_inputs = len(body["inputs"]) if isinstance(body["inputs"], list) else 1
            assert len(answer.results) == n_inputs
            assert answer.usage.n_tokens == sum(r.n_tokens for r in answer.results) > 0
            names = [
                part.partition(";")[0] for part in response.headers["server-timing"].split(", ")
            ]
            assert names == ["tokenize", "queue", "forward", "decode"]

    run(test)
    assert run.watched == [(f"/v1/{task}", 200)] * len(EXAMPLES[task])


def test_online_is_the_predictor(run, loaded):
    """Whatever else is asked meanwhile."""
    expected = loaded.predictors["ner"].predict([Record(str(i), t) for i, t in enumerate(TEXTS)])

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        asked = [ask(client, "ner", text) for text in TEXTS]
        others = [ask(client, "embed", text) for text in TEXTS]
        answers = await asyncio.gather(*asked, ask(client, "ner", TEXTS), *others)
        for i, outcome in enumerate(expected):
            assert isinstance(outcome, Prediction)
            for (result,) in (answers[i], [answers[len(TEXTS)][i]]):
                found = result["entities"]
                assert [(e["start"], e["end"], e["label"], e["text"]) for e in found] == [
                    (e.start, e.end, e.label, e.word) for e in outcome.value
                ]
                scores = [e.score for e in outcome.value]
                np.testing.assert_allclose([e["score"] for e in found], scores, atol=1e-5)
                assert result["n_windows"] == outcome.n_windows

    run(test)


def test_options_are_of_one_request(run):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        text = "😀 " + LONG
        plain, utf16, none, high = await asyncio.gather(
            ask(client, "ner", text),
            ask(client, "ner", text, offset_unit="utf16"),
            ask(client, "ner", text, aggregation_strategy="none"),
            ask(client, "ner", text, min_score=1.0),
        )
        again = await ask(client, "ner", text)
        assert plain == again
        first, other = plain[0]["entities"][-1], utf16[0]["entities"][-1]
        assert other["start"] == first["start"] + 1
        assert len(none[0]["entities"]) > len(plain[0]["entities"]) > 0
        assert high[0]["entities"] == []
        for schema in ("Person", ["City"], {"Person": ["City"]}):
            found = await ask(client, "extract", text[:600], schema=schema, schema_lang="en")
            names = {item["name"] for item in found[0]["extracted"]}
            assert names <= ({"Person", "City"} if isinstance(schema, dict) else {*schema, schema}
                             if isinstance(schema, str) else set(schema))  # fmt: skip
        for i in range(300):  # kept for a while, not for ever
            await ask(client, "ner", "x", min_score=i / 1000)
        assert len(engine._variants) <= 256

    run(test)


def test_openai_embeddings(run):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        own = await ask(client, "embed", ["one", "two"])
        body = {"input": ["one", "two"], "model": "tiny"}
        answer = (await client.post("/v1/embeddings", json=body)).json()
        assert [item["index"] for item in answer["data"]] == [0, 1]
        for item, result in zip(answer["data"], own, strict=True):
            np.testing.assert_allclose(item["embedding"], result["embedding"], atol=1e-6)
        assert answer["usage"]["total_tokens"] == sum(r["n_tokens"] for r in own)
        body |= {"encoding_format": "base64", "dimensions": 8, "input": "one", "user": "me"}
        answer = (await client.post("/v1/embeddings", json=body)).json()
        vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
        assert vector.shape == (8,)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    run(test)


def test_models_and_health(run, loaded):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert card["id"] == "tiny"
        assert set(card["tasks"]) == set(TASKS)
        assert card["labels"]["classify"] == ["sports", "politics", "science"]
        assert card["digests"].keys() == set(TASKS)
        assert (await client.get("/healthz")).json() == {"status": "ok", "problems": []}
        assert (await client.get("/readyz")).status_code == 200

    run(test)


def test_docs_need_nothing_from_elsewhere(run):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        page = (await client.get("/docs")).text
        needed = re.findall(r"(?:src|href)=[\"']([^\"']+)|url: [\"']([^\"']+)", page)
        urls = [one or other for one, other in needed]
        assert len(urls) >= 4, "a script, a style sheet, a picture, the document"
        for url in urls:
            assert url.startswith("/")
            assert (await client.get(url)).status_code == 200, url

    run(test)


def test_heads_share_one_encoder(tmp_path_factory, tokenizer):
    predictors = load_predictors(ModelConfig(), model_folders(ModelConfig()))
    tables = [p.model.ernie_m.embeddings.word_embeddings.weight for p in predictors.values()]
    assert len({table.data_ptr() for table in tables}) == 1
    heads = [predictors[t].model.classifier.weight.data_ptr() for t in ("ner", "classify")]
    assert heads[0] != heads[1]


# ---- refusals -----------------------------------------------------------------------------------


def test_one_bad_item_fails_alone(run):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        good = {"question": "Who?", "context": "Ada lived."}
        bad = {"question": " ", "context": "Ada lived.", "id": "bad"}
        first, failed, last = await ask(client, "qa", [good, bad, good])
        assert first["predicted_answers"] == last["predicted_answers"]
        assert failed["id"] == "bad"
        assert failed["error"]["code"] == "encode_failed"
        response = await client.post("/v1/qa", json={"inputs": bad})
        assert response.status_code == 422
        assert error_of(response)["param"] == "inputs.0"

    run(test)


def test_a_poison_window_harms_no_other(run, loaded, monkeypatch):
    """Those that share its forward pass are computed without it."""
    poison = set(loaded.predictors["ner"].tokenizer(POISON)["input_ids"][1:-1])
    run_windows = Predictor._run

    def fail(self: Predictor, windows: Any) -> Any:
        if any(poison <= set(window.ids.tolist()) for window in windows):
            raise RuntimeError("the kernel does not like this")
        return run_windows(self, windows)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        expected = await ask(client, "ner", "good text")
        monkeypatch.setattr(Predictor, "_run", fail)
        posts = [
            client.post("/v1/ner", json={"inputs": POISON if i % 5 == 0 else "good text"})
            for i in range(40)
        ]
        for i, response in enumerate(await asyncio.gather(*posts)):
            if i % 5:
                assert response.json()["results"] == expected
            else:
                assert response.status_code == 500
                assert error_of(response)["code"] == "forward_failed"
        mixed = await ask(client, "ner", ["good text", POISON])
        assert mixed[0] | {"id": "0"} == expected[0]
        assert mixed[1]["error"]["type"] == "server_error"
        assert (await client.get("/healthz")).status_code == 200

    run(test)


@pytest.mark.parametrize(
    ("path", "content", "status", "code", "param"),
    [
        ("/v1/ner", b"{", 400, "invalid_json", None),
        ("/v1/ner", b"\xff\xfe", 400, "invalid_json", None),
        ("/v1/ner", b"[" * 20_000, 400, "invalid_json", None),
        ("/v1/ner", b"[" * 100_000, 413, "too_many_values", None),
        ("/v1/ner", b"3", 422, "invalid_request", None),
        ("/v1/ner", b'{"inputs": [{"text": 3}]}', 422, "invalid_request", "inputs.0.text"),
        ("/v1/ner", b'{"inputs": "a", "modle": "b"}', 422, "invalid_request", "model"),
        ("/v1/ner", b'{"inputs": "a", "options": {"offset-unit hidden": 1}}', 422,
         "invalid_request", "options.offset_unit"),
        ("/v1/ner", b'{"inputs": [{"text": "a", "hidden": 1}]}', 422, "invalid_request",
         "inputs.0"),
        ("/v1/ner", b'{"inputs": "a", "hidden text": 1}', 422, "invalid_request", None),
        ("/v1/ner", b'{"inputs": "a", "options": {"min_score": 2}}', 422, "invalid_request",
         "options.min_score"),
        ("/v1/ner", b'{"inputs": "a", "options": {"min_score": NaN}}', 422, "invalid_request",
         "options.min_score"),
        ("/v1/ner", b'{"inputs": "a", "model": "gpt"}', 404, "no_such_model", "model"),
        ("/v1/classify", b'{"inputs": "a", "options": {"multi_label": true}}', 422,
         "invalid_option", "options.multi_label"),
        ("/v1/extract", b'{"inputs": "a"}', 422, "encode_failed", "inputs.0"),
        ("/v1/none", b"{}", 404, "not_found", None),
        ("/v1/ner", b'{"inputs": "' + b"x" * 5000 + b'"}', 413, "body_too_large", None),
        ("/v1/ner", b'{"inputs": ["a", "b", "c"]}', 413, "too_many_items", "inputs"),
    ],
)  # fmt: skip
def test_refusals(run, caplog, path, content, status, code, param):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        headers = {"content-type": "application/json", "x-request-id": "r-1"}
        response = await client.post(path, content=content, headers=headers)
        assert response.status_code == status, response.text
        error = error_of(response)
        assert (error["code"], error["param"], error["request_id"]) == (code, param, "r-1")
        assert error["type"] == "invalid_request_error"
        assert "hidden" not in response.text

        async def pieces() -> Any:
            for i in range(0, len(content), 1000):
                yield content[i : i + 1000]

        chunked = await client.post(path, content=pieces(), headers=headers)
        assert chunked.json() == response.json(), "also when its length is not known before"

    run(test, AppConfig(max_body_bytes=200_000 if b"[[" in content else 4096, max_items=2))
    assert "hidden" not in caplog.text


def test_methods_and_types(run):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        assert error_of(await client.get("/v1/ner"))["code"] == "method_not_allowed"
        response = await client.post("/v1/ner", content=b'{"inputs": "a"}')
        assert response.status_code == 422
        assert "Content-Type: application/json" in error_of(response)["message"]
        assert error_of(response)["request_id"] is None

    run(test)


def test_tokens(run):
    token, digest = new_token()

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for path, method in (
            ("/v1/ner", "POST"),
            ("/v1/models", "GET"),
            ("/v1/embeddings", "POST"),
        ):
            for headers in ({}, {"authorization": "Bearer nonsense"}):
                response = await client.request(method, path, json={}, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["type"] == "authentication_error"
        known = {"authorization": f"Bearer {token}"}
        assert (await client.get("/v1/models", headers=known)).status_code == 200
        response = await client.post("/v1/ner", json={"inputs": "a"}, headers=known)
        assert response.status_code == 200
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200

    run(test, AppConfig(tokens=(digest,)))


def test_names_of_other_machines_are_refused(run):
    """Only without tokens, which no page of a stranger has; and never for probes of health."""
    strange = {"host": "evil.example:8000"}
    body = {"inputs": "Ada"}

    async def refused(client: httpx.AsyncClient, engine: Engine) -> None:
        assert (await client.post("/v1/ner", json=body)).status_code == 200
        for path in ("/v1/models", "/", "/docs", "/openapi.json", "/nothing"):
            response = await client.get(path, headers=strange)
            assert response.status_code == 421
            assert error_of(response)["code"] == "unknown_host"
            assert "evil" not in response.text
        assert (await client.post("/v1/ner", json=body, headers=strange)).status_code == 421
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path, headers=strange)).status_code == 200

    async def answered(client: httpx.AsyncClient, engine: Engine) -> None:
        for path in ("/v1/models", "/"):
            response = await client.get(path, headers=strange | bearer)
            assert response.status_code == 200

    bearer: dict[str, str] = {}
    run(refused)
    assert ("other", 421) in run.watched
    run(answered, AppConfig(allowed_hosts=("evil.example",)))
    token, digest = new_token()
    bearer = {"authorization": f"Bearer {token}"}
    run(answered, AppConfig(tokens=(digest,)))
    run(refused, AppConfig(allowed_hosts=("good.example",)))


def test_a_body_that_takes_too_long(run):
    """Where no proxy of ours has received it before."""
    sent: list[Any] = []

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        async def slowly():
            yield b'{"inputs": '
            await asyncio.sleep(5)

        started = asyncio.get_running_loop().time()
        response = await client.post("/v1/ner", content=slowly())
        assert asyncio.get_running_loop().time() - started < 4
        assert response.status_code == 408
        assert error_of(response)["code"] == "body_timeout"
        assert response.headers["connection"] == "close"
        sent.append((await client.post("/v1/ner", json={"inputs": "Ada"})).status_code)

    run(test, AppConfig(body_timeout_s=0.2))
    assert sent == [200]
    assert [status for _, status in run.watched] == [408, 200]


def test_other_origins_are_strangers_unless_invited(run):
    origin = {"origin": "https://example.org"}

    async def strangers(client: httpx.AsyncClient, engine: Engine) -> None:
        response = await client.get("/healthz", headers=origin)
        assert not [name for name in response.headers if name.startswith("access-control")]

    async def invited(client: httpx.AsyncClient, engine: Engine) -> None:
        response = await client.get("/healthz", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://example.org"

    run(strangers)
    run(invited, AppConfig(cors_origins=("https://example.org",)))


# ---- under pressure -----------------------------------------------------------------------------


class Valve:
    """Holds forward passes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        self.open = threading.Event()
        run_windows = Predictor._run

        def wait(predictor: Predictor, windows: Any) -> Any:
            assert self.open.wait(30)
            return run_windows(predictor, windows)

        self.apply = lambda: monkeypatch.setattr(Predictor, "_run", wait)


def test_a_full_queue_refuses_and_recovers(run, monkeypatch):
    valve = Valve(monkeypatch)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        valve.apply()
        posts = [
            asyncio.create_task(client.post("/v1/ner", json={"inputs": "some words " * 5}))
            for _ in range(60)
        ]
        while sum(post.done() for post in posts) < 20:
            await asyncio.sleep(0.01)
        assert (await client.get("/healthz")).status_code == 200, "the event loop is free"
        valve.open.set()
        responses = await asyncio.gather(*posts)
        refused = [r for r in responses if r.status_code == 429]
        assert 0 < len(refused) < len(posts)
        assert {r.status_code for r in responses} == {200, 429}
        for response in refused:
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["type"] == "rate_limit_error"
        assert await ask(client, "ner", "some words")

    run(test, max_queue_tokens=400)


def test_a_deadline_ends_the_wait_alone(run, monkeypatch):
    valve = Valve(monkeypatch)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        valve.apply()
        running = asyncio.create_task(client.post("/v1/ner", json={"inputs": "first"}))
        await asyncio.sleep(0.1)
        headers = {"x-request-timeout-seconds": "0.2"}
        late = await client.post("/v1/ner", json={"inputs": LONG}, headers=headers)
        assert late.status_code == 504
        assert "within 0.18 s" in error_of(late)["message"], "before the proxy's own"
        assert engine._batchers["ner"].n_waiting_tokens == 0, "what nobody waits for is dropped"
        gone = asyncio.create_task(client.post("/v1/ner", json={"inputs": LONG}))
        await asyncio.sleep(0.1)
        assert engine._batchers["ner"].n_waiting_tokens > 0
        gone.cancel()
        await asyncio.sleep(0.1)
        assert engine._batchers["ner"].n_waiting_tokens == 0, "nor what a client left"
        valve.open.set()
        assert (await running).status_code == 200
        for value in ("nan", "-1", "soon", "1e999"):
            headers = {"x-request-timeout-seconds": value}
            response = await client.post("/v1/ner", json={"inputs": "a"}, headers=headers)
            assert response.status_code == 200

    run(test)


def test_a_lost_device_is_seen_by_the_health_check(run, monkeypatch):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        engine.check()

        def lose(self: Predictor, windows: Any) -> Any:
            raise DeviceError("cuda:0: an illegal memory access was encountered")

        monkeypatch.setattr(Predictor, "_run", lose)
        response = await client.post("/v1/ner", json={"inputs": "a"})
        assert response.status_code == 503
        assert response.headers["retry-after"]
        with pytest.raises(EngineError, match="illegal memory"):
            engine.check()
        health = await client.get("/healthz")
        assert health.status_code == 503
        assert "illegal memory" in health.json()["problems"][0]

    run(test)


def test_a_pass_that_hangs_is_seen_by_the_health_check(run, monkeypatch):
    valve = Valve(monkeypatch)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        valve.apply()
        running = asyncio.create_task(client.post("/v1/ner", json={"inputs": "a"}))
        await asyncio.sleep(0.4)
        with pytest.raises(EngineError, match="hangs"):
            engine.check()
        valve.open.set()
        assert (await running).status_code == 200
        engine.check()

    run(test, hang_s=0.2)


def test_a_fault_of_ours_tells_where_and_not_what(run, monkeypatch, caplog):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        def fail(self: Predictor, records: Any, n_characters: Any) -> Any:
            raise KeyError(records[0].text)

        monkeypatch.setattr(Predictor, "_encode_in_turn", fail)
        with caplog.at_level(logging.INFO):
            response = await client.post("/v1/ner", json={"inputs": "hidden"})
        assert response.status_code == 500
        assert "KeyError in test_serve_api.py" in error_of(response)["message"]
        assert "hidden" not in response.text

    run(test)
    assert "hidden" not in caplog.text


def test_closing_answers_what_was_accepted(loaded, monkeypatch):
    monkeypatch.setattr(Predictor, "close", lambda self: None)
    valve = Valve(monkeypatch)

    async def test() -> None:
        engine = Engine(loaded.config, loaded.predictors, loaded.folders)
        await engine.start()
        valve.apply()
        item = {"id": "0", "text": LONG, "fields": {}}
        asked = [asyncio.create_task(engine.answer(Ask("ner", [item], {}, 30))) for _ in range(5)]
        tokens = -1
        while (n := engine._batchers["ner"].n_waiting_tokens) != tokens or not n:
            tokens = n  # they are tokenized one after the other
            await asyncio.sleep(0.3)
        valve.open.set()
        for batcher in engine._batchers.values():
            await batcher.close()
        answers = await asyncio.gather(*asked)
        assert all(isinstance(answer, Served) for answer in answers)
        refused = await engine.answer(Ask("ner", [item], {}, 30))
        assert isinstance(refused, Refusal)
        assert refused.status == 503
        with pytest.raises(EngineError, match="no more"):
            engine.check()

    asyncio.run(asyncio.wait_for(test(), timeout=60))


def test_a_model_that_cannot_answer_never_becomes_ready(loaded, monkeypatch):
    def fail(self: Predictor, windows: Any) -> list[Any]:
        return [Failure("", "forward", "RuntimeError", "broken") for _ in windows]

    monkeypatch.setattr(Predictor, "_forward_all", fail)

    async def test() -> None:
        engine = Engine(loaded.config, loaded.predictors, loaded.folders)
        with pytest.raises(EngineError, match="ner: no answer"):
            await engine.start()

    asyncio.run(test())
    assert json.dumps(loaded.config.model_dump()), "settings are plain values"
    assert torch.get_num_threads() >= 1


# ---- requests that make too much work -----------------------------------------------------------

COSTLY = [body for body in HOSTILE_BODIES if body.is_costly and "label" not in body.name]


@pytest.mark.parametrize("body", COSTLY, ids=lambda body: body.name)
def test_too_much_work_is_refused_with_its_numbers(run, body):
    """Within seconds, with nothing left behind in queues and threads."""

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        headers = {"content-type": "application/json"}
        response = await client.post(body.path, content=body.make(), headers=headers)
        if body.name == "every span of a short text":  # not too many in windows of 64 tokens
            assert response.status_code == 200
        else:
            assert response.status_code in (413, 422), response.text[:300]
            assert len(re.findall(r"\d{3,}", error_of(response)["message"])) >= 2
        assert all(batcher.n_waiting_tokens == 0 for batcher in engine._batchers.values())
        await asyncio.wait_for(free_threads(engine), timeout=10)

    run(test, max_request_tokens=4000)


@pytest.mark.parametrize(("limit", "status"), [(100, 413), (1000, 200)])
def test_a_limit_can_be_raised(run, limit, status):
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        response = await client.post("/v1/ner", json={"inputs": "word " * 200})
        assert response.status_code == status, response.text

    run(test, max_request_tokens=limit)


def test_the_limit_is_that_of_the_queue_unless_told_otherwise():
    assert ModelConfig(max_queue_tokens=10).request_tokens == 65_536
    assert ModelConfig(max_queue_tokens=10**6).request_tokens == 10**6


def test_the_client_cuts_requests_that_make_too_much_work(run):
    """Each item is answered as it would be alone; one that is too much by itself fails alone."""
    texts = ["word " * 50, "Ada lived.", LONG, *["in Berlin " * 40] * 5]

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        transport = httpx.ASGITransport(client._transport.app)
        async with AsyncClient("http://test", transport=transport) as ours:
            results = await ours.ner(texts)
        assert [result.id for result in results] == [str(i) for i in range(len(texts))]
        failed = [isinstance(result, Failed) for result in results]
        assert failed == [text == LONG for text in texts]
        assert results[2].code == "request_too_large"
        assert [r.n_windows > 0 for r in results if not isinstance(r, Failed)] == [True] * 7

    run(test, max_request_tokens=500)


async def free_threads(engine: Engine) -> None:
    """Returns when every text thread is free at the same time."""
    import threading

    for pool in (engine._threads, engine._long_threads):
        barrier = threading.Barrier(pool._max_workers)
        waiting = [pool.submit(barrier.wait, 30) for _ in range(pool._max_workers)]
        await asyncio.gather(*map(asyncio.wrap_future, waiting))


@pytest.mark.parametrize("how", ["deadline", "client"])
def test_what_nobody_waits_for_ends(run, how):
    """The limit is raised so far that it would take minutes and gigabytes."""
    body = {"inputs": "in Berlin " * 4000, "options": {"schema": [f"n{i}" for i in range(2000)]}}

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        if how == "deadline":
            headers = {"x-request-timeout-seconds": "0.5"}
            late = await client.post("/v1/extract", json=body, headers=headers)
            assert late.status_code == 504
        else:
            asking = asyncio.create_task(client.post("/v1/extract", json=body))
            await asyncio.sleep(0.5)
            asking.cancel()
        await asyncio.wait_for(free_threads(engine), timeout=10)
        assert all(batcher.n_waiting_tokens == 0 for batcher in engine._batchers.values())
        before = resident_mb()
        await asyncio.sleep(0.3)
        assert resident_mb() < before + 50, "nothing is allocated any more"
        assert await ask(client, "ner", "some words")

    run(test, max_request_tokens=10**9)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_short_texts_have_their_turn_beside_long_ones(run):
    """A large request is read and decoded in slices, in a thread of its own."""
    many = [LONG[:200]] * 200

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        large = asyncio.create_task(client.post("/v1/ner", json={"inputs": many}))
        await asyncio.sleep(0.2)
        n_answers = 0
        while not large.done():
            await ask(client, "qa", {"question": "Who?", "context": "Ada lived."})
            n_answers += 1
        assert large.result().status_code == 200
        assert n_answers >= 3, "they do not wait for its end"

    run(test)


def test_a_client_that_goes_away_ends_its_request(loaded, monkeypatch):
    """Over a real connection, to a server that does not cancel requests by itself."""
    monkeypatch.setattr(Predictor, "close", lambda self: None)
    valve = Valve(monkeypatch)
    engine = Engine(loaded.config, loaded.predictors, loaded.folders)
    with served(make_api(AppConfig(), {"tiny": engine})) as url:
        valve.apply()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/ner", json={"inputs": LONG}, timeout=0.5)
        deadline = time.monotonic() + 10
        while engine._batchers["ner"].n_waiting_tokens and time.monotonic() < deadline:
            time.sleep(0.02)
        assert engine._batchers["ner"].n_waiting_tokens == 0
        valve.open.set()
