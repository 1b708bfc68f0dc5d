"""A run stands still before one of its effects, another one takes over, then the first goes on."""

import json
import os
import random
import re
import signal
from contextlib import suppress
from pathlib import Path

from erniem_batch import storage

from .faults import INCOMPLETE, USAGE, Case, Missed, Setting
from .pause import VARIABLE
from .results import compare, read_result
from .runs import HUNG, Run, wait_until

ASLEEP_S = 120.0
# What the one says that stood still, and what the other one may say to a lock that it holds.
LOST = ("another run has taken over", "a later run has published")
LOCKED = "holds its lock"


def recorded(output: str, who: str, record: Path) -> dict[str, str]:
    """The environment of a run whose effects are written down."""
    return _variable(folder=_folder(output), who=who, record=str(record))


def effects_in(record: Path) -> list[str]:
    """What was written down: one kind of effect a line, in order."""
    return record.read_text().splitlines() if record.exists() else []


def moment(effects: list[str], number: int, seed: str) -> int:
    """Which effect the run of this number stands still before: kinds take turns in an order of
    chance, and of one kind those at its beginning and its end."""
    kinds = list(dict.fromkeys(effects))
    random.Random(seed).shuffle(kinds)
    places = [i for i, effect in enumerate(effects) if effect == kinds[number % len(kinds)]]
    return places[0 if number // len(kinds) % 2 == 0 else -1]


def fall_asleep(case: Case, number: int, who: str) -> None:
    """Stops the run before an effect of its driver or actor; the same command takes over."""
    at = moment(case.setting.effects[who], number, f"{who} {Path(case.setting.folder).name}")
    stopped = case.log.with_suffix(".stopped")
    pause = _variable(
        folder=_folder(case.output), who=who, at=at, record=os.devnull, stopped=str(stopped)
    )
    run = case.start(pause)
    wait_until(lambda: stopped.exists() or not run.is_on, ASLEEP_S)
    if not stopped.exists():
        if run.wait() == 0:
            raise Missed
        case.problems.append(f"ended before effect {at}: {run.report()}")
        return
    pid, effect = stopped.read_text().strip().split(" ", 1)
    case.notes.append(f"{who} before {effect}")
    run.send(signal.SIGSTOP)  # of an actor, its driver stands still with it
    other = case.start()
    code = other.wait()
    done = None if code else read_result(case.output)
    for sleeper in {int(pid), run.pid}:
        with suppress(ProcessLookupError):
            os.kill(sleeper, signal.SIGCONT)
    late = run.wait()
    _check(case, effect, run, late, other, code)
    if done is not None:
        _check_unharmed(case, done)
    case.code = 0 if code == 0 else HUNG
    case.clear(run)
    case.clear(other)


def _check(case: Case, effect: str, run: Run, late: int, other: Run, code: int) -> None:
    """How both may end."""
    if code == 0:
        text = run.log.read_text()
        if late != INCOMPLETE or not any(words in text for words in LOST):
            case.problems.append(f"{effect}: the late run ended with {late}: {run.report()}")
        if "Traceback" in text:
            case.problems.append(f"{effect}: the late run ended with a traceback")
    elif code not in (USAGE, INCOMPLETE) or LOCKED not in other.log.read_text():
        case.problems.append(f"{effect}: the other run ended with {code}: {other.report()}")


def _check_unharmed(case: Case, done: object) -> None:
    """What the other run has made is as it was, after the late one has ended."""
    now = read_result(case.output)
    found = compare(now, done, set())  # type: ignore[arg-type]
    strays = re.compile(r"stray file (_dead_letters/|_run/|.*\.tmp$)")
    # What a late attempt leaves is removed by the next run, and named by no manifest.
    problems = [problem for problem in found.problems if not strays.match(problem)]
    if found.lost or found.repeated or problems:
        case.problems.append(f"the late run has changed results: {found.lost} {problems[:3]}")


def _folder(output: str) -> str:
    return output.partition("://")[2] if storage.is_remote(output) else output


def _variable(**values: object) -> dict[str, str]:
    return {VARIABLE: json.dumps(values)}


def record_effects(setting: Setting, log: Path) -> list[str]:
    """Two more undisturbed runs, whose effects are written down; gives what went wrong."""
    problems = []
    for who in ("driver", "actor"):
        record = log.with_suffix(f".{who}.effects")
        case = Case(setting, f"{setting.folder}/record-{who}", log, f"record {who}")
        case.ends(case.start(recorded(case.output, who, record)), 0)
        case.clear(case.runs[-1])
        setting.effects[who] = effects_in(record)
        problems += case.problems
    return problems
