"""Where the time of a layer goes, one thread, in float32: milliseconds of each step, in turn.

    python -m tests.benchmarks layer [--rounds 25]

The steps are those of `erniem_batch.model.packed`, on a batch of sentences, each timed by itself:
what the products take is the mark, and what the rest takes is what no packing can save.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App
from rich.console import Console

from erniem_batch import ErnieMForTokenClassification
from erniem_batch.batching import plan_batches
from erniem_batch.model.activations import activate_
from erniem_batch.model.onednn import prepack_linears
from erniem_batch.model.packed import Packed, _attend, pack
from erniem_batch.model.steps import steps_for
from tests.benchmarks.forward import KINDS, attention_share, workplace
from tests.benchmarks.race.products import product

BUDGETS = (512, 1024)

app = App(help=__doc__)
console = Console(stderr=True, width=120)


@app.default
def main(
    *, rounds: int = 25, folder: Path | None = None, vocab: Path | None = None
) -> list[dict[str, Any]]:
    """Prints a line of JSON.

    Args:
        rounds: Of which medians are taken.
        folder: For models; kept, and not made again.
        vocab: Folder with a vocabulary; default: that of the demo.
    """
    with workplace(folder, vocab) as (_, folder):
        torch.set_num_threads(1)
        model = ErnieMForTokenClassification.from_pretrained(folder / "model" / "ner")
        prepack_linears(model.ernie_m.encoder)  # as `Predictor.load` does
        rows = []
        for kind in KINDS:
            pieces = json.loads((folder / f"race-{kind}.json").read_text())
            texts = [np.array(piece["ids"], np.int64) for piece in pieces]
            lengths = [len(ids) for ids in texts]
            for budget in BUDGETS:
                plan = plan_batches(lengths, budget)
                middle = [texts[i] for i in plan[len(plan) // 2]]
                batch = pack(middle, model.config, torch.device("cpu"))
                row = {"kind": kind, "tokens": sum(batch.lengths), **measure(model, batch, rounds)}
                console.print(row)
                rows.append(row)
    print(json.dumps(rows))
    return rows


@torch.inference_mode()
def measure(model: Any, batch: Packed, rounds: int) -> dict[str, Any]:
    """Milliseconds of each step; and the products' share of all, attention counted as work."""
    layer = model.ernie_m.encoder.layers[5]
    attention = layer.self_attn.self_attn
    n_tokens, shape = sum(batch.lengths), (-1, 12, 64)
    hidden, q, k, v, mixed, outer = torch.randn(6, n_tokens, 768)
    inner = torch.randn(n_tokens, 3072)
    linear_steps = steps_for(layer.linear1)
    linears = {
        "q": (attention.q_proj, hidden, q),
        "k": (attention.k_proj, hidden, k),
        "v": (attention.v_proj, hidden, v),
        "out": (layer.self_attn.out_proj, mixed, outer),
        "linear1": (layer.linear1, hidden, inner),
        "linear2": (layer.linear2, inner, outer),
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, (linear, given, out) in linears.items():
        steps[f"product {name}"] = partial(product, linear, given, out)
        steps[f"linear {name}"] = partial(linear_steps.project, name, linear, given)
    steps |= {
        "attention": lambda: _attend(
            q.view(shape), k.view(shape), v.view(shape), batch.groups, mixed.view(shape)
        ),
        "activation": lambda: activate_(layer.activation, inner),
        "two residuals": lambda: (outer.add_(hidden), outer.add_(hidden)),
        "two norms": lambda: (layer.norm1(hidden), layer.norm2(hidden)),
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            inner.normal_()  # else the activation meets its own results
            outer.normal_()
            started = time.perf_counter()
            step()
            spent[name].append(1000 * (time.perf_counter() - started))
    ms = {name: statistics.median(many) for name, many in spent.items()}
    return summary(ms, attention_share(batch.lengths))


def summary(ms: Mapping[str, float], attention_work: float) -> dict[str, Any]:
    products = sum(value for name, value in ms.items() if name.startswith("product"))
    found = {
        "products": products,
        "biases": sum(v for name, v in ms.items() if name.startswith("linear")) - products,
        **{name: v for name, v in ms.items() if not name.startswith(("product", "linear"))},
    }
    total = sum(found.values())
    return {
        "ms": {name: round(value, 2) for name, value in found.items()},
        "share": {name: round(value / total, 3) for name, value in found.items()},
        "most_possible": round(products * (1 + attention_work) / total, 3),
    }
