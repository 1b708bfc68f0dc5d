"""Weights in oneDNN's own order: when they are, and that nothing else changes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from erniem_batch.config import PredictorConfig, shares_weights
from erniem_batch.model import onednn
from erniem_batch.model.heads import HEADS
from erniem_batch.model.onednn import PrepackedLinear, prepack_linears
from erniem_batch.predictor import Predictor
from erniem_batch.records import Record
from erniem_batch.serve.models import Shared

MANY_SIZES = """
import resource, sys
import torch
from erniem_batch.model.int8 import Int8Linear
from erniem_batch.model.onednn import PrepackedLinear

torch.set_num_threads(1)
kind = {"float32": PrepackedLinear, "int8": Int8Linear}[sys.argv[1]]
up, down = kind(torch.nn.Linear(64, 256)), kind(torch.nn.Linear(256, 64))

@torch.inference_mode()
def grown(sizes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in sizes:
        down(up(torch.ones(n, 64)))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

grown([2000, *range(1, 100)])
print(grown(range(100, 1000)))
"""

TEXTS = ["Ada Lovelace lived in London.", "Berlin", "Παρίσι και Ρώμη " * 40]


@pytest.fixture
def on_amd(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (37, 64), (600, 64), (3, 5, 64)])
@torch.no_grad()
def test_a_layer(shape):
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(shape)
    torch.testing.assert_close(PrepackedLinear(linear)(x), linear(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (True, torch.float32, PrepackedLinear),
        (True, torch.bfloat16, torch.nn.Linear),
        (False, torch.float32, torch.nn.Linear),
    ],
)
def test_only_where_it_is_faster(monkeypatch, random_model, tiny_config, kind, dtype, expected):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: kind)
    model = random_model(HEADS["ErnieMForEmbedding"], tiny_config).to(dtype)
    prepack_linears(model.ernie_m.encoder)
    assert type(model.ernie_m.encoder.layers[1].linear2) is expected


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_predictor_says_the_same(on_amd, ner_model_dir, share_weights):
    config = PredictorConfig(
        model=str(ner_model_dir), window_tokens=64, overlap_tokens=16, max_batch_tokens=256,
        device="cpu", n_threads=1,
    )  # fmt: skip
    records = [Record(str(i), text) for i, text in enumerate(TEXTS)]
    predictor = Predictor.load(replace(config, share_weights=share_weights))
    linear = predictor.model.ernie_m.encoder.layers[0].linear1
    assert isinstance(linear, PrepackedLinear) is not share_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "onednn_is_faster", lambda: False)
        plain = Predictor.load(config)
        expected = [outcome.value for outcome in plain.predict(records)]
    found = [outcome.value for outcome in predictor.predict(records)]
    assert any(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [(e.start, e.end, e.label) for e in ours] == [
            (e.start, e.end, e.label) for e in theirs
        ]
        assert [e.score for e in ours] == pytest.approx([e.score for e in theirs], abs=1e-5)
    plain.close()
    predictor.close()


@pytest.mark.parametrize(
    ("n_processes", "n_threads", "expected"),
    [(1, 1, False), (1, 4, False), (4, 4, False), (2, 1, True)],
)
def test_who_shares(n_processes, n_threads, expected):
    assert shares_weights(n_processes, n_threads) is expected


def test_tasks_of_a_service_share_them(on_amd, random_model, tiny_config):
    config = replace(tiny_config).with_labels(["a", "b"])
    shared = Shared()
    names = ("ErnieMForTokenClassification", "ErnieMForEmbedding", "ErnieMForQuestionAnswering")
    models = [random_model(HEADS[name], config) for name in names]
    for model in models[:2]:
        model.ernie_m.load_state_dict(models[2].ernie_m.state_dict())
    models[2].ernie_m.encoder.layers[0].linear1.weight.data[0, 0] += 1
    for model in models:
        prepack_linears(model.ernie_m.encoder)
        shared.add(model)
    first, second, other = (model.ernie_m.encoder.layers[0] for model in models)
    assert first.linear1.packed is second.linear1.packed
    assert first.linear1.packed is not first.linear2.packed
    assert first.linear1.packed is not other.linear1.packed


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_batches_of_many_sizes_leave_nothing(dtype):
    command = [sys.executable, "-c", MANY_SIZES, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert float(done.stdout) < 100, "MB; without a limit it is 500 to 800"
