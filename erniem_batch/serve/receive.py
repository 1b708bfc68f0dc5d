"""The body of a request, by Ray Serve's proxy.

Of itself Serve passes on the head of a request alone. The replica calls the proxy for the body, and
when it has it, once more for what comes after: the end of the connection. Each of these calls costs
both sides as much as all else that Serve does for a request. So here

- the proxy reads a body before it passes the request on, and the body travels with it
  (`BodyWithTheHead`), unless it is large or comes slowly: then the replica calls for it;
- the replica never calls for the end of the connection (`OnlyTheBody`): nobody listens for it, and
  when a client goes, the proxy itself cancels its request.
"""

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of Serve's `receive`: the call of the proxy. No promise of Ray's: where it has another name,
# everything works as before, only slower, and a test says so.
CALL = "_receive_asgi_messages"
# Of a scope: the messages that make up a whole body.
MESSAGES = "erniem_batch.messages"
# Bytes of a body that travels with its head.
MAX_BODY = 65_536
PATIENCE_S = 1.0

Call = Callable[[Any], Awaitable[bytes]]


def middlewares_of_the_proxy() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, in the environment of each node's Ray."""
    return [Middleware(BodyWithTheHead)]


class BodyWithTheHead:
    """In the proxy: small bodies are read first, and travel in the scope.

    Other applications behind the same proxy notice nothing of it.

    Args:
        patience_s: for a body to come; then the replica waits, which says so when it gives up.
    """

    def __init__(self, app: ASGIApp, patience_s: float = PATIENCE_S) -> None:
        self._app = app
        self._patience = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_small(scope):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        try:
            async with asyncio.timeout(self._patience):
                while not (messages and _ends_the_body(messages[-1])):
                    messages.append(await receive())
                    if messages[-1]["type"] != "http.request":
                        break  # the client has gone: that is the application's to see
                else:
                    scope[MESSAGES] = messages
        except TimeoutError:
            pass
        left = iter(messages)

        async def again() -> Message:
            return next(left, None) or await receive()

        await self._app(scope, again, send)


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


def _is_small(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "0")
    return "transfer-encoding" not in headers and declared.isdigit() and int(declared) <= MAX_BODY


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
