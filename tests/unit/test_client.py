"""The client before a server that does as it is told, and before the real service."""

import asyncio
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from serving import served_model

from erniem_batch import client as module
from erniem_batch.client import (
    RESULTS,
    AsyncClient,
    Client,
    Failed,
    ModelCard,
    NerResult,
    ServiceError,
)
from erniem_batch.errors import ConfigError, ErnieMBatchError
from erniem_batch.options import TASKS
from erniem_batch.serve import messages
from erniem_batch.serve.parity import difference
from erniem_batch.serve.tokens import new_token

SECRET = "nobody may read this"
COUNTED = {"n_tokens": 1, "n_windows": 1, "truncated": False}


# ---- a server that does as it is told -----------------------------------------------------------


@dataclass
class Told:
    """What came, and what is to be answered: (status, headers, body), or None to hang up; when
    there is nothing more, every item has no entities."""

    answers: list[Any] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""
    slow: float = 0.0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.requests]

    @property
    def counts(self) -> list[int]:
        """Items of each request."""
        return [len(body["inputs"]) for body in self.bodies]


def refusal(code: str, message: str = "no", param: str | None = None) -> bytes:
    error = {"message": message, "type": "x", "code": code, "param": param, "request_id": None}
    return json.dumps({"error": error}).encode()


def no_entities(body: bytes) -> bytes:
    items = json.loads(body)["inputs"]
    results = [{"id": item["id"], "entities": [], **COUNTED} for item in items]
    return json.dumps({"model": "m", "results": results, "usage": {}}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Told

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        told = self.told
        with told.lock:
            told.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            answer = told.answers.pop(0) if told.answers else (200, {}, no_entities(body))
            told.at_once += 1
            told.most_at_once = max(told.at_once, told.most_at_once)
        time.sleep(told.slow)
        with told.lock:
            told.at_once -= 1
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    told = Told()
    handler = type("Mine", (Handler,), {"told": told})
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield told
        server.shutdown()
        thread.join()


def ids(results: Any) -> list[str]:
    return [result.id for result in results]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_passes_is_tried_again(told: Told, status: int) -> None:
    told.answers = [(status, {}, refusal("queue_full")), None]
    with Client(told.url, retries=2) as client:
        assert ids(client.ner("a")) == ["0"]
    assert len(told.requests) == 3
    assert len({body for _, _, body in told.requests}) == 1, "the same, whole"
    assert len({headers["x-request-id"] for _, headers, _ in told.requests}) == 1


def test_retry_after_is_kept(told: Told) -> None:
    told.answers = [(429, {"Retry-After": "1"}, refusal("queue_full"))]
    started = time.monotonic()
    with Client(told.url) as client:
        client.ner("a")
    assert 1.0 <= time.monotonic() - started < 3.0


@pytest.mark.parametrize("status", [400, 401, 404, 408, 422, 504])
def test_what_stays_as_it_is_is_not_tried_again(told: Told, status: int) -> None:
    told.answers = [(status, {}, refusal("some_code", "some words", "options.top_k"))]
    with Client(told.url) as client, pytest.raises(ServiceError) as caught:
        client.ner(["a", "b"], top_k=0)
    error = caught.value
    assert (error.status, error.code, error.message) == (status, "some_code", "some words")
    assert (error.param, error.retry_after) == ("options.top_k", None)
    assert [error.request_id] == [headers["x-request-id"] for _, headers, _ in told.requests]
    assert str(error) == f"{status} some_code: some words (options.top_k)"


def test_patience_ends(told: Told) -> None:
    told.answers = [(503, {"Retry-After": "0"}, refusal("shutting_down"))] * 9
    with Client(told.url, retries=3) as client, pytest.raises(ServiceError) as caught:
        client.ner("a")
    assert (caught.value.status, caught.value.retry_after, len(told.requests)) == (503, 0.0, 4)


def test_a_service_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(url, retries=1) as client, pytest.raises(ServiceError) as caught:
        client.models()
    assert (caught.value.status, caught.value.code) == (None, "unreachable")
    assert url in str(caught.value)


def test_no_answer_in_time_is_not_tried_again(told: Told) -> None:
    told.slow = 0.6
    with Client(told.url, timeout=0.2) as client, pytest.raises(ServiceError) as caught:
        client.ner("a")
    assert (caught.value.status, caught.value.code) == (None, "timeout")
    assert len(told.requests) == 1
    assert told.requests[0][1]["x-request-timeout-seconds"] == "0.2"
    assert caught.value.request_id == told.requests[0][1]["x-request-id"]


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, b"<html>hello</html>", "not_understood"),
        (200, b"[]", "not_understood"),
        (200, b'{"results": []}', "not_understood"),
        (200, b'{"results": [{"id": "0"}]}', "not_understood"),
        (200, b'{"results": [[1]]}', "not_understood"),
        (200, b'{"results": [{"error": "x"}]}', "not_understood"),
        (404, b"<html>nobody may read this</html>", "http"),
        (404, b'{"error": "nobody may read this"}', "http"),
        (307, b"", "http"),
    ],
)
def test_something_else_answers(told: Told, status: int, body: bytes, code: str) -> None:
    told.answers = [(status, {}, body)]
    with Client(told.url) as client, pytest.raises(ServiceError) as caught:
        client.ner("a")
    assert (caught.value.status, caught.value.code) == (status, code)
    assert SECRET not in str(caught.value)


