"""An HTTP proxy on this machine that stands before an object store and fails on purpose.

Method, path, query, headers and body go on as they came, Host among them: the signature of a
request covers it. Which request fails, and how, comes from the seed.
"""

import asyncio
import random
import re
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

KINDS = ("500", "503", "delay", "reset_before", "reset_after", "cut")
DELAY_SECONDS = 0.3
# These describe one connection; the others go through.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
ERRORS = {"500": "InternalError", "503": "SlowDown"}


class FaultyProxy:
    """Forwards to an endpoint; a share of the requests meets a fault.

    - `500`, `503`: an answer of S3's kind, and the request does not reach the store
    - `delay`: forwarded, late
    - `reset_before`: the connection is reset, and the request does not reach the store
    - `reset_after`: the store has done it, the client gets a reset instead of the answer
    - `cut`: the answer breaks off in the middle of its body (a reset if it has none)

    Args:
        rate: share of the requests that fail.
        seed: of the choice.
        kinds: faults to choose from.
        match: regular expression that `METHOD /path?query` of a request must match to fail.
        limit: how many faults at most.

    Attributes:
        endpoint: where clients connect to.
        counts: requests by fault; `ok` are those without.
    """

    def __init__(
        self,
        endpoint: str,
        rate: float,
        seed: int = 0,
        kinds: tuple[str, ...] = KINDS,
        match: str = "",
        limit: int | None = None,
    ) -> None:
        self.endpoint = ""
        self.counts: Counter[str] = Counter()
        self._target = endpoint
        self._rate = rate
        self._random = random.Random(seed)
        self._kinds = kinds
        self._match = re.compile(match)
        self._limit = limit
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        if not self._ready.wait(10):
            raise TimeoutError("the proxy did not start")
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    @property
    def n_faults(self) -> int:
        return sum(n for kind, n in self.counts.items() if kind != "ok")

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            self._ready.set()
            await self._end.wait()
        await runner.cleanup()

    def _choose(self, request: web.Request) -> str:
        kind = "ok"
        matches = self._match.search(f"{request.method} {request.raw_path}")
        may_fail = self._limit is None or self.n_faults < self._limit
        if matches and may_fail and self._random.random() < self._rate:
            kind = self._random.choice(self._kinds)
        self.counts[kind] += 1
        return kind

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        kind = self._choose(request)
        body = await request.read()
        if kind in ERRORS:
            return _error(int(kind), ERRORS[kind])
        if kind == "reset_before":
            return _reset(request)
        if kind == "delay":
            await asyncio.sleep(DELAY_SECONDS)
        status, headers, content = await self._forward(request, body)
        if kind == "cut" and content and request.method != "HEAD":
            return await _cut(request, status, headers, content)
        if kind in ("reset_after", "cut"):
            return _reset(request)
        if request.method != "HEAD":
            headers.pop("Content-Length", None)
        return web.Response(status=status, headers=headers, body=content)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, Any, bytes]:
        async with self._session.request(
            request.method,
            URL(self._target + request.raw_path, encoded=True),
            headers=_passed_on(request.headers),
            data=body,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:
            headers = _passed_on(answer.headers)
            if "Content-Length" in answer.headers:
                headers["Content-Length"] = answer.headers["Content-Length"]
            return answer.status, headers, await answer.read()


def _passed_on(headers: Any) -> Any:
    kept = headers.copy()
    for name in HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _error(status: int, code: str) -> web.Response:
    text = f"<Error><Code>{code}</Code><Message>made by the test</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, status: int, headers: Any, content: bytes) -> Any:
    headers["Content-Length"] = str(len(content))
    answer = web.StreamResponse(status=status, headers=headers)
    with suppress(ConnectionError):
        await answer.prepare(request)
        await answer.write(content[: len(content) // 2])
        await asyncio.sleep(0.01)  # so that the half is sent
    _reset(request)
    return answer
