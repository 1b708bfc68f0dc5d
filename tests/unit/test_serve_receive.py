"""The body of a request, as Ray Serve hands it to the application."""

import asyncio
import json
import pickle
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from ray.serve._private import http_util
from ray.serve._private.http_util import ASGIReceiveProxy
from ray.serve._private.proxy_request_response import ASGIProxyRequest
from ray.serve.config import HTTPOptions
from serving import served
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http import auto

from erniem_batch.errors import ConfigError
from erniem_batch.serve.body_limits import BodyLimits
from erniem_batch.serve.config import AppConfig
from erniem_batch.serve.connections import BoundedConnection
from erniem_batch.serve.messages import Refused
from erniem_batch.serve.receive import (
    MESSAGES,
    BodyWithTheHead,
    OnlyTheBody,
    middlewares_of_the_proxy,
)
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


LIMITS = BodyLimits(timeout_s=5.0, max_bytes=200_000, total_bytes=1_000_000)


async def through_both(
    scope: dict[str, Any], client: Client, n_messages: int, limits: BodyLimits = LIMITS
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

    await BodyWithTheHead(proxy, limits)(scope, client, None)  # type: ignore[arg-type]
    return seen, n_calls


@pytest.mark.parametrize("parts", [(b"all",), (b"in ", b"three ", b"parts"), (b"",)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_small_body_travels_with_its_head(parts: tuple[bytes, ...], chunked: bool) -> None:
    scope = declared(sum(map(len, parts)))
    if chunked:
        scope = scope_of((b"transfer-encoding", b"chunked"))
    seen, n_calls = asyncio.run(through_both(scope, Client(*parts), 1))
    assert seen == [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
    assert n_calls == 0


def test_a_request_without_a_body_is_not_called_for_either() -> None:
    seen, n_calls = asyncio.run(through_both(scope_of(), Client(b""), 1))
    assert not seen[0]["body"]
    assert n_calls == 0


def test_a_large_body_is_received_first_and_called_for() -> None:
    parts = [bytes([i]) * 50_000 for i in range(3)]
    seen, n_calls = asyncio.run(through_both(declared(150_000), Client(*parts), 1))
    assert seen == [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
    assert n_calls == 1


def test_a_body_that_is_said_to_be_too_large_is_left_to_the_application() -> None:
    scope = declared(LIMITS.max_bytes + 1)
    client = Client(b"a", b"b")

    async def application(there: Any, receive: Any, send: Any) -> None:
        assert there is scope
        assert MESSAGES not in scope
        assert receive is client

    asyncio.run(BodyWithTheHead(application, LIMITS)(scope, client, None))  # type: ignore[arg-type]
    assert not client.n_asked


def test_a_body_that_turns_out_to_be_too_large_is_left_to_the_application() -> None:
    """It gets what has come, and the rest as it comes."""
    client = Client(*[b"x" * 60_000] * 6)
    scope = scope_of((b"transfer-encoding", b"chunked"))
    seen, _ = asyncio.run(through_both(scope, client, 3))
    assert [len(message["body"]) for message in seen] == [240_000, 60_000, 60_000]
    assert [message["more_body"] for message in seen] == [True, True, False]


class Answer:
    """What is sent to a client."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def error(self) -> Any:
        return json.loads(self.messages[1]["body"])["error"]


async def nobody(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("half a request was passed on")


def test_a_slow_body_is_refused() -> None:
    """And never reaches a replica. The connection ends, on which the rest may come."""
    limits = BodyLimits(timeout_s=0.1, max_bytes=1000, total_bytes=1000)
    scope = scope_of((b"content-length", b"6"), (b"x-request-id", b"mine"))
    answer = Answer()
    middleware = BodyWithTheHead(nobody, limits)
    asyncio.run(middleware(scope, Client(b"slow", then="http.request", pause=0.06), answer))
    assert (answer.status, answer.headers[b"connection"]) == (408, b"close")
    assert answer.error["code"] == "body_timeout"
    assert "0.1 s" in answer.error["message"]
    assert answer.error["request_id"] == "mine"
    assert Refused.model_validate({"error": answer.error})


def test_a_client_that_goes_while_its_body_is_received() -> None:
    client = Client(b"half", then="http.disconnect")
    asyncio.run(BodyWithTheHead(nobody, LIMITS)(declared(8), client, None))  # type: ignore[arg-type]


def test_memory_of_all_bodies_is_bounded() -> None:
    """Large bodies leave room for small ones; memory is free again when requests end."""
    limits = BodyLimits(timeout_s=5.0, max_bytes=200_000, total_bytes=400_000)
    statuses: list[int] = []
    hold = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await hold.wait()
        statuses.append(200)

    middleware = BodyWithTheHead(application, limits)

    async def ask(n_bytes: int) -> None:
        answer = Answer()
        await middleware(declared(n_bytes), Client(b"x" * n_bytes), answer)
        if answer.messages:
            statuses.append(answer.status)
            assert answer.headers[b"retry-after"] == b"1"

    async def test() -> None:
        asking = [asyncio.create_task(ask(n)) for n in [140_000] * 5 + [50_000] * 4]
        await asyncio.sleep(0.1)
        # Two of five large ones fit into three quarters, two of four small ones into all.
        assert sorted(statuses) == [503] * 5
        hold.set()
        await asyncio.gather(*asking)
        assert sorted(statuses) == [200] * 4 + [503] * 5
        await ask(140_000)
        assert statuses[-1] == 200

    asyncio.run(test())


@pytest.mark.parametrize(
    ("value", "stays"),
    [
        (b"mine", True),
        (b"\x1b[31mred", False),
        (b"two words", False),
        (b"\xff", False),
        (b"x" * 129, False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("n_bytes", [1, LIMITS.max_bytes + 1])
def test_request_ids_that_are_odd_go_no_further(value: bytes, stays: bool, n_bytes: int) -> None:
    """Serve gives the request one of its own then."""
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name.lower() == b"x-request-id")

    scope = declared(n_bytes)
    scope["headers"].append((b"X-Request-ID", value))
    asyncio.run(BodyWithTheHead(application, LIMITS)(scope, Client(b"x"), None))  # type: ignore[arg-type]
    assert seen == [value] * stays


def test_limits_travel_by_the_environment() -> None:
    limits = BodyLimits(timeout_s=2.5, max_bytes=7, total_bytes=9)
    assert BodyLimits.from_environment(limits.as_environment()) == limits
    assert BodyLimits.from_environment({}) == BodyLimits() == AppConfig().body_limits
    for wrong in ("", "0", "-1", "many", "nan", "inf"):
        with pytest.raises(ConfigError, match=r"ERNIEM_BATCH_BODY_TIMEOUT_S: expected a positive"):
            BodyLimits.from_environment({"ERNIEM_BATCH_BODY_TIMEOUT_S": wrong})


# ---- real connections ---------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """uvicorn behind the middleware of the proxy, with half a second for heads and bodies. At most
    four requests at a time are in the application; a fifth is an error."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setattr(BoundedConnection, "head_timeout_s", BoundedConnection.head_timeout_s)
    monkeypatch.setenv("ERNIEM_BATCH_BODY_TIMEOUT_S", "0.5")
    (middleware,) = middlewares_of_the_proxy()
    n_here = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal n_here
        n_here += 1
        status = 200 if n_here <= 4 else 500
        message = await receive()
        if scope["path"] == "/too-large":
            status = 413
        n_here -= 1
        await PlainTextResponse(str(len(message["body"])), status)(scope, receive, send)

    with served(middleware.cls(application, *middleware.args), lifespan="off") as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def send_half(address: tuple[str, int], data: bytes) -> socket.socket:
    client = socket.create_connection(address, timeout=20)
    client.sendall(data)
    return client


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    with client:
        return b"".join(iter(lambda: client.recv(65_536), b""))


HALF = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf"


def test_many_halves_of_requests_block_nobody(server: tuple[str, int]) -> None:
    clients = [send_half(server, HALF) for _ in range(150)]
    answer = httpx.post(f"http://{server[0]}:{server[1]}/", content=b"whole")
    assert (answer.status_code, answer.text) == (200, "5")
    for client in clients:
        assert everything(client).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("data", [b"", b"POST / HTTP/1.1\r\nHost: local"])
def test_a_head_that_never_ends(server: tuple[str, int], data: bytes) -> None:
    assert everything(send_half(server, data)) == b""


def test_a_second_head_that_never_ends(server: tuple[str, int]) -> None:
    client = send_half(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(65_536).startswith(b"HTTP/1.1 200")
    client.sendall(b"GET / HT")
    assert everything(client) == b""


def is_closed_on(client: socket.socket, part: bytes, n: int, pause: float) -> bool:
    """Whether the server ends the connection while so many parts are sent."""
    try:
        for _ in range(n):
            client.sendall(part)
            time.sleep(pause)
    except OSError:
        return True
    return False


def test_a_head_that_drips_or_is_endless(server: tuple[str, int]) -> None:
    """A byte now and then keeps nothing open; and a head is not as large as it likes."""
    with send_half(server, b"GET / HTTP/1.1\r\n") as client:
        assert is_closed_on(client, b"x", 100, 0.1)
    with send_half(server, b"GET / HTTP/1.1\r\nx: ") as client:
        assert is_closed_on(client, b"x" * 10_000, 1000, 0.0)


def test_connections_that_are_in_order_stay(server: tuple[str, int]) -> None:
    with httpx.Client(base_url=f"http://{server[0]}:{server[1]}") as client:
        for _ in range(3):
            assert client.post("/", content=b"x" * 100_000).text == "100000"
            time.sleep(0.3)


def test_serve_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable that `erniem-batch serve` sets, through Serve's own code."""
    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setattr(http_util, name, _settings_of_ray(None, {})[name])
    (middleware,) = http_util.configure_http_middlewares(HTTPOptions()).middlewares
    assert middleware.cls is BodyWithTheHead
