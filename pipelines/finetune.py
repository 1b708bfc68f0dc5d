"""Fine-tune an ErnieM encoder for named entities, on one machine.

    python pipelines/finetune.py --model SMALL --train 'ner/*.train.jsonl.gz' --output MODEL

Reads JSONL with `text` and `spans` ([start, end, label], characters). Writes a checkpoint every few
minutes; after an interruption the same command with --resume goes on where it stood.
"""

import argparse
import glob
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erniem_batch import ErnieMConfig, ErnieMForTokenClassification, ErnieMTokenizer
from erniem_batch.job.jsonl import open_jsonl
from erniem_batch.labels import spans_to_labels
from erniem_batch.model.heads import IGNORED_LABEL

WRITTEN_WITHOUT_SPACES = {"ja", "zh", "zh-Hans", "th"}


@dataclass(frozen=True)
class Example:
    """One text as the model sees it; ids and labels include the special tokens."""

    ids: list[int]
    labels: list[int]


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = ErnieMTokenizer.from_pretrained(args.model)
    records = read_records(args.train, args.max_per_language, args.seed)
    labels = ["O", *(f"{p}-{k}" for k in kinds_of(records) for p in "BI")]
    config = ErnieMConfig.from_pretrained(args.model).with_labels(labels)
    model = ErnieMForTokenClassification.from_pretrained(
        args.model, config=config, allow_new_head=True
    ).train()
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    batches = [
        batch
        for epoch in range(args.epochs)
        for batch in epoch_batches(records, tokenizer, labels, args, epoch)
    ]
    checkpoint = args.output / "training.pt"
    done = 0
    if args.resume and checkpoint.exists():
        done = restore(checkpoint, model, optimizer)
    print(f"records={len(records)} batches={len(batches)} starting at batch {done}", flush=True)

    started = saved = time.monotonic()
    tokens, losses = 0, []
    for step in range(done, len(batches)):
        scale = learning_rate_scale(step, len(batches), args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        input_ids, targets = collate(batches[step], tokenizer.pad_token_id)
        loss = model(input_ids, labels=targets).loss
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
    model.eval().half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    checkpoint.unlink(missing_ok=True)
    print(f"saved {args.output}", flush=True)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="folder of an ErnieM encoder")
    parser.add_argument("--train", required=True, nargs="+", help="JSONL files or globs")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-per-language", type=int, default=4000)
    parser.add_argument("--max-batch-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=192, help="tokens of one example")
    parser.add_argument(
        "--join", type=float, default=0.25, help="share of sentences joined with the next"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--warmup", type=float, default=0.06, help="share of all batches")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-minutes", type=float, default=10)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def read_records(patterns: list[str], max_per_language: int, seed: int) -> list[dict[str, Any]]:
    """Records of all files, in a reproducible order, at most so many a language."""
    by_language = defaultdict(list)
    for path in sorted({p for pattern in patterns for p in glob.glob(pattern)}):
        with open_jsonl(path) as lines:
            for line in lines:
                record = json.loads(line)
                by_language[record.get("lang", "")].append(record)
    if not by_language:
        raise SystemExit(f"no records in {patterns}: expected JSONL with text and spans")
    rng = random.Random(seed)
    chosen = []
    for language in sorted(by_language):
        rng.shuffle(by_language[language])
        chosen += by_language[language][:max_per_language]
    return chosen


def kinds_of(records: list[dict[str, Any]]) -> list[str]:
    return sorted({label for record in records for _, _, label in record["spans"]})


def join_some(
    records: list[dict[str, Any]], share: float, rng: random.Random
) -> list[dict[str, Any]]:
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


def epoch_batches(
    records: list[dict[str, Any]],
    tokenizer: ErnieMTokenizer,
    labels: list[str],
    args: argparse.Namespace,
    epoch: int,
) -> list[list[Example]]:
    """Batches of similar lengths within the token budget, in random order."""
    rng = random.Random(args.seed * 1000 + epoch)
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
        examples.append(Example(ids, [IGNORED_LABEL, *targets, IGNORED_LABEL]))
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


def collate(batch: list[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(example.ids) for example in batch)
    input_ids = torch.full((len(batch), width), pad_token_id)
    targets = torch.full((len(batch), width), IGNORED_LABEL)
    for i, example in enumerate(batch):
        input_ids[i, : len(example.ids)] = torch.tensor(example.ids)
        targets[i, : len(example.ids)] = torch.tensor(example.labels)
    return input_ids, targets


def make_optimizer(model: torch.nn.Module, peak: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; the new head learns five times as fast, tables and norms do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        is_head = name.startswith("classifier")
        decays = parameter.ndim == 2 and "embeddings" not in name
        groups[5 * peak if is_head else peak, decay if decays else 0.0].append(parameter)
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


if __name__ == "__main__":
    raise SystemExit(main())
