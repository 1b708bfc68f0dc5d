"""Extraction with 20 names over 1,000 short texts: Taskflow's schedule and ours, same engine.

    python tests/benchmarks/extract.py [--rows 1000] [--layers 2] [--threads 2] [--rounds 1]

In one process, with the same weights, float32 on CPU:
  taskflow  The schedule of PaddleNLP 2.8.1 Taskflow as a plain loop around our model: one pass a
            name, batches of 16 texts as they come, every one padded to 512 tokens, every text
            tokenized again for every name. It says nothing about the speed of Paddle itself.
  short     The same, padded only to the longest text of its batch (padding is hidden).
  compat    Our Predictor with taskflow_compat: the same padded windows, all names at once, equal
            windows computed once; --compat-rows at a time, since memory grows with each window.
  ours      Our Predictor as it is: batches by length within a token budget, padding hidden.

They take turns, and `ours` has one before and after each of the slow ones, so that a busy machine
slows all of them alike; ratios are taken round by round. Then the answers are compared: ours with
ours one window at a time, taskflow with compat, ours with taskflow; and what a further name costs.

Without --model, the weights are random (384 wide, 12 heads) with the demo model's vocabulary, the
heads shifted so that, with Taskflow's padding, 2 % of tokens start and 2 % end something. They can
show whether two ways to compute the same agree, but not how near the default mode comes to
Taskflow: they have not learnt to ignore padding. Without --texts, the texts are the package's
sample sentences, shuffled and repeated, cut to log-normal lengths, 45 tokens on average and 160 at
most; in NFC, since Taskflow fails on letters with separate accents.
"""

import gc
import json
import os
import resource
import statistics
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App

from erniem_batch import ErnieMConfig, ErnieMForInformationExtraction, ErnieMTokenizer
from erniem_batch.config import PredictorConfig
from erniem_batch.options import DEMO_FOLDER, ExtractOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Encoded, Prediction, Record, Window
from erniem_batch.tasks.base import sigmoid
from erniem_batch.tasks.extract import Item, walk
from erniem_batch.tasks.taskflow import (
    RESERVED_SPECIALS,
    Example,
    Result,
    Stage,
    TaskflowTask,
    cut_into_chunks,
    join_chunks,
    read_window,
    to_items,
    to_results,
)
from erniem_batch.text.schema import Node, taskflow_prompt

_NAMES = """
person, organization, city, country, river, mountain, building, university, newspaper, event,
date, time, amount of money, quantity, product, disease, profession, law, work of art, sports team
"""
LABELS = [name.strip() for name in _NAMES.split(",")]
N_LABELS = (1, 5, 10, 20)
BATCH_SIZE = 16  # Taskflow's default
LIMIT = 0.5  # position_prob
SHARE_OF_TOKENS = 0.02
N_CALIBRATION_TEXTS = 16
NEAR_LIMIT = 1e-5
SAME_PROBABILITY = 1e-4

Values = list[list[Item]]
Key = tuple[int, str, str, int | None, int | None]

app = App(help=__doc__)