def test_what_a_newer_service_adds_is_left_out(told: Told) -> None:
    entity = {"start": 0, "end": 1, "label": "PER", "text": "a", "score": 0.5, "new": 1}
    result = {"id": "0", "entities": [entity], **COUNTED, "new": {}}
    told.answers = [(200, {}, json.dumps({"results": [result], "new": 1}).encode())]
    with Client(told.url) as client:
        [found] = client.ner("a")
    assert isinstance(found, NerResult)
    assert found.entities[0].label == "PER"


def test_requests_have_so_many_items_and_bytes(told: Told) -> None:
    texts = ["x" * (i * 37 % 300) + "é京" for i in range(100)]
    with Client(told.url, max_items=5, max_body_bytes=1000) as client:
        results = client.ner(iter(texts), min_score=0.5, model="m")
    assert ids(results) == [str(i) for i in range(100)]
    assert [item["text"] for body in told.bodies for item in body["inputs"]] == texts
    assert {(body["model"], body["options"]["min_score"]) for body in told.bodies} == {("m", 0.5)}
    sizes = [len(body) for _, _, body in told.requests]
    assert max(sizes) <= 1000
    assert max(told.counts) == 5
    assert min(told.counts[:-1]) < 5, "some were full before"
    nexts = [len(json.dumps(body["inputs"][0])) for body in told.bodies[1:]]
    for size, count, more in zip(sizes, told.counts, nexts, strict=False):
        assert count == 5 or size + more > 1000, "the next item had no room"


def test_an_item_above_the_limit_goes_alone(told: Told) -> None:
    with Client(told.url, max_body_bytes=200) as client:
        assert ids(client.ner(["a", "b", "x" * 500, "c", "d"])) == ["0", "1", "2", "3", "4"]
    assert told.counts == [2, 1, 2]


@pytest.mark.parametrize("form", [SECRET, {"text": SECRET}])
def test_one_item_need_not_be_a_list(told: Told, form: Any) -> None:
    with Client(told.url + "/prefix/", token="abc") as client:
        assert ids(client.ner(form)) == ["0"]
    path, headers, _ = told.requests[0]
    assert (path, headers["authorization"]) == ("/prefix/v1/ner", "Bearer abc")
    assert headers["content-type"] == "application/json"
    assert told.bodies == [{"inputs": [{"text": SECRET, "id": "0"}], "options": {}}]


