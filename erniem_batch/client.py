"""The service from Python: typed results in order, requests of a good size, patience.

    from erniem_batch.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for result in client.ner(["Ada Lovelace lived in London.", "Ada wohnte in London."]):
            print(result)

An item is a text or a mapping with the fields of the API: `{"id": "a", "text": "…", "language":
"de"}`. Each gives one result: of its task, or `Failed` with its id if it could not be processed.
What concerns a whole request is raised as a `ServiceError`. Neither repeats what was sent.

Knows the API only by HTTP: no torch, no Ray and no pydantic in here.
"""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import httpx
from httpx_retries import Retry, RetryTransport

from erniem_batch.errors import ConfigError, ErnieMBatchError

Item = str | Mapping[str, Any]
Items = Item | Iterable[Item]

# All calls may be repeated: they change nothing. 500 and 502 are what a proxy says when a replica
# dies at work. Not repeated is what took too long (408, 504, no answer in time): it would again,
# and the first try may still be at work.
RETRIED_STATUS = (429, 500, 502, 503)
RETRIED_ERRORS = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.RemoteProtocolError,
    httpx.WriteError,
)
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
TIMEOUT_HEADER = "x-request-timeout-seconds"
REQUEST_ID_HEADER = "x-request-id"
# Of a request whose items make too much work together: fewer may be taken.
REQUEST_TOO_LARGE = "request_too_large"