@dataclass
class Usage:
    """What one turn of a candidate took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    model_seconds: float = 0.0
    windows: int = 0
    repeated_windows: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0


@contextmanager
def timed(usage: Usage) -> Iterator[None]:
    gc.collect()
    started, cpu_started = time.perf_counter(), time.process_time()
    yield
    usage.seconds = time.perf_counter() - started
    usage.cpu_seconds = time.process_time() - cpu_started


# ---- texts and model ---------------------------------------------------------------------------


def read_texts(files: Sequence[Path]) -> list[str]:
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines if line.strip()]


def make_texts(n_rows: int, seed: int = 0) -> list[str]:
    """Sample sentences in ever new order, cut to lengths of the SHORT mix."""
    folders = [DEMO_FOLDER / "data", DEMO_FOLDER / "data_classify"]
    files = sorted(path for folder in folders for path in folder.glob("*.jsonl"))
    sentences = [unicodedata.normalize("NFC", text) for text in read_texts(files)]
    rng = np.random.default_rng(seed)
    sigma = 0.5
    lengths = rng.lognormal(np.log(45) - sigma**2 / 2, sigma, n_rows).clip(4, 160).astype(int)
    tokenizer = ErnieMTokenizer.from_pretrained(DEMO_FOLDER / "model")
    source = (sentences[i] for _ in repeat(None) for i in rng.permutation(len(sentences)))
    texts = []
    for length in lengths.tolist():
        text = next(source)
        while len((tokens := tokenizer.encode_batch([text]).of(0)).ids) < length:
            text += f" {next(source)}"
        texts.append(text[: int(tokens.ends[length - 1])])
    return texts


def make_model(folder: Path, n_layers: int, texts: Sequence[str]) -> None:
    """Random weights whose probabilities pass the limit now and then."""
    tokenizer = ErnieMTokenizer.from_pretrained(DEMO_FOLDER / "model", lone_underline="paddle")
    tokenizer.save_pretrained(folder)
    config = ErnieMConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        initializer_range=0.05,  # more than usual: attention that looks at something
        mask_mode="paddle",
    )
    torch.manual_seed(0)
    model = ErnieMForInformationExtraction(config)
    model.save_pretrained(folder)
    compat = load(folder, taskflow_compat=True)
    windows, rows = windows_and_rows(compat, texts[:N_CALIBRATION_TEXTS])
    text_N2 = np.concatenate(
        [r[w.offset : w.offset + w.n_tokens] for w, r in zip(windows, rows, strict=True)]
    )
    padding_N2 = np.concatenate(
        [r[w.ids == compat.tokenizer.pad_token_id] for w, r in zip(windows, rows, strict=True)]
    )
    for i, head in enumerate((model.linear_start, model.linear_end)):
        # Padding is on the side of those that do not pass, as in a model that was trained.
        sign = 1 if np.median(padding_N2[:, i]) < np.median(text_N2[:, i]) else -1
        scale = 2 * sign / float(text_N2[:, i].std())
        with torch.no_grad():
            head.weight *= scale
            head.bias[:] = -float(np.quantile(text_N2[:, i] * scale, 1 - SHARE_OF_TOKENS))
    model.save_pretrained(folder)


def load(
    folder: Path, threads: int = 1, max_batch_tokens: int | None = None, **options: Any
) -> Predictor:
    options = {"schema": json.dumps(LABELS), "schema_lang": "en", **options}
    return Predictor.load(
        PredictorConfig(
            model=str(folder),
            options=ExtractOptions(**options),
            device="cpu",
            n_threads=threads,
            max_batch_tokens=max_batch_tokens,
        )
    )


def records_of(texts: Sequence[str]) -> list[Record]:
    return [Record(str(i), text) for i, text in enumerate(texts)]


def windows_and_rows(predictor: Predictor, texts: Sequence[str]) -> tuple[list[Window], list[Any]]:
    """All windows of texts, and the logits of each."""
    encoded = predictor.encode(records_of(texts))
    windows = [w for item in encoded if isinstance(item, Encoded) for w in item.windows]
    return windows, predictor.forward(windows)


# ---- candidates --------------------------------------------------------------------------------


def run_schedule(
    predictor: Predictor, model: torch.nn.Module, texts: Sequence[str], pad_to_512: bool
) -> tuple[Values, Values, Usage]:
    """Taskflow's way: name by name, 16 texts at a time, as they come.

    Returns:
        Values, each text being a call of its own as in compat mode; values, all texts being one
        call, in which the first answer to a name decides how those of all are read; usage.
    """
    task = predictor.task
    assert isinstance(task, TaskflowTask)
    usage = Usage()
    results: list[dict[str, list[Result]]] = [{} for _ in texts]
    answers_of: list[tuple[Stage, list[list[Result]]]] = []
    with timed(usage), torch.inference_mode():
        for label in LABELS:
            prompt = taskflow_prompt(label, None, "en")
            room = task.windows.size - len(prompt) - RESERVED_SPECIALS
            stage = Stage(Node(label))
            for text in texts:
                stage.examples.append(Example(text, prompt, cut_into_chunks(text, room, False)))
            chunks = [chunk for example in stage.examples for chunk in example.chunks]
            answers: list[list[Result]] = []
            for at in range(0, len(chunks), BATCH_SIZE):
                batch = chunks[at : at + BATCH_SIZE]
                pairs = [task._window(prompt, chunk) for chunk in batch]  # both tokenized anew
                lengths_B = np.array([w.offset + w.n_tokens + 1 for w, _ in pairs])
                width = task.windows.size if pad_to_512 else int(lengths_B.max())
                ids_BL = np.stack([window.ids[:width] for window, _ in pairs])
                positions_L = np.arange(width)
                positions_BL = np.where(positions_L < lengths_B[:, None], positions_L, 0)
                started = time.perf_counter()
                output = model(
                    torch.from_numpy(ids_BL), position_ids=torch.from_numpy(positions_BL)
                )
                logits_BL2 = torch.stack([output.start_logits, output.end_logits], dim=-1).numpy()
                usage.model_seconds += time.perf_counter() - started
                probs_BL2 = sigmoid(logits_BL2)
                for probs_L2, length, (_, offsets), chunk in zip(
                    probs_BL2, lengths_B.tolist(), pairs, batch, strict=True
                ):
                    seen = probs_L2 if pad_to_512 else probs_L2[:length]
                    spans = read_window(seen, offsets, LIMIT)
                    answers.append(to_results(spans, prompt, chunk))
                usage.windows += len(batch)
                usage.real_tokens += int(lengths_B.sum())
                usage.padded_tokens += ids_BL.size
            answers_of.append((stage, answers))
            at = 0
            for result, example in zip(results, stage.examples, strict=True):
                mine = deepcopy(answers[at : at + len(example.chunks)])  # joining shifts offsets
                found = join_chunks(Stage(stage.node, examples=[example]), mine)[0]
                if found:
                    result[label] = found
                at += len(example.chunks)
        values = [to_items(result) for result in results]
    as_one: list[dict[str, list[Result]]] = [{} for _ in texts]
    for stage, answers in answers_of:
        for result, found in zip(as_one, join_chunks(stage, answers), strict=True):
            if found:
                result[stage.node.name] = found
    return values, [to_items(result) for result in as_one], usage


def run_predictor(
    predictor: Predictor, texts: Sequence[str], rows_a_call: int | None = None
) -> tuple[Values, Usage]:
    records = records_of(texts)
    step = rows_a_call or len(records)
    before = deepcopy(predictor.counters)
    usage = Usage()
    with timed(usage):
        calls = [predictor.predict(records[i : i + step]) for i in range(0, len(records), step)]
    after = predictor.counters
    usage.model_seconds = after.seconds["forward"] - before.seconds["forward"]
    for name in ("windows", "repeated_windows", "real_tokens", "padded_tokens"):
        setattr(usage, name, getattr(after, name) - getattr(before, name))
    return [values_of(outcome) for outcomes in calls for outcome in outcomes], usage


def values_of(outcome: Any) -> list[Item]:
    if not isinstance(outcome, Prediction):
        raise SystemExit(f"text {outcome.id}: {outcome.stage}: {outcome.reason}")
    return outcome.value


# ---- comparisons -------------------------------------------------------------------------------


def keys_of(values: Values) -> dict[Key, float]:
    """Row, name, text, start and end of all that was found, with its probability."""
    return {
        (row, item.name, item.text, item.start, item.end): item.probability
        for row, items in enumerate(values)
        for item, _ in walk(items)
    }


def rows_that_differ(a: dict[Key, float], b: dict[Key, float]) -> list[int]:
    return sorted({key[0] for key in a.keys() ^ b.keys()})


def probability_difference(a: dict[Key, float], b: dict[Key, float]) -> float:
    return max((abs(a[key] - b[key]) for key in a.keys() & b.keys()), default=0.0)


def distance_from_limit(predictor: Predictor, text: str) -> float:
    """How near to the limit a token of the text comes: where rounding may decide."""
    _, rows = windows_and_rows(predictor, [text])
    return min(float(np.abs(sigmoid(row) - LIMIT).min()) for row in rows)


def compare(a: Values, b: Values, predictor: Predictor, texts: Sequence[str]) -> dict[str, Any]:
    """Whether two ways to compute the same thing give the same."""
    keys_a, keys_b = keys_of(a), keys_of(b)
    rows = rows_that_differ(keys_a, keys_b)
    near = sum(distance_from_limit(predictor, texts[i]) < NEAR_LIMIT for i in rows)
    return {
        "rows": len(a),
        "spans": [len(keys_a), len(keys_b)],
        "rows_that_differ": len(rows),
        "of_these_near_limit": near,
        "max_probability_difference": probability_difference(keys_a, keys_b),
    }


def compare_one_by_one(ours: Predictor, values: Values, texts: Sequence[str]) -> dict[str, Any]:
    """Ours against ours with every window in a batch of its own."""
    encoded = [item for item in ours.encode(records_of(texts)) if isinstance(item, Encoded)]
    windows = [window for item in encoded for window in item.windows]
    together = ours.forward(windows)
    alone = [ours.forward([window])[0] for window in windows]
    difference = max(
        float(np.abs(sigmoid(a) - sigmoid(b)).max()) for a, b in zip(together, alone, strict=True)
    )
    rows = iter(alone)
    found = [values_of(ours.decode(item, [next(rows) for _ in item.windows])) for item in encoded]
    return {
        **compare(values[: len(texts)], found, ours, texts),
        "windows": len(windows),
        "max_token_probability_difference": difference,
    }


def compare_places(ours: Values, theirs: Values) -> dict[str, Any]:
    """What the default mode finds, measured by what another one finds: row, name, start and end."""
    found, wanted = (
        # What stands in the prompt, which only Taskflow looks at, has no place.
        {(row, name, start, end) for row, name, _, start, end in keys_of(values) if end is not None}
        for values in (ours, theirs)
    )
    both = len(found & wanted)
    return {
        "rows": len(ours),
        "rows_that_differ": len({key[0] for key in found ^ wanted}),
        "ours": len(found),
        "theirs": len(wanted),
        "both": both,
        "precision": both / max(len(found), 1),
        "recall": both / max(len(wanted), 1),
        "theirs_without_text": sum(start >= end for _, _, start, end in wanted),
        "theirs_in_prompt": sum(key[4] is None for key in keys_of(theirs)),
    }


# ---- report ------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range if there is one."""
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def ratios(rounds: list[dict[str, list[Usage]]], name: str, other: str, what: str) -> list[float]:
    """How many times longer `name` took than `other`, round by round."""
    both = [turns for turns in rounds if name in turns and other in turns]
    medians = [
        [statistics.median(getattr(usage, what) for usage in turns[n]) for n in (name, other)]
        for turns in both
    ]
    return [a / b for a, b in medians]


