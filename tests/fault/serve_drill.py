"""The service drill: a real Ray Serve under load, while requests, replicas and models go wrong.

    python -m tests.fault.serve_drill [--only poison] [--seconds 60]

Tiny models of all tasks are served as `erniem-batch serve` does it, by a process of its own with a
Ray and a port of its own; asynchronous clients ask for all tasks with short and long texts. Prints
one line of JSON with the figures of each drill, and ends with 1 if one was not as promised.
"""

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import yaml
from cyclopts import App, Parameter
from fakes import save_tiny_ner_model, save_tiny_service
from ray import serve as ray_serve
from rich.console import Console

from erniem_batch import ErnieMTokenizer
from erniem_batch.errors import DeviceError
from erniem_batch.options import TASKS
from erniem_batch.predictor import Predictor
from erniem_batch.records import FloatArray, Window
from erniem_batch.serve import deployments, models
from erniem_batch.serve.config import AppConfig, ModelConfig, app_config
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.serve.run import NAME
from erniem_batch.serve.run import serve as run_service

from .corpus import SENTENCES, TOKENIZER
from .runs import HUNG, MARK, ROOT, Process, Run, free_port

# Words of one token each. A window with one of them makes its forward pass …
POISON = "œ"  # … raise, as a kernel may
LOST = "ß"  # … find that the device is gone
HANGER = "ψ"  # … never end
# What a replica shall note and do, by environment variables: it inherits them.
PASSES, CHILD_LIMITS = "ERNIEM_DRILL_PASSES", "ERNIEM_DRILL_CHILD_LIMITS"
SIZES = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 1024, "num_cpus": 1}
HANG_S = 5.0
START_S = 180.0
REPLACED_S = 120.0
GRACE_S = 30.0
FLOW_S = 60.0

console = Console(stderr=True, highlight=False)


# ---- in the processes of the service ------------------------------------------------------------


class FaultyPredictor(Predictor):
    """Fails at some words, and notes in a file which passes had poison in them."""

    def _forward_all(self, windows: Sequence[Window]) -> Any:
        if PASSES in os.environ:
            with open(os.environ[PASSES], "a") as file:
                file.write("P" if self._has(POISON, windows) else ".")
        return super()._forward_all(windows)

    def _run(self, windows: Sequence[Window]) -> list[FloatArray]:
        if self._has(POISON, windows):
            raise RuntimeError("the kernel does not like this")
        if self._has(LOST, windows):
            raise DeviceError("the device is gone (not really)")
        while self._has(HANGER, windows):
            time.sleep(1)
        return super()._run(windows)

    def _has(self, word: str, windows: Sequence[Window]) -> bool:
        token = self.tokenizer(word)["input_ids"][1]
        return any(token in window.ids for window in windows)


class FaultyHttpServer(deployments.HttpServer):
    """The deployment that speaks HTTP; what it loads can fail."""

    async def __init__(self, config: AppConfig, served: Mapping[str, Any]) -> None:  # type: ignore[misc]
        models.Predictor = FaultyPredictor  # type: ignore[misc]
        await super().__init__(config, served)


class FaultyModelServer(deployments.ModelServer):
    """A deployment with a model that can fail."""

    async def __init__(self, config: ModelConfig) -> None:  # type: ignore[misc]
        models.Predictor = FaultyPredictor  # type: ignore[misc]
        await super().__init__(config)


def faulty_app(args: AppConfig) -> Any:
    """The application with servers that can fail, and models with the limits of the environment."""
    options = deployments._options
    limits = json.loads(os.environ.get(CHILD_LIMITS, "{}"))

    def limited(name: str, args: AppConfig, model: ModelConfig | None) -> dict[str, Any]:
        return {**options(name, args, model), **(limits if name != "http" else {})}

    deployments.HttpServer = FaultyHttpServer  # type: ignore[misc]
    deployments.ModelServer = FaultyModelServer  # type: ignore[misc]
    deployments._options = limited
    try:
        return original_app(args)
    finally:
        deployments._options = options


original_app = deployments.app


