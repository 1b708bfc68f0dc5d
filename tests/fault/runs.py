"""The command as a user starts it, the processes that belong to it, and how to end them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "ERNIEM_DRILL_RUN"
TIMEOUT_S = 240.0
GONE_S = 6.0
HUNG = -999  # in place of an exit code


@dataclass(frozen=True)
class Process:
    """A process of this machine; `started` tells it from a later one with the same number."""

    pid: int
    parent: int
    session: int
    started: int
    command: str


def processes() -> dict[int, Process]:
    """All that are alive now."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                process = _process(int(entry.name))
                if process is not None:
                    found[process.pid] = process
    return found


def _process(pid: int) -> Process | None:
    folder = Path("/proc") / str(pid)
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), command.strip())


def below(root: int) -> list[Process]:
    """The process itself, those of its session, and all that they started."""
    there = processes()
    mine = {p.pid for p in there.values() if p.pid == root or p.session == root}
    while more := {p.pid for p in there.values() if p.parent in mine} - mine:
        mine |= more
    return [there[pid] for pid in sorted(mine)]


class Run:
    """`python -m erniem_batch.cli …` in a session of its own.

    Args:
        arguments: the command and what comes after it.
        environment: beside that of this process without Ray's variables.
        log: gets what it prints.
        code: folder with the package.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        code: Path = ROOT,
    ) -> None:
        self.log = log
        self.started = time.monotonic()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        paths = [str(code), inherited.get("PYTHONPATH", "")]
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        inherited[MARK] = uuid.uuid4().hex
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "erniem_batch.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=code,
                env={**inherited, **(environment or {})},
                start_new_session=True,
            )
        self._known: dict[int, Process] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_on(self) -> bool:
        return self._process.poll() is None

    def look(self) -> list[Process]:
        """Its processes now; they are remembered, since an orphan no longer says whose it was."""
        found = below(self.pid)
        self._known |= {process.pid: process for process in found}
        return found

    def actors(self) -> list[Process]:
        """The processes with a model in them."""
        return [p for p in self.look() if "ray::MapWorker" in p.command]

    def send(self, number: signal.Signals) -> None:
        self.look()
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """The exit code; a run that does not end is ended, and gives HUNG."""
        deadline = time.monotonic() + timeout
        looked = 0.0
        while self.is_on:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                self._process.wait()
                return HUNG
            if time.monotonic() > looked + 1:
                looked = time.monotonic()
                self.look()
            time.sleep(0.02)
        return self._process.wait()

    def end(self, patience: float = GONE_S) -> list[Process]:
        """Waits until all its processes are gone, and ends what is left; gives those."""
        if self.is_on:
            self.send(signal.SIGKILL)
            self._process.wait()
        deadline = time.monotonic() + patience
        while (left := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return left

    def _left(self) -> Iterator[Process]:
        self.look()
        now = processes()
        for process in self._known.values():
            there = now.get(process.pid)
            if there is not None and there.started == process.started:
                yield there

    def report(self) -> str:
        """The last lines that it printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [re.sub(r"\s+", " ", line) for line in text.splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith("{")]
        return " | ".join(told[-4:])[-500:]


def answer(*arguments: object) -> Any:
    """What a command of ours says on stdout, in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "erniem_batch.cli", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])


def wait_until(condition: Callable[[], bool], timeout: float, every: float = 0.03) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every)
    return condition()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
