"""Forward passes side by side, on the same weights and the same token ids, in one run.

    python -m tests.benchmarks forward [--rounds 5] [--threads 1 2] [--peers FOLDER] [--quick]

Each contender is a process in a Python of its own (race/engine.py); all are loaded, then they take
turns, round after round, so that a machine that slows down slows all of them. Each has its best
batch size, found before on a third of the pieces. Figures are real tokens a second, padding not
counted; ratios are taken round by round, and medians of these are told.

`gemm` is a mark, no contender: nothing but the products of the linear layers, for the same batches.
As a share of it, what attention multiplies is counted as work too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console

from tests.benchmarks.inputs import write_inputs
from tests.benchmarks.peers import pythons

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
ENGINE = HERE / "race" / "engine.py"
KINDS = ("short", "mixed")
ORACLE = "hf4-loop"
OURS = "ours-ner-float32"
# Which Python each needs, see peers.py; ours is this one.
CONTENDERS = {
    "gemm-ner": "",
    "gemm-classify": "",
    "ours-ner-float32": "",
    "ours-classify-float32": "",
    "ours-ner-float32-shared": "",
    "ctranslate2-float32": "new",
    "onnxruntime-float32": "new",
    "openvino-float32": "new",
    "hf5-sdpa": "new",
    "hf4-loop": "hf4",
    "hf4-pipeline": "hf4",
    "ours-ner-int8": "",
    "ours-classify-int8": "",
    "ctranslate2-int8": "new",
    "onnxruntime-int8": "new",
}
HIDDEN, LAYERS, INNER = 768, 12, 3072
CALIBRATION_SHARE = 3

app = App(help=__doc__, default_parameter=Parameter(consume_multiple=True))
console = Console(stderr=True, width=140)


@dataclass
class Contender:
    """A process of the race.

    Attributes:
        best: its option, for each kind of pieces.
        seconds: of each round, by kind.
    """

    name: str
    process: subprocess.Popen[str]
    ready_s: float
    options: list[dict[str, Any]]
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Its answer to one request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return read_answer(self.name, self.process)

    def calibrate(self, kind: str) -> None:
        """Finds its best option. The first call of all warms up."""
        self.ask(kind=kind, option=self.options[0], share=3 * CALIBRATION_SHARE)
        took = []
        for option in self.options:
            if len(self.options) == 1:
                break
            answer = self.ask(kind=kind, option=option, share=CALIBRATION_SHARE)
            took.append(answer["seconds"])
        self.best[kind] = self.options[took.index(min(took)) if took else 0]

    def peak_mb(self) -> float:
        """Of its memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def read_answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended with {process.wait()}: see its log")
    answer: dict[str, Any] = json.loads(line)
    return answer


