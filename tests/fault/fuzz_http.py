"""Random bodies against the web application: no fault, no traceback, no wrong status or answer.

    python -m tests.fault.fuzz_http --bodies 100000 --seed 1 [--serve]

One body in fifty is made by schemathesis from the OpenAPI document; the others by a grammar that
knows the fields and options of each task from the same document, and what people write into them.
The application is the real one, over real engines and tiny models; with --serve it is
`erniem-batch serve` on this machine, behind Ray's proxy. Body N of a seed is always the same:
--first N --bodies 1 sends it alone.
"""

import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from cyclopts import App
from fakes import save_tiny_service
from hostile import PLAIN
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from jsonschema import Draft202012Validator

from erniem_batch import ErnieMTokenizer
from erniem_batch.serve.api import make_api
from erniem_batch.serve.config import AppConfig, ModelConfig
from erniem_batch.serve.engine import Engine
from erniem_batch.serve.fields import MODELS
from erniem_batch.serve.messages import Refused

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
MODEL = {"name": "tiny", "window_tokens": 64, "overlap_tokens": 16}
# Small, so that the limits are met often.
LIMITS = {"max_body_bytes": 65_536, "max_items": 8, "max_values": 600,
          "max_text_characters": 3000, "max_characters": 6000}  # fmt: skip
# Stands in texts and names that are sent, and must come back in no error and no log line.
MARK = "qzMARKqz"
OF_SCHEMATHESIS = 0.02
# With fewer bodies there is none of schemathesis, which takes half a minute to begin.
LONG = 2000
AT_A_TIME = 8
# After so many bodies, honest requests are asked and must get what they always get.
HONEST_EVERY = 1000
JSON = {"Content-Type": "application/json"}

Random = random.Random
app = App(help=__doc__, help_format="plaintext")


# ---- bodies -------------------------------------------------------------------------------------

TEXTS = [
    *("Ada Lovelace lived in London.", "the team won", "", " ", "北京は大きい都市です。", "😀 x"),
    *("Person", "Place, Time", "cause", "effect", "de", "en", "tiny", "*", "a [b, c]", "[a", "a]"),
    *("a, [b, c], d", "［a，b］，c", "{}", "This is {}.", "{:>200000000}", "{0.__class__}", "{{}}"),
    *("{premise}", "x={premise} {question}", "x={premise}{premise}", "=", "float", "base64", "zh"),
    *('["a", {"b": ["c"]}]', "- a\n- b:\n  - c\n", "{a: b", "&a [*a]", "a:\n", "[" * 300, "null"),
    *("ﷺ", "\u200b", "e\u0301" * 9, "\x00", "\ud7ff", "\u2028", "[SEP]", "[CLS] [MASK]", "%s%n"),
    *("../a.json", "s3://a/b.yaml", "\ufeff", "\r\nX: 1", "\x1b[31m", "1e400", "No", "1:8"),
]
NUMBERS = [0, 1, -1, 2, 7, 0.5, 1.0, 0.999, 1e-9, 1.5, 10_000, 10_001, 2**63, 10**30, -0.0, 1e308]
RAW = [
    *("NaN", "-Infinity", "1e400", "9" * 5000, "0x1", "01", "'a'", "tru", "{", "]", "1.", "/**/1"),
    *('"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x"', "[" * 2000, '{"a":' * 700),
]


