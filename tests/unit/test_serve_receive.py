"""The body of a request, as Ray Serve hands it to the application."""

import asyncio
import pickle
from typing import Any

import pytest
from ray.serve._private.http_util import ASGIReceiveProxy

from erniem_batch.serve.receive import OnlyTheBody

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