def print_table(rounds: list[dict[str, list[Usage]]], names: Sequence[str], n_rows: int) -> None:
    print(
        "| schedule | windows | repeated | real tokens | computed tokens | padding | seconds | "
        "of it in the model | CPU seconds | rows/s | taskflow takes, times | by CPU seconds |"
    )
    print("|---|" + "--:|" * 11)
    for name in names:
        turns = [usage for turn in rounds for usage in turn.get(name, [])]
        last = turns[-1]
        seconds = [usage.seconds for usage in turns]
        cells = [
            name,
            f"{last.windows:,}",
            f"{last.repeated_windows / last.windows:.1%}",
            f"{last.real_tokens:,}",
            f"{last.padded_tokens:,}",
            f"{1 - last.real_tokens / last.padded_tokens:.1%}",
            spread(seconds, ",.1f"),
            f"{statistics.median(u.model_seconds / u.seconds for u in turns):.0%}",
            spread([usage.cpu_seconds for usage in turns], ",.1f"),
            f"{n_rows / statistics.median(seconds):,.1f}",
            spread(ratios(rounds, "taskflow", name, "seconds"), ".2f"),
            spread(ratios(rounds, "taskflow", name, "cpu_seconds"), ".2f"),
        ]
        print(f"| {' | '.join(cells)} |")