def text_of(r: Random) -> str:
    """A text such as people and others send."""
    text = r.choice(TEXTS)
    if r.random() < 0.3:
        text = f"{text} {MARK} {r.choice(TEXTS)}"
    if r.random() < 0.03:
        text *= r.choice((30, 300, 3000 // max(1, len(text))))
    return text[:20_000]


def any_value(r: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = r.randrange(5 if depth < 4 else 3)
    if kind == 0:
        return text_of(r)
    if kind == 1:
        return r.choice(NUMBERS)
    if kind == 2:
        return r.choice((None, True, False))
    n = r.choice((0, 1, 1, 2, 3, 9))
    if kind == 3:
        return [any_value(r, depth + 1) for _ in range(n)]
    return {text_of(r)[:50]: any_value(r, depth + 1) for _ in range(n)}


def fitting(r: Random, schema: dict[str, Any], defs: dict[str, Any], wrong: float) -> Any:
    """A value that a JSON schema allows; any other with probability `wrong` at each place."""
    if r.random() < wrong:
        return any_value(r)
    if "$ref" in schema:
        return fitting(r, defs[schema["$ref"].rpartition("/")[2]], defs, wrong)
    if "anyOf" in schema:
        return fitting(r, r.choice(schema["anyOf"]), defs, wrong)
    if "enum" in schema or "const" in schema:
        return r.choice(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        return _object(r, schema, defs, wrong)
    if kind == "array":
        n = r.choice((1, 1, 1, 2, 3, 8, 9)) if r.random() < 0.97 else 700
        return [fitting(r, schema.get("items", {}), defs, wrong) for _ in range(n)]
    if kind == "string":
        return text_of(r)
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("exclusiveMaximum"))
        number = r.uniform(low, 1 if high is None else min(high, 20)) * 0.99
        return int(number + 1) if kind == "integer" else number
    return r.choice((True, False)) if kind == "boolean" else None if kind == "null" else _tree(r)


def _object(r: Random, schema: dict[str, Any], defs: dict[str, Any], wrong: float) -> Any:
    fields = schema.get("properties", {})
    needed = schema.get("required", ())
    names = [name for name in fields if name in needed or r.random() < 0.35]
    made = {name: fitting(r, fields[name], defs, wrong) for name in names}
    more = schema.get("additionalProperties")
    if isinstance(more, dict) or (more is True and not fields):
        inner = more if isinstance(more, dict) else {}
        for _ in range(r.randrange(4)):
            made[text_of(r)[:50]] = fitting(r, inner, defs, wrong)
    if r.random() < wrong:
        made[r.choice((f"{MARK}x", "optoins", "__proto__", "modle", "", *fields))] = any_value(r)
    return made


def _tree(r: Random, depth: int = 0) -> Any:
    """A schema to extract by, which the document calls any value."""
    if depth > 3 or r.random() < 0.5:
        return text_of(r)
    if r.random() < 0.5:
        return [_tree(r, depth + 1) for _ in range(r.randrange(4))]
    return {text_of(r)[:30]: _tree(r, depth + 1) for _ in range(r.randrange(3))}


def damaged(r: Random, content: bytes) -> bytes:
    """A body in which bytes or values are others."""
    kind = r.randrange(5)
    if kind == 0:
        return content[: r.randrange(len(content) + 1)]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(r.choice((1, 1, 3, 20)) if changed else 0):
            changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
        return bytes(changed)
    at = r.randrange(len(content) + 1)
    if kind == 2:
        return content[:at] + r.choice(RAW).encode() + content[at:]
    if kind == 3:
        places = [i for i, byte in enumerate(content) if byte in b":[,"]
        at = r.choice(places) + 1 if places else 0
        return content[:at] + r.choice(RAW).encode() + b"," + content[at:]
    return content.decode(errors="replace").encode(r.choice(("utf-16", "utf-32", "utf-8-sig")))


@dataclass(frozen=True)
class Sent:
    """A request: number, path and body."""

    number: int
    path: str
    content: bytes


def of_grammar(seed: int, number: int, schemas: dict[str, Any]) -> Sent:
    """Body `number` of a seed, made by the grammar."""
    r = Random(f"{seed}/{number}")
    path = r.choice(sorted(MODELS))
    schema = schemas[path]
    value = fitting(r, schema, schema.get("$defs", {}), r.choice((0, 0, 0.02, 0.1)))
    if isinstance(value, dict) and "model" in value and r.random() < 0.8:
        value["model"] = MODEL["name"]
    ascii_only = r.random() < 0.3
    content = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    return Sent(number, path, damaged(r, content) if r.random() < 0.15 else content)


def of_schemathesis(seed: int, n: int, document: dict[str, Any]) -> list[Sent]:
    """Bodies that schemathesis makes of the OpenAPI document, fitting ones and others."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.method == "post"]
    n_each = max(1, n // len(operations) // 2)
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    made: list[Sent] = []
    for operation in operations:
        for mode in modes:

            @seeded(seed)
            @settings(
                max_examples=n_each,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(mode))
            def keep(case: Any) -> None:
                try:
                    content = json.dumps(case.body, ensure_ascii=False).encode()
                except (TypeError, UnicodeEncodeError):
                    content = b"{}"
                made.append(Sent(-len(made) - 1, case.path, content))

            keep()
    return made


# ---- what is wrong with an answer ---------------------------------------------------------------


@dataclass
class Judge:
    """Knows what the OpenAPI document allows.

    Attributes:
        document: of the service.
        requests: JSON schema of the body of each path, with its definitions.
    """

    document: dict[str, Any]
    requests: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.requests = {path: model.model_json_schema() for path, model in MODELS.items()}
        self._bodies = {path: Draft202012Validator(s) for path, s in self.requests.items()}
        self._answers: dict[tuple[str, str], Draft202012Validator] = {}
        for path in MODELS:
            for status, answer in self.document["paths"][path]["post"]["responses"].items():
                schema = answer["content"]["application/json"]["schema"]
                whole = {**schema, "components": self.document["components"]}
                self._answers[path, status] = Draft202012Validator(whole)

    def faults(self, sent: Sent, answer: httpx.Response) -> Iterator[str]:
        """What is wrong with an answer."""
        status = answer.status_code
        if status >= 500:
            yield f"status {status}: {answer.text[:300]}"
            return
        known = self._answers.get((sent.path, str(status)))
        if known is None:
            yield f"status {status} is not in the document: {answer.text[:200]}"
            return
        if error := next(known.iter_errors(answer.json()), None):
            yield f"{status} is not as the document says: {error.message[:200]}"
        value, is_json = _parsed(sent.content)
        if status == 400 and is_json:
            yield f"400 for JSON: {answer.text[:200]}"
        if not sent.content and status == 422:
            pass  # a body is missing
        elif status not in (400, 413) and not is_json:
            yield f"{status} for what is no JSON"
        elif status == 200:
            yield from self._faults_of_results(sent, value, answer.json())
        else:
            yield from _faults_of_error(answer)

    def _faults_of_results(self, sent: Sent, value: Any, answer: Any) -> Iterator[str]:
        if error := next(self._bodies[sent.path].iter_errors(value), None):
            yield f"200 for what the document forbids: {error.message[:200]}"
            return
        if sent.path == "/v1/embeddings":
            inputs = value["input"]
            n = 1 if isinstance(inputs, str) else len(inputs)
            if [item["index"] for item in answer["data"]] != list(range(n)):
                yield "not a vector for each text"
            return
        items = value["inputs"] if isinstance(value["inputs"], list) else [value["inputs"]]
        items = [{"text": item} if isinstance(item, str) else item for item in items]
        wanted = [str(i) if item.get("id") is None else item["id"] for i, item in enumerate(items)]
        if [result["id"] for result in answer["results"]] != wanted:
            yield "not a result for each item"
        options = value.get("options", {})
        if options.get("offset_unit", "codepoint") != "codepoint":
            return
        if options.get("aggregation_strategy") == "none":
            return  # the text of an entity is its token
        for item, result in zip(items, answer["results"], strict=False):
            if "error" in result and MARK in str(result["error"]):
                yield f"the error of an item repeats the request: {result['error']}"
            yield from _faults_of_spans(item.get("text", item.get("context", "")), result)


def _faults_of_spans(text: str, result: dict[str, Any]) -> Iterator[str]:
    for name in ("entities", "predicted_answers", "extracted"):
        for span in result.get(name) or ():
            if span["start"] is not None and text[span["start"] : span["end"]] != span["text"]:
                yield f"{name}: text from {span['start']} to {span['end']} is another"


def _faults_of_error(answer: httpx.Response) -> Iterator[str]:
    problem = Refused.model_validate_json(answer.content).error
    if MARK in answer.text:
        yield f"{answer.status_code} {problem.code} repeats the request: {answer.text[:300]}"
    if "Traceback" in answer.text:
        yield "a traceback"


def _parsed(content: bytes) -> tuple[Any, bool]:
    try:
        return json.loads(content.removeprefix(b"\xef\xbb\xbf").decode()), True
    except (ValueError, RecursionError):
        return None, False


class Lines(logging.Handler):
    """Log lines that tell of a fault, or repeat what was sent."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if MARK in line or record.exc_info or record.levelno >= logging.ERROR:
            self.wrong.append(f"log: {line[:300]} {record.exc_info}")


# ---- the fuzz -----------------------------------------------------------------------------------


@dataclass
class Found:
    """Outcome of a fuzz: answers by status and code, and what was wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)


async def fuzz(client: httpx.AsyncClient, n: int, seed: int, first: int = 0) -> Found:
    """Sends `n` bodies, some at a time, and judges the answers."""
    found = Found()
    judge = Judge((await client.get("/openapi.json")).json())
    honest = await _honest(client)
    n_of_schema = int(n * OF_SCHEMATHESIS) if n >= LONG else 0
    of_schema = of_schemathesis(seed, n_of_schema, judge.document) if n_of_schema else []
    numbers = range(first, first + n - len(of_schema))
    requests = iter([*of_schema, *numbers])

    async def work() -> None:
        for each in requests:
            sent = of_grammar(seed, each, judge.requests) if isinstance(each, int) else each
            started = time.monotonic()
            try:
                answer = await client.post(sent.path, content=sent.content, headers=JSON)
            except Exception as error:
                found.wrong.append(f"{sent.number} {sent.path}: no answer: {error!r}")
                continue
            found.slowest = max(found.slowest, (time.monotonic() - started, sent.number))
            for fault in judge.faults(sent, answer):
                found.wrong.append(f"{sent.number} {sent.path}: {fault}")
                print(found.wrong[-1], sent.content[:300], file=sys.stderr)
            code = "" if answer.status_code == 200 else answer.json().get("error", {}).get("code")
            found.statuses[f"{answer.status_code} {code}".strip()] += 1
            if found.statuses.total() % HONEST_EVERY:
                continue
            print(f"{found.statuses.total()}: {len(found.wrong)} wrong", file=sys.stderr)
            if await _honest(client) != honest:
                found.wrong.append(f"after {sent.number}, honest requests get other answers")

    await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
    if await _honest(client) != honest:
        found.wrong.append("at the end, honest requests get other answers")
    return found


async def _honest(client: httpx.AsyncClient) -> list[Any]:
    found = []
    for path, body in PLAIN.items():
        answer = await client.post(path, json=body)
        while answer.status_code == 429:  # others wait
            await asyncio.sleep(0.1)
            answer = await client.post(path, json=body)
        if answer.status_code != 200:
            print(f"honest {path}: {answer.status_code} {answer.text[:300]}", file=sys.stderr)
        found.append(_without_noise(answer.json()))
    return found


def _without_noise(value: Any) -> Any:
    """Numbers without their last digits, which depend on what shares a batch."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_noise(inner) for name, inner in value.items()}
    return value


@asynccontextmanager
async def in_this_process(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application over a tiny model."""
    config = ModelConfig(**MODEL, model=str(folder), max_batch_tokens=4096)
    app = AppConfig(models=(config,), request_timeout_s=600, **LIMITS)
    api = make_api(app, {"tiny": Engine.load(config)})
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client,
    ):
        yield client


@asynccontextmanager
async def behind_ray(folder: Path, log: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `erniem-batch serve`, on this machine."""
    from .serve_drill import Service

    config = log.with_suffix(".yaml")
    config.write_text(json.dumps({"models": [{**MODEL, "model": str(folder)}], **LIMITS}))
    command = Service(config, log, faulty=False)
    try:
        command.wait_ready()
        async with httpx.AsyncClient(base_url=command.url, timeout=120) as client:
            yield client
    finally:
        command.end()


@app.default
def run(*, bodies: int = 100_000, seed: int = 1, first: int = 0, serve: bool = False) -> int:
    """Fuzz, print the figures, and end with 1 if anything was wrong."""
    lines = Lines()
    logging.getLogger().addHandler(lines)

    async def all_of_it(folder: Path) -> Found:
        model = save_tiny_service(folder / "model", ErnieMTokenizer.from_pretrained(TOKENIZER))
        log = folder / "log"
        async with behind_ray(model, log) if serve else in_this_process(model) as client:
            found = await fuzz(client, bodies, seed, first)
        if serve and (MARK in log.read_text() or "Traceback" in log.read_text()):
            found.wrong.append("the log of the service repeats the request, or has a traceback")
        return found

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(all_of_it(Path(folder)))
    wrong = [*found.wrong, *lines.wrong]
    for line in wrong[:100]:
        print(line)
    total, seconds = found.statuses.total(), time.monotonic() - started
    print(f"{total} bodies in {seconds:.0f} s, seed {seed}: {len(wrong)} wrong")
    print(f"slowest {found.slowest[0]:.2f} s (body {found.slowest[1]})")
    print(", ".join(f"{status}: {count}" for status, count in found.statuses.most_common()))
    return 1 if wrong else 0


def main() -> int:
    result = app(sys.argv[1:], result_action="return_value")
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
