"""HTTP: what comes in is checked, passed on to an engine, and answered. No model, no Ray in here.

Errors of all kinds have one form, that of the OpenAI API, and never repeat what was sent.
"""

import asyncio
import base64
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from erniem_batch import __version__
from erniem_batch.errors import fault_of
from erniem_batch.options import OPTIONS, TASKS
from erniem_batch.serve.body import INVALID_JSON, bounded_route
from erniem_batch.serve.body import Refuse as Refuse
from erniem_batch.serve.config import AppConfig
from erniem_batch.serve.engine import Ask, Refusal, Served
from erniem_batch.serve.fields import known_place, unknown_field
from erniem_batch.serve.hosts import is_known_host
from erniem_batch.serve.limits import MAX_REQUEST_ID
from erniem_batch.serve.messages import (
    EXAMPLES,
    REQUESTS,
    RESPONSES,
    EmbeddingsRequest,
    EmbeddingsResponse,
    Health,
    ModelList,
    Refused,
    given_options,
    items_of,
)
from erniem_batch.serve.receive import too_slow
from erniem_batch.serve.tokens import allowed_hashes, is_allowed

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TIMEOUT_HEADER = "x-request-timeout-seconds"
# Of the time that a caller, or the proxy for it, gives: so much is ours, the rest is for the way.
OUR_SHARE = 0.9
# Load balancers ask these by whatever name; they tell no secret.
HEALTH_PATHS = ("/healthz", "/readyz")
UNKNOWN_HOST = Refusal(
    421,
    "unknown_host",
    "the header Host names another machine: call this one by localhost or by the address on which "
    "it listens, or have the name allowed (--allowed-host, allowed_hosts in the settings)",
)
# pydantic speaks of Python where JSON is meant.
WORDS = {
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "string_unicode": "Input should be text without halves of surrogate pairs",
}
# Values of an answer that the event loop itself writes as JSON; and values in one piece of others.
SHORT_ANSWER = 2_000
WRITTEN_AT_ONCE = 500
UNANSWERED = 499  # the client went away before
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refused, "description": "The body is not JSON."},
    401: {"model": Refused, "description": "No bearer token, or an unknown one."},
    404: {"model": Refused, "description": "No such model, or none for this task."},
    408: {"model": Refused, "description": "The body did not arrive in time."},
    413: {"model": Refused, "description": "The body, or the work it makes, is too large."},
    421: {"model": Refused, "description": "There are no tokens, and Host is no name of ours."},
    422: {"model": Refused, "description": "A field is wrong, or the only item unusable."},
    429: {"model": Refused, "description": "Too much waits; see Retry-After."},
    500: {"model": Refused, "description": "A fault of the service."},
    503: {"model": Refused, "description": "The model is being replaced; see Retry-After."},
    504: {"model": Refused, "description": "No answer in time."},
}


class Backend(Protocol):
    """An engine, here or in another process."""

    async def start(self) -> None:
        """Returns when it is ready."""

    async def close(self) -> None:
        """Ends it, when what was accepted is answered."""

    def answer(self, ask: Ask) -> Coroutine[Any, Any, Served | Refusal]:
        """What a request gets."""

    async def card(self) -> dict[str, Any]:
        """`messages.ModelCard`."""

    async def problem(self) -> str | None:
        """What is wrong with it."""


# Told of every request: path, status, seconds.
Watcher = Callable[[str, int, float], None]


def make_api(
    config: AppConfig,
    backends: Mapping[str, Backend],
    watch: Watcher = lambda path, status, seconds: None,
) -> FastAPI:
    """The web application over some models, by name.

    Raises:
        ConfigError: the tokens of the config are unusable.
    """
    service = _Service(config, backends)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for backend in backends.values():
            await backend.start()
        await service.learn_tasks()
        yield
        for backend in backends.values():
            await backend.close()

    api = FastAPIOffline(  # its /docs has all it needs here, not on a CDN
        title="erniem_batch",
        version=__version__,
        summary="Multilingual tagging with ErnieM: the predictor of the batch pipeline, online.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    api.include_router(_models_router(service))
    api.include_router(_health_router(service))
    if config.page:
        api.include_router(_page_router())
    for error in (RequestValidationError, HTTPException, Refuse):
        api.add_exception_handler(error, _on_error)
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
        )
    if config.allowed_hosts or not service.hashes:
        api.add_middleware(_HostCheck, allowed=config.allowed_hosts)
    api.add_middleware(
        _Gate,
        max_body_bytes=config.max_body_bytes,
        body_timeout_s=config.body_timeout_s,
        watch=watch,
    )
    return api