def child(config: str, port: int) -> None:
    """Serves as the command does; each line of standard input names a config to change to."""
    deployments.app = faulty_app

    def until() -> None:
        for line in sys.stdin:
            ray_serve.run(faulty_app(read_config(line.strip())), name=NAME, route_prefix="/")
            print("changed", flush=True)

    run_service(ServeFlags(config=config, port=port), until)


def read_config(path: str) -> AppConfig:
    return app_config(yaml.safe_load(Path(path).read_text()))


# ---- the service, from outside ------------------------------------------------------------------


class Service(Run):
    """A process with a service, its Ray and its replicas.

    Args:
        config: file with its settings.
        log: gets what it prints.
        faulty: with a model that can fail, and can be told to change; else the plain command.
    """

    def __init__(
        self,
        config: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
        faulty: bool = True,
    ) -> None:
        self.log = log
        self.started = time.monotonic()
        self._faulty = faulty
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = ["-m", "erniem_batch.cli", "serve", "--config", str(config), "--port", str(port)]
        if faulty:
            name = "tests.fault.serve_drill"
            command = ["-c", f"import {name} as drill; drill.child({str(config)!r}, {port})"]
            # Ray reads them when it is imported, which is before the command would set them.
            secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            environment = {**secret, **(environment or {})}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        paths = [str(ROOT), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")]
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        inherited[MARK] = uuid.uuid4().hex
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**inherited, **(environment or {})},
                start_new_session=True,
            )
        self._known: dict[int, Process] = {}

    def wait_ready(self) -> None:
        """Returns when it answers.

        Raises:
            RuntimeError: it does not.
        """
        while time.monotonic() < self.started + START_S:
            if not self.is_on:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the service did not start: {self.report()}")

    def replicas(self, name: str = "http") -> list[Process]:
        """The processes of a deployment."""
        title = f"ray::ServeReplica:{NAME}:{name}"
        return [process for process in self.look() if process.command.startswith(title)]

    def proxies(self) -> list[Process]:
        """The processes that listen to the outside."""
        return [process for process in self.look() if "ProxyActor" in process.command]

    def change(self, config: Path) -> None:
        """Changes to other settings; returns when Serve says that it has."""
        assert self._process.stdin is not None
        before = self.log.read_text(errors="replace").count("changed")
        self._process.stdin.write(f"{config}\n".encode())
        self._process.stdin.flush()
        deadline = time.monotonic() + START_S
        while self.log.read_text(errors="replace").count("changed") == before:
            if time.monotonic() > deadline or not self.is_on:
                raise RuntimeError(f"the model was not changed: {self.report()}")
            time.sleep(0.1)

    def finish(self) -> tuple[int, float]:
        """Asks it to end: exit code and seconds."""
        started = time.monotonic()
        if self._faulty and self._process.stdin is not None:
            self._process.stdin.close()  # it waits for that, not for signals
        else:
            self.send(signal.SIGTERM)
        return self.wait(120), time.monotonic() - started


# ---- load ---------------------------------------------------------------------------------------


def honest(r: random.Random) -> tuple[str, dict[str, Any]]:
    """A task and a body for it; one of ten texts is long."""
    task = r.choice(TASKS)
    is_long = r.random() < 0.1
    text = text_of(r, 40 if is_long else r.randint(1, 3))
    # A random model finds something everywhere: asked about each thing in a long text, it would
    # fill the queue by itself.
    schema = ["Person", "Place"] if is_long else ["Person", {"Place": ["Kind"]}]
    inputs: dict[str, dict[str, Any]] = {
        "choose": {"premise": text, "choices": ["one", "two"], "question": "cause"},
        "qa": {"question": "Who?", "context": text},
        "extract": {"text": text, "schema": schema},
    }
    return task, {"inputs": inputs.get(task, {"text": text})}


def text_of(r: random.Random, n_sentences: int) -> str:
    """Some sentences in some languages."""
    languages = [r.choice(list(SENTENCES)) for _ in range(n_sentences)]
    return " ".join(SENTENCES[lang].format(n=r.randint(1, 2000)) for lang in languages)


