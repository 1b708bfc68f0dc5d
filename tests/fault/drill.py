"""The fault drill: runs are killed, stopped, doubled and starved, and must come to the same end.

    python -m tests.fault.drill --repeats 5 --report report.md

A seeded corpus is tagged once undisturbed. Then each fault strikes a run of the same command at
random moments of its work; the command is started again until it is complete, and the folder is
compared with the undisturbed one: every row once, data files equal byte for byte, nothing left
over. All the while a reader looks on and must never see anything half done.
"""

import io
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
from cyclopts import App, Parameter
from fakes import write_bytes
from rich.console import Console
from rich.table import Table

from erniem_batch import storage

from .asleep import fall_asleep, record_effects
from .corpus import Corpus, change_corpus, make_corpus, save_model
from .faults import (
    Case,
    Missed,
    Nodes,
    Setting,
    Skip,
    Wrong,
    faulty_storage,
    fill_disk,
    kill_actor,
    kill_driver,
    kill_node,
    terminate,
    two_at_once,
)
from .results import Difference, Reader, compare, is_data, names_in, read_result
from .runs import ROOT

SMALL_DISK = 64 << 20
COMMON = ["--unit-bytes", "9000", "--window-tokens", "128", "--overlap-tokens", "32"]
STOPPED = 143

console = Console(stderr=True, highlight=False)


