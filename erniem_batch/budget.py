"""How many tokens a forward pass should have: tried once, then remembered for this machine."""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from erniem_batch.config import cache_folder
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.onednn import processor
from erniem_batch.model.packed import encode_packed, pack

logger = logging.getLogger(__name__)

# A CPU is fastest while a batch stays in its cache; a GPU needs enough work to fill it.
LADDER = {"cpu": (256, 512, 1024, 2048), "cuda": (4096, 8192, 16_384, 32_768, 65_536)}
# As sentences are.
TEXT_TOKENS = 64
# All layers of a CPU take the same time; on a GPU all of them have to fit.
CPU_LAYERS = 1
ROUNDS = 3
SECONDS = 2.0
# A smaller one wins if it is nearly as fast: it takes less memory.
NEARLY = 0.97


def find_budget(model: ErnieMModel, window_tokens: int) -> int:
    """The token budget for a model where it is now, with as many threads as this one has.

    Takes about a second the first time.

    Args:
        window_tokens: the least, since a window must fit.
    """
    facts = _facts(model, window_tokens)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "budgets" / f"{digest}.json"
    with ExitStack() as stack:
        with suppress(OSError):  # a home that cannot be written: tried each time
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of several actors that start together one tries: they would disturb each other.
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        known = _read(path)
        if known is not None:
            return known
        speeds = measure(model, ladder(_weight(model).device.type, window_tokens))
        budget = choose(speeds)
        with suppress(OSError):
            _write(path, {**facts, "tokens_per_s": speeds, "max_batch_tokens": budget})
    logger.info("found max_batch_tokens=%d of=%s", budget, ",".join(map(str, speeds)))
    return budget


def ladder(device_type: str, window_tokens: int) -> list[int]:
    """What is tried, in no order."""
    known = LADDER.get(device_type, LADDER["cpu"])
    return [n for n in known if n > window_tokens] + [window_tokens] * (window_tokens >= known[0])


def measure(model: ErnieMModel, budgets: Sequence[int]) -> dict[int, float]:
    """Tokens a second with each budget, the best of some rounds in turn; those that do not fit
    in memory are left out, unless it is the least.
    """
    on_cpu = _weight(model).device.type == "cpu"
    n_layers = CPU_LAYERS if on_cpu else None
    least = min(budgets)
    seconds: dict[int, float] = {}
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS + 1):  # the first warms up
        for budget in sorted(budgets):
            if number > 1 and time.perf_counter() > end:
                break
            try:
                took = _seconds(model, budget, n_layers)
            except torch.OutOfMemoryError:
                budgets = [n for n in budgets if n < budget]
                seconds.pop(budget, None)
                torch.cuda.empty_cache()
                break
            if number:
                seconds[budget] = min(took, seconds.get(budget, took))
    return {n: n / took for n, took in sorted(seconds.items())} or {least: 0.0}


def choose(speeds: dict[int, float]) -> int:
    """The least that is nearly as fast as the fastest."""
    enough = NEARLY * max(speeds.values())
    return min(n for n, speed in speeds.items() if speed >= enough)


@torch.inference_mode()
def _seconds(model: ErnieMModel, n_tokens: int, n_layers: int | None) -> float:
    lengths = [TEXT_TOKENS] * (n_tokens // TEXT_TOKENS)
    lengths += [n_tokens % TEXT_TOKENS] * (n_tokens % TEXT_TOKENS > 0)
    ids = np.arange(n_tokens) % model.config.vocab_size
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    batch = pack(
        [text[: model.config.max_tokens] for text in texts], model.config, _weight(model).device
    )
    started = time.perf_counter()
    encode_packed(model, batch, n_layers=n_layers)
    if _weight(model).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _facts(model: ErnieMModel, window_tokens: int) -> dict[str, Any]:
    """What the answer depends on."""
    config, device = model.config, _weight(model).device
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        "threads": None if is_gpu else torch.get_num_threads(),
        "linear": type(model.encoder.layers[0].linear1).__name__,
        "dtype": str(_weight(model).dtype),
        "model": [
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_hidden_layers,
            config.hidden_act if isinstance(config.hidden_act, str) else "other",
        ],
        "window_tokens": window_tokens,
        "torch": torch.__version__,
    }


def _weight(model: ErnieMModel) -> Tensor:
    return model.embeddings.word_embeddings.weight


def cpu_name() -> str:
    """As the system calls it; two of one name are taken for equal."""
    lines = processor().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _read(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["max_batch_tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, found: dict[str, Any]) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(path)
