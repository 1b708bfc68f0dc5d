"""The web application under fire, over real HTTP: bodies made by machine from its own OpenAPI
document, and two thousand that are broken or meant to harm.

Whatever comes, the answer has the one form of errors, repeats nothing of what was sent, and the
next honest request gets what it always got.
"""

import codecs
import http.client
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fakes import save_tiny_service
from fault.serve_drill import Service as Command
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import served_model

from erniem_batch import ErnieMTokenizer
from erniem_batch.options import TASKS
from erniem_batch.serve.messages import Refused

pytestmark = pytest.mark.timeout(240)

N_BODIES = 2000
SEED = 20_260
MAX_BODY_BYTES = 2 << 20
MAX_ITEMS = 16
# Stands in every text that is sent, and must come back in no error and no log line.
MARK = "qzMARKqz"
# Stands in names of fields. Of a field that does not belong, only the nearest known one is named.
KEY_MARK = "qzKEYqz"

VALID: dict[str, dict[str, Any]] = {
    "ner": {
        "inputs": [{"id": MARK, "text": f"Ada {MARK} in London", "language": "en"}, f"in {MARK}"],
        "options": {"min_score": {"*": 0.1, "en": {"PER": 0.2}}, "offset_unit": "utf16"},
    },
    "classify": {
        "inputs": [{"text": f"the {MARK} won", "text_pair": f"a {MARK} lost"}],
        "options": {"top_k": 2, "pooling": "max", "all_scores": False},
    },
    "choose": {
        "inputs": {"premise": f"it {MARK}", "choices": [MARK, "no"], "question": "cause"},
        "options": {"question_template": ["cause={premise} why {question}"], "min_score": 0.1},
    },
    "qa": {
        "inputs": [{"question": f"who is {MARK}", "context": f"{MARK} is in London"}],
        "options": {"top_k": 2, "max_answer_tokens": 9, "null_threshold": 0.5},
    },
    "embed": {
        "inputs": [f"one {MARK}", "two"],
        "options": {"dimensions": 8, "prefix": f"{MARK}: ", "output_dtype": "int8"},
    },
    "extract": {
        "inputs": [{"text": f"Ada {MARK} in London", "schema": {MARK: [MARK, "x [a, b]"]}}],
        "options": {"schema": ["Person", {"Place": ["Kind"]}], "schema_lang": "en"},
    },
    "embeddings": {"input": [f"one {MARK}", "two"], "dimensions": 8, "encoding_format": "base64"},
}


# ---- the service --------------------------------------------------------------------------------


@dataclass
class Service:
    """Where it listens, and how to ask it."""

    client: httpx.Client

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """An honest request."""
        return self.client.post(path, content=json.dumps(body), headers={**JSON, **headers})

    def normal(self) -> dict[str, Any]:
        """What an honest client gets for each task."""
        return {name: self.post(f"/v1/{name}", body).json() for name, body in VALID.items()}


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer
) -> Iterator[Service]:
    """All six tasks of a tiny model behind a server of this process."""
    folder = save_tiny_service(tmp_path_factory.mktemp("service"), tokenizer)
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_items": MAX_ITEMS}
    # Each request on a connection of its own: after refusing a body that still comes in, the server
    # closes the line.
    alone = httpx.Limits(max_keepalive_connections=0)
    with (
        served_model(folder, limits, window_tokens=64, overlap_tokens=16) as url,
        httpx.Client(base_url=url, timeout=60, limits=alone) as client,
    ):
        yield Service(client)


# ---- what the OpenAPI document says -------------------------------------------------------------

# This check wants an answer to whatever JSON Schema lets pass. Some rules stand in no schema: an
# extraction needs a schema from somewhere, options may exclude each other, a question must not be
# empty, a text must find room behind its prompt. Those requests get a 422, as they should.
LEFT_OUT = [positive_data_acceptance]
EXAMPLES = 25  # for each operation and kind


