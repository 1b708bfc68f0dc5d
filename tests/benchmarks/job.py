"""The batch job, Parquet to Parquet through Ray, beside the bare predictor and tutorials' code.

    python -m tests.benchmarks job [--rounds 5] [--texts 400] [--peers FOLDER]

All have the same weights (the size of ErnieM-base), texts (sentences, in some files) and threads.
What counts is the time from the first unit begun to the last one written: starting Ray and loading
the model, which a night's work does once, are left out for everybody.

  bare   `Predictor.predict` of a file's texts after the other, nothing read or written.
  ours   `erniem-batch ner`, one actor with all threads, which are lanes of one thread each.
  actors the same with an actor for each thread. Those that start later find less to do: take many
         more texts before comparing.
  naive  race/naive_job.py, with the best of some batch sizes.
"""

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App
from rich.console import Console

from erniem_batch.job.rundir import RunFolder
from tests.benchmarks.forward import HERE, workplace
from tests.benchmarks.inputs import make_pieces
from tests.benchmarks.peers import pythons

NAIVE_BATCHES = (1, 8)

app = App(help=__doc__)
console = Console(stderr=True, width=120)


@app.default
def main(
    *,
    rounds: int = 5,
    texts: int = 400,
    files: int = 4,
    threads: int = 2,
    peers: Path | None = None,
    folder: Path | None = None,
    vocab: Path | None = None,
) -> dict[str, Any]:
    """Prints a line of JSON.

    Args:
        rounds: In which they take turns.
        texts: Of the corpus.
        files: Of the corpus, each a unit: for `actors`, ten for each or more.
        threads: For each.
        peers: Where the Pythons of the others are; default: naive is left out.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
    """
    with workplace(folder, vocab) as (scratch, folder):
        model = folder / "model" / "ner"
        n_tokens = write_corpus(scratch / "in", model, texts, files)
        found: dict[str, list[float]] = {"bare": [], "ours": [], "actors": []}
        naive_batch = None
        if peers is not None:
            write_corpus(scratch / "few", model, texts // 8, files)
            python = pythons(peers, ["hf4"])["hf4"]
            tried = {
                size: naive(python, model, scratch / "few", scratch / f"few{size}", threads, size)
                for size in NAIVE_BATCHES
            }
            naive_batch = min(tried, key=lambda size: tried[size])
            found["naive"] = []
        for number in range(rounds):
            names = list(found) if number % 2 == 0 else list(found)[::-1]
            for name in names:
                output = scratch / f"{name}-{number}"
                if name == "bare":
                    seconds = bare(model, scratch / "in", threads)
                elif name == "ours":
                    seconds = ours(model, scratch / "in", output, 1, threads)
                elif name == "actors":
                    seconds = ours(model, scratch / "in", output, threads, 1)
                else:
                    assert naive_batch is not None
                    seconds = naive(python, model, scratch / "in", output, threads, naive_batch)
                found[name].append(seconds)
                console.print(f"{name} {n_tokens / seconds:.0f} tokens/s", highlight=False)
    report = {
        "texts": texts,
        "tokens": n_tokens,
        "threads": threads,
        "naive_batch": naive_batch,
        "tokens_per_s": {
            name: round(n_tokens / statistics.median(many)) for name, many in found.items()
        },
        "ours_by": {
            name: round(
                statistics.median(a / b for a, b in zip(many, found["ours"], strict=True)), 3
            )
            for name, many in found.items()
            if name != "ours"
        },
        "seconds": found,
    }
    print(json.dumps(report))
    return report


def write_corpus(folder: Path, model: Path, n_texts: int, n_files: int = 4) -> int:
    """Parquet files of sentences; gives the number of their tokens."""
    from erniem_batch import ErnieMTokenizer

    folder.mkdir()
    pieces = make_pieces(ErnieMTokenizer.from_pretrained(model), "short", n_texts, seed=7)
    for number in range(n_files):
        texts = [piece["text"] for piece in pieces[number::n_files]]
        ids = [f"{number}-{i}" for i in range(len(texts))]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{number:04}.parquet")
    return sum(len(piece["ids"]) - 2 for piece in pieces)


def bare(model: Path, source: Path, threads: int) -> float:
    """Seconds of the predictor alone, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.job", "predictor", str(model), str(source)]
    return seconds_of([*command, str(threads)], {})


@app.command
def predictor(model: str, source: Path, threads: int) -> None:
    """What `bare` runs."""
    from erniem_batch.config import PredictorConfig
    from erniem_batch.predictor import Predictor
    from erniem_batch.records import Record

    made = Predictor.load(PredictorConfig(model=model, device="cpu", n_threads=threads))
    files = [pq.read_table(path) for path in sorted(source.glob("*.parquet"))]
    records = [[Record(row["id"], row["text"]) for row in table.to_pylist()] for table in files]
    made.predict(records[0][:8])
    started = time.perf_counter()
    for some in records:
        made.predict(some)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def ours(model: Path, source: Path, output: Path, actors: int, threads: int) -> float:
    """Seconds of the job, from its first unit to its last."""
    script = Path(sys.executable).parent / "erniem-batch"
    subprocess.run(
        [str(script), "ner", "--model", str(model), "--input", str(source), "--output",
         str(output), "--num-cpus-per-actor", str(threads), "--unit-bytes", "1", "--actors",
         f"{actors}:{actors}"],
        check=True, capture_output=True,
    )  # fmt: skip
    receipts = RunFolder(str(output)).read_ledger(1).to_pylist()
    ended = [(output / row["output"]).stat().st_mtime for row in receipts]
    begun = [end - row["seconds"] for end, row in zip(ended, receipts, strict=True)]
    return max(ended) - min(begun)


def naive(python: Path, model: Path, source: Path, output: Path, threads: int, batch: int) -> float:
    """Seconds of tutorials' code."""
    command = [str(python), str(HERE / "race" / "naive_job.py"), str(model), str(source)]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return seconds_of([*command, str(output), str(threads), str(batch)], token)


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


if __name__ == "__main__":
    app()
