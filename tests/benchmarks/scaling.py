"""How cost grows: with the corpus, the length of texts, actors and labels, with a tiny model.

    python -m tests.benchmarks scaling [--rows 1000 --rows 1000000] [--skip-rows]

The model has two layers of 64, so that what is not the model is seen. Memory is that of the driver
and of the largest actor, the highest seen; it must not grow with the corpus.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cyclopts import App
from rich.console import Console

from erniem_batch import ErnieMConfig, ErnieMForTokenClassification, ErnieMTokenizer
from erniem_batch.job.rundir import RunFolder
from erniem_batch.options import DEMO_FOLDER
from tests.benchmarks.inputs import sample_texts
from tests.benchmarks.watch import erniem_batch, watched

ROWS_A_FILE = 50_000
TOKENS = 400_000
LENGTHS = (10, 100, 1000, 10_000, 50_000)
LABELS = (3, 21, 201)

app = App(help=__doc__)
console = Console(stderr=True, width=120)


@app.default
def main(
    *, rows: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000), quick: bool = False
) -> list[dict[str, Any]]:
    """Prints a line of JSON.

    Args:
        rows: Sizes of the corpus.
        quick: Small ones only.
    """
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        words = [word for text in sample_texts() for word in text.split()]
        plans: list[tuple[str, int, int, int, int, int]] = []
        for count in (1000, 3000) if quick else rows:
            plans.append(("rows", count, count, 10, 1, 7))
        for length in LENGTHS[:3] if quick else LENGTHS:
            plans.append(("tokens a text", length, max(8, TOKENS // length), length, 1, 7))
        for count in (1, 2):
            plans.append(("actors", count, 60_000 if not quick else 2000, 10, count, 7))
        for count in LABELS:
            plans.append(("labels", count, 20_000 if not quick else 1000, 20, 1, count))
        for number, (what, value, n_rows, n_words, n_actors, n_labels) in enumerate(plans):
            folder = scratch / str(number)
            write(folder / "in", words, n_rows, n_words)
            model = save_model(folder / "model", n_labels)
            peaks = watched(
                erniem_batch(
                    "ner", "--model", str(model), "--input", str(folder / "in"), "--output",
                    str(folder / "out"), "--actors", f"{n_actors}:{n_actors}",
                    "--num-cpus-per-actor", "1", "--columns", "id",
                )
            )  # fmt: skip
            done = pq.ParquetDataset([str(p) for p in (folder / "out").glob("*.parquet")])
            table = done.read(columns=["id", "n_tokens"])
            assert len(set(table["id"].to_pylist())) == n_rows, "each row once"
            receipts = RunFolder(str(folder / "out")).read_ledger(1).to_pylist()
            result = {
                what: value,
                "rows": n_rows,
                "tokens": sum(table["n_tokens"].to_pylist()),
                "seconds_in_all": round(peaks.seconds, 1),
                "seconds_in_units": round(sum(r["seconds"] for r in receipts), 1),
                "driver_mb": round(peaks.driver_rss),
                "actor_mb": round(peaks.actor_rss),
            }
            console.print(result)
            results.append(result)
    print(json.dumps(results))
    return results


def write(folder: Path, words: Sequence[str], n_rows: int, n_words: int) -> None:
    """Parquet files of random texts."""
    folder.mkdir(parents=True)
    rng = random.Random(n_rows + n_words)
    for first in range(0, n_rows, ROWS_A_FILE):
        rows = range(first, min(n_rows, first + ROWS_A_FILE))
        texts = [" ".join(rng.choices(words, k=n_words)) for _ in rows]
        table = pa.table({"id": [str(row) for row in rows], "text": texts})
        pq.write_table(table, folder / f"{first}.parquet", row_group_size=5000)


def save_model(folder: Path, n_labels: int) -> Path:
    tokenizer = ErnieMTokenizer.from_pretrained(DEMO_FOLDER / "encoder")
    labels = ["O", *labels_of(n_labels - 1)]
    config = ErnieMConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4,
    ).with_labels(labels)  # fmt: skip
    torch.manual_seed(0)
    model = ErnieMForTokenClassification(config).eval()
    torch.nn.init.constant_(model.classifier.bias[:1], 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labels_of(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"{'BI'[number % 2]}-L{number // 2}"
