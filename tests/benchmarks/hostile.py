"""Short texts while somebody else sends hostile bodies: how much longer do they wait?

    python -m tests.benchmarks.hostile [--seconds 6] [--only "follow-up questions"]

The service runs as `erniem-batch serve` starts it, behind Ray Serve's proxy, on this machine alone.
Its models are random, of all tasks, with --hidden and --layers (a request of the client takes about
as long as with a small real one). One client asks for named entities in short texts, one after the
other. In turn for each body of `tests/hostile_bodies.py`, its latencies are measured

  quiet    while nobody else asks, for a third of --seconds, and
  hostile  while a process of its own sends the body again and again, --pause after each answer.

The quiet latencies of all turns are taken together: a machine that is slower for a while is so for
both. A ratio is p99 hostile by p99 quiet; the service promises less than --target. `half requests`
are connections that never send the rest of their bodies. Ends with 1 if a ratio reaches the target,
the client got no answer, or an answer was a fault.
"""

import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from cyclopts import App
from rich.console import Console
from rich.table import Table

import tests.fault  # finds `fakes` and `hostile_bodies`, as pytest does  # noqa: F401
from erniem_batch import ErnieMTokenizer

# isort: split
from fakes import TINY_MODELS, save_tiny_model
from hostile_bodies import EXPECTED_STATUSES, HOSTILE_BODIES, HostileBody, half_requests

from tests.fault.corpus import TOKENIZER
from tests.fault.serve_drill import Service

TEXTS = ["Ada Lovelace lived in London.", "Die Sitzung begann in Berlin.", "北京は大きい都市です。"]
HALF = "half requests"
# Of a hostile request, and of one of the client.
ANSWER_S = 20.0
# Least answers for a p99 that means something.
LEAST_ANSWERS = 100
JSON = {"Content-Type": "application/json"}

app = App(name="python -m tests.benchmarks.hostile", result_action="return_value")
console = Console(stderr=True, highlight=False)


@dataclass
class Turn:
    """What was seen while one body was sent.

    Attributes:
        quiet, hostile: milliseconds of each answer that the client got.
        statuses: answers to the hostile body.
        failed: requests of the client without a good answer.
    """

    name: str
    quiet: list[float] = field(default_factory=list)
    hostile: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    failed: int = 0


# ---- the honest client --------------------------------------------------------------------------


class Client:
    """Asks for named entities in short texts, one after the other, on one connection."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._host, timeout=ANSWER_S)
        self._bodies = [json.dumps({"inputs": text}).encode() for text in TEXTS]
        self.failed = 0

    def ask_for(self, seconds: float) -> list[float]:
        """Milliseconds of each good answer."""
        self._connection.close()  # the server may have closed it meanwhile
        end, spent = time.perf_counter() + seconds, []
        while time.perf_counter() < end:
            for body in self._bodies:
                started = time.perf_counter()
                if self._ask(body):
                    spent.append(1000 * (time.perf_counter() - started))
                else:
                    self.failed += 1
        return spent

    def _ask(self, body: bytes) -> bool:
        try:
            self._connection.request("POST", "/v1/ner", body, JSON)
            response = self._connection.getresponse()
            response.read()
            return response.status == 200
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False


# ---- the hostile one, in a process of its own ---------------------------------------------------


def send_hostile(orders: Connection, url: str, pause: float) -> None:
    """Waits for names of bodies; sends each until the next order, which an empty one ends."""
    bodies = {body.name: body for body in HOSTILE_BODIES}
    while name := orders.recv():
        if name == HALF:
            orders.send(hold_half_requests(orders, url))
        else:
            orders.send(send_again_and_again(orders, url, bodies[name], pause))


def send_again_and_again(
    orders: Connection, url: str, body: HostileBody, pause: float
) -> dict[str, int]:
    content, statuses = body.make(), Counter[str]()
    orders.send("ready")
    while not orders.poll(pause if statuses else 0):
        statuses[post(url, body.path, content)] += 1
    orders.recv()
    return dict(statuses)


def post(url: str, path: str, content: bytes) -> str:
    """The status, or the name of the error in its place."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)
    try:
        connection.request("POST", path, content, JSON)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        # A server may refuse a large body, and close the line, before it has read all of it.
        return type(error).__name__
    finally:
        connection.close()


def hold_half_requests(orders: Connection, url: str) -> dict[str, int]:
    n_connections = int(os.environ.get("HALF_REQUESTS", "1100"))
    where = urlsplit(url)
    try:
        with half_requests(str(where.hostname), int(where.port or 80), n_connections) as held:
            orders.send("ready")
            orders.recv()
            return {"held": len(held)}
    except OSError as error:
        orders.send("ready")
        orders.recv()
        return {type(error).__name__: 1}


@contextmanager
def hostile_process(url: str, pause: float) -> Iterator[Connection]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=send_hostile, args=(theirs, url, pause), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.terminate()
        process.join(10)


# ---- a turn -------------------------------------------------------------------------------------