def test_nothing_asked_nothing_sent(told: Told) -> None:
    with Client(told.url) as client:
        assert client.ner([]) == []
    assert told.requests == []


def test_a_stream_asks_when_it_is_read(told: Told) -> None:
    with Client(told.url, max_items=2) as client:
        results = client.stream("ner", ({"id": f"t{i}", "text": "x"} for i in range(10**9)))
        assert told.requests == []
        assert [next(results).id for _ in range(3)] == ["t0", "t1", "t2"]
        assert told.counts == [2, 2]


def test_places_of_errors_count_over_all_items(told: Told) -> None:
    told.answers = [
        (200, {}, no_entities(b'{"inputs": [{"id": "0"}, {"id": "1"}, {"id": "2"}]}')),
        (422, {}, refusal("invalid_request", "should be text", "inputs.1.text")),
    ]
    with Client(told.url, max_items=3) as client, pytest.raises(ServiceError) as caught:
        client.ner(["a"] * 9)
    assert caught.value.param == "inputs.4.text"


def test_text_that_is_none_spoils_no_request(told: Told) -> None:
    texts = ["\ud800", "a", "b", "x\udfff", "\udfff", "c"]
    with Client(told.url, max_items=2) as client:
        results = client.ner(texts)
    assert ids(results) == ["0", "1", "2", "3", "4", "5"]
    assert [isinstance(result, Failed) for result in results] == [True, False, False, True, True, 0]
    assert [item["text"] for body in told.bodies for item in body["inputs"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("n_items", "status", "code", "param", "is_of_the_item"),
    [
        (1, 422, "encode_failed", "inputs.0", True),
        (1, 500, "forward_failed", "inputs.0", True),
        (1, 413, "body_too_large", None, True),
        (1, 413, "too_many_characters", None, True),
        (1, 413, "text_too_long", "inputs.0", True),
        (1, 422, "invalid_option", "options", False),
        (1, 422, "invalid_request", "inputs.0.text", False),
        (2, 413, "body_too_large", None, False),
    ],
)
def test_a_lonely_item_fails_as_it_would_among_others(
    told: Told, n_items: int, status: int, code: str, param: str | None, is_of_the_item: bool
) -> None:
    told.answers = [(status, {}, refusal(code, "words", param))] * 3
    with Client(told.url, retries=2) as client:
        if is_of_the_item:
            kind = "server_error" if status == 500 else "invalid_request_error"
            found = client.ner([{"id": "mine", "text": "a"}])
            assert found == [Failed("mine", code, "words", kind)]
        else:
            with pytest.raises(ServiceError, match=code):
                client.ner(["a"] * n_items)


def _everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    "answer", [None, (422, {}, refusal("x")), (200, {}, b"no JSON"), (200, {}, b'{"results": [3]}')]
)
def test_errors_do_not_repeat_the_text(told: Told, answer: Any) -> None:
    told.answers = [answer] * 3
    with Client(told.url, retries=2) as client, pytest.raises(ServiceError) as caught:
        client.ner([SECRET, SECRET])
    assert SECRET not in _everything_said(caught.value)


