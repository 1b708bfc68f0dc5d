"""Fine-tune an ErnieM encoder for one task, on one machine.

    python pipelines/finetune.py --model SMALL --train 'ner/*.train.jsonl.gz' --output MODEL

Reads JSONL; the fields by --task, all places in characters (code points):

    ner       text, spans [[start, end, label], ...]
    classify  text, label
    qa        question, context, answers [{text, start}, ...]
    extract   text, spans: for each kind of span a prompt, as UIE wants it

and `lang`, if there is one. Writes a checkpoint every few minutes; after an interruption the same
command with --resume goes on where it stood.
"""

import argparse
import glob
import hashlib
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erniem_batch import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMTokenizer,
)
from erniem_batch.job.jsonl import open_jsonl
from erniem_batch.labels import spans_to_labels
from erniem_batch.model.checkpoint import PreTrainedModel, save_overlay
from erniem_batch.model.heads import IGNORED_LABEL
from erniem_batch.model.overlay import base_name
from erniem_batch.text.windows import window_starts

WRITTEN_WITHOUT_SPACES = {"ja", "zh", "zh-Hans", "th"}

# How a prompt may call a kind of span; a kind that is not here is its own name.
PROMPTS = {
    "PER": ("Person", "人物"),
    "LOC": ("Location", "地点"),
    "ORG": ("Organization", "组织机构"),
}

QUESTION_TOKENS = 64  # of a long question, so that there is room for the context
WINDOW_OVERLAP = 128

# What the heads get instead of a target where there is only padding.
FILLERS = {"labels": IGNORED_LABEL, "start_positions": 0, "end_positions": 0}

