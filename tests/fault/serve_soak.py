"""The service for a long time under mixed load, to see that nothing is left over and memory stays.

    python tests/fault/serve_soak.py --minutes 30

Clients with time to think ask for all six tasks with short, long and odd texts; some of what they
send is wrong, and some hang up. Prints one line of JSON: how requests ended, memory of the replica
and of the proxy, and by how many MB an hour each grows over the last two thirds, by least squares.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

# As a script it finds itself only.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fault.runs import Process
from tests.fault.serve_drill import Service, digest, honest, text_of

SAMPLE_S = 10.0
METRICS_S = 15.0  # Ray passes on what it counts with some delay
THINK_S = 0.4
BAD_SHARE, HANG_UP_SHARE, ODD_SHARE, LONG_SHARE = 0.05, 0.04, 0.08, 0.03
ODD_TEXTS = ["", " \n\t", "\x00", "\u200d" * 50, "e" + "\u0301" * 400, "x" * 20_000, "😀" * 300]
BAD_BODIES: list[Any] = [
    {},
    {"inputs": 7},
    {"inputs": "a", "options": {"none": 1}},
    {"inputs": {"text": "a", "more": 1}},
    {"inputs": "a", "model": "none"},
]
MODEL = {"name": "demo", "model": "demo", "num_cpus": 1, "max_batch_tokens": 2048}


@dataclass
class Counts:
    """How requests ended, and how many have not."""

    ended: Counter[str] = field(default_factory=Counter)
    n_open: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Client:
    """Asks, thinks, asks again; on a line of its own, which it drops from time to time."""

    def __init__(self, url: str, number: int, counts: Counts) -> None:
        self._url = url
        self._random = random.Random(f"soak-{number}")
        self._counts = counts

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            async with httpx.AsyncClient(timeout=120) as line:
                for _ in range(self._random.randint(5, 50)):
                    await self._once(line)
                    await asyncio.sleep(self._random.expovariate(1 / THINK_S))
                    if time.monotonic() > until:
                        break

    async def _once(self, line: httpx.AsyncClient) -> None:
        kind, task, body = self._request()
        # Who hangs up does so within a moment, whether the answer is there or not.
        patience = self._random.uniform(0.001, 0.05) if kind == "hang up" else 120.0
        counts = self._counts
        counts.n_open += 1
        started = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                response = await line.post(f"{self._url}/v1/{task}", json=body)
            status = str(response.status_code)
        except TimeoutError:
            status = "gone"
        except httpx.TransportError as error:
            status = type(error).__name__
        finally:
            counts.n_open -= 1
        counts.ended[f"{kind}: {status}"] += 1
        right = {"good": {"200"}, "bad": {"404", "422"}, "hang up": {"200", "gone"}}[kind]
        if status not in right:
            counts.unexpected[f"{kind} {task}: {status}"] += 1
        elif kind == "good":
            counts.seconds.append(time.monotonic() - started)

    def _request(self) -> tuple[str, str, Any]:
        """What kind it is, the task and the body."""
        r = self._random
        task, body = honest(r)
        share = r.random()
        if share < BAD_SHARE:
            return "bad", "ner", r.choice(BAD_BODIES)
        if share < BAD_SHARE + HANG_UP_SHARE:
            return "hang up", task, body
        name = {"choose": "premise", "qa": "context"}.get(task, "text")
        if share < BAD_SHARE + HANG_UP_SHARE + ODD_SHARE:
            body["inputs"][name] = r.choice(ODD_TEXTS)
            if task == "qa" and not body["inputs"][name].strip():
                return "bad", task, body  # in nothing there is no answer
        elif share < BAD_SHARE + HANG_UP_SHARE + ODD_SHARE + LONG_SHARE:
            body["inputs"][name] = text_of(r, r.randint(50, 150))
        return "good", task, body


# ---- memory -------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Megabytes of some processes over time.

    Attributes:
        samples: seconds since the start, and megabytes, by what the process is.
        pids: each that was seen.
    """

    started: float = field(default_factory=time.monotonic)
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    pids: dict[str, set[int]] = field(default_factory=dict)

    def look(self, name: str, processes: Sequence[Process]) -> None:
        megabytes = sum(rss(process.pid) for process in processes)
        self.pids.setdefault(name, set()).update(process.pid for process in processes)
        self.samples.setdefault(name, []).append((time.monotonic() - self.started, megabytes))

    def figures(self, name: str) -> dict[str, float]:
        """First, last and highest, and the slope of the last two thirds."""
        samples = self.samples[name]
        end = samples[-1][0]
        late = [(at, mb) for at, mb in samples if at >= end / 3]
        return {
            "first_mb": round(samples[0][1], 1),
            "last_mb": round(samples[-1][1], 1),
            "highest_mb": round(max(mb for _, mb in samples), 1),
            "mb_per_hour": round(slope(late), 1),
            "samples": len(samples),
            "processes": len(self.pids[name]),
        }


def rss(pid: int) -> float:
    """Megabytes of memory that a process holds; 0 if it is gone."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Megabytes an hour of the line that fits best."""
    if len(samples) < 2:
        return 0.0
    at, mb = np.array(samples).T
    return float(np.polyfit(at / 3600, mb, 1)[0])


# ---- the soak -----------------------------------------------------------------------------------


async def soak(service: Service, minutes: float, clients: int) -> dict[str, Any]:
    """The load and the samples; figures."""
    counts, memory = Counts(), Memory()
    until = time.monotonic() + 60 * minutes
    tasks = [
        asyncio.create_task(Client(service.url, number, counts).run(until))
        for number in range(clients)
    ]
    while time.monotonic() < until:
        memory.look("replica", service.replicas())
        memory.look("proxy", service.proxies())
        await asyncio.sleep(min(SAMPLE_S, max(0.0, until - time.monotonic())))
    _, left = await asyncio.wait(tasks, timeout=180)
    for task in left:
        task.cancel()
    await asyncio.sleep(METRICS_S)
    health = httpx.get(f"{service.url}/healthz", timeout=30).json()
    seconds = sorted(counts.seconds) or [0.0]
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": sum(counts.ended.values()),
        "ended": dict(sorted(counts.ended.items())),
        "unexpected": dict(counts.unexpected),
        "unfinished": counts.n_open,
        "waiting_tokens": waiting_tokens(service),
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 1),
        "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
        "health": health,
        "memory": {name: memory.figures(name) for name in memory.samples},
    }


def waiting_tokens(service: Service) -> float | None:
    """What still waits in the queues, as the service tells Prometheus; None: it cannot be asked."""
    found = re.search(r"metrics\s+(http\S+)", service.log.read_text(errors="replace"))
    if found is None:
        return None
    lines = httpx.get(found[1], timeout=30).text.splitlines()
    values = [line for line in lines if line.startswith("ray_erniem_serve_waiting_tokens{")]
    return sum(float(line.rpartition(" ")[2]) for line in values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", default=MODEL["model"])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with everything it has started
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        config = Path(name) / "serve.yaml"
        config.write_text(yaml.safe_dump({"models": [{**MODEL, "model": arguments.model}]}))
        service = Service(config, Path(name) / "log", faulty=False)
        try:
            service.wait_ready()
            assert digest(service.url)
            figures = asyncio.run(soak(service, arguments.minutes, arguments.clients))
            figures["exit_code"], seconds = service.finish()
            figures["exit_s"] = round(seconds, 1)
        finally:
            service.end()
    print(json.dumps(figures), flush=True)
    wrong = figures["unexpected"] or figures["unfinished"] or figures["exit_code"]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
