"""Linear layers in int8."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.model import int8
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.fetch import local_folder
from erniem_batch.model.heads import HEADS
from erniem_batch.model.int8 import Int8Linear, quantize, quantize_linears
from erniem_batch.model.packed import encode_packed, pack
from erniem_batch.options import OPTIONS
from erniem_batch.predictor import Predictor
from erniem_batch.records import Record
from erniem_batch.serve.models import Shared

CPU = torch.device("cpu")
SAMPLES = [
    "Ada Lovelace met Charles Babbage in London.",
    "Angela Merkel besuchte Paris.",
    "Владимир живёт в Москве.",
    "李白住在长安。",
    "",
]


@pytest.mark.parametrize("n_tokens", [1, 2, 17, 300])
def test_a_layer_is_near_the_real_one(n_tokens):
    torch.manual_seed(2)
    linear = torch.nn.Linear(64, 96)
    x = torch.randn(n_tokens, 64) * torch.logspace(-3, 3, n_tokens)[:, None]  # each its own scale
    with torch.no_grad():
        exact, ours = linear(x), Int8Linear(linear)(x)
    error = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.02


def test_rows_are_for_themselves():
    torch.manual_seed(2)
    layer = Int8Linear(torch.nn.Linear(64, 32))
    x = torch.randn(9, 64)
    x[4] *= 1e4
    together = layer(x)
    for i, row in enumerate(x):
        assert torch.equal(layer(row[None])[0], together[i])
    assert torch.equal(layer(x.view(3, 3, 64)).view(9, 32), together), "any leading dimensions"
    assert torch.equal(layer(quantize(x)), together)


def _extreme() -> tuple[torch.nn.Linear, torch.Tensor]:
    """Weights and activations that are all as large as they can be."""
    torch.manual_seed(2)
    linear, x = torch.nn.Linear(64, 32), torch.full((9, 64), 3.0)
    with torch.no_grad():
        linear.weight[:] = torch.tensor([0.5, -0.5]).repeat(16)[:, None]
    return linear, x


@pytest.mark.parametrize("extreme", [False, True])
def test_without_onednn(monkeypatch, extreme):
    linear, x = _extreme()
    if not extreme:
        linear, x = torch.nn.Linear(64, 32), torch.randn(9, 64)
    fast = Int8Linear(linear)(x)
    monkeypatch.setattr(int8, "_has_onednn", lambda: False)
    torch.testing.assert_close(Int8Linear(linear)(x), fast, atol=1e-5, rtol=0)


def test_largest_products_are_right_on_this_machine():
    """Two of them are more than 16 bits hold, which processors without VNNI add them in."""
    linear, x = _extreme()
    with torch.no_grad():
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x), atol=0, rtol=1e-5)


def test_weights_have_a_bit_less_where_products_are_cut_off(monkeypatch):
    asked = []

    def is_exact(weight: int) -> bool:
        asked.append(weight)
        return weight < 100

    monkeypatch.setattr(int8, "_is_exact", is_exact)
    int8._onednn_limit.cache_clear()
    try:
        assert int8._onednn_limit() == 64
        assert asked == [127, 64]
        linear = torch.nn.Linear(64, 32)
        largest_C = linear.weight.detach().abs().amax(1)
        torch.testing.assert_close(64 * Int8Linear(linear).scales_C, largest_C)
    finally:
        int8._onednn_limit.cache_clear()


def test_a_row_of_zeros():
    layer = Int8Linear(torch.nn.Linear(8, 8))
    assert torch.equal(layer(torch.zeros(2, 8)), layer.bias.expand(2, 8))


@torch.no_grad()
def test_an_encoder_is_near_the_real_one(random_model):
    model = random_model(ErnieMModel)
    rng = np.random.default_rng(4)
    batch = pack([rng.integers(3, 120, size=n) for n in (5, 5, 31, 2)], model.config, CPU)
    exact = encode_packed(model, batch)
    quantize_linears(model.encoder)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.encoder.modules())
    ours = encode_packed(model, batch)
    cosine = torch.nn.functional.cosine_similarity(ours, exact)
    assert cosine.min() > 0.99
    firsts = encode_packed(model, batch, firsts_only=True)
    torch.testing.assert_close(firsts, ours[batch.firsts_N], atol=1e-5, rtol=0)


def _predictor(task: str, dtype: str) -> Predictor:
    folder = Path(local_folder("demo", task))
    return Predictor.load(
        PredictorConfig(model=str(folder), options=OPTIONS[task](), device="cpu", dtype=dtype)
    )


def test_the_demo_model_finds_the_same():
    exact, ours = (_predictor("ner", dtype) for dtype in ("float32", "int8"))
    records = [Record(str(i), text) for i, text in enumerate(SAMPLES)]
    a, b = ([o.value for o in p.predict(records)] for p in (exact, ours))
    assert [[(e.start, e.end, e.label) for e in v] for v in a] == [
        [(e.start, e.end, e.label) for e in v] for v in b
    ]
    assert any(a)
    for record, together in zip(records, b, strict=True):  # texts beside it change nothing
        alone = ours.predict([record])[0].value
        assert [(e.start, e.end, e.label) for e in alone] == [
            (e.start, e.end, e.label) for e in together
        ]
        assert [e.score for e in alone] == pytest.approx([e.score for e in together], abs=1e-3)


def test_tasks_of_a_service_share_int8_weights(random_model, tiny_config):
    config = replace(tiny_config).with_labels(["a", "b"])
    shared = Shared()
    models = [
        random_model(HEADS[name], config)
        for name in ("ErnieMForTokenClassification", "ErnieMForEmbedding")
    ]
    models[1].ernie_m.load_state_dict(models[0].ernie_m.state_dict())
    for model in models:
        quantize_linears(model.ernie_m.encoder)
        shared.add(model)
    first, second = (m.ernie_m.encoder.layers[0] for m in models)
    assert first.linear1.packed is second.linear1.packed
    assert first.linear1.scales_C.data_ptr() == second.linear1.scales_C.data_ptr()
    assert first.linear1.packed is not first.linear2.packed


def test_not_on_a_gpu(monkeypatch):
    monkeypatch.setattr("erniem_batch.predictor.usable_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="dtype=int8 is for CPUs: on a GPU use float16"):
        Predictor.load(PredictorConfig(dtype="int8"))