class Drill:
    """Settings and faults; each setting is made when a fault needs it."""

    def __init__(self, work: Path, seed: int, stack: ExitStack) -> None:
        self._work = work
        self._seed = seed
        self._stack = stack
        self._logs = work / "logs"
        self._logs.mkdir(parents=True)
        # All runs are of one state of the package, whoever edits it meanwhile.
        self._code = work / "code"
        shutil.copytree(ROOT / "erniem_batch", self._code / "erniem_batch")
        self._quick = work / "quick"
        shutil.copytree(self._code, self._quick)
        shutil.copy(Path(__file__).with_name("pause.py"), self._quick / "sitecustomize.py")
        _shorten_times(self._quick / "erniem_batch")

    def faults(self) -> dict[str, Callable[[], tuple[Setting, Callable[..., None]]]]:
        """By name: where it strikes, and how."""
        return {
            "kill -9 driver": lambda: (self.local, lambda case, _: kill_driver(case)),
            "kill -9 driver, JSONL": lambda: (self.jsonl, lambda case, _: kill_driver(case)),
            "kill -9 actor": lambda: (self.local, lambda case, _: kill_actor(case)),
            "SIGTERM": lambda: (self.local, lambda case, _: terminate(case)),
            "two runs at once": lambda: (self.local, lambda case, _: two_at_once(case)),
            "changed input, kill": lambda: (self.changed, lambda case, _: kill_driver(case)),
            "overwrite, kill": lambda: (self.overwrite, lambda case, _: kill_driver(case)),
            "disk full": lambda: (self.small_disk, lambda case, _: fill_disk(case)),
            "storage faults, S3": lambda: (
                self.s3,
                lambda case, number: faulty_storage(case, self.store.endpoint, number),
            ),
            "kill -9 driver, S3": lambda: (self.s3, lambda case, _: kill_driver(case)),
            "two runs at once, S3": lambda: (self.s3, lambda case, _: two_at_once(case)),
            "asleep driver": lambda: self._asleep(self.local, "driver"),
            "asleep driver, JSONL": lambda: self._asleep(self.jsonl, "driver"),
            "asleep driver, next night": lambda: self._asleep(self.changed, "driver"),
            "asleep driver, overwrite": lambda: self._asleep(self.overwrite, "driver"),
            "asleep driver, replay": lambda: self._asleep(self.replay, "driver"),
            "asleep actor": lambda: self._asleep(self.local, "actor"),
            "asleep actor, JSONL": lambda: self._asleep(self.jsonl, "actor"),
            "asleep driver, S3": lambda: self._asleep(self.s3, "driver"),
            "asleep actor, S3": lambda: self._asleep(self.s3, "actor"),
            "kill node": lambda: (self.local, lambda case, _: kill_node(case, self.nodes)),
        }

    def _asleep(self, setting: Setting, who: str) -> tuple[Setting, Callable[..., None]]:
        """A setting whose runs can be stopped before each of their effects."""
        if not setting.effects:
            quick = replace(setting, code=self._quick, effects=setting.effects)
            log = self._logs / f"record-{Path(setting.folder).name}"
            problems = record_effects(quick, log)
            for name in ("driver", "actor"):
                _remove(f"{setting.folder}/record-{name}")
            if problems:
                raise Wrong("; ".join(problems))
        quick = replace(setting, code=self._quick)
        return quick, lambda case, number: fall_asleep(case, number, who)

    @cached_property
    def corpus(self) -> Corpus:
        return make_corpus(self._work / "corpus", self._seed)

    @cached_property
    def model(self) -> str:
        return str(save_model(self._work / "model"))

    @cached_property
    def nodes(self) -> Nodes:
        return Nodes(self._stack)

    @cached_property
    def store(self) -> Any:
        import stores

        try:
            return self._stack.enter_context(stores.seaweedfs(self._work / "store"))
        except stores.Missing as error:
            raise Skip(str(error)) from error

    @cached_property
    def local(self) -> Setting:
        """Everything on a local disk."""
        return self._undisturbed("local", self._setting(self.corpus, "local"))

    @cached_property
    def jsonl(self) -> Setting:
        """The same with JSONL as output."""
        setting = self._setting(self.corpus, "jsonl")
        setting.arguments += ["--output-format", "jsonl"]
        return self._undisturbed("jsonl", setting)

    @cached_property
    def changed(self) -> Setting:
        """The second night: some files have changed, one is new."""
        first = self._setting(make_corpus(self._work / "nightly", self._seed), "changed")
        first = self._undisturbed("night-1", first)
        corpus = change_corpus(first.corpus, self._seed)
        before = Path(first.folder) / "reference"
        return self._undisturbed("night-2", self._after(first, before, corpus=corpus))

    @cached_property
    def overwrite(self) -> Setting:
        """A complete folder is made anew with other settings."""
        before = Path(self.local.folder) / "reference"
        setting = self._after(self.local, before, folder=f"{self._work}/overwrite")
        setting.arguments += ["--overwrite", "--min-score", "0.6"]
        return self._undisturbed("overwrite", setting)

    @cached_property
    def replay(self) -> Setting:
        """The dead letters of a complete run once more; they stay dead letters."""
        before = Path(self.local.folder) / "reference"
        setting = self._after(self.local, before, folder=f"{self._work}/replay", command="replay")
        setting.arguments = []
        return self._undisturbed("replay", setting)

    @cached_property
    def small_disk(self) -> Setting:
        """Like `local`, on a disk that can be filled."""
        folder = self._work / "small"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Skip(f"no tmpfs may be mounted: {done.stderr.strip()}")
        self._stack.callback(subprocess.run, ["umount", str(folder)])
        return replace(self.local, folder=str(folder))

    @cached_property
    def s3(self) -> Setting:
        """Input and output in an object store."""
        for path in self.corpus.folder.iterdir():
            storage.write(self.store.url(f"corpus/{path.name}"), path.read_bytes())
        setting = self._setting(self.corpus, "s3")
        setting.arguments[1] = self.store.url("corpus")
        setting.folder, setting.pause = self.store.url("out"), 1.0
        return self._undisturbed("s3", setting)

    def _setting(self, corpus: Corpus, name: str) -> Setting:
        inputs = ["--input", str(corpus.folder), "--model", self.model]
        arguments = [*inputs, *COMMON, "--max-dead-letters", "20%"]
        folder = self._work / name
        return Setting(
            arguments=arguments,
            folder=str(folder),
            logs=self._logs,
            corpus=corpus,
            code=self._code,
        )

    @staticmethod
    def _after(first: Setting, before: Path, **changes: Any) -> Setting:
        """A setting that begins with the outcome of another."""
        arguments = list(first.arguments)
        changes = {"folder": f"{first.folder}-next", "effects": {}, **changes}
        return replace(
            first, arguments=arguments, before=before, old=first.reference, new_files=0, **changes
        )

    def _undisturbed(self, name: str, setting: Setting) -> Setting:
        """Makes the reference run, and sees that it is right."""
        case = Case(setting, f"{setting.folder}/reference", self._logs / name, name)
        with Reader(case.output, setting.pause) as reader:
            case.ends(case.start(), 0)
        setting.new_files = case.new_files()
        setting.reference = read_result(case.output)
        ids = setting.reference.ids
        faults = [*case.problems, *setting.reference.faults, *reader.problems]
        if (
            max(ids.values(), default=0) > 1
            or ids.keys() != setting.corpus.good | setting.corpus.bad
        ):
            faults.append("its rows are not those of the corpus")
        n_dead = sum(map(len, setting.reference.letters.values()))
        if n_dead != len(setting.corpus.bad):
            faults.append(f"{n_dead} dead letters, not {len(setting.corpus.bad)}")
        if faults:
            raise Wrong(f"the undisturbed run {name} is wrong: {'; '.join(faults[:5])}")
        console.print(
            f"reference {name}: {len(ids):,} rows, {n_dead} dead letters, "
            f"{len(setting.reference.digests)} files, {setting.new_files} new, "
            f"{time.monotonic() - case.started:.0f} s"
        )
        return setting


