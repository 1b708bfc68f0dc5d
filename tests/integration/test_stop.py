"""Ctrl-C and SIGTERM at any moment: one sentence, an exit code, no traceback; a rerun completes."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import listening
import pytest
from fakes import write_jsonl
from fault.runs import free_port
from faulty import words
from terminal import CTRL_C, Terminal, in_terminal

from erniem_batch.job.status import status
from erniem_batch.stopping import SENTENCE

ROOT = Path(__file__).parents[2]
SEED = 20_261
# Documented are 2 s; the machine of the tests has much else to do.
SECONDS_TO_END = 10.0
PROGRAM = "from erniem_batch.entry import program; raise SystemExit(program())"
COMMAND = [sys.executable, "-c", PROGRAM]

pytestmark = pytest.mark.timeout(900)


def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return inherited | {"PYTHONPATH": str(ROOT)}


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def is_stopped_well(terminal: Terminal, expected: int) -> float:
    """The process has ended as documented; how many seconds that took."""
    started = time.monotonic()
    code = terminal.wait(60)
    took = time.monotonic() - started
    told = terminal.text()
    assert code == expected, told
    assert told.count(SENTENCE) == 1, told
    assert "Traceback" not in told, told
    assert "Exception ignored" not in told, told
    assert took < SECONDS_TO_END, told
    return took


def stop(terminal: Terminal, number: int) -> float:
    """By the key or from outside."""
    if number == signal.SIGINT:
        terminal.press(CTRL_C)
    else:
        terminal.process.send_signal(number)
    return is_stopped_well(terminal, 128 + number)


@pytest.fixture
def job(tmp_path: Path, ner_model_dir: Path) -> list[str]:
    for name in "abcd":
        rows = [{"id": f"{name}-{i}", "text": words(i)} for i in range(200)]
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", rows)
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    flags += ["--model", str(ner_model_dir), "--window-tokens", "64", "--overlap-tokens", "16"]
    return [*COMMAND, "ner", *flags, "--actors", "1", "--unit-bytes", "2000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_while_modules_are_imported(tmp_path: Path, number: int, delay: float) -> None:
    with in_terminal([*COMMAND, "ner", "--help"], environment(), tmp_path) as terminal:
        wait_until(lambda: terminal.hears(signal.SIGTERM))
        time.sleep(delay)
        stop(terminal, number)


@pytest.mark.parametrize("script", ["ner.py", "finetune.py", "evaluate.py"])
def test_scripts_hear_it_too(tmp_path: Path, script: str) -> None:
    command = [sys.executable, str(ROOT / "pipelines" / script), "--help"]
    with in_terminal(command, environment(), tmp_path) as terminal:
        wait_until(lambda: terminal.hears(signal.SIGTERM))
        stop(terminal, signal.SIGINT)


def test_a_watch_ends(tmp_path: Path) -> None:
    (tmp_path / "out" / "_run").mkdir(parents=True)
    (tmp_path / "out" / "_run" / "lease.json").write_text(
        '{"owner": "x", "machine": "y", "host": "z", "pid": 1, "beat": 0, "released": ""}'
    )
    command = [*COMMAND, "status", "out", "--watch", "60"]
    with in_terminal(command, environment(), tmp_path) as terminal:
        wait_until(lambda: terminal.hears(signal.SIGTERM))
        time.sleep(1.5)
        stop(terminal, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_twenty_moments_of_a_run(tmp_path: Path, job: list[str], number: int) -> None:
    """Spread over a whole run, and twice in some; what is left is done by the last one."""
    draw = random.Random(SEED + number)
    started = time.monotonic()
    other = [word.replace(str(tmp_path / "out"), str(tmp_path / "whole")) for word in job]
    with in_terminal(other, environment(), tmp_path) as whole:
        assert whole.wait(200) == 0, whole.text()
    seconds = time.monotonic() - started
    longest, n_stopped = 0.0, 0
    for moment in range(20):
        with in_terminal(job, environment(), tmp_path) as terminal:
            wait_until(lambda terminal=terminal: terminal.hears(signal.SIGTERM))
            give_up = time.monotonic() + seconds * (moment + draw.random()) / 20
            while time.monotonic() < give_up and terminal.process.poll() is None:
                terminal.text(0.02)
            if terminal.process.poll() is not None:
                assert terminal.process.returncode == 0, terminal.text()
                continue
            family = listening.family(terminal.process.pid)
            if moment % 4 == 3:
                terminal.press(CTRL_C * 2)
                is_stopped_well(terminal, 130)
            else:
                longest = max(longest, stop(terminal, number))
            n_stopped += 1
            wait_until(lambda family=family: not any(map(listening.command_of, family)))
    assert n_stopped >= 10
    print(f"{n_stopped} runs stopped, the slowest within {longest:.1f} s")
    with in_terminal(job, environment(), tmp_path) as terminal:
        assert terminal.wait(200) == 0, terminal.text()
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_work_that_is_stopped_is_said_to_be(tmp_path: Path, job: list[str]) -> None:
    """Ray's own processes get the key too, and end with ours."""
    with in_terminal(job, environment(), tmp_path) as terminal:
        ledger = tmp_path / "out" / "_run" / "attempts"
        wait_until(lambda: terminal.text() is not None and ledger.exists(), 120)
        family = listening.family(terminal.process.pid)
        assert len(family) > 5
        hosts = {host for host, _ in listening.addresses(terminal.process.pid)}
        assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1"}, "nothing of it is open to others"
        stop(terminal, signal.SIGINT)
        wait_until(lambda: not any(map(listening.command_of, family)))
    assert status(str(tmp_path / "out")).state == "stopped"