class _Service:
    """What the routes have in common."""

    def __init__(self, config: AppConfig, backends: Mapping[str, Backend]) -> None:
        self.config = config
        self.backends = backends
        self.hashes = allowed_hashes(config)
        self.tasks: dict[str, Sequence[str]] = {}
        self.is_ready = False

    async def learn_tasks(self) -> None:
        self.tasks = {name: (await b.card())["tasks"] for name, b in self.backends.items()}
        self.is_ready = True

    async def require_token(self, request: Request) -> None:
        """Raises Refuse(401) unless the request may pass."""
        if not is_allowed(request.headers.get("authorization"), self.hashes):
            raise Refuse(Refusal(401, "unauthorized", "a bearer token is needed"))

    async def answer(
        self, request: Request, task: str, model: str | None, items: Any, options: Any
    ) -> tuple[str, Served]:
        """The name of the model and what it says.

        Raises:
            Refuse: why there is no answer.
        """
        if len(items) > self.config.max_items:
            message = f"{len(items)} inputs; at most {self.config.max_items} at a time"
            raise Refuse(Refusal(413, "too_many_items", message, "inputs"))
        name = self._model_for(task, model)
        ask = Ask(task, items, options, self._seconds(request))
        answer = await _while_connected(request, self.backends[name].answer(ask))
        if isinstance(answer, Refusal):
            raise Refuse(answer)
        return name, answer

    def _model_for(self, task: str, model: str | None) -> str:
        able = [name for name, tasks in self.tasks.items() if task in tasks]
        if model is None and able:
            return able[0]
        if model in able:
            return model
        if model is not None and model not in self.backends:
            message = f"there is no such model; for {task} there are: {', '.join(able) or 'none'}"
            raise Refuse(Refusal(404, "no_such_model", message, "model"))
        message = f"no model of this kind does {task}; see GET /v1/models"
        raise Refuse(Refusal(404, "no_such_task", message, "model"))

    def _seconds(self, request: Request) -> float:
        """Until the service gives up: before the proxy does, which reads the same header."""
        ours = self.config.request_timeout_s
        try:
            asked = float(request.headers.get(TIMEOUT_HEADER, ""))
        except ValueError:
            return ours
        return min(ours, OUR_SHARE * asked) if asked > 0 else ours


async def _while_connected(
    request: Request, answer: Coroutine[Any, Any, Served | Refusal]
) -> Served | Refusal:
    """The answer. If the client goes away first, it is cancelled, and nothing more is computed."""
    asking = asyncio.create_task(answer)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((asking, leaving), return_when=asyncio.FIRST_COMPLETED)
        gone = Refusal(UNANSWERED, "client_gone", "the client went away")
        return asking.result() if asking.done() else gone
    finally:
        asking.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- models -------------------------------------------------------------------------------------