HEAD = re.compile(r"classifier|qa_outputs|linear_start|linear_end|ernie_m\.pooler")

Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One sequence as the model sees it.

    Attributes:
        ids: with the special tokens.
        targets: arguments of the model's forward by name; one number a token, or one in all.
    """

    ids: list[int]
    targets: dict[str, list[int] | int]


@dataclass(frozen=True)
class Task:
    """What differs from task to task.

    Attributes:
        head: the class of the model.
        labels: of the records, in the order of the head; none where the head has no labels.
        examples: for one pass over the records.
        max_length: tokens of one example, unless --max-length says otherwise.
    """

    head: type[PreTrainedModel]
    labels: Callable[[list[Record]], list[str]]
    examples: Callable[..., list[Example]]
    max_length: int


def main() -> int:
    args = parse_args()
    task = TASKS[args.task]
    args.max_length = args.max_length or task.max_length
    if args.overlay and base_name(args.model) is not None:
        raise SystemExit(f"{args.model} is an overlay itself: --overlay needs a complete model")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = ErnieMTokenizer.from_pretrained(args.model)
    records = read_records(args.train, args.max_per_language, args.seed, args.hold_out)
    labels = task.labels(records)
    model = new_model(task, args.model, labels)
    freeze(model, args.train_only)
    model.train(not args.no_dropout)
    optimizer = make_optimizer(model, args.learning_rate, args.head_rate, args.weight_decay)
    batches = [
        batch
        for epoch in range(args.epochs)
        for batch in epoch_batches(records, tokenizer, labels, args, epoch)
    ][: args.max_batches]
    checkpoint = args.output / "training.pt"
    done = 0
    if args.resume and checkpoint.exists():
        done = restore(checkpoint, model, optimizer)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"records={len(records)} batches={len(batches)} trained_parameters={n_trained} "
        f"starting at batch {done}",
        flush=True,
    )

    started = saved = time.monotonic()
    tokens, losses = 0, []
    for step in range(done, len(batches)):
        scale = learning_rate_scale(step, len(batches), args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        input_ids, targets = collate(batches[step], tokenizer.pad_token_id)
        loss = model(input_ids, **targets).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens += sum(len(example.ids) for example in batches[step])
        if (step + 1) % 50 == 0 or step + 1 == len(batches):
            seconds = time.monotonic() - started
            left = seconds / (step + 1 - done) * (len(batches) - step - 1)
            print(
                f"batch={step + 1}/{len(batches)} loss={np.mean(losses[-50:]):.4f} "
                f"tokens_per_s={tokens / seconds:.0f} minutes_left={left / 60:.1f}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * args.checkpoint_minutes:
            saved = time.monotonic()
            save(checkpoint, model, optimizer, step + 1)
    model.eval().half()
    if args.overlay:
        save_overlay(model, args.output, args.model)
    else:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    checkpoint.unlink(missing_ok=True)
    print(f"saved {args.output}", flush=True)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="ner")
    parser.add_argument("--model", required=True, type=Path, help="folder of an ErnieM encoder")
    parser.add_argument("--train", required=True, nargs="+", help="JSONL files or globs")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--train-only",
        metavar="REGEX",
        type=re.compile,
        help="train only the parameters with such names and the head, and no embeddings",
    )
    parser.add_argument(
        "--overlay", action="store_true", help="save only what differs from --model"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-batches", type=int, help="stop after so many, as if planned")
    parser.add_argument("--max-per-language", type=int, default=4000)
    parser.add_argument("--max-batch-tokens", type=int, default=1024)
    parser.add_argument(
        "--max-length", type=int, help="tokens of one example; default: 192, of qa 384"
    )
    parser.add_argument(
        "--join", type=float, default=0.25, help="ner: share of sentences joined with the next"
    )
    parser.add_argument(
        "--negatives", type=float, default=1.0, help="extract: prompts in vain for one in earnest"
    )
    parser.add_argument(
        "--hold-out", type=float, default=0.0, help="qa: share of paragraphs kept out, by hash"
    )
    parser.add_argument("--no-dropout", action="store_true", help="faster, for little training")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--head-rate", type=float, default=5.0, help="times the learning rate, for the new head"
    )
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--warmup", type=float, default=0.06, help="share of all batches")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-minutes", type=float, default=10)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def new_model(task: Task, folder: Path, labels: list[str]) -> PreTrainedModel:
    """The encoder of a folder under the head of a task."""
    config = ErnieMConfig.from_pretrained(folder)
    if task.head is not ErnieMForTokenClassification:  # thresholds of another task
        extra = {k: v for k, v in config.extra.items() if k != "task_specific_params"}
        config = replace(config, extra=extra, id2label=None, label2id=None, num_labels=None)
    if labels:
        config = config.with_labels(labels)
    return task.head.from_pretrained(folder, config=config, allow_new_head=True)


def freeze(model: torch.nn.Module, train_only: re.Pattern[str] | None) -> None:
    """Leaves only the parameters with such names, and the head, to be trained; None: all."""
    if train_only is None:
        return
    for name, parameter in model.named_parameters():
        chosen = train_only.search(name) is not None and "embeddings" not in name
        parameter.requires_grad_(chosen or HEAD.match(name) is not None)


# ---- records ----------------------------------------------------------------------------------


def read_records(
    patterns: list[str], max_per_language: int, seed: int, hold_out: float = 0.0
) -> list[Record]:
    """Records of all files, in a reproducible order, at most so many a language."""
    by_language = defaultdict(list)
    for path in sorted({p for pattern in patterns for p in glob.glob(pattern)}):
        with open_jsonl(path) as lines:
            for line in lines:
                record = json.loads(line)
                by_language[record.get("lang", "")].append(record)
    if not by_language:
        raise SystemExit(f"no records in {patterns}: expected JSONL, see --help for the fields")
    rng = random.Random(seed)
    chosen = []
    for language in sorted(by_language):
        group = by_language[language]
        if hold_out:
            group = [r for r, out in zip(group, held_out(group, hold_out), strict=True) if not out]
        rng.shuffle(group)
        chosen += group[:max_per_language]
    return chosen


def held_out(records: list[Record], share: float) -> list[bool]:
    """Which questions of one language are kept out of the training, whole paragraphs at a time.

    A paragraph is known by the smallest id of its questions. Translations have the same ids, so the
    same paragraphs are kept out in every language.
    """
    paragraph: dict[str, str] = {}
    for record in records:
        known = paragraph.get(record["context"], record["id"])
        paragraph[record["context"]] = min(known, record["id"])

    def is_out(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32

    return [is_out(paragraph[record["context"]]) for record in records]


def kinds_of(records: list[Record]) -> list[str]:
    return sorted({label for record in records for _, _, label in record["spans"]})


def join_some(records: list[Record], share: float, rng: random.Random) -> list[Record]:
    """Some records joined with the next of their language, so that the model sees more than one
    sentence at a time."""
    by_language = defaultdict(list)
    for record in records:
        by_language[record.get("lang", "")].append(record)
    joined = []
    for language, group in sorted(by_language.items()):
        rng.shuffle(group)
        space = "" if language in WRITTEN_WITHOUT_SPACES else " "
        while group:
            record = group.pop()
            text, spans = record["text"], [tuple(s) for s in record["spans"]]
            while group and rng.random() < share:
                other = group.pop()
                shift = len(text) + len(space)
                text += space + other["text"]
                spans += [(a + shift, b + shift, kind) for a, b, kind in other["spans"]]
            joined.append({"text": text, "spans": spans})
    return joined


# ---- examples ---------------------------------------------------------------------------------


def ner_examples(
    records: list[Record],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    rng: random.Random,
) -> list[Example]:
    """`[CLS] text [SEP]` with a BIO label for each token."""
    texts = join_some(records, args.join, rng)
    tokens = tokenizer.encode_batch([record["text"] for record in texts])
    label_id = {label: i for i, label in enumerate(labels)}
    examples = []
    for i, record in enumerate(texts):
        row = tokens.of(i)
        keep = args.max_length - 2
        offsets = list(zip(row.starts[:keep].tolist(), row.ends[:keep].tolist(), strict=True))
        targets = [label_id[x] for x in spans_to_labels(record["spans"], offsets)]
        # A token of white space only has no label of its own, neither here nor in decoding.
        targets = [
            IGNORED_LABEL if record["text"][a:b].isspace() else target
            for (a, b), target in zip(offsets, targets, strict=True)
        ]
        ids = tokenizer.build_inputs_with_special_tokens(row.ids[:keep].tolist())
        examples.append(Example(ids, {"labels": [IGNORED_LABEL, *targets, IGNORED_LABEL]}))
    return examples


def classify_examples(
    records: list[Record],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    rng: random.Random,
) -> list[Example]:
    """`[CLS] text [SEP]` with one label."""
    tokens = tokenizer.encode_batch([record["text"] for record in records], offsets=False)
    examples = []
    for i, record in enumerate(records):
        kept = tokens.of(i).ids[: args.max_length - 2].tolist()
        ids = tokenizer.build_inputs_with_special_tokens(kept)
        examples.append(Example(ids, {"labels": labels.index(record["label"])}))
    return examples


def qa_examples(
    records: list[Record],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    rng: random.Random,
) -> list[Example]:
    """`[CLS] question [SEP] [SEP] slice of the context [SEP]`, with first and last token of the
    answer; both are 0, [CLS], if the slice does not hold all of it."""
    questions = tokenizer.encode_batch([record["question"] for record in records], offsets=False)
    contexts = tokenizer.encode_batch([record["context"] for record in records])
    examples = []
    for i, record in enumerate(records):
        question = questions.of(i).ids[:QUESTION_TOKENS].tolist()
        row = contexts.of(i)
        answer = record["answers"][0]
        span = (answer["start"], answer["start"] + len(answer["text"]))
        place = tokens_of_span(record["context"], span, row.starts.tolist(), row.ends.tolist())
        before = len(question) + 3
        size = args.max_length - before - 1
        for start in window_starts(len(row.ids), size, min(WINDOW_OVERLAP, size // 2)):
            window = row.ids[start : start + size].tolist()
            first = last = 0
            if place is not None and start <= place[0] and place[1] < start + len(window):
                first, last = (at - start + before for at in place)
            ids = tokenizer.build_inputs_with_special_tokens(question, window)
            examples.append(Example(ids, {"start_positions": first, "end_positions": last}))
    return examples


def extract_examples(
    records: list[Record],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    rng: random.Random,
) -> list[Example]:
    """`[CLS] prompt [SEP] [SEP] text [SEP]` with 1 where a span that the prompt asks for starts,
    and ends; a prompt for each kind in a text, and some for kinds that are not there."""
    all_kinds = kinds_of(records)
    names = sorted({name for kind in all_kinds for name in PROMPTS.get(kind, (kind,))})
    prompts = {name: tokenizer.encode_batch([name]).ids.tolist() for name in names}
    tokens = tokenizer.encode_batch([record["text"] for record in records])
    found, in_vain = [], []
    for i, record in enumerate(records):
        row = tokens.of(i)
        for kind in all_kinds:
            prompt = prompts[rng.choice(PROMPTS.get(kind, (kind,)))]
            before = len(prompt) + 3
            keep = args.max_length - before - 1
            starts, ends = row.starts[:keep].tolist(), row.ends[:keep].tolist()
            ids = tokenizer.build_inputs_with_special_tokens(prompt, row.ids[:keep].tolist())
            first, last = [0] * len(ids), [0] * len(ids)
            spans = [(a, b) for a, b, label in record["spans"] if label == kind]
            for span in spans:
                place = tokens_of_span(record["text"], span, starts, ends)
                if place is not None:
                    first[before + place[0]] = last[before + place[1]] = 1
            example = Example(ids, {"start_positions": first, "end_positions": last})
            (found if spans else in_vain).append(example)
    rng.shuffle(in_vain)
    return found + in_vain[: round(args.negatives * len(found))]


def tokens_of_span(
    text: str, span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]
) -> tuple[int, int] | None:
    """First and last token of a span of characters; None if the tokens end before the span does.

    Args:
        starts, ends: characters of each token.
    """
    if not ends or ends[-1] < span[1]:
        return None
    inside = [
        i
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        if start < span[1] and span[0] < end and not text[start:end].isspace()
    ]
    return (inside[0], inside[-1]) if inside else None


# ---- batches ----------------------------------------------------------------------------------


def epoch_batches(
    records: list[Record],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    epoch: int,
) -> list[list[Example]]:
    """Batches of similar lengths within the token budget, in random order."""
    rng = random.Random(args.seed * 1000 + epoch)
    examples = TASKS[args.task].examples(records, tokenizer, labels, args, rng)
    rng.shuffle(examples)
    examples.sort(key=lambda e: len(e.ids) // 4)  # similar lengths, otherwise at random
    batches: list[list[Example]] = [[]]
    for example in examples:
        longest = max(len(example.ids), *(len(e.ids) for e in batches[-1]), 0)
        if batches[-1] and longest * (len(batches[-1]) + 1) > args.max_batch_tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def collate(batch: list[Example], pad_token_id: int) -> tuple[Tensor, dict[str, Tensor]]:
    """input_ids (examples, tokens); targets of the same shape, or (examples,)."""
    width = max(len(example.ids) for example in batch)
    input_ids = torch.full((len(batch), width), pad_token_id)
    for i, example in enumerate(batch):
        input_ids[i, : len(example.ids)] = torch.tensor(example.ids)
    targets = {}
    for name in batch[0].targets:
        rows = [example.targets[name] for example in batch]
        if isinstance(rows[0], list):
            rows = [row + [FILLERS[name]] * (width - len(row)) for row in rows]
        targets[name] = torch.tensor(rows)
    return input_ids, targets


# ---- training ---------------------------------------------------------------------------------


def make_optimizer(
    model: torch.nn.Module, peak: float, head_rate: float, decay: float
) -> torch.optim.Optimizer:
    """AdamW; the new head learns faster, tables and norms do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = head_rate * peak if HEAD.match(name) else peak
            decays = parameter.ndim == 2 and "embeddings" not in name
            groups[lr, decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}
            for (lr, weight_decay), parameters in groups.items()
        ],
        fused=True,
    )


def learning_rate_scale(step: int, n_steps: int, warmup: float) -> float:
    """Linear rise, then linear fall to zero."""
    rise = max(1, math.ceil(n_steps * warmup))
    return min((step + 1) / rise, (n_steps - step) / max(1, n_steps - rise))


def save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return int(state["step"])


TASKS = {
    "ner": Task(
        ErnieMForTokenClassification,
        lambda records: ["O", *(f"{p}-{k}" for k in kinds_of(records) for p in "BI")],
        ner_examples,
        max_length=192,
    ),
    "classify": Task(
        ErnieMForSequenceClassification,
        lambda records: sorted({record["label"] for record in records}),
        classify_examples,
        max_length=192,
    ),
    "qa": Task(ErnieMForQuestionAnswering, lambda records: [], qa_examples, max_length=384),
    "extract": Task(
        ErnieMForInformationExtraction, lambda records: [], extract_examples, max_length=192
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