def _shorten_times(package: Path) -> None:
    """Lets a lease run out after seconds instead of half a minute, and a lock of a file, too."""
    for name, old, new in (
        ("job/lease.py", "BEAT_S = 5.0", "BEAT_S = 1.0"),
        ("job/lease.py", "STALE_S = 30.0", "STALE_S = 8.0"),
        ("storage.py", "LOCK_SECONDS = 60", "LOCK_SECONDS = 6"),
    ):
        text = (package / name).read_text()
        if old not in text:
            raise RuntimeError(f"{name} has no line {old}")
        (package / name).write_text(text.replace(old, new))


# ---- outcomes ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    """All repeats of a fault."""

    fault: str
    runs: int = 0
    complete: int = 0
    lost: int = 0
    repeated: int = 0
    files: int = 0
    loose: int = 0
    restarts: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        numbers = (self.runs, self.complete, self.lost, self.repeated, self.files, self.loose)
        seconds = self.seconds / max(1, self.runs)
        return [
            self.fault,
            *map(str, numbers),
            str(self.restarts),
            str(len(self.problems)),
            f"{seconds:.0f}",
        ]


COLUMNS = (
    "fault",
    "runs",
    "complete",
    "rows lost",
    "repeated",
    "files differ",
    "nearly equal",
    "restarts",
    "violations",
    "s each",
)


def disturb(
    fault: str, number: int, setting: Setting, strike: Callable[..., None], seed: int
) -> tuple[Case, Difference, int]:
    """One disturbed run to its end, and how it differs; struck again if the fault came late."""
    for attempt in range(5):
        name = f"{''.join(c if c.isalnum() else '-' for c in fault)}-{number}-{attempt}"
        log = setting.logs / name
        case = Case(setting, f"{setting.folder}/{name}", log, f"{seed}-{name}")
        try:
            with Reader(case.output, setting.pause) as reader:
                try:
                    strike(case, number)
                    case.finish()
                finally:
                    for run in case.runs:
                        run.end()
            break
        except Missed:
            _remove(case.output)
    else:
        raise RuntimeError(f"{fault}: the run was always over before the fault struck")
    loose = loosened(case.output, reader.tries)
    found = compare(read_result(case.output), setting.reference, loose)
    found.problems += case.problems + list(dict.fromkeys(reader.problems))
    found.problems += _strange_content(reader, setting, loose)
    if not found.problems:
        _remove(case.output)
    return case, found, len(loose)


def loosened(output: str, tries: dict[str, int]) -> set[str]:
    """Files whose unit was rightly worked on row by row: two processes had died on it."""
    units = {unit for unit, number in tries.items() if number > 2}
    if not units:
        return set()
    names = {}
    for info in storage.find(f"{output}/_run/plan"):
        data = storage.read(info.path)
        for row in pq.read_table(io.BytesIO(data or b"")).to_pylist():
            names[row["id"]] = row["output"]
    stems = {names[unit] for unit in units}
    return {name for name in names_in(output) if is_data(name) and name.rpartition(".")[0] in stems}


def _strange_content(reader: Reader, setting: Setting, loose: set[str]) -> Iterator[str]:
    """What a reader has seen under a name must be what stands there at the end, or stood before."""
    right = {name: {value} for name, value in setting.reference.digests.items()}
    for name, value in (setting.old.digests if setting.old else {}).items():
        right.setdefault(name, set()).add(value)
    for name, digests in reader.digests.items():
        if name not in loose and digests - right.get(name, set()):
            yield f"reader: {name} had another content for a while"


def _remove(output: str) -> None:
    if storage.is_remote(output):
        storage.delete([info.path for info in storage.find(output)])
    else:
        shutil.rmtree(output, ignore_errors=True)


