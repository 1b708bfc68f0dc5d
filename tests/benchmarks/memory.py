"""Memory of 1, 2 and 4 actors on one machine, with a model of the size of ErnieM-base.

    python -m tests.benchmarks memory [--actors 1 --actors 2 --actors 4]

Weights are mapped from the file: what the first actor reads, the others find. The 1.1 GB of them
are in the figures of each actor, and once in those of all together.
"""

import json
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.console import Console

from tests.benchmarks.forward import workplace
from tests.benchmarks.job import write_corpus
from tests.benchmarks.watch import erniem_batch, watched

app = App(help=__doc__)
console = Console(stderr=True, width=120)


@app.default
def main(
    *,
    actors: tuple[int, ...] = (1, 2, 4),
    texts: int = 240,
    folder: Path | None = None,
    vocab: Path | None = None,
) -> list[dict[str, Any]]:
    """Prints a line of JSON: memory in MB, the highest seen.

    Args:
        actors: How many, one after the other.
        texts: Of the corpus.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
    """
    with workplace(folder, vocab) as (scratch, folder):
        model = folder / "model" / "ner"
        write_corpus(scratch / "in", model, texts)
        rows = []
        for count in actors:
            peaks = watched(
                erniem_batch(
                    "ner", "--model", str(model), "--input", str(scratch / "in"), "--output",
                    str(scratch / f"out{count}"), "--num-cpus-per-actor", "1",
                    "--actors", f"{count}:{count}", "--unit-bytes", "1",
                )
            )  # fmt: skip
            row = {
                "actors": peaks.n_actors,
                "actor_rss_mb": round(peaks.actor_rss),
                "actor_anonymous_mb": round(peaks.actor_anonymous),
                "all_actors_pss_mb": round(peaks.all_pss),
                "driver_rss_mb": round(peaks.driver_rss),
                "weights_mb": round((model / "model.safetensors").stat().st_size / 1e6),
            }
            console.print(row)
            rows.append(row)
    print(json.dumps(rows))
    return rows