def cost_of_labels(turns: dict[int, list[Usage]], n_rows: int) -> dict[str, Any]:
    """Seconds by number of names, and of a line through them."""
    medians = {n: statistics.median(u.seconds for u in usages) for n, usages in turns.items()}
    slope, start = np.polyfit(list(medians), list(medians.values()), 1)
    return {
        "seconds": {n: round(seconds, 3) for n, seconds in medians.items()},
        "seconds_per_further_label_and_1000_rows": float(slope) * 1000 / n_rows,
        "seconds_before_the_first_and_1000_rows": float(start) * 1000 / n_rows,
        "padded_tokens": {n: usages[-1].padded_tokens for n, usages in turns.items()},
        "real_tokens": {n: usages[-1].real_tokens for n, usages in turns.items()},
        "repeated_windows": {
            n: usages[-1].repeated_windows / usages[-1].windows for n, usages in turns.items()
        },
    }


@app.default
def main(
    *,
    model: Path | None = None,
    layers: int = 2,
    texts: list[Path] | None = None,
    rows: int = 1000,
    rounds: int = 1,
    threads: int = 2,
    taskflow_rows: int | None = None,
    check_rows: int | None = None,
    compat_rows: int = 50,
    max_batch_tokens: int | None = None,
) -> None:
    """Prints a table, what the comparisons gave, and all of it as one line of JSON.

    Args:
        model: Model folder with a UIE head; default: made here, of random weights.
        layers: Of the model made here.
        texts: JSONL files with a field text, whose first rows are taken; default: made here.
        rows: How many texts.
        rounds: How often each candidate has its turn.
        threads: Of the forward pass.
        taskflow_rows: Compare the schedules on the first so many rows only, all of them on the
            same ones; the cost of further names is still that of all rows.
        check_rows: Rows to compute again one window at a time; default: all.
        compat_rows: Rows in one call of compat.
        max_batch_tokens: Of ours and compat; default: as the package does it.
    """
    torch.set_num_threads(threads)
    given = read_texts(texts)[:rows] if texts else make_texts(rows)
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            make_model(Path(folder), layers, given)
        where = model or Path(folder)
        compat = load(where, threads, max_batch_tokens, taskflow_compat=True)
        ours = load(where, threads, max_batch_tokens)
        run(compat, ours, given, rounds, taskflow_rows, check_rows, compat_rows)


