"""A command that runs, and the memory of its Ray actors and of its driver meanwhile."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EVERY_S = 0.5
# What Ray calls the process of an actor of ours.
ACTOR = "UnitTagger"


@dataclass
class Peaks:
    """Of memory in MB; each the highest of its kind that was seen.

    Attributes:
        actor_rss: of one actor; pages that it shares with others counted in full.
        actor_anonymous: of one actor; what comes from no file, so that nobody else has it.
        all_pss: of all actors together; shared pages counted once.
    """

    n_actors: int = 0
    seconds: float = 0.0
    driver_rss: float = 0.0
    actor_rss: float = 0.0
    actor_anonymous: float = 0.0
    all_pss: float = 0.0
    driver_over_time: list[float] = field(default_factory=list)
    actor_over_time: list[float] = field(default_factory=list)


def erniem_batch(*arguments: str) -> list[str]:
    """The command line of this environment."""
    return [str(Path(sys.executable).parent / "erniem-batch"), *arguments]


def watched(command: Sequence[str]) -> Peaks:
    """Runs a command to its end."""
    peaks = Peaks()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        look(process.pid, peaks)
        time.sleep(EVERY_S)
    peaks.seconds = time.monotonic() - started
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode()[-2000:])
    return peaks


def look(pid: int, peaks: Peaks) -> None:
    actors = [seen for child in descendants(pid) if (seen := memory(child, ACTOR))]
    driver = memory(pid, "")
    if driver:
        peaks.driver_rss = max(peaks.driver_rss, driver["Rss"])
        peaks.driver_over_time.append(round(driver["Rss"]))
    if actors:
        peaks.n_actors = max(peaks.n_actors, len(actors))
        peaks.actor_rss = max(peaks.actor_rss, *(a["Rss"] for a in actors), 0)
        peaks.actor_anonymous = max(peaks.actor_anonymous, *(a["Anonymous"] for a in actors), 0)
        peaks.all_pss = max(peaks.all_pss, sum(a["Pss"] for a in actors))
        peaks.actor_over_time.append(round(max(a["Rss"] for a in actors)))


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these did."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after_name[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def memory(pid: int, name: str) -> dict[str, float] | None:
    """In MB, of a process with a name in its command line; None: it is another, or gone."""
    folder = Path(f"/proc/{pid}")
    try:
        if name not in (folder / "cmdline").read_text():
            return None
        lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    pairs = (line.split()[:2] for line in lines)
    return {key.rstrip(":"): int(value) / 1024 for key, value in pairs}