def as_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(*COLUMNS)
    for outcome in outcomes:
        table.add_row(*outcome.row(), style="red" if outcome.problems else "")
    return table


def as_markdown(outcomes: Sequence[Outcome], skipped: dict[str, str], seed: int) -> str:
    lines = [
        f"# Fault drill, seed {seed}",
        "",
        "Runs are disturbed ones, restarts not counted. Nearly equal: files of units that were",
        "worked on row by row after two deaths; same rows and spans, scores to 1e-5.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'--:|' * (len(COLUMNS) - 1)}",
        *(f"| {' | '.join(outcome.row())} |" for outcome in outcomes),
    ]
    numbers = ("runs", "complete", "lost", "repeated", "files", "loose", "restarts")
    sums = [str(sum(getattr(outcome, name) for outcome in outcomes)) for name in numbers]
    n_problems = sum(len(outcome.problems) for outcome in outcomes)
    lines += [f"| all | {' | '.join(sums)} | {n_problems} | |", ""]
    lines += [f"- skipped: {fault}: {reason}" for fault, reason in skipped.items()]
    for outcome in outcomes:
        lines += [f"- **{outcome.fault}**: {problem}" for problem in outcome.problems]
    for outcome in outcomes:
        lines += [f"- {outcome.fault}: {note}" for note in outcome.notes]
    return "\n".join(lines) + "\n"


@contextmanager
def _work_folder(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="drill-") as name:
            yield Path(name)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="drill-", dir=folder))


app = App(name="drill", help=__doc__, result_action="return_value")


@app.default
def drill(
    *,
    repeats: int = 5,
    only: Annotated[list[str] | None, Parameter(negative=())] = None,
    seed: int = 1,
    report: Path | None = None,
    work: Path | None = None,
) -> int:
    """Disturbs runs and compares what comes of them with an undisturbed one.

    Args:
        repeats: Disturbed runs of each fault.
        only: Faults whose name contains this; repeatable.
        seed: Of the corpus and of the moments.
        report: Markdown file for the table; written anew after each run.
        work: Folder to keep outputs and logs in. Default: a temporary one, removed at the end.
    """
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    with _work_folder(work) as folder, ExitStack() as stack:
        all_faults = Drill(folder, seed, stack).faults()
        for fault, make in all_faults.items():
            if only and not any(word in fault for word in only):
                continue
            try:
                setting, strike = make()
            except Skip as reason:
                skipped[fault] = str(reason)
                continue
            except Wrong as error:
                outcomes.append(Outcome(fault, problems=[str(error)]))
                console.print(f"{fault}: {error}", markup=False)
                continue
            outcome = Outcome(fault)
            outcomes.append(outcome)
            for number in range(repeats):
                _add(outcome, fault, number, setting, strike, seed)
                if report is not None:
                    write_bytes(report, as_markdown(outcomes, skipped, seed).encode())
    Console().print(as_table(outcomes))
    for fault, reason in skipped.items():
        console.print(f"skipped: {fault}: {reason}")
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _add(
    outcome: Outcome,
    fault: str,
    number: int,
    setting: Setting,
    strike: Callable[..., None],
    seed: int,
) -> None:
    outcome.runs += 1
    started = time.monotonic()
    try:
        case, found, n_loose = disturb(fault, number, setting, strike, seed)
    except Exception as error:
        outcome.problems.append(f"{number}: {type(error).__name__}: {error}")
        console.print(f"[red]{fault} {number}[/]: {type(error).__name__}: {error}", markup=True)
        return
    finally:
        outcome.seconds += time.monotonic() - started
    needed = 2 if "two runs" in fault or "asleep" in fault else 1
    outcome.complete += case.code == 0
    outcome.lost += found.lost
    outcome.repeated += found.repeated
    outcome.files += found.files
    outcome.loose += n_loose
    outcome.restarts += len(case.runs) - needed
    outcome.problems += [f"{number}: {problem}" for problem in found.problems]
    outcome.notes += [f"{number}: {note}" for note in case.notes]
    word = "[red]WRONG[/]" if found.problems else "as it should be"
    console.print(
        f"{fault} {number}: {word}, {len(case.runs)} runs, "
        f"{time.monotonic() - started:.0f} s {'; '.join(case.notes)}"
    )
    for problem in found.problems[:8]:
        console.print(f"   {problem}", markup=False)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # with everything it has started
    result = app(sys.argv[1:])
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