TRAIN = ROOT / "erniem_batch" / "demo" / "annotated" / "train.jsonl"
OTHERS = {
    "plan": ["plan", "ner"],
    "demo": ["ner"],
    "finetune": [
        "finetune",
        "--task",
        "classify",
        "--model",
        "demo",
        "--epochs",
        "50",
        "--output",
        "trained",
    ],
    "serve": ["serve", "--tasks", "ner"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_at_five_moments(tmp_path: Path, name: str) -> None:
    """Until a service is ready; what ends before is skipped."""
    draw = random.Random(f"{SEED}{name}")
    n_stopped = 0
    command = OTHERS[name]
    if name == "serve":
        command = [*command, "--port", str(free_port())]
    if name == "finetune":
        command = [*command, "--train", str(TRAIN)]
    for latest in (2, 4, 8, 12, 16):
        with in_terminal([*COMMAND, *command], environment(), tmp_path) as terminal:
            wait_until(lambda terminal=terminal: terminal.hears(signal.SIGTERM))
            give_up = time.monotonic() + draw.uniform(0.5, 1.0) * latest
            while time.monotonic() < give_up and terminal.process.poll() is None:
                terminal.text(0.02)
            if terminal.process.poll() is not None:
                assert terminal.process.returncode == 0, terminal.text()
                continue
            family = listening.family(terminal.process.pid)
            if "end with Ctrl-C" not in terminal.text():
                stop(terminal, signal.SIGINT)
                n_stopped += 1
        wait_until(lambda family=family: not any(map(listening.command_of, family)))
    assert n_stopped >= 2


@pytest.mark.slow
@pytest.mark.parametrize("n_keys", [1, 2])
def test_a_service_ends_by_the_key(tmp_path: Path, n_keys: int) -> None:
    """It finishes what was accepted, unless the key comes again."""
    command = [*COMMAND, "serve", "--tasks", "ner", "--port", str(free_port())]
    with in_terminal(command, environment(), tmp_path) as terminal:
        wait_until(lambda: "end with Ctrl-C" in terminal.text(), 120)
        terminal.press(CTRL_C)
        if n_keys == 2:
            wait_until(lambda: "finishing what was accepted" in terminal.text())
            stop(terminal, signal.SIGINT)
        else:
            assert terminal.wait(60) == 0
            assert "Traceback" not in terminal.text()
            assert SENTENCE not in terminal.text()