def measure(client: Client, hostile: Connection, name: str, seconds: float) -> Turn:
    turn = Turn(name)
    turn.quiet = client.ask_for(seconds / 3)
    hostile.send(name)
    hostile.recv()
    failed = client.failed
    turn.hostile = client.ask_for(seconds)
    turn.failed = client.failed - failed
    hostile.send("stop")
    if hostile.poll(3 * ANSWER_S):
        turn.statuses = hostile.recv()
    return turn


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def report(turns: Sequence[Turn], target: float) -> tuple[dict[str, Any], bool]:
    """The figures, printed as a table; and whether all is as promised."""
    quiet = [ms for turn in turns for ms in turn.quiet]
    quiet_p50, quiet_p99 = percentile(quiet, 0.5), percentile(quiet, 0.99)
    table = Table("body", "answers", "p50 ms", "p99 ms", "max ms", "ratio", "its answers", "")
    table.add_row("(quiet)", str(len(quiet)), f"{quiet_p50:.1f}", f"{quiet_p99:.1f}",
                  f"{max(quiet, default=0):.1f}", "1.00", "", "")  # fmt: skip
    rows, good = [], True
    for turn in turns:
        p99 = percentile(turn.hostile, 0.99)
        ratio = p99 / quiet_p99
        expected = {str(status) for status in EXPECTED_STATUSES}
        faults = [s for s in turn.statuses if s.isdigit() and s not in expected]
        is_good = ratio < target and not turn.failed and not faults
        good = good and is_good
        few = len(turn.hostile) < LEAST_ANSWERS
        note = ("" if is_good else "NOT AS PROMISED") + (" few answers" if few else "")
        if turn.failed:
            note += f" {turn.failed} failed"
        table.add_row(turn.name, str(len(turn.hostile)), f"{percentile(turn.hostile, 0.5):.1f}",
                      f"{p99:.1f}", f"{max(turn.hostile, default=0):.1f}", f"{ratio:.2f}",
                      " ".join(f"{s}:{n}" for s, n in turn.statuses.items()), note)  # fmt: skip
        rows.append({"body": turn.name, "answers": len(turn.hostile), "failed": turn.failed,
                     "p50_ms": round(percentile(turn.hostile, 0.5), 2), "p99_ms": round(p99, 2),
                     "ratio": round(ratio, 2), "statuses": turn.statuses})  # fmt: skip
    console.print(table)
    figures = {
        "quiet": {"answers": len(quiet), "p50_ms": round(quiet_p50, 2),
                  "p99_ms": round(quiet_p99, 2)},
        "bodies": rows,
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "good": good,
    }  # fmt: skip
    return figures, good


# ---- the service --------------------------------------------------------------------------------


def save_models(folder: Path, hidden: int, n_layers: int) -> Path:
    """Random models of all tasks; that for labels knows entailment, for zero-shot requests."""
    tokenizer = ErnieMTokenizer.from_pretrained(TOKENIZER)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": n_layers,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": max(1, hidden // 32),
        "initializer_range": 0.05,
    }
    kinds = {**TINY_MODELS, "classify": TINY_MODELS["classify-entailment"]}
    kinds.pop("classify-entailment")
    for task, kind in kinds.items():
        name = "encoder" if task == "embed" else task
        save_tiny_model(folder / name, tokenizer, **{**kind, **sizes})
    return folder


@contextmanager
def started(folder: Path, log: Path) -> Iterator[str]:
    """The address of a service of all tasks, over a model folder."""
    config = log.with_suffix(".yaml")
    model = {"name": "small", "model": str(folder), "num_cpus": 1}
    config.write_text(yaml.safe_dump({"models": [model], "request_timeout_s": 15}))
    service = Service(config, log, faulty=False)
    try:
        service.wait_ready()
        yield service.url
    finally:
        try:
            service.finish()
        except subprocess.TimeoutExpired:
            pass
        finally:
            service.end()


@app.default
def main(
    *,
    seconds: float = 6,
    pause: float = 0.25,
    target: float = 2.0,
    only: list[str] | None = None,
    hidden: int = 256,
    layers: int = 4,
    url: str | None = None,
) -> None:
    """Prints a table on stderr and a line of JSON.

    Args:
        seconds: Of each body.
        pause: Seconds between an answer to a hostile body and the next time it is sent.
        target: Ratios of p99 must be below.
        only: Names of bodies; default: all, and half requests.
        hidden: Size of the models, which have that many numbers a token.
        layers: Of the models.
        url: A service that runs already; default: one is started.
    """
    names = [body.name for body in HOSTILE_BODIES] + [HALF]
    chosen = [name for name in names if only is None or name in only]
    if not chosen:
        raise SystemExit(f"--only must be one of: {', '.join(names)}")
    with tempfile.TemporaryDirectory() as temporary:
        if url is not None:
            turns = measure_all(url, chosen, seconds, pause)
        else:
            folder = save_models(Path(temporary) / "models", hidden, layers)
            with started(folder, Path(temporary) / "service.log") as address:
                turns = measure_all(address, chosen, seconds, pause)
    figures, good = report(turns, target)
    print(json.dumps(figures, ensure_ascii=False))
    if not good:
        sys.exit(1)


def measure_all(url: str, names: Sequence[str], seconds: float, pause: float) -> list[Turn]:
    client = Client(url)
    client.ask_for(2)  # warms up
    turns = []
    with hostile_process(url, pause) as hostile:
        for name in names:
            turns.append(measure(client, hostile, name, seconds))
            p99 = percentile(turns[-1].hostile, 0.99)
            console.print(f"{name}: p99 {p99:.1f} ms, {turns[-1].statuses}")
        hostile.send("")
    return turns


if __name__ == "__main__":
    app()
