"""The body of a request, by Ray Serve's proxy.

Of itself Serve passes on the head of a request alone. The replica calls the proxy for the body, and
when it has it, once more for what comes after: the end of the connection. Each of these calls costs
both sides as much as all else that Serve does for a request. And a request whose body never ends
takes the place of another one until it times out. So here

- the proxy receives a whole body, within a deadline, before it passes the request on
  (`BodyWithTheHead`): requests that are not complete count nowhere. A small body travels with the
  head; for a larger one the replica calls;
- the replica never calls for the end of the connection (`OnlyTheBody`): nobody listens for it, and
  when a client goes, the proxy itself cancels its request.

The same middleware stands before a replica that listens itself (`--direct-port`).
"""

import asyncio
import logging
import os
import pickle
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from erniem_batch.serve.body_limits import BodyLimits
from erniem_batch.serve.connections import bound_heads

# Of Serve's `receive`: the call of the proxy. No promise of Ray's: where it has another name,
# everything works as before, only slower, and a test says so.
CALL = "_receive_asgi_messages"
# Of a scope: the messages that make up a whole body.
MESSAGES = "erniem_batch.messages"
# Bytes of a body that travels with its head.
MAX_BODY = 65_536
# Share of the memory for bodies that larger ones may take: small requests always find some.
SHARE_OF_LARGE = 0.75
REQUEST_ID = b"x-request-id"
MAX_REQUEST_ID = 128

Call = Callable[[Any], Awaitable[bytes]]

# No request is logged unless this is 1.
ACCESS_LOG = "ERNIEM_BATCH_ACCESS_LOG"
# That of the proxy, whose lines go where it writes others.
logger = logging.getLogger("ray.serve")


def middlewares_of_the_proxy() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, in the environment of each node's Ray."""
    limits = BodyLimits.from_environment()
    bound_heads(limits.timeout_s)
    return [Middleware(BodyWithTheHead, limits)]


class BodyWithTheHead:
    """In the proxy: a request is passed on when its body is complete.

    Other applications behind the same proxy notice nothing but the deadline.

    Args:
        limits: a body that takes longer is answered by 408; one for which there is no memory, by
            503; a larger one is left to the application.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits | None = None) -> None:
        self._app = app
        self._limits = limits or BodyLimits()
        self._memory = _Memory(self._limits.total_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _drop_odd_request_ids(scope)
        if scope["type"] != "http" or _declared_bytes(scope) > self._limits.max_bytes:
            await self._app(scope, receive, send)
            return
        with _Body(self._memory) as body:
            refusal = await self._refusal_for(body, receive)
            if refusal is not None:
                await _refuse(scope, send, *refusal)
            elif not body.client_is_gone:
                await self._pass_on(body, scope, receive, send)

    async def _refusal_for(self, body: "_Body", receive: Receive) -> tuple[int, str, str] | None:
        """Read the body; status, code and message if it must be refused."""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await body.read(receive, self._limits.max_bytes)
        except TimeoutError:
            return 408, "body_timeout", too_slow(self._limits.timeout_s)
        except _NoMemory:
            message = "too many bodies are on their way at once: ask again"
            return 503, "too_many_bodies", message
        return None

    async def _pass_on(self, body: "_Body", scope: Scope, receive: Receive, send: Send) -> None:
        messages = [body.take_message()]
        if body.is_complete and body.n_bytes <= MAX_BODY:
            scope[MESSAGES] = messages
        left = iter(messages)

        async def again() -> Message:
            return next(left, None) or await receive()

        await self._app(scope, again, send)


def too_slow(timeout_s: float) -> str:
    """What a client is told whose body took too long."""
    return f"the body was not complete within {timeout_s:g} s"


class _NoMemory(Exception):
    """All bodies together are too large."""


class _Memory:
    """Bytes that bodies take in this process."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0

    def take(self, n_bytes: int, is_large: bool) -> None:
        """Raises _NoMemory if there is none."""
        limit = self._total * (SHARE_OF_LARGE if is_large else 1.0)
        if self._used + n_bytes > limit:
            raise _NoMemory
        self._used += n_bytes

    def give_back(self, n_bytes: int) -> None:
        self._used -= n_bytes


class _Body:
    """What has arrived of a body. Its memory counts until the block ends."""

    def __init__(self, memory: _Memory) -> None:
        self.n_bytes = 0
        self.is_complete = False
        self.client_is_gone = False
        self._memory = memory
        self._data = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.give_back(self.n_bytes)

    async def read(self, receive: Receive, max_bytes: int) -> None:
        """Receive the body, or the first part of one that is larger than max_bytes."""
        while not self.is_complete and self.n_bytes <= max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                self.client_is_gone = True
                return
            part = message.get("body", b"")
            self._memory.take(len(part), is_large=self.n_bytes + len(part) > MAX_BODY)
            self.n_bytes += len(part)
            self._data += part
            self.is_complete = _ends_the_body(message)

    def take_message(self) -> Message:
        """All of it in one message; can be called once."""
        data, self._data = bytes(self._data), bytearray()
        return {"type": "http.request", "body": data, "more_body": not self.is_complete}


class OnlyTheBody:
    """In the replica: lets Serve fetch the body where it has not come along, and nothing after."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = getattr(receive, CALL, None)
        if scope["type"] == "http" and call is not None:
            here = scope.pop(MESSAGES, None)
            setattr(receive, CALL, _until_the_end(call if here is None else _known(here)))
        await self._app(scope, receive, send)


def _declared_bytes(scope: Scope) -> int:
    declared = Headers(scope=scope).get("content-length", "0")
    return int(declared) if declared.isdecimal() and len(declared) < 20 else 0


def _drop_odd_request_ids(scope: Scope) -> None:
    """Serve writes them into its log, and takes those that are not UTF-8 for a fault of its own."""
    scope["headers"] = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower() != REQUEST_ID or _is_plain(value)
    ]


def _is_plain(value: bytes) -> bool:
    return 0 < len(value) <= MAX_REQUEST_ID and all(33 <= byte <= 126 for byte in value)


async def _refuse(scope: Scope, send: Send, status: int, code: str, message: str) -> None:
    """Answer in the form of our errors, and close the connection, on which more may come."""
    error = {
        "message": message,
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "code": code,
        "param": None,
        "request_id": Headers(scope=scope).get("x-request-id"),
    }
    headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {})
    level = logging.WARNING if os.environ.get(ACCESS_LOG) == "1" else logging.DEBUG
    logger.log(level, "%s refused status=%d code=%s", scope["method"], status, code)
    await JSONResponse({"error": error}, status, headers)(scope, _nothing, send)


async def _nothing() -> Message:
    raise AssertionError("a response of ours reads nothing")


def _known(messages: list[Message]) -> Call:
    async def call(metadata: Any) -> bytes:
        return pickle.dumps(messages)

    return call


def _until_the_end(call: Call) -> Call:
    is_complete = False

    async def messages(metadata: Any) -> bytes:
        nonlocal is_complete
        if is_complete:
            await asyncio.get_running_loop().create_future()  # Serve cancels who waits here
        pickled = await call(metadata)
        is_complete = any(_ends_the_body(message) for message in pickle.loads(pickled))
        return pickled

    return messages


def _ends_the_body(message: Mapping[str, Any]) -> bool:
    return message["type"] == "http.request" and not message.get("more_body")
