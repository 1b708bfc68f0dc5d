"""How runs are disturbed: a fault strikes a Case, which then has to come to its end."""

import os
import random
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from erniem_batch.job.manifest import read_manifest

from .corpus import Corpus
from .results import Result, is_data, names_in
from .runs import HUNG, ROOT, Run, wait_until

RESTARTS = 4
STOP_S = 2.0  # a run ends within this after SIGTERM
START_S = 120.0
POOL = ["--actors", "1", "--num-cpus-per-actor", "1"]
KILLED, STOPPED, USAGE, INCOMPLETE = -int(signal.SIGKILL), 143, 2, 3

console = Console(stderr=True, highlight=False)


class Missed(Exception):
    """The run was over before the fault struck."""


class Wrong(Exception):
    """A run that nobody disturbed did not do what it should."""


class Skip(Exception):
    """This machine cannot do it."""


@dataclass(kw_only=True)
class Setting:
    """Where runs take place, and the undisturbed one that all others are compared with.

    Attributes:
        arguments: of the command, without --output and the pool.
        folder: of all outputs.
        logs: what the runs print.
        corpus: whose rows must come out.
        before: what the output folder begins with; None: it is new.
        old: the result in `before`.
        new_files: how many data files the work adds.
        code: folder with the package.
        command: with its arguments before `--output`, where it is not `ner`.
        effects: of an undisturbed run, by who has them, see `asleep.py`.
    """

    arguments: list[str]
    folder: str
    logs: Path
    corpus: Corpus
    pause: float = 0.1
    environment: dict[str, str] = field(default_factory=dict)
    before: Path | None = None
    old: Result | None = None
    reference: Result = field(default_factory=lambda: Result(b""))
    new_files: int = 0
    code: Path = ROOT
    command: str = "ner"
    effects: dict[str, list[str]] = field(default_factory=dict)


class Case:
    """One disturbed run, restarts included.

    Attributes:
        code: of the run that ended last.
        runs: all, in order.
        problems: what was not as promised.
        notes: what is worth knowing and no fault.
    """

    def __init__(self, setting: Setting, output: str, log: Path, seed: str) -> None:
        self.setting = setting
        self.output = output
        self.random = random.Random(seed)
        self.code = HUNG
        self.runs: list[Run] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.environment = dict(setting.environment)
        self.pool = list(POOL)
        self.log = log
        if setting.before is not None:
            shutil.copytree(setting.before, output)
        self._old = {name for name in names_in(output) if is_data(name)}

    def start(self, environment: Mapping[str, str] | None = None) -> Run:
        """The command, once more.

        Args:
            environment: of this run only.
        """
        log = self.log.with_suffix(f".{len(self.runs)}.log")
        variables = {**self.environment, **(environment or {})}
        run = Run(self._arguments(), log, variables, self.setting.code)
        self.runs.append(run)
        return run

    def _is_overwritten(self) -> bool:
        """Return whether the results of --overwrite are published."""
        published = read_manifest(self.output)
        return published is not None and published.generation > 1

    def _arguments(self) -> list[str]:
        if "--overwrite" in self.setting.arguments and self._is_overwritten():
            # Another one would start anew once more, with other names for the same results.
            rest = [each for each in self.setting.arguments if each != "--overwrite"]
            return ["ner", *rest, "--output", self.output, *self.pool]
        if self.setting.command == "replay":
            return ["replay", self.output, *self.setting.arguments, *self.pool]
        return ["ner", *self.setting.arguments, "--output", self.output, *self.pool]

    def new_files(self) -> int:
        """Data files that the runs have added so far."""
        names = {name for name in names_in(self.output) if is_data(name)}
        return len(names - self._old)

    def wait_for_work(self, run: Run, early: bool = False) -> None:
        """Until a random moment of the work of this run.

        Args:
            early: when it has just begun.

        Raises:
            Missed: the run has ended by itself.
        """
        there = self.new_files()
        latest = there if early else self.setting.new_files - 4
        wanted = 1 + self.random.randint(there, max(there, latest))
        every = 0.03 if self.setting.pause < 0.2 else 0.2
        wait_until(lambda: not run.is_on or self.new_files() >= wanted, START_S, every)
        time.sleep(self.random.uniform(0, 0.2))
        if not run.is_on:
            if run.wait() == 0 and self.new_files():
                raise Missed
            raise Wrong(f"the run ended before its first file: {run.report()}")

    def ends(self, run: Run, *codes: int) -> int:
        """Waits for the end of a run, which must be with one of these exit codes."""
        self.code = run.wait()
        if self.code not in codes:
            what = "did not end" if self.code == HUNG else f"ended with {self.code}"
            self.problems.append(f"a run {what}, not {codes}: {run.report()}")
        return self.code

    def clear(self, run: Run) -> None:
        """No actor of an ended run may live on; Ray's agents do for a while, and do no harm."""
        for process in run.end():
            if "ray::MapWorker" in process.command:
                self.problems.append(f"process {process.pid}, an actor, outlived its run")

    def finish(self) -> None:
        """Starts the command again until it is complete."""
        for _ in range(RESTARTS):
            if self.code == 0:
                return
            run = self.start()
            self.ends(run, 0, *self.setting_codes)
            self.clear(run)
        if self.code != 0:
            self.problems.append(f"not complete after {RESTARTS} restarts")

    @property
    def setting_codes(self) -> Sequence[int]:
        """Exit codes of a restart that may have to be followed by another one."""
        return (INCOMPLETE,) if self.environment != self.setting.environment else ()


