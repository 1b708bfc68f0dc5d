"""The service under load on this machine, beside others, in one run.

    python -m tests.benchmarks.serve [--seconds 40] [--repeat 3] [--infinity-python PATH] [--quick]

The model is made here: ErnieM of the size of ernie-m-base with random weights, and heads for named
entities and classification; --quick takes two layers and few measurements. Texts come one a
request, from `wrk` (Debian's package) with 1, 8, 32 and 128 clients, each of which sends its next
text when it has its answer. `short` texts have 10 to 40 tokens, of many languages; of `mixed` ones
18 % have 100 to 400 tokens and 2 % have 700 to 1,500, which take several windows.

  bare      Our Predictor in a loop, no service: one text a call, lists of 32, all in one call.
            Lists of 32, what 32 clients have under way at a time, are the mark, 100 %; all in one
            call can be sorted by length, which no service can do.
  ours      `erniem-batch serve` behind Ray Serve's own proxy.
  direct    The same, asked past the proxy at the replica's own port (`--direct-port`).
  naive     transformers behind `@serve.batch`, as tutorials have it. It cuts long texts off, so of
            `mixed` it computes less: compare tokens/s.
  infinity  infinity-emb, of the Python given, for classification and embeddings. It does not know
            ErnieM: it gets the same weights as an XLM-RoBERTa, which is the same network. Its
            tokenizer is that of XLM-R, so counts of tokens differ a little.

What the service adds to a single forward pass is measured in pairs: the pass in a process of its
own, then the request, in turn (serve/paired.py). What Ray Serve itself takes is seen by texts of no
token, from 32 clients (`empty`): so many a second it passes on when there is nothing to compute.
With the cores shared, a service cannot do more than 1 / (1 / bare + 1 / empty) texts a second: what
is `possible` as a share of bare. Requests with 8 texts each show the service without that.

What share of bare 32 clients get is measured in turns of --seconds: the bare loop, the service, the
bare loop, and so on; all processes of the service are held while the bare loop runs. The share of a
turn is that of the mean of the bare loop before and after it, and the median of the turns counts:
a machine that becomes slower or faster meanwhile does so for both.

All have the same threads and float32. They take turns, each alone on the machine; with --repeat, in
turned order every other round, and figures are medians of the rounds. A rate is that of whole
seconds after the first answer, since until then nobody can be done; --seconds should be many times
a latency all the same. wrk fills its histogram of latencies with requests that were never sent,
where answers are slow: that is taken out again. A table goes to stderr, one line of JSON to stdout.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from tests.benchmarks.watch import descendants

HERE = Path(__file__).parent
PARTS = HERE / "serve"
REPOSITORY = HERE.parents[1]
# The vocabulary of ERNIE-M where there is one beside the repository, else that of the demo.
VOCAB = REPOSITORY.parent / "shared" / "vocab"
DEMO_VOCAB = REPOSITORY / "erniem_batch" / "demo" / "encoder"
CLIENTS = (1, 8, 32, 128)
KINDS = ("short", "mixed")
TASKS = ("ner", "classify", "embed")
NAMES = ("ours", "direct", "naive", "infinity")
PROMISED = ("ours", "direct")
START_S = 300
STOP_S = 60
ANSWER_S = 300
WARM_UP_S = 3
# For a rate, and answers for each client; of fewer, the whole time counts.
LEAST_SECONDS = 5
LEAST_ANSWERS = 5
AWAKE_S = 1.5
TARGET_SHARE = 0.85
TARGET_CLIENTS = 32
LIST = 8
TARGET_ADDED_MS = 15.0
# Of a turn of the bare loop at most: Ray looks after its processes, and was never held longer.
MAX_HELD_S = 16.0

app = App(help=__doc__, default_parameter=Parameter(consume_multiple=True))
console = Console(stderr=True, width=120)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server.

    Attributes:
        command: starts it; PORT stands for the port.
        routes: for each task, where to send a text, and the body around it.
        environment: what it needs beside that of all.
    """

    name: str
    command: Sequence[str]
    routes: Mapping[str, tuple[str, Callable[[str], Any]]]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """What one measurement showed.

    Attributes:
        p50_ms, p99_ms: None if nothing was answered.
        server_ms: what the server says of a request, on average.
    """

    answers: int
    texts_per_s: float
    tokens_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    refused: int
    broken: int
    server_ms: dict[str, float]