def test_every_operation_keeps_to_its_document(service: Service) -> None:
    """Statuses, headers, content types and bodies are those of /openapi.json, what it forbids is
    refused, and nothing is a fault of the service."""
    schema = schemathesis.openapi.from_url(f"{service.client.base_url}/openapi.json")
    # What is wrong in two ways may be refused for its size, which is looked at first.
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = [*rejection.expected_statuses, "413"]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == len(TASKS) + 4  # embeddings, models, healthz, readyz
    statuses: set[int] = set()
    for operation in operations:
        _check(operation.as_strategy(schemathesis.GenerationMode.POSITIVE), statuses)
        if operation.method == "post":  # without a body there is nothing to be wrong
            _check(operation.as_strategy(schemathesis.GenerationMode.NEGATIVE), statuses)
    assert {200, 400, 404, 422} <= statuses


def _check(strategy: Any, statuses: set[int]) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        statuses.add(case.call_and_validate(excluded_checks=LEFT_OUT).status_code)

    run()


# ---- two thousand attacks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One request that is wrong, or looks so.

    Attributes:
        kind: names it when it succeeds.
        content: the body; pieces are sent in chunks.
        may_time_out: it asks for a short time, so that 504 is an answer.
    """

    kind: str
    path: str
    content: bytes | tuple[bytes, ...] = b""
    headers: dict[str, str | bytes] = field(default_factory=lambda: dict(JSON))
    method: str = "POST"
    may_time_out: bool = False


Random = random.Random
Attacker = Callable[[Random, str, dict[str, Any]], Attack]

# Texts that stand in for a value of JSON; most are no JSON at all.
RAW_VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "0x10", "01", "+1", "'a'"),
    *(
        "1.",
        "9" * 400,
        "9" * 5000,
        "-0",
        "1.5",
        "1e3",
        "tru",
        "undefined",
        "{",
        "]",
        ",",
        "/* */ 1",
    ),
    *(
        f'"{MARK}\\ud800"',
        f'"\\udc00\\ud800{MARK}"',
        f'"{MARK}\\u0000"',
        f'"\\x{MARK}"',
        f'"{MARK}',
    ),
    *(
        f'"{MARK}',
        "[" * 100_000,
        '{"a":' * 20_000,
        "[" * 400 + "]" * 400,
        '{"a":' * 300 + "1" + "}" * 300,
    ),
]
WRONG_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 1.5, -0.0, 1e308, 10**18, 10**30, "", " ", MARK, "\x00"),
    *([], {}, [[]], [None], [MARK], {KEY_MARK: MARK}, {KEY_MARK: [7]}, [[MARK, 5]], {"": MARK}),
    *({"*": 2}, {"*": {"*": {"*": 0.5}}}, {"\u202e": 0.5}, {KEY_MARK: {KEY_MARK: -1}}),
    *(f"../../{MARK}.json", f"/etc/{MARK}.yaml", f"s3://{MARK}/a.json", f"file:///{MARK}.yml"),
    *(f"{{a: &b [{MARK}], c: *b}}", f"a\n{MARK}: [", f"!!python/object/apply:os.system [{MARK}]"),
    *("{}", "{0.__class__}", f"x={{premise}}{{{MARK}}}", "%s%n", "${jndi:ldap://x}", "' OR 1=1 --"),
    *("\ufeff", "\u200d\u200d", "\U0001f468\u200d\U0001f469", "e" + "\u0301" * 500, "\r\nX-Bad: 1"),
]
ODD_CHARACTERS = "\x00\x07\x1b\x7f\u0085\u2028\ufffd\uffff\U0010ffff\u202e\u0600\ud7ff\ue000"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, the whole included."""
    yield at
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*at, key))