# ---- faults -----------------------------------------------------------------------------------


def kill_driver(case: Case) -> None:
    """kill -9 of the driver, once or twice; half of the restarts come while its orphans live."""
    for _ in range(case.random.choice((1, 1, 2))):
        run = case.start()
        case.wait_for_work(run)
        run.send(signal.SIGKILL)
        case.ends(run, KILLED)
        if case.random.random() < 0.5:
            case.clear(run)


def kill_actor(case: Case) -> None:
    """kill -9 of an actor; the run goes on."""
    run = case.start()
    case.wait_for_work(run)
    actors = run.actors()
    if not actors:
        raise Missed
    os.kill(case.random.choice(actors).pid, signal.SIGKILL)
    case.ends(run, 0, INCOMPLETE)
    case.clear(run)


def terminate(case: Case) -> None:
    """SIGTERM of the driver: exit code 143 within two seconds."""
    run = case.start()
    case.wait_for_work(run)
    sent = time.monotonic()
    run.send(signal.SIGTERM)
    case.ends(run, STOPPED)
    seconds = time.monotonic() - sent
    case.notes.append(f"stopped in {seconds:.1f} s")
    if seconds > STOP_S:
        case.problems.append(f"SIGTERM took {seconds:.2f} s")
    case.clear(run)


def two_at_once(case: Case) -> None:
    """The same command twice: one of them is refused."""
    one = case.start()
    if case.random.random() < 0.5:
        time.sleep(case.random.uniform(0, 3))
    else:
        case.wait_for_work(one, early=True)
    other = case.start()
    codes = sorted((other.wait(), one.wait()))
    if codes == [0, 0] and '"n_units_now": 0,' in other.log.read_text():
        raise Missed  # it was so slow to start that all was done
    case.code = 0 if 0 in codes else codes[-1]
    refused = one if one.wait() == USAGE else other
    if codes != [0, USAGE] or "another run is writing" not in refused.log.read_text():
        case.problems.append(f"two runs ended with {codes}: {one.report()} / {other.report()}")
    case.clear(one)
    case.clear(other)


def kill_node(case: Case, nodes: "Nodes") -> None:
    """A whole node of a cluster goes, with its actors, and a new one comes."""
    case.environment = {**case.environment, "RAY_AUTH_MODE": "disabled"}
    case.pool = ["--actors", "2", "--num-cpus-per-actor", "1", "--address", nodes.address]
    run = case.start()
    case.wait_for_work(run)
    case.notes.append(f"{nodes.kill_one(case.random)} actors killed")
    time.sleep(case.random.uniform(0, 2))
    nodes.add()
    case.ends(run, 0, INCOMPLETE)
    case.clear(run)


def faulty_storage(case: Case, endpoint: str, number: int) -> None:
    """Object storage that answers 500 and 503, is slow, resets connections, cuts answers."""
    from .proxy import KINDS, FaultyProxy

    kinds = KINDS if number % 2 == 0 else (case.random.choice(KINDS),)
    seed = case.random.randrange(10**6)
    with FaultyProxy(endpoint, rate=0.3, seed=seed, kinds=kinds) as proxy:
        case.environment = {**case.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        run = case.start()
        case.ends(run, 0, INCOMPLETE)
        case.clear(run)
        case.finish()
    shown = ", ".join(f"{n} {kind}" for kind, n in sorted(proxy.counts.items()))
    case.notes.append(f"requests: {shown}")


def fill_disk(case: Case) -> None:
    """The disk of the output gets full; once there is room again, the same command goes on."""
    ballast = Path(case.output).parent / "ballast"
    run = case.start()
    case.wait_for_work(run)
    try:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16)[: 1 << 12])
        if case.ends(run, INCOMPLETE) == INCOMPLETE and "No space left" not in run.log.read_text():
            case.problems.append(f"no clear message: {run.report()}")
    finally:
        ballast.unlink()
    case.clear(run)


# ---- settings ---------------------------------------------------------------------------------


class Nodes:
    """A cluster on this machine: a head without work and two nodes."""

    def __init__(self, stack: ExitStack) -> None:
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, **self._common(160)}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(self._cluster.shutdown)
        self._nodes: list[Any] = []
        self.add()
        self.add()
        self.address = self._cluster.address

    @staticmethod
    def _common(megabytes: int) -> dict[str, Any]:
        return {"object_store_memory": megabytes << 20, "dashboard_agent_listen_port": 0}

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=2, **self._common(120)))

    def kill_one(self, generator: random.Random) -> int:
        """Ends a node, if possible one with actors; gives their number."""
        from .runs import below

        counts = []
        for node in self._nodes:
            pid = node.all_processes["raylet"][0].process.pid
            counts.append(sum("ray::MapWorker" in process.command for process in below(pid)))
        busy = [i for i, n in enumerate(counts) if n] or list(range(len(counts)))
        chosen = generator.choice(busy)
        self._cluster.remove_node(self._nodes.pop(chosen), allow_graceful=False)
        return counts[chosen]
