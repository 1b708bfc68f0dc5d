"""Tokens a second of training steps on CPU, by dtype and kernel of attention, in one run.

    python tests/benchmarks/finetune.py [--model DEMO_OR_FOLDER] [--tokens 3072] [--rounds 5]

A step is what `erniem-batch finetune --freeze-embeddings --dropout 0` does: forward, backward and
AdamW over all layers. The candidates take turns, so that a busy machine slows all of them alike;
ratios are to float32 with fused attention, taken turn by turn. `train/loop.py` chooses plain
attention in half precision for texts up to a length that this table supports.
"""

import argparse
import json
import statistics
import time
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from erniem_batch import ErnieMModel
from erniem_batch.model.fetch import local_folder
from erniem_batch.model.heads import ErnieMForEmbedding
from erniem_batch.train.heads import encoder_of

LENGTHS = (40, 140, 256, 384)
DTYPES = (torch.float32, torch.bfloat16)
KERNELS = {"fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], "plain": [SDPBackend.MATH]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=3072, help="padded tokens of a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = local_folder(args.model, "embed")
    model = encoder_of(ErnieMForEmbedding.from_pretrained(folder)).float()  # no dropout
    model.embeddings.requires_grad_(False)
    layers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-6, fused=True)
    for length in LENGTHS:
        input_ids = torch.randint(5, model.config.vocab_size - 1, (args.tokens // length, length))
        input_ids[::3, -length // 8 :] = model.config.pad_token_id
        candidates = list(product(DTYPES, KERNELS))
        speeds: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):  # the first only warms up
            for dtype, kernel in candidates:
                seconds = timed_step(model, optimizer, input_ids, dtype, KERNELS[kernel])
                if turn:
                    name = f"{str(dtype).removeprefix('torch.')} {kernel}"
                    speeds.setdefault(name, []).append(input_ids.numel() / seconds)
        print(json.dumps(summary(length, speeds)), flush=True)
    return 0


def timed_step(
    model: ErnieMModel,
    optimizer: torch.optim.Optimizer,
    input_ids: torch.Tensor,
    dtype: torch.dtype,
    kernels: list[SDPBackend],
) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    with (
        sdpa_kernel(kernels),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16),
    ):
        loss = model(input_ids).last_hidden_state.float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def summary(length: int, speeds: dict[str, list[float]]) -> dict[str, object]:
    """Median tokens a second and median ratios to the first candidate."""
    first = next(iter(speeds.values()))
    return {
        "tokens_of_a_text": length,
        "tokens_per_s": {name: round(statistics.median(s)) for name, s in speeds.items()},
        "times_as_fast": {
            name: round(statistics.median(a / b for a, b in zip(s, first, strict=True)), 2)
            for name, s in speeds.items()
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
