"""The body of a request, as Ray Serve hands it to the application."""

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from ray.serve._private import http_util
from ray.serve._private.http_util import ASGIReceiveProxy
from ray.serve._private.proxy_request_response import ASGIProxyRequest
from ray.serve.config import HTTPOptions

from erniem_batch.serve.receive import MAX_BODY, BodyWithTheHead, OnlyTheBody
from erniem_batch.serve.run import _settings_of_ray

SCOPE = {"type": "http"}


class Proxy:
    """In the place of Ray's: a connection that stays open when the body is through."""

    def __init__(self, *parts: bytes) -> None:
        self.n_calls = 0
        self._parts = list(parts)

    async def __call__(self, metadata: Any) -> bytes:
        self.n_calls += 1
        if not self._parts:
            await asyncio.get_running_loop().create_future()
        part = self._parts.pop(0)
        message = {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        return pickle.dumps([message])


@pytest.mark.parametrize("parts", [(b"all",), (b"in ", b"three ", b"parts"), (b"",)])
def test_serve_is_asked_for_the_body_alone(parts: tuple[bytes, ...]) -> None:
    """By Serve's own class: should Ray call its call otherwise, this fails, and requests cost more
    again."""
    proxy = Proxy(*parts)
    body = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            body.append(message["body"])
            if not message["more_body"]:
                break
        await asyncio.sleep(0.01)  # computes something

    async def test() -> bool:
        receive = ASGIReceiveProxy(SCOPE, None, proxy)
        fetching = asyncio.create_task(receive.fetch_until_disconnect())
        await OnlyTheBody(application)(SCOPE, receive, None)
        is_waiting = not fetching.done()
        fetching.cancel()
        await asyncio.wait([fetching])
        return is_waiting

    assert asyncio.run(test())
    assert body == list(parts)
    assert proxy.n_calls == len(parts)


def test_a_client_that_goes_while_it_sends() -> None:
    async def gone(metadata: Any) -> bytes:
        return pickle.dumps([{"type": "http.disconnect"}])

    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"

    async def test() -> None:
        receive = ASGIReceiveProxy(SCOPE, None, gone)
        fetching = asyncio.create_task(receive.fetch_until_disconnect())
        await OnlyTheBody(application)(SCOPE, receive, None)
        await fetching

    asyncio.run(test())


def test_others_are_left_as_they_are() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def application(scope: Any, given: Any, send: Any) -> None:
        assert given is receive

    asyncio.run(OnlyTheBody(application)(SCOPE, receive, None))  # type: ignore[arg-type]


# ---- the body that travels with its head --------------------------------------------------------


class Client:
    """In the place of uvicorn: parts of a body, and then an open connection."""

    def __init__(self, *parts: bytes, then: str | None = None, pause: float = 0.0) -> None:
        self.n_asked = 0
        self._messages = [
            {"type": "http.request", "body": part, "more_body": i < len(parts) or then is not None}
            for i, part in enumerate(parts, 1)
        ]
        if then is not None:
            self._messages.append({"type": then})
        self._pause = pause

    async def __call__(self) -> dict[str, Any]:
        self.n_asked += 1
        await asyncio.sleep(self._pause)
        if not self._messages:
            await asyncio.get_running_loop().create_future()
        return self._messages.pop(0)


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}


def declared(n_bytes: int) -> dict[str, Any]:
    return scope_of((b"content-length", b"%d" % n_bytes))


async def through_both(
    scope: dict[str, Any], client: Client, n_messages: int, patience_s: float = 1.0
) -> tuple[Sequence[Any], int]:
    """What the application receives, and how often its replica called the proxy for it: both ends,
    with what Serve has between them."""
    seen: list[Any] = []
    n_calls = 0

    async def application(_: Any, receive: Any, send: Any) -> None:
        for _ in range(n_messages):
            seen.append(await asyncio.wait_for(receive(), 5))

    async def proxy(there: Any, receive: Any, send: Any) -> None:
        async def call(metadata: Any) -> bytes:
            nonlocal n_calls
            n_calls += 1
            return pickle.dumps([await receive()])

        sent = ASGIProxyRequest(there, receive, send).serialized_replica_arg("a proxy")
        here = pickle.loads(sent).asgi_scope
        receive_there = ASGIReceiveProxy(here, None, call)
        fetching = asyncio.create_task(receive_there.fetch_until_disconnect())
        await OnlyTheBody(application)(here, receive_there, send)
        fetching.cancel()
        await asyncio.wait([fetching])

    await BodyWithTheHead(proxy, patience_s)(scope, client, None)  # type: ignore[arg-type]
    return seen, n_calls


@pytest.mark.parametrize("parts", [(b"all",), (b"in ", b"three ", b"parts"), (b"",)])
def test_a_small_body_travels_with_its_head(parts: tuple[bytes, ...]) -> None:
    scope = declared(sum(map(len, parts)))
    seen, n_calls = asyncio.run(through_both(scope, Client(*parts), len(parts)))
    assert [message["body"] for message in seen] == list(parts)
    assert n_calls == 0


def test_a_request_without_a_body_is_not_called_for_either() -> None:
    seen, n_calls = asyncio.run(through_both(scope_of(), Client(b""), 1))
    assert not seen[0]["body"]
    assert n_calls == 0


@pytest.mark.parametrize(
    "scope",
    [
        declared(MAX_BODY + 1),
        scope_of((b"transfer-encoding", b"chunked")),
        scope_of((b"content-length", b"many")),
    ],
)
def test_other_bodies_are_not_read_ahead(scope: dict[str, Any]) -> None:
    """A large one would have to be held here and there."""
    client = Client(b"a", b"b")

    async def application(there: Any, receive: Any, send: Any) -> None:
        assert there is scope
        assert receive is client

    asyncio.run(BodyWithTheHead(application)(scope, client, None))  # type: ignore[arg-type]
    assert not client.n_asked
    seen, n_calls = asyncio.run(through_both(scope, client, 2))
    assert [message["body"] for message in seen] == [b"a", b"b"]
    assert n_calls == 2


def test_a_slow_body_is_waited_for_by_the_replica() -> None:
    """And nothing that came meanwhile is lost."""
    client = Client(b"slow", b"ly", pause=0.06)
    seen, n_calls = asyncio.run(through_both(declared(6), client, 2, patience_s=0.1))
    assert [message["body"] for message in seen] == [b"slow", b"ly"]
    assert n_calls == 2


def test_a_client_that_goes_while_its_body_is_read_ahead() -> None:
    client = Client(b"half", then="http.disconnect")
    seen, _ = asyncio.run(through_both(declared(8), client, 2))
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


def test_serve_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable that `erniem-batch serve` sets, through Serve's own code."""
    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    monkeypatch.setattr(http_util, name, _settings_of_ray(None, {})[name])
    (middleware,) = http_util.configure_http_middlewares(HTTPOptions()).middlewares
    assert middleware.cls is BodyWithTheHead
