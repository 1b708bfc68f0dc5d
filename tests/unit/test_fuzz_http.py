"""A short fuzz of HTTP bodies, as `python -m tests.fault.fuzz_http` does it for long; and that it
would see what is wrong."""

import asyncio
from typing import Any

import httpx
import pytest
from fault.fuzz_http import MARK, Judge, Sent, fuzz, in_this_process

from erniem_batch.predictor import Predictor


@pytest.fixture(scope="module")
def document(service_dir) -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        async with in_this_process(service_dir) as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(read())


def test_a_short_fuzz_finds_nothing(service_dir) -> None:
    async def run() -> Any:
        async with in_this_process(service_dir) as client:
            return await fuzz(client, 160, seed=2)

    found = asyncio.run(run())
    assert not found.wrong
    assert {"200", "400 invalid_json", "422 invalid_request"} <= set(found.statuses)
    assert found.statuses.total() > 120


def result(**changes: Any) -> dict[str, Any]:
    entity = {"start": 0, "end": 3, "label": "PER", "text": "Ada", "score": 0.9}
    done = {"id": "0", "entities": [entity | changes], "n_tokens": 1, "n_windows": 1}
    done |= {"truncated": False, "detected_language": None}
    usage = {"n_tokens": 1, "n_windows": 1}
    return {"model": "tiny", "results": [done], "usage": usage}


def refused(message: str) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "code": "x", "param": None}
    return {"error": error | {"request_id": None}}


@pytest.mark.parametrize(
    ("body", "status", "answer", "fault"),
    [
        (b'{"inputs": "Ada"}', 200, result(), None),
        (b'{"inputs": "Ada"}', 200, result(end=2), "is another"),
        (b'{"inputs": "Ada"}', 200, result(score="high"), "not as the document says"),
        (b'{"inputs": ["Ada", "b"]}', 200, result(), "not a result for each item"),
        (b'{"inputs": [{"id": "x", "text": "Ada"}]}', 200, result(), "not a result for each"),
        (b'{"inputs": 3}', 200, result(), "the document forbids"),
        (b"{", 200, result(), "for what is no JSON"),
        (b"{", 400, refused("it is no JSON"), None),
        (b'{"inputs": "Ada"}', 400, refused("it is no JSON"), "400 for JSON"),
        (b'{"inputs": 3}', 422, refused(f"not {MARK}"), "repeats the request"),
        (b'{"inputs": "Ada"}', 500, refused("a fault"), "status 500"),
        (b'{"inputs": "Ada"}', 409, refused("who knows"), "not in the document"),
    ],
)
def test_what_is_wrong_is_seen(document, body, status, answer, fault) -> None:
    response = httpx.Response(status, json=answer)
    faults = list(Judge(document).faults(Sent(0, "/v1/ner", body), response))
    assert (not faults) if fault is None else any(fault in f for f in faults), faults


def test_a_fault_of_the_service_is_found(service_dir, monkeypatch) -> None:
    """Some of the texts make the service fail."""
    rounds = Predictor.rounds

    def fail(self: Predictor, records: Any, *rest: Any) -> Any:
        if any("qz" in str(record.text) for record in records):
            raise ZeroDivisionError
        return rounds(self, records, *rest)

    async def run() -> Any:
        async with in_this_process(service_dir) as client:
            monkeypatch.setattr(Predictor, "rounds", fail)
            return await fuzz(client, 60, seed=3)

    wrong = asyncio.run(run()).wrong
    assert any("status 500" in line and "ZeroDivisionError" in line for line in wrong)