def start(name: str, python: Path, folder: Path, threads: int, stack: ExitStack) -> Contender:
    """A contender that is ready."""
    log = stack.enter_context((folder / f"{name}.log").open("w"))
    environment = (
        os.environ | {"PYTHONPATH": str(REPOSITORY)}
        if python.samefile(sys.executable)
        else os.environ
    )
    process = subprocess.Popen(
        [str(python), str(ENGINE), name, str(folder), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.kill)
    ready = read_answer(name, process)
    console.print(f"{name} is ready after {ready['ready_s']:.1f} s", highlight=False)
    return Contender(name, process, ready["ready_s"], ready["options"])


def race(
    folder: Path, names: Sequence[str], kinds: Sequence[str], threads: int, rounds: int,
    pythons_of: Mapping[str, Path],
) -> list[dict[str, Any]]:  # fmt: skip
    """A result for each contender and kind."""
    with ExitStack() as stack:
        # The oracle's rows first: others are compared with them.
        all_ = [start(name, pythons_of[CONTENDERS[name]], folder, threads, stack) for name in names]
        for kind in kinds:
            for one in all_:
                one.calibrate(kind)
                console.print(f"{kind}: {one.name} takes {one.best[kind]}", highlight=False)
            for number in range(rounds):
                for one in all_ if number % 2 == 0 else reversed(all_):
                    answer = one.ask(kind=kind, option=one.best[kind])
                    one.seconds.setdefault(kind, []).append(answer["seconds"])
                speeds = ", ".join(
                    f"{one.name} {answer['tokens'] / one.seconds[kind][-1]:.0f}" for one in all_
                )
                console.print(f"{kind} round {number + 1}: {speeds}", highlight=False)
        saved = {one.name: save(one, folder, kinds) for one in all_}
        return [result(one, all_, kind, folder, saved, threads) for kind in kinds for one in all_]


def save(one: Contender, folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Its rows, where it gives rows."""
    paths = {}
    for kind in kinds:
        path = folder / f"{one.name}-{kind}.npz"
        path.unlink(missing_ok=True)
        one.ask(kind=kind, option=one.best[kind], save=str(path))
        if path.exists():
            paths[kind] = path
    return paths


def result(
    one: Contender, all_: Sequence[Contender], kind: str, folder: Path,
    saved: Mapping[str, Mapping[str, Path]], threads: int,
) -> dict[str, Any]:  # fmt: skip
    """What is told of a contender."""
    lengths = [len(p["ids"]) for p in json.loads((folder / f"race-{kind}.json").read_text())]
    speeds = [sum(lengths) / s for s in one.seconds[kind]]
    found: dict[str, Any] = {
        "engine": one.name,
        "kind": kind,
        "threads": threads,
        "option": one.best[kind],
        "tokens_per_s": round(statistics.median(speeds), 1),
        "from": round(min(speeds), 1),
        "to": round(max(speeds), 1),
        "peak_mb": round(one.peak_mb()),
        "ready_s": round(one.ready_s, 1),
    }
    by_name = {other.name: other for other in all_}
    for other in ("ours-ner-float32", "ours-ner-int8", "ours-classify-float32",
                  "ours-classify-int8"):  # fmt: skip
        if other in by_name:
            found[f"{other}_by_it"] = round(
                statistics.median(
                    theirs / ours
                    for theirs, ours in zip(
                        one.seconds[kind], by_name[other].seconds[kind], strict=True
                    )
                ), 3,
            )  # fmt: skip
    mark = by_name.get("gemm-classify" if "classify" in one.name else "gemm-ner")
    if mark is not None and one.name.endswith("float32"):
        work = 1 + attention_share(lengths)
        shares = [work * m / s for m, s in zip(mark.seconds[kind], one.seconds[kind], strict=True)]
        found["share_of_gemm"] = round(statistics.median(shares), 3)
    oracle, rows = saved.get(ORACLE, {}).get(kind), saved.get(one.name, {}).get(kind)
    if oracle and rows and "classify" not in one.name:
        found |= compare(oracle, rows)
    return found


def attention_share(lengths: Sequence[int]) -> float:
    """Multiplications of attention by those of the linear layers."""
    linear = sum(lengths) * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    return sum(2 * n * n * HIDDEN for n in lengths) / linear


def compare(oracle: Path, rows: Path) -> dict[str, Any]:
    """With what transformers says: the largest difference, and how many labels are the same."""
    with np.load(oracle) as a, np.load(rows) as b:
        pairs = [(a[name], b[name]) for name in a.files]
    same = np.concatenate([x.argmax(1) == y.argmax(1) for x, y in pairs])
    return {
        "max_difference": float(f"{max(np.abs(x - y).max() for x, y in pairs):.2g}"),
        "same_labels": round(float(same.mean()), 4),
    }


@app.default
def main(
    *,
    rounds: int = 5,
    threads: tuple[int, ...] = (1, 2),
    kinds: tuple[str, ...] = KINDS,
    engines: tuple[str, ...] = (),
    peers: Path | None = None,
    folder: Path | None = None,
    vocab: Path | None = None,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Prints a line of JSON; `python -m tests.benchmarks all` makes a table and a chart of it.

    Args:
        rounds: Of each race.
        threads: A race for each.
        kinds: Of pieces: short, mixed.
        engines: Default: all.
        peers: Where the Pythons of the others are, or will be made; default: the others are left
            out.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
        quick: Two layers and one round, to see that it works.
    """
    with workplace(folder, vocab, layers=2 if quick else LAYERS) as (_, folder):
        names = [n for n in CONTENDERS if (peers or not CONTENDERS[n]) and n in (engines or [n])]
        pythons_of = {"": Path(sys.executable)} | (pythons(peers) if peers else {})
        results = []
        for n_threads in threads:
            results += race(folder, names, kinds, n_threads, 1 if quick else rounds, pythons_of)
    print(json.dumps(results))
    return results


@contextmanager
def workplace(
    folder: Path | None, vocab: Path | None, layers: int = LAYERS
) -> Iterator[tuple[Path, Path]]:
    """A folder for scratch, gone afterwards, and the one with models and texts, made if need be.

    Args:
        folder: that is kept; None: scratch is taken.
        vocab: folder with a vocabulary; None: that of the demo.
    """
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        kept = (folder or scratch).resolve()
        if not (kept / "race-mixed.json").exists():
            kept.mkdir(parents=True, exist_ok=True)
            write_inputs(kept, vocab, layers, "--rows", "250002")
        yield scratch, kept