Key = tuple[str, str, str, int]  # contender, task, kind of text, clients


@dataclass(frozen=True)
class Turn:
    """A load between two runs of the bare loop.

    Attributes:
        bare: texts a second of the bare loop, the mean of before and after.
        bare_tokens: the same in tokens.
    """

    load: Load
    bare: float
    bare_tokens: float

    @property
    def share(self) -> float:
        return self.load.texts_per_s / self.bare

    @property
    def share_of_tokens(self) -> float:
        return self.load.tokens_per_s / self.bare_tokens


@dataclass
class Seen:
    """All that was measured so far, a list for the rounds."""

    loads: dict[Key, list[Load]] = field(default_factory=dict)
    turns: dict[Key, list[Turn]] = field(default_factory=dict)
    paired: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bare: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


# ---- contenders ---------------------------------------------------------------------------------


def contenders(folder: Path, threads: int, infinity_python: Path | None) -> list[Contender]:
    model = folder / "model"
    script = Path(sys.executable).parent / "erniem-batch"
    ours = Contender(
        name="ours",
        command=[str(script), "serve", "--model", str(model), "--tasks", ",".join(TASKS),
                 "--num-cpus", str(threads), "--port", "PORT"],
        routes={
            "ner": ("/v1/ner", lambda text: {"inputs": text}),
            "classify": ("/v1/classify", lambda text: {"inputs": text, "options": {"top_k": 3}}),
            "embed": ("/v1/embeddings", lambda text: {"input": text}),
        },
    )  # fmt: skip
    direct = replace(
        ours,
        name="direct",
        command=[
            *("OTHER" if part == "PORT" else part for part in ours.command),
            "--direct-port",
            "PORT",
        ],
    )
    naive = Contender(
        name="naive",
        command=[sys.executable, str(PARTS / "naive.py"), str(model / "ner"), "PORT", str(threads)],
        routes={"ner": ("/", lambda text: {"inputs": text})},
        # Read when Ray is imported: without it, it would leave a token in the home folder.
        environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    )
    if infinity_python is None:
        return [ours, direct, naive]
    infinity = Contender(
        name="infinity",
        command=[
            str(infinity_python.parent / "infinity_emb"), "v2", "--host", "127.0.0.1", "--port",
            "PORT", "--engine", "torch", "--device", "cpu", "--dtype", "float32", "--batch-size",
            "32", "--no-compile", "--no-bettertransformer", "--lengths-via-tokenize",
            "--model-id", str(folder / "xlmr" / "classify"), "--served-model-name", "classify",
            "--model-id", str(folder / "xlmr" / "embed"), "--served-model-name", "embed",
        ],
        routes={
            "classify": ("/classify", lambda text: {"model": "classify", "input": [text]}),
            "embed": ("/embeddings", lambda text: {"model": "embed", "input": text}),
        },
        environment={"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )  # fmt: skip
    return [ours, direct, naive, infinity]


@contextmanager
def running(
    contender: Contender, folder: Path, threads: int
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that answers, and its process, for as long as it is needed."""
    port = free_port()
    ports = {"PORT": str(port), "OTHER": str(free_port())}
    command = [ports.get(part, part) for part in contender.command]
    log_path = folder / f"{contender.name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command, env=environment(threads) | dict(contender.environment), stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for_answer(contender, address, process, log_path)
        yield address, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment(threads: int) -> dict[str, str]:
    """Threads for all alike; a Ray that happens to run is left alone."""
    mine = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    mine.pop("RAY_SERVE_ENABLE_HA_PROXY", None)
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return mine | numbers | {"TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_answer(
    contender: Contender, address: str, process: subprocess.Popen[bytes], log: Path
) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            for task in contender.routes:
                ask(contender, address, task)
            return
        except (URLError, OSError):  # not there yet, or not ready
            time.sleep(0.5)
    tail = log.read_text(errors="replace")[-2000:]
    raise SystemExit(f"{contender.name} did not start:\n{tail}")


def ask(contender: Contender, address: str, task: str) -> None:
    """One request; when it is answered, so are all before it."""
    path, body_of = contender.routes[task]
    body = json.dumps(body_of("Ada Lovelace lived in London.")).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(address + path, body, headers), timeout=ANSWER_S) as response:
        response.read()


# ---- measurements -------------------------------------------------------------------------------


def measure_server(
    contender: Contender, folder: Path, plan: Sequence[tuple[str, str, int]], seconds: float,
    threads: int, n_turns: int, seen: Seen,
) -> None:  # fmt: skip
    """All of a server, started for it."""
    with running(contender, folder, threads) as (address, process):
        for kind in seen.bare if contender.name == "ours" else ():  # by the proxy
            added = measure_added(address, folder, kind, seconds, threads)
            seen.paired.setdefault(kind, []).append(added)
        warm: set[tuple[str, str]] = set()
        for task, kind, n_clients in plan:
            if task not in contender.routes:
                continue
            path, body_of = contender.routes[task]
            bodies = folder / f"{contender.name}-{task}-{kind}.jsonl"
            texts = json.loads((folder / f"{kind}.json").read_text())
            bodies.write_text("".join(f"{json.dumps(body_of(text))}\n" for text in texts))
            if (task, kind) not in warm:
                put_under_load(address + path, bodies, 8, min(WARM_UP_S, seconds))
                warm.add((task, kind))
            ask(contender, address, task)
            key = contender.name, task, kind, n_clients
            measure = partial(put_under_load, address + path, bodies, n_clients, seconds)
            if task == "ner" and n_clients == TARGET_CLIENTS and contender.name in PROMISED:
                turns = measure_turns(key, measure, process.pid, folder, seconds, threads, n_turns)
                seen.turns.setdefault(key, []).extend(turns)
                loads = [turn.load for turn in turns]
            else:
                loads = [measure()]
                tell(key, loads[0])
            seen.loads.setdefault(key, []).extend(loads)


def measure_turns(
    key: Key, measure: Callable[[], Load], server: int, folder: Path, seconds: float,
    threads: int, n_turns: int,
) -> list[Turn]:  # fmt: skip
    """The bare loop and a server, one after the other."""
    found: list[Turn] = []
    with bare_loop(folder, key[2], threads) as loop:

        def alone() -> dict[str, float]:
            with held(server):
                return loop(min(seconds, MAX_HELD_S))

        before = alone()
        for _ in range(n_turns):
            load = measure()
            after = alone()
            bare, tokens = (
                statistics.mean(one[unit] for one in (before, after))
                for unit in ("texts_per_s", "tokens_per_s")
            )
            found.append(Turn(load, bare, tokens))
            tell(key, load, f"{found[-1].share:.1%} of {bare:.1f}")
            before = after
    return found


@contextmanager
def bare_loop(
    folder: Path, kind: str, threads: int
) -> Iterator[Callable[[float], dict[str, float]]]:
    """A function that runs the predictor for so many seconds, in a process of its own."""
    command = [sys.executable, str(PARTS / "bare.py"), str(folder / "model" / "ner"), "ner",
               str(folder / f"{kind}.json"), "in-turns"]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(threads)
    ) as process:
        sink, source = process.stdin, process.stdout
        assert sink is not None
        assert source is not None

        def loop(seconds: float) -> dict[str, float]:
            sink.write(f"{seconds}\n")
            sink.flush()
            report: dict[str, float] = json.loads(source.readline())
            return report

        yield loop


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Nothing of a server runs meanwhile; it would take some of the cores even when nobody asks."""
    processes = [pid, *descendants(pid)]
    try:
        send_all(processes, signal.SIGSTOP)
        yield
    finally:
        send_all(processes, signal.SIGCONT)
        time.sleep(AWAKE_S)


def send_all(processes: Sequence[int], number: signal.Signals) -> None:
    """One that has ended meanwhile must not leave the others as they are."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def put_under_load(url: str, bodies: Path, n_clients: int, seconds: float) -> Load:
    command = ["wrk", "-t1", f"-c{n_clients}", f"-d{max(1, round(seconds))}s",
               "--timeout", f"{ANSWER_S}s", "-s", str(PARTS / "load.lua"), url,
               "--", str(bodies)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    n_answers = max(1, seen["requests"])
    latencies = latencies_of(seen, n_clients)
    texts_per_s, tokens_per_s = rates_of(seen, n_clients)
    return Load(
        answers=seen["requests"],
        texts_per_s=texts_per_s,
        tokens_per_s=tokens_per_s,
        p50_ms=percentile(latencies, 0.50),
        p99_ms=percentile(latencies, 0.99),
        refused=seen["refused"],
        broken=seen["broken"],
        server_ms={name: round(ms / n_answers, 1) for name, ms in seen["spent_ms"].items()},
    )


def rates_of(seen: Mapping[str, Any], n_clients: int) -> tuple[float, float]:
    """Answers with 200 a second, and their tokens, while all clients were at work: without the time
    to the first answer, and without the last second, which is no whole one."""
    answers = {second: (n, tokens) for second, n, tokens in seen["seconds"]}
    whole = range(min(answers, default=0) + 1, max(answers, default=0))
    if len(whole) < LEAST_SECONDS or seen["requests"] < LEAST_ANSWERS * n_clients:
        spent = seen["micros"] / 1e6
        n, tokens = (sum(column) for column in zip((0, 0), *answers.values(), strict=True))
        return n / spent, tokens / spent
    counts = [answers.get(second, (0, 0)) for second in whole]
    n, tokens = (sum(column) / len(whole) for column in zip(*counts, strict=True))
    return n, tokens


def latencies_of(seen: Mapping[str, Any], n_clients: int) -> dict[int, int]:
    """How many requests took so many microseconds.

    wrk 4 adds, for each request that took twice the usual time or more, those that an open queue
    would have seen meanwhile (stats_correct in its stats.c). Ours is closed: from the slowest down,
    they are taken out again.
    """
    counts: Counter[int] = Counter(dict(seen["histogram"]))
    a_client = seen["requests"] // n_clients
    if a_client and counts.total() > seen["requests"]:
        usual = seen["micros"] // a_client
        for micros in sorted(counts, reverse=True):
            if micros < 2 * usual:
                break
            added = micros - usual
            while counts[micros] and added > usual:
                counts[added] -= counts[micros]
                added -= usual
    if counts.total() != seen["requests"]:
        raise SystemExit(f"{counts.total()} latencies of {seen['requests']} requests: another wrk?")
    return counts


def percentile(counts: Mapping[int, int], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    left = share * sum(counts.values())
    for micros in sorted(counts):
        left -= counts[micros]
        if left <= 0:
            return micros / 1000
    return None


def measure_bare(folder: Path, kind: str, seconds: float, threads: int) -> dict[str, Any]:
    report = run_part("bare.py", folder, kind, seconds, threads)
    console.print(f"bare {kind}: {json.dumps(report)}", highlight=False)
    return report


def measure_added(
    address: str, folder: Path, kind: str, seconds: float, threads: int
) -> dict[str, Any]:
    """By the service at this address to a forward pass; and what the way to it takes by itself."""
    report = run_part("paired.py", folder, kind, seconds, threads, f"{address}/v1/ner")
    bodies = folder / "empty.jsonl"
    bodies.write_text('{"inputs": ""}\n')
    empty = put_under_load(f"{address}/v1/ner", bodies, TARGET_CLIENTS, seconds)
    report["empty_per_s"] = empty.texts_per_s
    texts = json.loads((folder / f"{kind}.json").read_text())
    lists = [texts[i : i + LIST] for i in range(0, len(texts) - LIST + 1, LIST)]
    bodies.write_text("".join(f"{json.dumps({'inputs': list_})}\n" for list_ in lists))
    many = put_under_load(f"{address}/v1/ner", bodies, TARGET_CLIENTS, seconds)
    report["in_lists"] = {"texts_per_s": LIST * many.texts_per_s, "tokens_per_s": many.tokens_per_s}
    console.print(f"paired {kind}: {json.dumps(report)}", highlight=False)
    return report


def run_part(
    name: str, folder: Path, kind: str, seconds: float, threads: int, *more: str
) -> dict[str, Any]:
    command = [sys.executable, str(PARTS / name), str(folder / "model" / "ner"), "ner",
               str(folder / f"{kind}.json"), str(seconds), *more]  # fmt: skip
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment(threads)
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def tell(key: Key, load: Load, share: str = "") -> None:
    name, task, kind, n_clients = key
    console.print(
        f"{name} {task} {kind} clients={n_clients} {share} {load.texts_per_s:.1f} texts/s "
        f"p50={millis(load.p50_ms)} ms p99={millis(load.p99_ms)} ms {load.server_ms or ''}",
        highlight=False,
    )


# ---- report -------------------------------------------------------------------------------------


def millis(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def middle(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of numbers, and of numbers in mappings; None where one is missing."""
    found: dict[str, Any] = {}
    for name in rounds[0]:
        values = [one.get(name) for one in rounds]
        if None in values:
            found[name] = None
        elif isinstance(values[0], Mapping):
            found[name] = middle(values)
        else:
            found[name] = round(statistics.median(values), 2)
    return found


def marks(seen: Seen) -> dict[str, float]:
    """Texts a second that are 100 %, by kind: the bare loop, in turn with the service if it was."""
    found = {kind: middle(many)["lists"]["texts_per_s"] for kind, many in seen.bare.items()}
    for (_, _, kind, _), turns in seen.turns.items():
        found[kind] = statistics.median(turn.bare for turn in turns)
    return found


def targets(seen: Seen) -> list[dict[str, Any]]:
    """What the service promises, and whether it holds."""
    found: list[dict[str, Any]] = []
    for (name, _, kind, n_clients), turns in seen.turns.items():
        shares = sorted(turn.share for turn in turns)
        share = statistics.median(shares)
        found.append(
            {
                "target": f"{name} {kind}: share of bare at {n_clients} clients",
                "limit": TARGET_SHARE,
                "is": round(share, 3),
                "turns": [round(value, 3) for value in shares],
                # The longest texts may be done when the time is over: then tokens compare.
                "in_tokens": round(statistics.median(t.share_of_tokens for t in turns), 3),
                "met": share >= TARGET_SHARE,
            }
        )
        if kind in seen.paired and name == "ours":
            bare = marks(seen)[kind]
            paired = middle(seen.paired[kind])
            found[-1]["possible"] = round(1 / (1 + bare / paired["empty_per_s"]), 3)
            found[-1][f"with_{LIST}_a_request"] = round(paired["in_lists"]["texts_per_s"] / bare, 3)
    for kind, many in seen.paired.items():
        added = middle(many)["added_ms"]
        found.append({"target": f"{kind}: ms added to a forward pass, p50, 1 client",
                      "limit": TARGET_ADDED_MS, "is": round(added, 1),
                      "met": added <= TARGET_ADDED_MS})  # fmt: skip
    return found


def ratios(loads: Mapping[Key, dict[str, Any]]) -> dict[str, float]:
    """Ours by the others, in texts a second (naive: in tokens, since it drops some)."""
    found = {}
    for (name, task, kind, n_clients), load in loads.items():
        mine = loads.get(("ours", task, kind, n_clients))
        unit = "tokens_per_s" if name == "naive" else "texts_per_s"
        if name not in ("ours", "direct") and mine is not None and load[unit]:
            found[f"{name} {task} {kind} {n_clients}"] = round(mine[unit] / load[unit], 2)
    return found


def print_table(seen: Seen) -> None:
    table = Table("task", "texts", "clients", "server", "texts/s", "of rounds", "answers",
                  "tokens/s", "p50 ms", "p99 ms", "not 2xx", "of bare")  # fmt: skip
    mark = marks(seen)
    for kind, rounds in seen.bare.items():
        for way, values in middle(rounds).items():
            table.add_row(
                "ner", kind, "-", f"bare, {way}", f"{values['texts_per_s']:.1f}", "", "",
                f"{values['tokens_per_s']:.0f}" if way != "one" else "",
                f"{values['forward_ms']:.0f}" if way == "one" else "", "", "",
                f"{values['texts_per_s'] / mark[kind]:.0%}",
            )  # fmt: skip
    for key in sorted(seen.loads, key=lambda key: (key[1] != "ner", *key[1:], key[0])):
        name, task, kind, n_clients = key
        load = middle([asdict(one) for one in seen.loads[key]])
        speeds = [one.texts_per_s for one in seen.loads[key]]
        share = load["texts_per_s"] / mark[kind] if kind in mark else None
        if key in seen.turns:
            share = statistics.median(turn.share for turn in seen.turns[key])
        table.add_row(
            task, kind, str(n_clients), name, f"{load['texts_per_s']:.1f}",
            f"{min(speeds):.1f}-{max(speeds):.1f}", f"{load['answers']:.0f}",
            f"{load['tokens_per_s']:.0f}", millis(load["p50_ms"]), millis(load["p99_ms"]),
            f"{load['refused'] + load['broken']:.0f}", "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    console.print(table)


@app.default
def main(
    *,
    seconds: float = 40,
    repeat: int = 1,
    turns: int = 6,
    infinity_python: Path | None = None,
    quick: bool = False,
    clients: list[int] | None = None,
    kinds: list[str] | None = None,
    tasks: list[str] | None = None,
    servers: list[str] | None = None,
    threads: int = 2,
    vocab: Path | None = None,
) -> None:
    """Prints a table on stderr and a line of JSON.

    Args:
        seconds: Of each measurement.
        repeat: Rounds.
        turns: Of the bare loop and the service with 32 clients, in each round.
        infinity_python: Python with infinity-emb 0.0.78 (`pip install torch==2.13.0
            "infinity-emb[server,torch]" "click<8.2" "typer<0.13"`); default: left out.
        quick: A model of two layers, two measurements a server: to see that it all works.
        clients: How many at a time.
        kinds: Of texts: short, mixed.
        tasks: ner, classify, embed. The naive server does ner, infinity the others.
        servers: ours, direct, naive, infinity; default: all.
        threads: Of torch, for all.
        vocab: Folder with the vocabulary of the model; default: ../shared/vocab beside the
            repository if it is there, else that of the demo.
    """
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed (Debian: apt install wrk)")
    seconds = min(seconds, 2) if quick else seconds
    turns = min(turns, 2) if quick else turns
    n_clients = clients or ([1, TARGET_CLIENTS] if quick else CLIENTS)
    kinds = kinds or (["mixed"] if quick else list(KINDS))
    tasks = tasks or (["ner", "embed"] if quick and infinity_python else list(TASKS))
    vocab = vocab or (DEMO_VOCAB if quick or not VOCAB.is_dir() else VOCAB)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, vocab, quick)
        everybody = contenders(folder, threads, infinity_python)
        running_order = [c for c in everybody if c.name in (servers or NAMES)]
        plan = [p for p in product(tasks, kinds, n_clients) if not quick or p[0] == tasks[0]
                or p[2] == TARGET_CLIENTS]  # fmt: skip
        seen = Seen()
        machine = [os.getloadavg()[0]]
        for number in range(repeat):
            for kind in kinds:
                seen.bare.setdefault(kind, []).append(measure_bare(folder, kind, seconds, threads))
            for server in running_order if number % 2 == 0 else reversed(running_order):
                if not set(tasks) & set(server.routes):
                    continue
                measure_server(server, folder, plan, seconds, threads, turns, seen)
                machine.append(os.getloadavg()[0])
    medians = {key: middle([asdict(one) for one in many]) for key, many in seen.loads.items()}
    print_table(seen)
    line: dict[str, Any] = {
        "seconds": seconds,
        "rounds": repeat,
        "threads": threads,
        "cores": os.cpu_count(),
        "layers": layers(quick),
        "vocabulary": vocab.name,
        "load_average": [round(value, 1) for value in machine],
        "infinity": "measured" if infinity_python else "skipped: no --infinity-python",
        "bare": {kind: middle(many) for kind, many in seen.bare.items()},
        "paired": {kind: middle(many) for kind, many in seen.paired.items()},
        "targets": targets(seen),
        "ours_by": ratios(medians),
        "loads": {" ".join(map(str, key)): value for key, value in medians.items()},
    }
    for target in line["targets"]:
        console.print(target, highlight=False)
    if infinity_python is None:
        console.print("infinity: skipped, no --infinity-python", highlight=False)
    print(json.dumps(line))


def layers(quick: bool) -> int:
    return 2 if quick else 12


def make_inputs(folder: Path, vocab: Path, quick: bool) -> None:
    console.print("making models and texts …")
    command = [sys.executable, "-m", "tests.benchmarks.inputs", str(folder.resolve()),
               "--vocab", str(vocab.resolve()), "--layers", str(layers(quick))]  # fmt: skip
    subprocess.run(command, check=True, cwd=REPOSITORY)


if __name__ == "__main__":
    app()
