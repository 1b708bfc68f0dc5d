"""The body of a request, by Ray Serve's proxy.

A replica calls the proxy for the body, and when it has it, once more for what comes after: the end
of the connection. That second call is there for handlers that listen for it; it ends by being
cancelled when the answer is ready, and costs both sides as much as the first one. Nobody here
listens: when a client goes, the proxy itself cancels its request.
"""

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

# Of Serve's `receive`: the call of the proxy. No promise of Ray's: where it has another name,
# everything works as before, only slower, and a test says so.
CALL = "_receive_asgi_messages"


class OnlyTheBody:
    """Lets Serve fetch the body of a request, and nothing after it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = getattr(receive, CALL, None)
        if scope["type"] == "http" and call is not None:
            setattr(receive, CALL, _until_the_end(call))
        await self._app(scope, receive, send)


def _until_the_end(
    call: Callable[[Any], Awaitable[bytes]],
) -> Callable[[Any], Awaitable[bytes]]:
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
