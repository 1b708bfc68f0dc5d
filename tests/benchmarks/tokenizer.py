"""Tokens a second of transformers' ErnieMTokenizer and ours, in one run, on one thread.

    python tests/benchmarks/tokenizer.py VOCAB_FOLDER TEXTS [--lines 20000] [--repeats 5]

VOCAB_FOLDER holds sentencepiece.bpe.model and vocab.txt. TEXTS holds one text a line, or JSON
objects with a field `text` (*.jsonl, *.jsonl.gz). The candidates take turns, so that a busy machine
slows all of them alike; each keeps its best time. Ids are checked to be equal first.
"""

import argparse
import copy
import gzip
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from erniem_batch import ErnieMTokenizer

Ids = list[list[int]]


def read_texts(path: Path, n_lines: int) -> list[str]:
    """The first non-empty texts of a file."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] if ".jsonl" in path.name else line for line in lines)
        return list(islice(filter(str.strip, texts), n_lines))


def make_candidates(
    folder: Path, texts: Sequence[str], batch_size: int, warm: bool
) -> dict[str, Callable[[], Callable[[], Ids]]]:
    """What is timed, by name: each call prepares one turn, which gives the ids of all texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.logging.set_verbosity_error()
    reference = transformers.ErnieMTokenizer(
        str(folder / "sentencepiece.bpe.model"), vocab_file=str(folder / "vocab.txt")
    )
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]

    def run_reference() -> Ids:
        return [
            ids
            for batch in batches
            for ids in reference(list(batch), add_special_tokens=False)["input_ids"]
        ]

    loaded = ErnieMTokenizer.from_pretrained(folder, num_threads=1)

    def prepare_ours(offsets: bool) -> Callable[[], Ids]:
        ours = loaded if warm else copy.deepcopy(loaded)

        def run() -> Ids:
            rows: Ids = []
            for batch in batches:
                tokens = ours.encode_batch(batch, offsets=offsets)
                ids, splits = tokens.ids.tolist(), tokens.splits.tolist()
                rows += [ids[a:b] for a, b in pairwise(splits)]
            return rows

        return run

    return {
        "transformers, ids": lambda: run_reference,
        "ours, ids": lambda: prepare_ours(offsets=False),
        "ours, ids and offsets": lambda: prepare_ours(offsets=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("vocab_folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--lines", type=int, default=20_000, help="texts to read (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1000, help="texts a call (%(default)s)")
    parser.add_argument("--warm", action="store_true", help="keep our table of pieces all along")
    options = parser.parse_args()

    texts = read_texts(options.texts, options.lines)
    candidates = make_candidates(options.vocab_folder, texts, options.batch_size, options.warm)
    results = {name: prepare()() for name, prepare in candidates.items()}
    expected = next(iter(results.values()))
    for name, ids in results.items():
        if ids != expected:
            raise SystemExit(f"{name}: ids differ from the reference; nothing timed")
    n_tokens = sum(map(len, expected))
    print(
        f"texts={len(texts)} tokens={n_tokens} repeats={options.repeats} warm={options.warm} "
        f"cores={os.cpu_count()}"
    )

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, prepare in candidates.items():
            run = prepare()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    slowest = min(times["transformers, ids"])
    for name, seconds in times.items():
        best = min(seconds)
        print(
            f"{name:<24}{n_tokens / best:>12,.0f} tokens/s{slowest / best:>8.1f}x"
            f"   best {best:.3f} s, worst {max(seconds):.3f} s"
        )


if __name__ == "__main__":
    main()
