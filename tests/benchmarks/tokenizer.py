"""Tokens a second of transformers' ErnieMTokenizer and ours, in one run, on one thread.

    python tests/benchmarks/tokenizer.py VOCAB_FOLDER TEXTS [--lines 20000] [--repeats 5]

VOCAB_FOLDER holds sentencepiece.bpe.model and vocab.txt. TEXTS holds one text a line, or JSON
objects with a field `text` (*.jsonl, *.jsonl.gz). The candidates take turns, so that a busy machine
slows all of them alike; ratios are taken turn by turn. Ids are checked to be equal first.
"""

import argparse
import gzip
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from erniem_batch import ErnieMTokenizer

Ids = list[Any]


def read_texts(path: Path, n_lines: int) -> list[str]:
    """The first non-empty texts of a file."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] if ".jsonl" in path.name else line for line in lines)
        return list(islice(filter(str.strip, texts), n_lines))


def make_candidates(
    folder: Path, texts: Sequence[str], batch_size: int
) -> dict[str, Callable[[], Ids]]:
    """What is timed, by name: each call gives the ids of all texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.logging.set_verbosity_error()
    reference = transformers.ErnieMTokenizer(
        str(folder / "sentencepiece.bpe.model"), vocab_file=str(folder / "vocab.txt")
    )
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]

    def run_reference() -> Ids:
        return [ids for batch in batches for ids in reference(list(batch))["input_ids"]]

    ours = ErnieMTokenizer.from_pretrained(folder, num_threads=1)

    def run_ours(offsets: bool) -> Ids:
        return [
            ids
            for batch in batches
            for ids in ours(list(batch), return_offsets_mapping=offsets).input_ids
        ]

    def run_arrays(offsets: bool) -> Ids:
        rows: Ids = []
        for batch in batches:
            tokens = ours.encode_batch(batch, offsets=offsets)
            rows += np.split(tokens.ids, tokens.splits[1:-1])
        return rows

    return {
        "transformers, ids": run_reference,
        "ours, ids": lambda: run_ours(offsets=False),
        "ours, ids and offsets": lambda: run_ours(offsets=True),
        "ours, ids as arrays": lambda: run_arrays(offsets=False),
        "ours, ids and offsets as arrays": lambda: run_arrays(offsets=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("vocab_folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--lines", type=int, default=20_000, help="texts to read (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1000, help="texts a call (%(default)s)")
    options = parser.parse_args()

    texts = read_texts(options.texts, options.lines)
    candidates = make_candidates(options.vocab_folder, texts, options.batch_size)
    # This first turn, not timed, also fills our table of pieces, as the first unit of a job does.
    results = {name: list(map(list, run())) for name, run in candidates.items()}
    expected = next(iter(results.values()))
    inner = [ids[1:-1] for ids in expected]
    for name, ids in results.items():
        if ids != (inner if name.endswith("arrays") else expected):  # arrays: no special tokens
            raise SystemExit(f"{name}: ids differ from the reference; nothing timed")
    n_tokens = sum(map(len, inner))
    print(f"texts={len(texts)} tokens={n_tokens} repeats={options.repeats} cores={os.cpu_count()}")

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    reference = times["transformers, ids"]
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(reference, seconds, strict=True))
        median = statistics.median(seconds)
        print(
            f"{name:<34}{n_tokens / median:>12,.0f} tokens/s, times the reference: "
            f"median {statistics.median(ratios):.1f}, turns {ratios[0]:.1f} to {ratios[-1]:.1f}"
        )


if __name__ == "__main__":
    main()