def test_errors_travel_between_processes() -> None:
    error = ServiceError(429, "queue_full", "words", "options", "r", 2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert isinstance(copy, ErnieMBatchError)
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "http://"),
        ({"base_url": "http://"}, "http://"),
        ({"base_url": "http://x:port"}, "no URL"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"max_items": 0}, "max_items"),
        ({"token": "a secret\n"}, "printable"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Client(**{"base_url": "http://x", **settings})
    assert "secret" not in _everything_said(caught.value)


def test_an_unknown_task() -> None:
    with Client("http://x") as client, pytest.raises(ConfigError, match="ner, classify"):
        client.stream("net", "a")


# ---- asyncio ------------------------------------------------------------------------------------


def test_several_requests_at_a_time_and_results_in_order(told: Told) -> None:
    told.slow = 0.05

    async def ask() -> list[str]:
        async with AsyncClient(told.url, max_items=2, concurrency=3) as client:
            return ids(await client.ner(["a"] * 20))

    assert asyncio.run(ask()) == [str(i) for i in range(20)]
    assert (told.most_at_once, told.counts) == (3, [2] * 10)


def test_a_refusal_ends_all_of_a_call(told: Told) -> None:
    told.slow = 0.05
    told.answers = [(422, {}, refusal("x", param="inputs.0.text"))]

    async def ask() -> None:
        async with AsyncClient(told.url, max_items=1, concurrency=4) as client:
            with pytest.raises(ServiceError, match="422 x") as caught:
                await client.ner([SECRET] * 50)
            assert SECRET not in _everything_said(caught.value)
            assert len(asyncio.all_tasks()) == 1, "nothing goes on"

    asyncio.run(ask())
    assert len(told.requests) <= 2 * 4, "those under way, and no further ones"


def test_asyncio_tries_again_too(told: Told) -> None:
    told.answers = [(503, {}, refusal("x")), None]

    async def ask() -> list[str]:
        async with AsyncClient(told.url) as client:
            return [r.id async for r in client.stream("ner", ["\ud800", "a"])]

    assert asyncio.run(ask()) == ["0", "1"]
    assert len(told.requests) == 3


# ---- the real service ---------------------------------------------------------------------------

SIZES = {"window_tokens": 64, "overlap_tokens": 16}
TEXTS = ["Ada Lovelace lived in London.", "", "北京は大きい都市です。", "😀 x " * 100]
ITEMS: dict[str, list[Any]] = {
    "ner": TEXTS,
    "classify": [*TEXTS, {"text": "It rains.", "text_pair": "It is wet."}],
    "choose": [{"premise": text, "choices": ["one", "two"]} for text in TEXTS],
    "qa": [{"context": text, "question": "Who?"} for text in TEXTS if text],
    "embed": TEXTS,
    "extract": TEXTS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "classify": {"all_scores": True},
    "extract": {"schema": {"Person": ["City"]}, "schema_lang": "en", "output_json": True},
}


@pytest.fixture(scope="module")
def service(service_dir: Path) -> Iterator[str]:
    with served_model(service_dir, {"max_body_bytes": 100_000}, **SIZES) as url:
        yield url


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_the_service(service: str, task: str) -> None:
    items, options = ITEMS[task], OPTIONS.get(task, {})
    inputs = [{"text": item} if isinstance(item, str) else item for item in items]
    body = {"inputs": inputs, "options": options}
    plain = httpx.post(f"{service}/v1/{task}", json=body, timeout=60).json()["results"]
    with Client(service, max_items=2) as client:
        found = getattr(client, task)(items, **options)
        assert list(client.stream(task, items, **options)) == found

    async def ask() -> list[Any]:
        async with AsyncClient(service) as client:
            return await getattr(client, task)(items, **options)  # type: ignore[no-any-return]

    together = asyncio.run(ask())
    for result, same, expected in zip(found, together, plain, strict=True):
        assert type(result) is RESULTS[task]
        expected = {"detected_language": None, **expected}
        for one in (asdict(result), asdict(same)):
            nested = [{**answer, "extracted_json": None} for answer in (one, expected)]
            assert difference(*nested) <= 1e-5
            assert one.keys() - expected.keys() == set()


def test_classes_are_those_of_the_api() -> None:
    """What the service may send, the client knows; and the other way round."""
    for task, result in RESULTS.items():
        theirs = messages.RESULTS[task]
        assert {f.name for f in fields(result)} == set(theirs.model_fields)
    for mine, theirs_too in (
        (module.Entity, messages.Entity),
        (module.LabelScore, messages.LabelScore),
        (module.Answer, messages.Answer),
        (module.Extracted, messages.Extracted),
    ):
        hints = get_type_hints(mine)
        assert hints == {n: f.annotation for n, f in theirs_too.model_fields.items()}
    assert {f.name for f in fields(ModelCard)} == set(messages.ModelCard.model_fields) - {"object"}
    assert set(RESULTS) == set(TASKS)


def test_the_headers_are_those_of_the_api() -> None:
    from erniem_batch.serve import api

    assert module.TIMEOUT_HEADER == api.TIMEOUT_HEADER


def test_models(service: str) -> None:
    with Client(service) as client:
        [card] = client.models()
    assert (card.id, set(card.tasks), card.window_tokens) == ("tiny", set(TASKS), 64)
    assert set(card.digests) == set(TASKS)


def test_an_item_that_fails_is_a_result(service: str) -> None:
    """Among others, alone, and alone in the last request of several."""
    items = [
        {"id": "a", "context": "x", "question": "Who?"},
        {"id": "b", "context": "x", "question": ""},
        {"id": "c", "context": SECRET, "question": ""},
    ]
    for some, max_items in ((items, 64), (items[1:2], 64), (items, 2)):
        with Client(service, max_items=max_items) as client:
            results = client.qa(some)
        assert ids(results) == [item["id"] for item in some]
        failed = [result for result in results if isinstance(result, Failed)]
        assert ids(failed) == [item["id"] for item in some if not item["question"]]
        assert {(f.code, f.type) for f in failed} == {("encode_failed", "invalid_request_error")}
        assert SECRET not in repr(failed)


def test_a_text_that_is_too_large_is_a_result(service: str) -> None:
    with Client(service, max_body_bytes=50_000, retries=0) as client:
        results = client.embed(["a", "x" * 200_000, "b"])
    assert ids(results) == ["0", "1", "2"]
    assert [getattr(r, "code", None) for r in results] == [None, "body_too_large", None]


def test_refusals_of_the_service(service: str) -> None:
    with Client(service) as client:
        with pytest.raises(ServiceError) as caught:
            client.ner("a", model="another")
        assert (caught.value.status, caught.value.code) == (404, "no_such_model")
        with pytest.raises(ServiceError) as caught:
            client.ner(["a", "b"], top_k=3)
        assert (caught.value.status, caught.value.param) == (422, "options")
        assert "there are aggregation_strategy, min_score, offset_unit" in caught.value.message
        with pytest.raises(ServiceError) as caught:
            client.qa([{"context": "a", "question": "b"}] * 3 + ["c"])
        assert (caught.value.status, caught.value.param) == (422, "inputs.3.question")


def test_the_deadline_reaches_the_service(service: str) -> None:
    with Client(service, timeout=0.05) as client, pytest.raises(ServiceError) as caught:
        client.embed([f"{i} {SECRET} " * 200 for i in range(20)])
    assert caught.value.code in ("deadline_exceeded", "timeout")


def test_tokens(service_dir: Path) -> None:
    token, digest = new_token()
    app = {"tokens": (digest,)}
    with served_model(service_dir, app, tasks=("ner",), **SIZES) as url:
        with Client(url, token) as client:
            assert ids(client.ner("a")) == ["0"]
        with Client(url, "wrong") as client, pytest.raises(ServiceError) as caught:
            client.ner("a")
    assert (caught.value.status, caught.value.code) == (401, "unauthorized")


# ---- how light it is ----------------------------------------------------------------------------


def test_nothing_heavy_is_imported() -> None:
    """Of the package only the errors: whoever asks a service needs no torch."""
    folder = str(Path(module.__file__).parent)
    code = f"""
import sys, types
package = types.ModuleType("erniem_batch")  # without what its __init__ imports
package.__path__ = [{folder!r}]
sys.modules["erniem_batch"] = package
import erniem_batch.client
ours = sorted(name for name in sys.modules if name.startswith("erniem_batch."))
assert ours == ["erniem_batch.client", "erniem_batch.errors"], ours
heavy = {{"torch", "numpy", "ray", "pydantic", "fastapi", "pyarrow", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