def run(
    compat: Predictor,
    ours: Predictor,
    given: Sequence[str],
    n_rounds: int,
    taskflow_rows: int | None,
    check_rows: int | None,
    compat_rows: int,
) -> None:
    # This first look, not timed, also fills both tables of pieces.
    ours.encode(records_of(given))
    fine = [isinstance(item, Encoded) for item in compat.encode(records_of(given))]
    all_texts = [text for text, ok in zip(given, fine, strict=True) if ok]
    texts = all_texts[:taskflow_rows]
    config = ours.model.config
    setting = {
        "rows": len(texts),
        "rows_for_cost_of_labels": len(all_texts),
        "rows_left_out_since_taskflow_fails": len(given) - len(all_texts),
        "distinct_rows": len(set(texts)),
        "labels": len(LABELS),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "mask_mode": config.mask_mode,
        "compat_rows_a_call": compat_rows,
        "max_batch_tokens": ours.max_batch_tokens,
        "threads": ours.config.n_threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(" ".join(f"{name}={value}" for name, value in setting.items()), flush=True)

    values: dict[str, Values] = {}

    def schedule(name: str, model: torch.nn.Module, pad_to_512: bool) -> Usage:
        values[name], values[f"{name}, one call"], usage = run_schedule(
            compat, model, texts, pad_to_512
        )
        return usage

    def predict(
        name: str, predictor: Predictor, some: Sequence[str], rows_a_call: int | None = None
    ) -> Usage:
        values[name], usage = run_predictor(predictor, some, rows_a_call)
        return usage

    fewer = {n: ours.with_options(schema=json.dumps(LABELS[:n])) for n in N_LABELS}
    candidates: dict[str, Callable[[], Usage]] = {
        "taskflow": lambda: schedule("taskflow", compat.model, pad_to_512=True),
        "short": lambda: schedule("short", ours.model, pad_to_512=False),
        "compat": lambda: predict("compat", compat, texts, compat_rows),
        "ours": lambda: predict("ours", ours, texts),
        **{f"{n} labels": lambda n=n: predict(f"{n}", fewer[n], all_texts) for n in N_LABELS},
    }
    order = ["ours", "taskflow", "ours", "compat", "ours", "short", "ours"]
    order += [f"{n} labels" for n in N_LABELS]
    run_schedule(compat, compat.model, texts[:BATCH_SIZE], pad_to_512=True)
    for predictor in (compat, ours):
        run_predictor(predictor, texts[:BATCH_SIZE])
    rounds: list[dict[str, list[Usage]]] = []
    loads = [os.getloadavg()[0]]
    for number in range(1, n_rounds + 1):
        turns: dict[str, list[Usage]] = {}
        rounds.append(turns)
        for name in order:
            turns.setdefault(name, []).append(candidates[name]())
            loads.append(os.getloadavg()[0])
            print(
                f"round {number} {name}: {turns[name][-1].seconds:.1f} s, "
                f"{turns[name][-1].cpu_seconds:.1f} CPU s, load {loads[-1]:.1f}, "
                f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:,} MiB",
                flush=True,
            )

    for turns in rounds:
        # The predictor cannot tell: the windows of compat come to it padded. They are the same.
        for usage in turns["compat"]:
            usage.real_tokens = turns["taskflow"][0].real_tokens
    print()
    names = ["taskflow", "short", "compat", "ours"]
    print_table(rounds, names, len(texts))
    checks = {
        "taskflow_and_compat": compare(values["taskflow"], values["compat"], compat, texts),
        "ours_and_one_by_one": compare_one_by_one(ours, values["ours"], texts[:check_rows]),
        "ours_and_taskflow": compare_places(values["ours"], values["taskflow"]),
        "taskflow_and_taskflow_in_one_call": compare(
            values["taskflow"], values["taskflow, one call"], compat, texts
        ),
        "ours_and_short": compare_places(values["ours"], values["short"]),
    }
    by_label = {n: [u for turns in rounds for u in turns[f"{n} labels"]] for n in N_LABELS}
    cost = cost_of_labels(by_label, len(all_texts))
    for name, check in checks.items():
        print(f"\n{name}: {json.dumps(check)}")
    print(f"\ncost of labels: {json.dumps(cost)}\n")
    line = {
        **setting,
        "rounds": len(rounds),
        "load": [round(min(loads), 1), round(statistics.median(loads), 1), round(max(loads), 1)],
        "seconds": {n: [round(u.seconds, 2) for t in rounds for u in t[n]] for n in names},
        "cpu_seconds": {n: [round(u.cpu_seconds, 2) for t in rounds for u in t[n]] for n in names},
        "padded_tokens": {n: rounds[-1][n][-1].padded_tokens for n in names},
        "real_tokens": {n: rounds[-1][n][-1].real_tokens for n in names},
        "taskflow_takes_times": {
            n: [round(ratio, 3) for ratio in ratios(rounds, "taskflow", n, "seconds")]
            for n in names
        },
        "checks": checks,
        "cost_of_labels": cost,
    }
    print(json.dumps(line))
    same = checks["taskflow_and_compat"]
    if (
        same["rows_that_differ"] > same["of_these_near_limit"]
        or same["max_probability_difference"] > SAME_PROBABILITY
    ):
        raise SystemExit("taskflow and compat answer differently")


if __name__ == "__main__":
    app()