class ServiceError(ErnieMBatchError):
    """A request that was not served, after all retries.

    Attributes:
        status: of HTTP; None: no answer came.
        code: a word for machines, such as queue_full or invalid_option; `unreachable` and `timeout`
            without an answer, `not_understood` for an answer that is none of this service, `http`
            for one from something before it.
        message: for people.
        param: the field that is wrong: `options`, or `inputs.17.text`, counted over all items of
            the call, from 0.
        request_id: by which the service's log knows the request.
        retry_after: seconds after which it may go better, where the service said so.
    """

    def __init__(
        self,
        status: int | None,
        code: str,
        message: str,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, code, message, param, request_id, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        what = self.code if self.status is None else f"{self.status} {self.code}"
        where = f" ({self.param})" if self.param else ""
        return f"{what}: {self.message}{where}"


# ---- results ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failed:
    """An item that could not be processed; the others were.

    Attributes:
        id: of the item; its place among all items of the call, from 0, if it has none.
        code: a word for machines, such as encode_failed.
        message: what was expected and what came.
        type: invalid_request_error, or server_error where the service is to blame.
    """

    id: str
    code: str
    message: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What all results have.

    Attributes:
        id: of the item; its place among all items of the call, from 0, if it has none.
        n_tokens: without special tokens, question and choices included.
        n_windows: model inputs it took.
        truncated: whether a part went unread, as was asked for.
        detected_language: ISO 639-1 code, where the service looks for it.
    """

    id: str
    n_tokens: int
    n_windows: int
    truncated: bool
    detected_language: str | None = None


@dataclass(frozen=True, slots=True)
class Entity:
    """`text` from `start` to before `end`, counted in the `offset_unit` that was asked for
    (default: code points); `score` from 0 to 1."""

    start: int
    end: int
    label: str
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NerResult(Result):
    """Entities in the order of the text."""

    entities: list[Entity]


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and how sure it is."""

    label: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult(Result):
    """The best label, None where none scores high enough; and the others, best first."""

    predicted_label: str | None
    predicted_score: float | None
    label_scores: list[LabelScore]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseResult(Result):
    """The best choice, counted from 0, None where it scores too low; and the score of each."""

    predicted_choice: int | None
    choice_scores: list[float]


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` from `start` to before `end` of the context; `score` from 0 to 1."""

    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QaResult(Result):
    """The best answer, None where there is none; and the others, best first."""

    predicted_answer: str | None
    predicted_answers: list[Answer]
    null_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult(Result):
    """A vector: `dimensions` numbers; whole ones from -127 to 127 with `output_dtype="int8"`."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Something found under a name of the schema; `parent` is the `id` of what it was asked about.
    Options, which stand in no text, have no offsets."""

    id: int
    parent: int | None
    name: str
    text: str
    start: int | None
    end: int | None
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractResult(Result):
    """A tree as a flat list, each item behind its parent; and as Taskflow's nested JSON, with
    `output_json=True`."""

    extracted: list[Extracted]
    extracted_json: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model that is served.

    Attributes:
        id: by which `model=` asks for it.
        labels: of the tasks that have them.
        digests: SHA-256 of the model folder, for each task; a batch run notes the same.
        window_tokens: longest model input; longer texts are read in several.
        overlap_tokens: that neighbouring ones share.
        detect_language: whether the language of each text is found out.
    """

    id: str
    tasks: list[str]
    labels: dict[str, list[str]]
    digests: dict[str, str]
    window_tokens: int
    overlap_tokens: int
    detect_language: bool
    dtype: str


RESULTS: dict[str, type[Result]] = {
    "ner": NerResult,
    "classify": ClassifyResult,
    "choose": ChooseResult,
    "qa": QaResult,
    "embed": EmbedResult,
    "extract": ExtractResult,
}
# What the lists in results are made of.
PARTS: dict[str, type[Any]] = {
    "entities": Entity,
    "label_scores": LabelScore,
    "predicted_answers": Answer,
    "extracted": Extracted,
}

R = TypeVar("R", bound=Result)
# What reading JSON of another form than expected raises.
MISREAD = (AttributeError, KeyError, TypeError, ValueError)
# Codes of refusals that say nothing of an item, and are about the only one there is.
TOO_LARGE = ("body_too_large", "too_many_values", "too_many_characters", REQUEST_TOO_LARGE)


def _made(cls: Any, values: Mapping[str, Any]) -> Any:
    """An object of JSON; what a newer service says beside it is left out."""
    known = {n: value for n, value in values.items() if n in cls.__dataclass_fields__}
    for name in known.keys() & PARTS.keys():
        known[name] = [_made(PARTS[name], part) for part in known[name]]
    return cls(**known)


# ---- requests and answers -----------------------------------------------------------------------


@dataclass(slots=True)
class _Call(Generic[R]):
    """One request for some of the items.

    Attributes:
        frame: what stands in the body around the items.
        first: place of the first item among all items.
        parts: the items, as JSON.
    """

    kind: type[R]
    path: str
    frame: tuple[bytes, bytes]
    first: int
    ids: list[str] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, ident: str, part: bytes) -> None:
        """One more item."""
        self.ids.append(ident)
        self.parts.append(part)
        self.n_bytes += len(part) + 1

    def has_room(self, part: bytes, max_items: int, max_body_bytes: int) -> bool:
        """Whether the item may come too; the first always may."""
        n_bytes = self.n_bytes + len(part) + sum(map(len, self.frame))
        return not self.parts or (len(self.parts) < max_items and n_bytes <= max_body_bytes)

    @property
    def body(self) -> bytes:
        """The request."""
        return b",".join(self.parts).join(self.frame)

    def is_too_large(self, response: httpx.Response) -> bool:
        """Whether the service refused the items together and may take half of them."""
        is_refused = response.status_code == 413 and len(self.parts) > 1
        return is_refused and _refusal(response).code == REQUEST_TOO_LARGE

    def halves(self) -> "list[_Call[R]]":
        """Two requests, for half of the items each."""
        n = len(self.parts) // 2
        first, second = (
            _Call(self.kind, self.path, self.frame, self.first + start, self.ids[some],
                  self.parts[some])
            for start, some in ((0, slice(n)), (n, slice(n, None)))
        )  # fmt: skip
        return [first, second]

    def results(self, response: httpx.Response) -> list[R | Failed]:
        """What the answer says of each item.

        Raises:
            ServiceError: it is a refusal of them all.
        """
        if not response.is_success:
            error = _refusal(response, self.first)
            if len(self.ids) == 1 and _is_of_the_item(error, self.first):
                ours = "server_error" if response.status_code == 500 else "invalid_request_error"
                return [Failed(self.ids[0], error.code, error.message, ours)]
            raise error
        try:
            found = [self._result(values) for values in response.json()["results"]]
        except MISREAD as error:
            raise _not_understood(response) from error
        if len(found) != len(self.ids):
            raise _not_understood(response)
        return found

    def _result(self, values: Mapping[str, Any]) -> R | Failed:
        if "error" not in values:
            made: R = _made(self.kind, values)
            return made
        error = values["error"]
        return Failed(values["id"], error["code"], error["message"], error["type"])


def _is_of_the_item(error: ServiceError, place: int) -> bool:
    """Whether a refused request would have been an error of its only item among others."""
    return error.param == f"inputs.{place}" or error.code in TOO_LARGE


def _refusal(response: httpx.Response, first: int = 0) -> ServiceError:
    """What an answer says that is none, in words of the service only."""
    try:
        error = response.json()["error"]
        code, message = str(error["code"]), str(error["message"])
        param = _moved(error.get("param"), first)
    except MISREAD:
        code, message, param = "http", response.reason_phrase or "no reason given", None
    waits = response.headers.get("retry-after", "")
    return ServiceError(
        response.status_code,
        code,
        message,
        param,
        response.request.headers.get(REQUEST_ID_HEADER),
        float(waits) if waits.isascii() and waits.isdigit() else None,
    )


def _moved(param: str | None, first: int) -> str | None:
    """The place of an item in its request as that among all items: inputs.3.text."""
    root, _, rest = (param or "").partition(".")
    number, dot, name = rest.partition(".")
    return f"{root}.{int(number) + first}{dot}{name}" if number.isdecimal() else param


def _not_understood(response: httpx.Response) -> ServiceError:
    message = "the answer is none of this service: is the address right, or is one of them older?"
    ident = response.request.headers.get(REQUEST_ID_HEADER)
    return ServiceError(response.status_code, "not_understood", message, request_id=ident)


def _no_answer(error: httpx.RequestError) -> ServiceError:
    is_late = isinstance(error, httpx.TimeoutException)
    # The texts of other errors may repeat what came.
    detail = f": {error}" if isinstance(error, httpx.ConnectError) else ""
    host = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
    ident = error.request.headers.get(REQUEST_ID_HEADER)
    message = f"no answer from {host}, {type(error).__name__}{detail}"
    return ServiceError(None, "timeout" if is_late else "unreachable", message, request_id=ident)


def _one_by_one(items: Items) -> Iterable[Item]:
    return [items] if isinstance(items, str | Mapping) else items


class _Service:
    """What both clients have in common; see Client."""

    def __init__(
        self,
        base_url: str,
        token: str | None,
        timeout: float,
        retries: int,
        max_items: int,
        max_body_bytes: int,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"the address of the service is no URL: {base_url!r}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(
                f"the address of the service must begin with http:// or https://, got {base_url!r}"
            )
        if timeout <= 0:
            raise ConfigError(f"timeout must be more than 0 seconds, got {timeout}")
        for name, value, least in (
            ("retries", retries, 0),
            ("max_items", max_items, 1),
            ("max_body_bytes", max_body_bytes, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        headers = {"content-type": "application/json", TIMEOUT_HEADER: f"{timeout:g}"}
        if token is not None:
            if not (token and token.isascii() and token.isprintable() and " " not in token):
                raise ConfigError("the token must be printable ASCII without spaces")
            headers["authorization"] = f"Bearer {token}"
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": headers,
            "timeout": timeout,
        }
        self._retry = Retry(
            total=retries,
            allowed_methods=("GET", "POST"),
            status_forcelist=RETRIED_STATUS,
            retry_on_exceptions=RETRIED_ERRORS,
            backoff_factor=FIRST_WAIT_S / 2,
            max_backoff_wait=LONGEST_WAIT_S,
        )
        self._max_items = max_items
        self._max_body_bytes = max_body_bytes

    def _calls(
        self, kind: type[R], items: Items, model: str | None, options: Mapping[str, Any]
    ) -> Iterator[_Call[R] | Failed]:
        """Requests for the items, in order; Failed for one that cannot be sent."""
        task = next(name for name, result in RESULTS.items() if result is kind)
        # An object without its opening brace: the items come before.
        rest = json.dumps({"options": options} | ({} if model is None else {"model": model}))
        frame = (b'{"inputs":[', b"]," + rest[1:].encode())
        call = _Call(kind, f"v1/{task}", frame, 0)
        for place, item in enumerate(_one_by_one(items)):
            values = {"text": item} if isinstance(item, str) else dict(item)
            if values.get("id") is None:
                values["id"] = str(place)
            ident = str(values["id"])
            try:
                part = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
            except UnicodeEncodeError:
                part = None
            if part is None or not call.has_room(part, self._max_items, self._max_body_bytes):
                if call.parts:
                    yield call
                call = _Call(kind, call.path, frame, place if part else place + 1)
            if part is None:
                message = "text must be without halves of surrogate pairs: they are no UTF-8"
                yield Failed(ident, "invalid_request", message, "invalid_request_error")
            else:
                call.add(ident, part)
        if call.parts:
            yield call

    @staticmethod
    def _identified() -> dict[str, str]:
        return {REQUEST_ID_HEADER: uuid.uuid4().hex}

    @staticmethod
    def _kind(task: str) -> type[Result]:
        if task not in RESULTS:
            raise ConfigError(f"task must be one of {', '.join(RESULTS)}, got {task!r}")
        return RESULTS[task]

    @staticmethod
    def _cards(response: httpx.Response) -> list[ModelCard]:
        if not response.is_success:
            raise _refusal(response)
        try:
            return [_made(ModelCard, card) for card in response.json()["data"]]
        except MISREAD as error:
            raise _not_understood(response) from error


# ---- the clients --------------------------------------------------------------------------------


class Client(_Service):
    """A client that waits for its answers. Close it, or use it with `with`.

    Methods take one item or any number of them, of which only those of one request are held at a
    time by `stream`; the others give a list. Options are those of the command line, under the same
    names (`min_score=0.5`), and hold for the call; what is not given is as the service was told.

    All methods raise a ServiceError: the service cannot be reached, does not let this token in, has
    no such model or option, or gives no answer in time. What it says to try again later is tried
    again: after as many seconds as it says, else after 1, 2, 4, … seconds, a random part of each
    left out.

    Args:
        base_url: such as https://tagging.example.org or http://127.0.0.1:8000.
        token: bearer token, where the service wants one.
        timeout: seconds for one try of one request; the service is told, and gives up before.
        retries: tries after the first.
        max_items: of one request.
        max_body_bytes: of one request, in UTF-8; an item above it goes alone, and becomes Failed
            if it is too much for the service.
        transport: of httpx, instead of the default one: for proxies, certificates
            (`httpx.HTTPTransport(verify=…)`) and tests.

    Raises:
        ConfigError: one of these is impossible.

    Example:
        with Client("http://127.0.0.1:8000", timeout=30) as client:
            [result] = client.ner("Ada Lovelace lived in London.", min_score=0.5)
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        max_items: int = 64,
        max_body_bytes: int = 256 << 10,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, token, timeout, retries, max_items, max_body_bytes)
        retrying = RetryTransport(transport or httpx.HTTPTransport(), self._retry)
        self._http = httpx.Client(transport=retrying, **self._settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def ner(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[NerResult | Failed]:
        """Named entities in texts.

        Example:
            [result] = client.ner("Ada Lovelace lived in London.", offset_unit="utf16")
            # NerResult(id='0', …, entities=[Entity(start=0, end=12, label='PER', …), …])
        """
        return list(self._stream(NerResult, items, model, options))

    def classify(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ClassifyResult | Failed]:
        """Labels of texts, or of pairs of them.

        Example:
            [result] = client.classify({"text": "It rains.", "text_pair": "It is wet."}, top_k=3)
            # ClassifyResult(id='0', …, predicted_label='entailment', predicted_score=0.98, …)
        """
        return list(self._stream(ClassifyResult, items, model, options))

    def choose(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ChooseResult | Failed]:
        """The best of several choices for a premise.

        Example:
            item = {"premise": "The glass fell.", "choices": ["It broke.", "It was blue."]}
            [result] = client.choose(item | {"question": "effect"})
            # ChooseResult(id='0', …, predicted_choice=0, choice_scores=[0.9, 0.1])
        """
        return list(self._stream(ChooseResult, items, model, options))

    def qa(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[QaResult | Failed]:
        """Answers that stand in a context.

        Example:
            item = {"question": "Where did Ada live?", "context": "Ada lived in London."}
            [result] = client.qa(item, null_threshold=0.0)
            # QaResult(id='0', …, predicted_answer='London', predicted_answers=[Answer(…)], …)
        """
        return list(self._stream(QaResult, items, model, options))

    def embed(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[EmbedResult | Failed]:
        """A vector for each text.

        Example:
            good, gut = client.embed(["Good morning", "Guten Morgen"], dimensions=128)
            # EmbedResult(id='0', …, embedding=[0.03, -0.11, …])
        """
        return list(self._stream(EmbedResult, items, model, options))

    def extract(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ExtractResult | Failed]:
        """What a schema names, found in texts.

        Example:
            [result] = client.extract("Ada lived in London.", schema=["Person"], schema_lang="en")
            # ExtractResult(id='0', …, extracted=[Extracted(id=0, parent=None, name='Person', …)])
        """
        return list(self._stream(ExtractResult, items, model, options))

    def stream(
        self, task: str, items: Items, *, model: str | None = None, **options: Any
    ) -> Iterator[Result | Failed]:
        """Results one after the other, for more items than fit in memory.

        Args:
            task: ner, classify, choose, qa, embed or extract.

        Example:
            with open("texts.txt", encoding="utf-8") as lines:
                for result in client.stream("ner", lines):
                    if isinstance(result, NerResult):
                        print(result.id, len(result.entities))
        """
        return self._stream(self._kind(task), items, model, options)

    def models(self) -> list[ModelCard]:
        """What is served.

        Example:
            {card.id: card.tasks for card in client.models()}
            # {'demo': ['ner', 'classify', 'choose', 'qa', 'embed', 'extract']}
        """
        return self._cards(self._send("GET", "v1/models"))

    def _stream(
        self, kind: type[R], items: Items, model: str | None, options: Mapping[str, Any]
    ) -> Iterator[R | Failed]:
        for call in self._calls(kind, items, model, options):
            if isinstance(call, Failed):
                yield call
            else:
                yield from self._answer(call)

    def _answer(self, call: _Call[R]) -> list[R | Failed]:
        response = self._send("POST", call.path, call.body)
        if call.is_too_large(response):
            return [result for half in call.halves() for result in self._answer(half)]
        return call.results(response)

    def _send(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, content=body, headers=self._identified())
        except httpx.RequestError as error:
            raise _no_answer(error) from error


class AsyncClient(_Service):
    """Client for asyncio: the same methods, to be awaited, and several requests at a time, which
    share the forward passes of the service.

    Args:
        base_url, token, timeout, retries, max_items, max_body_bytes, transport: as for Client.
        concurrency: requests of one call that are under way at a time.

    Example:
        async with AsyncClient("http://127.0.0.1:8000") as client:
            async for result in client.stream("embed", texts):
                ...
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        max_items: int = 64,
        max_body_bytes: int = 256 << 10,
        concurrency: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, token, timeout, retries, max_items, max_body_bytes)
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
        self._concurrency = concurrency
        retrying = RetryTransport(transport or httpx.AsyncHTTPTransport(), self._retry)
        self._http = httpx.AsyncClient(transport=retrying, **self._settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def ner(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[NerResult | Failed]:
        """As Client.ner: `await client.ner("Ada lived in London.")`."""
        return await self._all(NerResult, items, model, options)

    async def classify(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ClassifyResult | Failed]:
        """As Client.classify: `await client.classify("It rains.", top_k=3)`."""
        return await self._all(ClassifyResult, items, model, options)

    async def choose(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ChooseResult | Failed]:
        """As Client.choose: `await client.choose({"premise": "…", "choices": ["…", "…"]})`."""
        return await self._all(ChooseResult, items, model, options)

    async def qa(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[QaResult | Failed]:
        """As Client.qa: `await client.qa({"question": "…", "context": "…"})`."""
        return await self._all(QaResult, items, model, options)

    async def embed(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[EmbedResult | Failed]:
        """As Client.embed: `await client.embed(["Good morning", "Guten Morgen"])`."""
        return await self._all(EmbedResult, items, model, options)

    async def extract(
        self, items: Items, *, model: str | None = None, **options: Any
    ) -> list[ExtractResult | Failed]:
        """As Client.extract: `await client.extract("Ada lived in London.", schema="Person")`."""
        return await self._all(ExtractResult, items, model, options)

    def stream(
        self, task: str, items: Items, *, model: str | None = None, **options: Any
    ) -> AsyncIterator[Result | Failed]:
        """As Client.stream: `async for result in client.stream("ner", lines)`."""
        return self._stream(self._kind(task), items, model, options)

    async def models(self) -> list[ModelCard]:
        """As Client.models: `await client.models()`."""
        return self._cards(await self._send("GET", "v1/models"))

    async def _all(
        self, kind: type[R], items: Items, model: str | None, options: Mapping[str, Any]
    ) -> list[R | Failed]:
        return [result async for result in self._stream(kind, items, model, options)]

    async def _stream(
        self, kind: type[R], items: Items, model: str | None, options: Mapping[str, Any]
    ) -> AsyncIterator[R | Failed]:
        asked: deque[asyncio.Task[Sequence[R | Failed]]] = deque()
        try:
            for call in self._calls(kind, items, model, options):
                asked.append(asyncio.create_task(self._answer(call)))
                if len(asked) == self._concurrency:
                    for result in await asked.popleft():
                        yield result
            while asked:
                for result in await asked.popleft():
                    yield result
        finally:  # one was refused, or nobody wants the rest
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _answer(self, call: _Call[R] | Failed) -> Sequence[R | Failed]:
        if isinstance(call, Failed):
            return [call]
        response = await self._send("POST", call.path, call.body)
        if call.is_too_large(response):
            return [result for half in call.halves() for result in await self._answer(half)]
        return call.results(response)

    async def _send(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, content=body, headers=self._identified())
        except httpx.RequestError as error:
            raise _no_answer(error) from error