def with_word(
    word: str, tasks: Sequence[str] = ("ner", "classify", "embed")
) -> Callable[[random.Random], tuple[str, dict[str, Any]]]:
    """Makes requests for some tasks, with a word in a short text."""

    def make(r: random.Random) -> tuple[str, dict[str, Any]]:
        return r.choice(tasks), {"inputs": f"{text_of(r, 1)} {word} {r.randint(0, 999)}"}

    return make


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        status: of HTTP; or the class of the error where there is none.
        code: of the error, in the one form; "no form" for an error in any other.
        began, ended: when, by the monotonic clock.
        retry_after: whether it says when to come again.
    """

    status: int | str
    code: str
    began: float
    ended: float
    retry_after: bool = False


@dataclass
class Load:
    """Clients that ask one request after the other until they are told to end.

    Attributes:
        answers: of all, in the order in which they came.
    """

    url: str
    seed: int = 1
    pause: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    _ended: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, n_clients: int, make: Callable[[random.Random], Any] = honest) -> None:
        for number in range(n_clients):
            r = random.Random(f"{self.seed}-{number}-{len(self._tasks)}")
            self._tasks.append(asyncio.create_task(self._client(make, r)))

    async def flow(self, n: int = 50) -> None:
        """Returns when so many answers have come, or the time is over."""
        deadline = time.monotonic() + FLOW_S
        while len(self.answers) < n and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def end(self) -> list[Answer]:
        """All answers, when the last one has come."""
        self._ended = True
        await asyncio.gather(*self._tasks)
        return self.answers

    async def _client(self, make: Callable[[random.Random], Any], r: random.Random) -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            while not self._ended:
                task, body = make(r)
                answer = await ask(client, f"{self.url}/v1/{task}", body)
                self.answers.append(answer)
                # Who was refused comes back a little later, as clients do.
                await asyncio.sleep(self.pause if answer.status == 200 else max(self.pause, 0.1))


async def ask(client: httpx.AsyncClient, url: str, body: Any) -> Answer:
    """One request."""
    began = time.monotonic()
    try:
        response = await client.post(url, json=body)
    except httpx.TransportError as error:
        return Answer(type(error).__name__, "", began, time.monotonic())
    return answer_of(response, began)


def answer_of(response: httpx.Response, began: float) -> Answer:
    code = ""
    if response.status_code != 200:
        try:
            code = response.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = "no form"
    told = "retry-after" in response.headers
    return Answer(response.status_code, code, began, time.monotonic(), told)


def counts(answers: Sequence[Answer]) -> dict[str, int]:
    """How many of each status and code."""
    found = Counter(f"{a.status} {a.code}".strip() for a in answers)
    return dict(sorted(found.items()))


def p95(answers: Sequence[Answer]) -> float:
    """Milliseconds within which 95 of 100 good answers came."""
    times = sorted(a.ended - a.began for a in answers if a.status == 200)
    return round(1000 * times[int(0.95 * len(times))], 1) if times else 0.0


# ---- drills -------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a drill has shown.

    Attributes:
        figures: to be printed.
        problems: what was not as promised.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


class Drill:
    """Settings, and one method for each drill.

    Args:
        work: folder for models, settings and logs.
        seconds: how long the load lasts where that is free to choose.
        clients: how many ask at a time.
    """

    def __init__(self, work: Path, seconds: float = 60.0, clients: int = 16) -> None:
        self._work = work
        self._seconds = seconds
        self._clients = clients
        tokenizer = ErnieMTokenizer.from_pretrained(TOKENIZER)
        self._model = save_tiny_service(work / "service", tokenizer)
        self._other = save_tiny_ner_model(work / "other", tokenizer, num_hidden_layers=1)

    def drills(self) -> dict[str, Callable[[], Awaitable[Found]]]:
        """By name."""
        return {
            "poison": self.poison,
            "kill": self.kill,
            "overflow": self.overflow,
            "overflow behind": self.overflow_behind,
            "kill behind": self.kill_behind,
            "change": self.change,
            "SIGTERM": self.terminate,
            "SIGTERM idle": self.terminate_idle,
            "SIGTERM behind": self.terminate_behind,
            "device lost": self.device_lost,
            "hanging pass": self.hanging_pass,
        }

    async def poison(self) -> Found:
        """A quarter of the clients send poison: they alone get errors."""
        passes = self._work / "passes"
        passes.unlink(missing_ok=True)
        found = Found()
        with self._service(environment={PASSES: str(passes)}) as service:
            good, bad = Load(service.url, 1), Load(service.url, 2)
            good.start(self._clients - self._clients // 4)
            bad.start(self._clients // 4, with_word(POISON))
            await asyncio.sleep(self._seconds)
            others, poisoned = counts(await good.end()), counts(await bad.end())
            health = httpx.get(f"{service.url}/healthz", timeout=30).status_code
        noted = passes.read_text()
        found.figures = {
            "others": others,
            "poisoned": poisoned,
            "passes": len(noted),
            "passes_with_poison": noted.count("P"),
            "p95_ms": p95(good.answers),
        }
        found.expect(set(others) == {"200"}, f"others suffered: {others}")
        found.expect(set(poisoned) == {"500 forward_failed"}, f"poison got {poisoned}")
        found.expect(noted.count("P") > 3, "there was no poison")
        found.expect(health == 200, f"/healthz says {health}")
        return found

    async def kill(self) -> Found:
        """kill -9 of the replica: requests in flight fail, and it is back without a hand."""
        with self._service() as service:
            return await self._killed(service, "http")

    async def kill_behind(self) -> Found:
        """kill -9 of a model behind the replica that speaks HTTP."""
        with self._service(self._two()) as service:
            return await self._killed(service, "one", with_word("", ("ner", "classify")))

    async def _killed(self, service: Service, name: str, make: Any = honest) -> Found:
        found = Found()
        load = Load(service.url)
        load.start(self._clients, make)
        await load.flow()
        (victim,) = service.replicas(name)
        killed = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        back = await self._back(service, victim, name)
        await asyncio.sleep(3)
        answers = await load.end()
        bad = [a for a in answers if a.status != 200]
        after = min((a.ended for a in answers if a.began > killed and a.status == 200), default=0.0)
        found.figures = {
            "before": counts([a for a in answers if a.ended < killed]),
            "in_flight": counts([a for a in answers if a.began < killed <= a.ended]),
            "after": counts([a for a in answers if a.began >= killed]),
            "first_answer_s": round(after - killed, 1),
            "last_failure_s": round(max((a.ended for a in bad), default=killed) - killed, 1),
            "replica_back_s": back,
        }
        found.expect(not [a for a in bad if a.ended < killed], "errors before the kill")
        found.expect(back is not None and after > 0, "it did not come back")
        faults = [a for a in bad if a.began > killed and a.status == 500]
        found.expect(not faults, f"{len(faults)} of those that came later got 500")
        return found

    async def _back(self, service: Service, before: Process, name: str) -> float | None:
        """Seconds until another replica is there and answers; None: there is none."""
        started = time.monotonic()
        async with httpx.AsyncClient(timeout=30) as client:
            while time.monotonic() < started + REPLACED_S:
                pids = {process.pid for process in service.replicas(name)}
                if pids - {before.pid}:
                    answer = await ask(client, f"{service.url}/v1/ner", {"inputs": "Ada"})
                    if answer.status == 200:
                        return round(time.monotonic() - started, 1)
                await asyncio.sleep(0.2)
        return None

    async def overflow(self) -> Found:
        """More than may wait: 429 with the time to come again, and nothing else."""
        with self._service({"models": [self._tiny(max_queue_tokens=2000)]}) as service:
            return await self._burst(service, 300)

    async def overflow_behind(self) -> Found:
        """The same with models behind: their refusals, and those of Serve for them."""
        limits = json.dumps({"max_ongoing_requests": 4, "max_queued_requests": 4})
        found = Found()
        for kind, environment, tokens in (
            ("queue of the model", {}, 2000),
            ("queue of Serve", {CHILD_LIMITS: limits}, 1_000_000),
        ):
            config = self._two(max_queue_tokens=tokens)
            with self._service(config, environment=environment) as service:
                one = await self._burst(service, 300, ("ner", "classify"))
            found.figures[kind] = one.figures
            found.problems += [f"{kind}: {problem}" for problem in one.problems]
        return found

    async def _burst(self, service: Service, n: int, tasks: Sequence[str] = TASKS) -> Found:
        found = Found()
        r = random.Random(5)
        limits = httpx.Limits(max_connections=None)
        looks: list[Answer] = []
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def look() -> None:
                for path in ("/v1/models", "/healthz") * 5:
                    began = time.monotonic()
                    looks.append(answer_of(await client.get(f"{service.url}{path}"), began))

            bodies = []
            while len(bodies) < n:
                task, body = honest(r)
                if task in tasks:
                    bodies.append((task, body))
            asks = [ask(client, f"{service.url}/v1/{task}", body) for task, body in bodies]
            *answers, _ = await asyncio.gather(*asks, look())
            await asyncio.sleep(2)
            later = [await ask(client, f"{service.url}/v1/{t}", body) for t, body in bodies[:10]]
        found.figures = {
            "burst": counts(answers),
            "looks": counts(looks),
            "afterwards": counts(later),
        }
        told = [a.retry_after for a in answers if a.status == 429]
        found.expect({a.status for a in answers} == {200, 429}, "not just 200 and 429")
        found.expect(all(told), f"{told.count(False)} of {len(told)} without Retry-After")
        found.expect({a.status for a in later} == {200}, "it does not recover")
        found.expect(all(a.status != 500 for a in looks), "a look at it gives 500")
        return found

    async def change(self) -> Found:
        """Another model under load: no request fails."""
        found = Found()
        first = {"models": [self._tiny(tasks=["ner"])]}
        second = {"models": [self._tiny(model=str(self._other))]}
        with self._service(first) as service:
            before = digest(service.url)
            load = Load(service.url)
            load.start(self._clients, with_word("", ("ner",)))
            await load.flow()
            started = time.monotonic()
            await asyncio.to_thread(service.change, self._config(second, "second"))
            changed = time.monotonic() - started
            await asyncio.sleep(3)
            answers = await load.end()
            after = digest(service.url)
        found.figures = {"answers": counts(answers), "change_s": round(changed, 1)}
        found.figures["p95_ms"] = p95(answers)
        found.expect({a.status for a in answers} == {200}, f"failures: {counts(answers)}")
        found.expect(before != after, "it is the same model")
        return found

    async def terminate(self) -> Found:
        """SIGTERM under load: what was accepted is answered."""
        return await self._ended(self._clients)

    async def terminate_idle(self) -> Found:
        """SIGTERM without any load, to compare."""
        return await self._ended(0)

    async def terminate_behind(self) -> Found:
        """SIGTERM under load with models behind: they must not go before what is asked of them."""
        make = with_word("", ("ner", "classify", "embed"))
        return await self._ended(self._clients, self._two(), make)

    async def _ended(
        self, n_clients: int, settings: Mapping[str, Any] | None = None, make: Any = honest
    ) -> Found:
        found = Found()
        with self._service(settings, faulty=False) as service:
            load = Load(service.url)
            load.start(n_clients, make)
            await (load.flow() if n_clients else asyncio.sleep(2))
            told = time.monotonic()
            code, seconds = await asyncio.to_thread(service.finish)
            answers = await load.end()
            report = service.report()
        found.figures = {
            "exit_code": code,
            "seconds": round(seconds, 1),
            "before": counts([a for a in answers if a.ended < told]),
            "in_flight": counts([a for a in answers if a.began < told <= a.ended]),
            "after": counts([a for a in answers if a.began >= told]),
        }
        open_ = [a for a in answers if a.began < told <= a.ended]
        found.expect(all(a.status == 200 for a in open_), "something accepted was not answered")
        found.expect(code == 0, f"exit code {'none' if code == HUNG else code}: {report}")
        found.expect(seconds < GRACE_S, f"it took {seconds:.0f} s")
        return found

    async def device_lost(self) -> Found:
        """The device is gone: the replica is replaced."""
        with self._service() as service:
            return await self._replaced(service, LOST)

    async def hanging_pass(self) -> Found:
        """A forward pass never ends: the replica is replaced."""
        with self._service({"models": [self._tiny(hang_s=HANG_S)]}) as service:
            return await self._replaced(service, HANGER)

    async def _replaced(self, service: Service, word: str) -> Found:
        found = Found()
        (victim,) = service.replicas()
        load = Load(service.url, pause=0.5)
        load.start(4)
        await load.flow(20)
        struck = time.monotonic()
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"inputs": f"Ada {word}"}
            blow = asyncio.create_task(ask(client, f"{service.url}/v1/ner", body))
            back = await self._back(service, victim, "http")
            answers = await load.end()
            first = await blow
        after = [a.ended for a in answers if a.began > struck and a.status == 200]
        found.figures = {
            "blow": f"{first.status} {first.code}",
            "blow_s": round(first.ended - first.began, 1),
            "replica_back_s": back,
            "others": counts([a for a in answers if a.ended > struck]),
            "first_answer_s": round(min(after) - struck, 1) if after else None,
        }
        found.expect(back is not None, "it was not replaced")
        return found

    # ---- settings -----------------------------------------------------------------------------

    def _tiny(self, **changes: Any) -> dict[str, Any]:
        return {"name": "tiny", "model": str(self._model), **SIZES, **changes}

    def _two(self, **changes: Any) -> dict[str, Any]:
        both = {"num_cpus": 0.5, **changes}
        one = self._tiny(name="one", tasks=["ner"], **both)
        return {"models": [one, self._tiny(name="two", tasks=["classify", "embed"], **both)]}

    def _config(self, settings: Mapping[str, Any], name: str = "first") -> Path:
        path = self._work / f"{name}-{uuid.uuid4().hex[:6]}.yaml"
        path.write_text(yaml.safe_dump({"request_timeout_s": 20, **settings}))
        return path

    @contextmanager
    def _service(
        self, settings: Mapping[str, Any] | None = None, **arguments: Any
    ) -> Iterator[Service]:
        config = self._config(settings or {"models": [self._tiny()]})
        service = Service(config, config.with_suffix(".log"), **arguments)
        try:
            service.wait_ready()
            yield service
        finally:
            if service.is_on:
                service.finish()
            service.end()


def digest(url: str) -> str:
    """Of the model for named entities."""
    card = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]
    found: str = card["digests"]["ner"]
    return found


app = App(name="serve_drill", help=__doc__, result_action="return_value")


@app.default
def drill(
    *,
    only: Annotated[list[str] | None, Parameter(negative=())] = None,
    seconds: float = 60.0,
    clients: int = 16,
    work: Path | None = None,
) -> int:
    """Disturbs a service, and counts what comes of it.

    Args:
        only: Drills whose name contains this; repeatable.
        seconds: Of the load with poison.
        clients: That ask at a time.
        work: Folder to keep logs in. Default: a temporary one, removed at the end.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="serve-drill-") as temporary:
        folder = Path(temporary)
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="serve-drill-", dir=work))
        for name, strike in Drill(folder, seconds, clients).drills().items():
            if only and not any(word in name for word in only):
                continue
            started = time.monotonic()
            try:
                found = asyncio.run(strike())
            except Exception as error:
                found = Found(problems=[f"{type(error).__name__}: {error}"])
            figures[name] = {**found.figures, "problems": found.problems}
            word = "[red]WRONG[/]" if found.problems else "as it should be"
            console.print(f"{name}: {word}, {time.monotonic() - started:.0f} s")
            console.print(f"   {json.dumps(figures[name])}", markup=False)
    print(json.dumps(figures))
    return 1 if any(each["problems"] for each in figures.values()) else 0


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with everything it has started
    result = app(sys.argv[1:])
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