def changed(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not at:
        return value
    copy = json.loads(json.dumps(body))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return copy


def _as_bytes(body: Any) -> bytes:
    return json.dumps(body).encode()


def _wrong_value(r: Random, path: str, body: dict[str, Any]) -> Attack:
    at = r.choice(list(places(body)))
    value = r.choice(WRONG_VALUES)
    return Attack(f"value {value!r:.40} at {at}", path, _as_bytes(changed(body, at, value)))


def _raw_value(r: Random, path: str, body: dict[str, Any]) -> Attack:
    at = r.choice([place for place in places(body) if place])
    raw = r.choice(RAW_VALUES)
    text = json.dumps(changed(body, at, "@here@")).replace('"@here@"', raw)
    return Attack(f"raw {raw[:30]} at {at}", path, text.encode())


def _lost_or_added(r: Random, path: str, body: dict[str, Any]) -> Attack:
    at = r.choice([place for place in places(body) if place])
    copy = changed(body, at, None)
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if r.random() < 0.4 or not isinstance(inner, dict):
        del inner[at[-1]]
        return Attack(f"without {at}", path, _as_bytes(copy))
    inner[at[-1]] = "x"
    inner[r.choice([KEY_MARK, "", "__proto__", "model_config", f"{MARK} a", "\x00"])] = MARK
    return Attack(f"more at {at}", path, _as_bytes(copy))


def _twice(r: Random, path: str, body: dict[str, Any]) -> Attack:
    key = r.choice(list(body))
    second = json.dumps({key: r.choice(WRONG_VALUES)})[1:]
    return Attack(f"{key} twice", path, (json.dumps(body)[:-1] + ", " + second).encode())


def _other_options(r: Random, path: str, body: dict[str, Any]) -> Attack:
    options = VALID[r.choice(TASKS)]["options"]
    return Attack("options of another task", path, _as_bytes({**body, "options": options}))


def _cut(r: Random, path: str, body: dict[str, Any]) -> Attack:
    content = _as_bytes(body)
    return Attack("cut", path, content[: r.randrange(len(content))])


def _flipped(r: Random, path: str, body: dict[str, Any]) -> Attack:
    content = bytearray(json.dumps(body, ensure_ascii=False).encode())
    for _ in range(r.choice((1, 1, 1, 3, 20))):
        content[r.randrange(len(content))] ^= 1 << r.randrange(8)
    return Attack("flipped bits", path, bytes(content))


def _inserted(r: Random, path: str, body: dict[str, Any]) -> Attack:
    content = json.dumps(body)
    at = r.randrange(len(content))
    odd = r.choice(ODD_CHARACTERS)
    return Attack(f"{odd!r} inside", path, (content[:at] + odd + content[at:]).encode())


def _noise(r: Random, path: str, _: dict[str, Any]) -> Attack:
    size = r.choice((1, 7, 100, 5000))
    return Attack("noise", path, r.randbytes(size) + (MARK.encode() if size > 7 else b""))


def _encoded(r: Random, path: str, body: dict[str, Any]) -> Attack:
    text = json.dumps(body, ensure_ascii=False).replace("London", "Zürich")
    name = r.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7", "cp037"))
    content = text.encode(name)
    if r.random() < 0.2:
        content = codecs.BOM_UTF16_BE + text.encode()
    return Attack(f"in {name}", path, content)


CONTENT_TYPES = [
    *("", "text/plain", "application/xml", "application/x-www-form-urlencoded", f"{MARK}/{MARK}"),
    *("multipart/form-data", "multipart/form-data; boundary=x", "application/json; charset=utf-16"),
    *("application/json, text/plain", "application/problem+json", "application/octet-stream", ";"),
]


def _typed(r: Random, path: str, body: dict[str, Any]) -> Attack:
    headers: dict[str, str | bytes] = {"Content-Type": r.choice(CONTENT_TYPES)}
    if r.random() < 0.3:
        headers["Content-Encoding"] = r.choice(("gzip", "br", "deflate", "identity", MARK))
    form = f"inputs={MARK}&options=%7B%7D&inputs[0][text]={MARK}".encode()
    content = form if r.random() < 0.3 else _as_bytes(body)
    return Attack(f"typed {headers}", path, content, headers)


SHORT_TIMES = ("1e-9", "1e-300", "5e-324", "0.0001")
TIMES = (*SHORT_TIMES, "nan", "-1", "0", "-0", "1e999", "inf", "-inf", MARK, "", "1,2", "１", "1_0")


REQUEST_IDS = (b"", b"a" * 5000, b"\xff\xfe", b"a\tb", b"<script>", b'"}', b"%0d%0aX-Bad: 1")


def _headed(r: Random, path: str, body: dict[str, Any]) -> Attack:
    seconds = r.choice(TIMES)
    headers: dict[str, str | bytes] = {**JSON, "X-Request-Timeout-Seconds": seconds.encode()}
    headers["X-Request-ID"] = r.choice(
        (
            b"",
            b"a" * 5000,
            b"\xff\xfe",
            "é".encode(),
            b"a\tb",
            b"<script>",
            b'"}',
            b"%0d%0aX-Bad: 1",
        )
    )
    headers["Authorization"] = r.choice((b"", b"Bearer", b"Bearer \xff", f"Basic {MARK}".encode()))
    odd = r.choice(("X-Forwarded-For", "Origin", "Cookie", "Forwarded", "X-HTTP-Method-Override"))
    headers[odd] = f"{MARK}; DELETE".encode()
    wait = seconds in SHORT_TIMES
    return Attack(f"headers {headers}", path, _as_bytes(body), headers, may_time_out=wait)


def _long(r: Random, path: str, body: dict[str, Any]) -> Attack:
    at = r.choice([at for at in places(body) if at and isinstance(at[-1], str | int)])
    size = r.choice((300, 5000, 100_000))
    many = {f"{KEY_MARK}{i}": i for i in range(99)}
    value = r.choice((MARK * (size // 8), [MARK] * (size // 50), many))
    return Attack(f"{size} at {at}", path, _as_bytes(changed(body, at, value)))


def _chunked(r: Random, path: str, body: dict[str, Any]) -> Attack:
    content = _as_bytes(body)
    if r.random() < 0.3:
        n_pieces = MAX_BODY_BYTES // 65_536 + r.randint(1, 5)
        return Attack("chunks above the limit", path, (content, *[MARK.encode() * 8192] * n_pieces))
    size = r.randint(1, 40)
    return Attack(
        "chunks", path, tuple(content[i : i + size] for i in range(0, len(content), size))
    )


def _method(r: Random, path: str, body: dict[str, Any]) -> Attack:
    method = r.choice(("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD"))
    return Attack(f"method {method}", path, _as_bytes(body), method=method)


ADDRESSES = [
    *(
        "/",
        "/v1",
        "/v1/",
        "/v1/ner/",
        "//v1/ner",
        "/v1/%6eer",
        "/V1/NER",
        "/v1/ner%00",
        "/v1/ner;a=1",
    ),
    *("/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/index.html"),
    *("/....//api.py", "/..\\..\\api.py", "/v1/ner;a=1", "/.git/config", f"/{MARK}", "/v1/nul"),
    *("/v1/ner?inputs=a", f"/v1/{MARK}?{MARK}={MARK}", "/%", "/%zz", "/%ff%fe", "/" + "a/" * 2000),
    *("/openapi.json?x=1", "/docs", "/docs/oauth2-redirect", "/redoc", "/metrics", "/-/healthz"),
]


def _address(r: Random, _: str, body: dict[str, Any]) -> Attack:
    address = r.choice(ADDRESSES)
    method = r.choice(("GET", "GET", "POST", "HEAD"))
    content = _as_bytes(body) if method == "POST" else b""
    return Attack(f"{method} {address[:60]}", address, content, method=method)


KINDS: list[tuple[Attacker, int]] = [
    *((_wrong_value, 500), (_raw_value, 320), (_lost_or_added, 150), (_twice, 60)),
    *((_other_options, 60), (_cut, 120), (_flipped, 220), (_inserted, 100), (_noise, 30)),
    *((_encoded, 60), (_typed, 80), (_headed, 100), (_long, 40), (_chunked, 40)),
    *((_method, 50), (_address, 60)),
]


def attacks(seed: int) -> list[Attack]:
    """All of them, always the same for a seed."""
    r = Random(seed)
    made = [*bombs()]
    for kind, count in KINDS:
        for _ in range(count):
            name = r.choice(list(VALID))
            made.append(kind(r, f"/v1/{name}", VALID[name]))
    r.shuffle(made)
    return made


def bombs() -> Iterator[Attack]:
    """Small requests that ask for much."""

    def extract(kind: str, schema: Any, **options: Any) -> Iterator[Attack]:
        body = {"inputs": f"Ada {MARK}", "options": {"schema": schema, **options}}
        yield Attack(f"schema: {kind}", "/v1/extract", _as_bytes(body))
        body = {"inputs": {"text": f"Ada {MARK}", "schema": schema}, "options": options}
        yield Attack(f"own schema: {kind}", "/v1/extract", _as_bytes(body))

    deep: Any = MARK
    for _ in range(17):
        deep = {KEY_MARK: deep}
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    yield from extract("17 deep", deep)
    yield from extract("aliases", "\n".join([f"a0: &a0 [{MARK}]", *lines]))
    yield from extract("flow of YAML", "[" * 3000)
    yield from extract("tags", f"!!python/object/apply:os.system ['{MARK}']\n")
    yield from extract("10,000 names", [f"{MARK}{i}" for i in range(10_000)])
    yield from extract("one long name", MARK * 100_000)
    yield from extract("brackets", "[" * 50_000 + MARK)
    yield from extract("options", f"x [{', '.join([MARK] * 5000)}]", span_pairing="all")
    yield from extract("everything", ["a", "b"], position_prob=0.0, span_pairing="all")
    for labels in ([MARK * 125_000], [f"{MARK}{i}" for i in range(10_000)], ["", " "]):
        body = {"inputs": f"a {MARK}", "options": {"candidate_labels": labels}}
        yield Attack("candidate labels", "/v1/classify", _as_bytes(body))
    many = {"premise": MARK, "choices": [MARK] * 10_000}
    yield Attack("10,000 choices", "/v1/choose", _as_bytes({"inputs": many}))
    yield Attack("too many", "/v1/ner", _as_bytes({"inputs": [MARK] * (MAX_ITEMS + 1)}))
    yield Attack("100,000 inputs", "/v1/ner", _as_bytes({"inputs": [MARK] * 100_000}))
    yield Attack("a long text", "/v1/ner", _as_bytes({"inputs": f"{MARK} " * 4000}))
    yield Attack("no words", "/v1/ner", _as_bytes({"inputs": MARK * 20_000}))
    yield Attack("a large body", "/v1/ner", b" " * (MAX_BODY_BYTES + 1))
    yield Attack("many answers", "/v1/qa", _as_bytes(VALID["qa"] | {"options": {"top_k": 10_000}}))


def send(service: Service, attack: Attack) -> httpx.Response:
    """The answer to an attack; its address goes out as it stands."""
    url = service.client.base_url.copy_with(raw_path=b"/")
    request = service.client.build_request(
        attack.method,
        url,
        content=iter(attack.content) if isinstance(attack.content, tuple) else attack.content,
        headers=attack.headers,
        extensions={"target": attack.path.encode()},
    )
    return service.client.send(request)


def faults_of(attack: Attack, answer: httpx.Response) -> Iterator[str]:
    """What is wrong with an answer."""
    status = answer.status_code
    if status == 504 and not attack.may_time_out:
        yield "504 without a short deadline"
    if status >= 500 and status != 504:
        yield f"status {status}: {answer.text[:200]}"
    if MARK in str(answer.headers) or KEY_MARK in str(answer.headers):
        yield "a header repeats the request"
    if status < 300 or attack.method == "HEAD":
        yield from _faults_inside(answer)
    elif status >= 400:
        yield from _faults_of_error(answer)
    else:
        yield f"status {status}"


def _faults_of_error(answer: httpx.Response) -> Iterator[str]:
    if answer.headers.get("content-type") != "application/json":
        yield f"status {answer.status_code} as {answer.headers.get('content-type')}"
        return
    problem = Refused.model_validate_json(answer.content).error
    if MARK in answer.text:
        yield f"{answer.status_code} {problem.code} repeats the request: {answer.text[:200]}"
    if KEY_MARK in answer.text:
        yield f"{answer.status_code} {problem.code} repeats a name: {problem.message[:200]}"


def _faults_inside(answer: httpx.Response) -> Iterator[str]:
    """Of several items, each may have an error."""
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return
    results = answer.json().get("results", []) if answer.content else []
    for error in (result["error"] for result in results if "error" in result):
        if error["type"] == "server_error":
            yield f"an item failed: {error}"
        if MARK in str(error) or KEY_MARK in str(error):
            yield f"the error of an item repeats it: {str(error)[:200]}"


def test_nothing_that_is_sent_does_harm(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Every attack is refused or answered, and afterwards all is as before."""
    caplog.set_level(logging.DEBUG, "erniem_batch")
    made = attacks(SEED)
    assert len(made) >= N_BODIES
    statuses = withstand(service, made)
    assert MARK not in caplog.text
    assert KEY_MARK not in caplog.text
    assert {200, 400, 404, 405, 413, 422, 504} <= statuses


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_nothing_that_is_sent_through_ray_does_harm(
    tmp_path: Path, tokenizer: ErnieMTokenizer
) -> None:
    """The same attacks on `erniem-batch serve`, whose proxy reads small bodies before it passes a
    request on; and bytes that are no HTTP."""
    config, log = tmp_path / "serve.yaml", tmp_path / "log"
    folder = save_tiny_service(tmp_path / "model", tokenizer)
    model = {"name": "tiny", "model": str(folder), "window_tokens": 64, "overlap_tokens": 16}
    config.write_text(
        json.dumps({"models": [model], "max_body_bytes": MAX_BODY_BYTES, "max_items": MAX_ITEMS})
    )
    command = Command(config, log, faulty=False)
    try:
        command.wait_ready()
        (replica,) = command.replicas()
        alone = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=command.url, timeout=60, limits=alone) as client:
            service = Service(client)
            # Not the headers: Ray's proxy ends tiny deadlines by itself, with 408 and plain text,
            # and answers 500 to an X-Request-ID that is not UTF-8.
            made = [attack for attack in attacks(SEED) if not attack.kind.startswith("headers")]
            assert {200, 400, 404, 405, 413, 422} <= withstand(service, made)
            answers = {kind: raw(client.base_url.port, sent) for kind, sent in RAW_REQUESTS.items()}
            assert not {k: a for k, a in answers.items() if a[0] >= 500 or MARK in a[1]}
            assert service.post("/v1/ner", VALID["ner"]).status_code == 200
        assert [process.pid for process in command.replicas()] == [replica.pid], (
            "it is the same one"
        )
    finally:
        command.end()
    assert MARK not in log.read_text()
    assert KEY_MARK not in log.read_text()


def withstand(service: Service, made: Sequence[Attack]) -> set[int]:
    """Sends them all, and says with which statuses they were answered; fails if one does harm."""
    before = service.normal()
    assert all("error" not in answer for answer in before.values()), before
    found, slow, statuses = [], [], []
    for attack in made:
        started = time.monotonic()
        try:
            answer = send(service, attack)
        except httpx.TransportError as error:
            found.append(f"{attack.path[:20]} {attack.kind[:90]}: no answer: {error!r}")
            continue
        statuses.append(answer.status_code)
        found += [f"{attack.path[:20]} {attack.kind[:90]}: {f}" for f in faults_of(attack, answer)]
        if time.monotonic() - started > 20:
            slow.append(attack.kind)
    assert not slow
    assert service.client.get("/healthz").json() == {"status": "ok", "problems": []}
    assert service.normal() == before
    assert not found, "\n".join([f"{len(found)} of {len(made)}:", *dict.fromkeys(found)])
    return set(statuses)


# ---- below HTTP ---------------------------------------------------------------------------------


def raw(port: int | None, request: bytes) -> tuple[int, str]:
    """What comes back for some bytes, after which nothing more is sent; 0: the line was closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(request)
        line.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(line)
        try:
            answer.begin()
            return answer.status, answer.read().decode()
        except (http.client.HTTPException, ConnectionError):
            return 0, ""


BODY = _as_bytes({"inputs": MARK})
HEAD = (
    b"POST /v1/ner HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
)
RAW_REQUESTS = {
    "longer than it says": HEAD + b"Content-Length: 5\r\n\r\n" + BODY,
    "shorter than it says": HEAD + b"Content-Length: 5000\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "a length of text": HEAD + f"Content-Length: {MARK}\r\n\r\n".encode() + BODY,
    "a huge length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 500\r\n\r\n" + BODY,
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a broken chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
    "an unfinished chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n" + BODY,
    "another coding": HEAD + f"Transfer-Encoding: {MARK}\r\n\r\n".encode() + BODY,
    "a line break in a header": HEAD + b"X-Request-ID: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a lone line feed": HEAD + b"X-Request-ID: a\nX-Bad: 1\r\nContent-Length: 0\r\n\r\n",
    "NUL in a header": HEAD + b"X-Request-ID: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "a header without end": HEAD + b"X-Request-ID: " + MARK.encode() * 20_000,
    "no HTTP": MARK.encode() + b"\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100ff010000fb0303") + bytes(250),
    "a WebSocket": b"GET /v1/ner HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "nothing": b"",
}


def test_what_is_no_http_is_turned_away(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that the server itself refuses, and bodies whose end never comes."""
    wrong = {}
    for kind, request in RAW_REQUESTS.items():
        status, text = raw(service.client.base_url.port, request)
        if status >= 500 or MARK in text:
            wrong[kind] = (status, text[:200])
    assert not wrong
    assert MARK not in caplog.text
    answer = service.post("/v1/ner", VALID["ner"])
    assert answer.status_code == 200


def test_request_ids_come_back_only_if_they_are_harmless(service: Service) -> None:
    """Letters come back, cut where they are long; control characters do not."""

    def id_of(given: bytes) -> str | None:
        headers = {**JSON, "X-Request-ID": given}
        answer = service.client.post("/v1/ner", content=b"{", headers=headers)
        found: str | None = answer.json()["error"]["request_id"]
        return found

    assert id_of(b"a-1") == "a-1"
    assert id_of(b"a" * 5000) == "a" * 128
    assert id_of(b"a\tb") is None
    assert id_of(b"\xff") is None


# ---- what has gone wrong before -----------------------------------------------------------------


def test_no_file_is_opened_because_a_request_names_it(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path as a schema is a name like others, whether there is such a file or not."""
    (tmp_path / "there.json").write_text('["Person", "Place"]')
    monkeypatch.chdir(tmp_path)  # the service is in this process
    found = {}
    for path in (Path("there.json"), Path("absent.json")):
        body = {"inputs": "Ada lived in London", "options": {"schema": str(path)}}
        answer = service.post("/v1/extract", body)
        results = answer.json().get("results", [{}])
        names = {item["name"] for result in results for item in result.get("extracted", [])}
        found[path.name] = (answer.status_code, results[0].get("n_windows"), names <= {str(path)})
    assert set(found.values()) == {(200, 1, True)}, found


def test_half_a_surrogate_pair_is_refused_everywhere(service: Service) -> None:
    """Also where any JSON may stand."""
    long = "Ada Lovelace lived in London."  # something is found
    for body in (
        {"inputs": long, "options": {"schema": ["\ud800"]}},
        {"inputs": long, "options": {"schema": {"\ud800": "b"}}},
        {"inputs": {"text": long, "schema": ["\ud800"]}},
        {"inputs": "\ud800", "options": {"schema": "a"}},
    ):
        answer = service.post("/v1/extract", body)
        assert answer.status_code in (400, 422), (body, answer.text)


def test_null_is_as_good_as_nothing_where_the_document_allows_it(service: Service) -> None:
    """`candidate_labels` and all others that may be null."""
    for name, option in (("classify", "candidate_labels"), ("qa", "null_threshold")):
        body = {**VALID[name], "options": {option: None}}
        assert service.post(f"/v1/{name}", body).status_code == 200


def test_an_attack_does_not_hold_up_others(service: Service) -> None:
    """While a request for 160,000 windows is at work, a small one is answered within seconds."""
    names = [f"{MARK}{i}" for i in range(10_000)]
    body = {"inputs": ["a"] * MAX_ITEMS, "options": {"schema": names}}
    hurry = {"X-Request-Timeout-Seconds": "3"}
    answers: list[int] = []

    def ask() -> None:
        answers.append(service.post("/v1/extract", body, **hurry).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    seconds = []
    while thread.is_alive():
        started = time.monotonic()
        assert service.post("/v1/ner", VALID["ner"]).status_code == 200
        seconds.append(time.monotonic() - started)
    assert answers[0] in (200, 413, 422, 429, 504)
    assert max(seconds, default=0.0) < 5