def _models_router(service: _Service) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        dependencies=[Depends(service.require_token)],
        responses=REFUSALS,
        route_class=bounded_route(service.config),
    )
    for task in TASKS:
        _add_task(router, service, task)

    @router.post("/embeddings", response_model=EmbeddingsResponse, tags=["OpenAI"])
    async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
        """Vectors, as OpenAI's API gives them."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        items = [{"id": str(i), "text": text, "fields": {}} for i, text in enumerate(texts)]
        options = {} if body.dimensions is None else {"dimensions": body.dimensions}
        name, served = await service.answer(request, "embed", body.model, items, options)
        _require_all(served)
        make = partial(_openai_embeddings, name, served, body.encoding_format)
        return await _answer(make, served)

    @router.get("/models", response_model=ModelList, tags=["models"])
    async def models() -> Response:
        """What is served here."""
        cards = [await backend.card() for backend in service.backends.values()]
        content = {"object": "list", "data": [{"object": "model", **card} for card in cards]}
        return Response(to_json(content), media_type="application/json")

    return router


def _add_task(router: APIRouter, service: _Service, task: str) -> None:
    examples: dict[str, Any] = {name: {"value": value} for name, value in EXAMPLES[task].items()}
    model: Any = REQUESTS[task]

    async def route(request: Request, body: Any) -> Response:
        items = items_of(task, body.inputs)
        name, served = await service.answer(
            request, task, body.model, items, given_options(body.options)
        )
        if len(items) == 1:  # of several, each has its own result or error
            _require_all(served)
        usage = {"n_tokens": served.n_tokens, "n_windows": served.n_windows}
        content = {"model": name, "results": served.results, "usage": usage}
        return await _answer(lambda: content, served)

    route.__name__ = task
    route.__doc__ = (OPTIONS[task].__doc__ or "").partition("\n")[0]
    route.__annotations__["body"] = Annotated[model, Body(openapi_examples=examples)]
    router.add_api_route(
        f"/{task}", route, methods=["POST"], response_model=RESPONSES[task], tags=["tasks"]
    )


def _require_all(served: Served) -> None:
    """Raises Refuse for the first item that failed."""
    for place, result in enumerate(served.results):
        if "error" in result:
            error = result["error"]
            status = 500 if error["type"] == "server_error" else 422
            raise Refuse(Refusal(status, error["code"], error["message"], f"inputs.{place}"))


def _openai_embeddings(name: str, served: Served, encoding: str) -> dict[str, Any]:
    vectors = [result["embedding"] for result in served.results]
    if encoding == "base64":
        vectors = [base64.b64encode(np.array(v, "<f4").tobytes()).decode() for v in vectors]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)
        ],
        "model": name,
        "usage": {"prompt_tokens": served.n_tokens, "total_tokens": served.n_tokens},
    }


async def _answer(make: Callable[[], dict[str, Any]], served: Served) -> Response:
    """The answer that `make` gives, as JSON. A thread writes a long one."""
    if _n_values(served) <= SHORT_ANSWER:
        content = to_json(make())
    else:
        content = await asyncio.to_thread(lambda: json_in_pieces(make()))
    timing = served.timing
    spent = {name: getattr(timing, name) for name in timing.__slots__}
    told = ", ".join(f"{name};dur={1000 * s:.1f}" for name, s in spent.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": told})


def _n_values(served: Served) -> int:
    values = (value for result in served.results for value in result.values())
    return sum(len(value) if isinstance(value, list | str) else 1 for value in values)


def json_in_pieces(value: dict[str, Any]) -> bytes:
    """JSON of an answer, whose lists are written some items at a time: Python's lock is held
    meanwhile, and the event loop stands still."""
    return b"{" + b",".join(to_json(k) + b":" + _piece(v) for k, v in value.items()) + b"}"


def _piece(value: Any) -> bytes:
    if not isinstance(value, list):
        return json_in_pieces(value) if isinstance(value, dict) else to_json(value)
    if any(_has_lists(item) for item in value[:WRITTEN_AT_ONCE]):
        return b"[" + b",".join(map(_piece, value)) + b"]"
    starts = range(0, len(value), WRITTEN_AT_ONCE)
    pieces = (to_json(value[at : at + WRITTEN_AT_ONCE])[1:-1] for at in starts)
    return b"[" + b",".join(pieces) + b"]"


def _has_lists(item: Any) -> bool:
    return isinstance(item, dict) and any(isinstance(v, list) for v in item.values())


# ---- health and page ----------------------------------------------------------------------------


def _health_router(service: _Service) -> APIRouter:
    router = APIRouter(tags=["health"])
    down: dict[int | str, dict[str, Any]] = {503: {"model": Health}}

    async def problems() -> list[str]:
        found = {name: await backend.problem() for name, backend in service.backends.items()}
        return [f"{name}: {problem}" for name, problem in found.items() if problem]

    def health(wrong: Sequence[str]) -> Response:
        content = {"status": "unavailable" if wrong else "ok", "problems": wrong}
        status = 503 if wrong else 200
        return Response(to_json(content), status, media_type="application/json")

    @router.get("/healthz", response_model=Health, responses=down)
    async def healthz() -> Response:
        """Whether it is alive."""
        return health(await problems())

    @router.get("/readyz", response_model=Health, responses=down)
    async def readyz() -> Response:
        """Whether all models are loaded and have answered a first request."""
        return health(await problems() if service.is_ready else ["the models are being loaded"])

    return router


def _page_router() -> APIRouter:
    """A page to try things, as files that were read once."""
    router = APIRouter(include_in_schema=False)
    for path in sorted(PAGE.iterdir()):
        address = "/" if path.name == "index.html" else f"/{path.name}"
        router.add_api_route(address, _file(path), methods=["GET"], response_model=None)
    return router


def _file(path: Path) -> Callable[[], Awaitable[Response]]:
    content, kind = path.read_bytes(), PAGE_TYPES[path.suffix]

    async def file() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return file


# ---- errors -------------------------------------------------------------------------------------


async def _on_error(request: Request, error: Exception) -> Response:
    """Every error in the one form."""
    refusal = _refusal_of(error, _route_of(request.scope))
    body = {
        "message": refusal.message,
        "type": ERROR_TYPES.get(
            refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error"
        ),
        "code": refusal.code,
        "param": refusal.param,
        "request_id": _request_id(request),
    }
    headers = dict(getattr(error, "headers", None) or {})
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after)))
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come
    if refusal.status >= 500:
        logger.warning("refused status=%d code=%s id=%s", refusal.status, refusal.code,
                       body["request_id"])  # fmt: skip
    content = to_json({"error": body})
    return Response(content, refusal.status, headers, media_type="application/json")


async def _send_error(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    response = await _on_error(Request(scope), error)
    await response(scope, receive, send)


def _route_of(scope: Scope) -> str:
    """The path of the route, which has nothing of what a client sent in it."""
    return str(getattr(scope.get("route"), "path", "other"))


def _refusal_of(error: Exception, path: str) -> Refusal:
    if isinstance(error, Refuse):
        return error.refusal
    if isinstance(error, RequestValidationError):
        return _invalid(error, path)
    if isinstance(error, HTTPException):
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
        return Refusal(error.status_code, codes.get(error.status_code, "http"), str(error.detail))
    return Refusal(500, "fault", fault_of(error))


def _invalid(error: RequestValidationError, path: str) -> Refusal:
    """The first thing that is wrong, and where; never what came."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return INVALID_JSON
    sent = [part for part in first["loc"] if part != "body"]
    if first["type"] == "extra_forbidden":
        message, place = unknown_field(path, sent)
    else:
        message, place = WORDS.get(first["type"], first["msg"]), known_place(path, sent)
    more = len(error.errors()) - 1
    message += f" (and {more} more)" if more else ""
    if not sent:
        message = f"the body must be a JSON object with Content-Type: application/json. {message}"
    return Refusal(422, "invalid_request", message, ".".join(place)[:200] or None)


def _request_id(request: Request) -> str | None:
    given = request.headers.get("x-request-id", "")[:MAX_REQUEST_ID]
    return given if given and given.isascii() and given.isprintable() else None


# ---- before all else ----------------------------------------------------------------------------


class _HostCheck:
    """Refuses requests that call this machine by a name that is not its own."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_checked = scope["type"] == "http" and scope["path"] not in HEALTH_PATHS
        if is_checked and not is_known_host(scope, self._allowed):
            await _send_error(Refuse(UNKNOWN_HOST), scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Gate:
    """Refuses bodies that are too large or too slow while they come in; answers faults that nobody
    foresaw, whose tracebacks could hold text of a document; tells how each request ended."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float, watch: Watcher
    ) -> None:
        self._app = app
        self._max = max_body_bytes
        self._timeout = body_timeout_s
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = UNANSWERED
        body = _IncomingBody(receive, self._max, self._timeout)
        declared = dict(scope["headers"]).get(b"content-length", b"0")

        async def noted(message: Message) -> None:
            nonlocal status
            if body.refusal is not None:
                return  # FastAPI takes it for a body that cannot be parsed
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            # Python reads no number of thousands of digits.
            if declared.isdigit() and (len(declared) > 18 or int(declared) > self._max):
                body.refuse_size()
            else:
                await self._app(scope, body.receive, noted)
            if body.refusal is not None:
                status = body.refusal.status
                await _send_error(Refuse(body.refusal), scope, receive, send)
        except Exception as error:
            if status != UNANSWERED:
                raise
            status = 500
            await _send_error(error, scope, receive, send)
        finally:
            self._watch(_route_of(scope), status, time.perf_counter() - started)


class _IncomingBody:
    """A body on its way in, with a limit for its size and a deadline for its end.

    Attributes:
        refusal: why the request is refused; None as long as it is not.
    """

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self.refusal: Refusal | None = None
        self._receive = receive
        self._max = max_bytes
        self._timeout = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._n_bytes = 0
        self._is_complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            Refuse: too much has come, or the body takes too long.
        """
        try:
            async with asyncio.timeout_at(None if self._is_complete else self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = Refusal(408, "body_timeout", too_slow(self._timeout))
            raise Refuse(self.refusal) from None
        self._n_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body")
        if self._n_bytes > self._max:
            raise Refuse(self.refuse_size())
        return message

    def refuse_size(self) -> Refusal:
        """Note that the body is too large."""
        message = f"the body is larger than {self._max} bytes: send less at a time"
        self.refusal = Refusal(413, "body_too_large", message)
        return self.refusal
