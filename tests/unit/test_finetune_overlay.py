"""Training the biases alone, running means of weights, and models written as what differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import save_tiny_model, write_jsonl

from erniem_batch import ErnieMForTokenClassification, ErnieMTokenizer
from erniem_batch.errors import ConfigError
from erniem_batch.train import loop
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.heads import Rates, SharedHeads, make_optimizer, new_model
from erniem_batch.train.loop import train
from erniem_batch.train.session import LocalSession

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture
def start(tmp_path: Path, tokenizer: ErnieMTokenizer) -> Path:
    """A model for token classification that stands alone."""
    return save_tiny_model(tmp_path / "start", tokenizer, "ErnieMForTokenClassification", LABELS)


def config_of(start: Path, tmp_path: Path, name: str = "new", **values: Any) -> FinetuneConfig:
    rows = [
        {"id": str(i), "text": f"{who} lives in {where}.", "lang": "en",
         "spans": [{"start": 0, "end": len(who), "label": "PER"}]}
        for i, (who, where) in enumerate([("Ada", "London"), ("Bo", "Rome"), ("Cy", "Oslo")] * 6)
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {"epochs": ("2",), "max_batch_tokens": 64, "evaluations": 3}
    return FinetuneConfig(
        task="ner",
        model=str(start),
        train=(str(data),),
        output=str(tmp_path / name),
        **(settings | values),
    )


def test_biases_and_heads_alone_learn(start):
    heads = SharedHeads({"ner": new_model("ner", start, LABELS, None, None)})
    optimizer = make_optimizer(heads, Rates(only_biases=True), 2)
    learning = {name for name, p in heads.named_parameters() if p.requires_grad}
    matrices = {
        name
        for name, p in heads.named_parameters()
        if p.ndim == 2 and "classifier" not in name and "pooler" not in name
    }
    assert matrices
    assert not learning & matrices
    assert {name for name, _ in heads.named_parameters()} - learning == matrices
    n_learning = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert n_learning < 0.05 * sum(p.numel() for p in heads.parameters())


def test_an_overlay_of_biases_is_the_trained_model(start, tmp_path, tokenizer):
    config = config_of(start, tmp_path, learn="biases", overlay=True)
    train(config, LocalSession(tmp_path / "state"))
    size = (tmp_path / "new" / "model.safetensors").stat().st_size
    assert size < 0.2 * (start / "model.safetensors").stat().st_size
    before = ErnieMForTokenClassification.from_pretrained(start).state_dict()
    after = ErnieMForTokenClassification.from_pretrained(tmp_path / "new").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("bias" in name for name in changed)
    assert all(before[name].ndim == 1 or "classifier" in name for name in changed)
    assert ErnieMTokenizer.from_pretrained(tmp_path / "new").vocab_size == tokenizer.vocab_size
    # And once more from there: an overlay lies over the same base, not over another overlay.
    again = config_of(tmp_path / "new", tmp_path, "again", learn="biases", overlay=True)
    train(again, LocalSession(tmp_path / "state2"))
    assert ErnieMForTokenClassification.from_pretrained(tmp_path / "again")


def test_what_is_kept_is_the_running_mean(start, tmp_path, monkeypatch):
    """Of the weights after each step, beginning with those at the start."""
    share, seen = 0.7, []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (step(self, *a, **k), seen.append(weight_of(self)))[0],
    )

    def weight_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        return optimizer.param_groups[-1]["params"][-1].detach().clone()

    training = loop.prepare(config_of(start, tmp_path, average=share), LocalSession(tmp_path / "s"))
    expected = weight_of(training.optimizer)
    loop.run_steps(training)
    for weight in seen:
        expected = share * expected + (1 - share) * weight
    last = training.optimizer.param_groups[-1]["params"][-1]
    name = next(n for n, p in training.heads.named_parameters() if p is last)
    torch.testing.assert_close(training.average[name], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(training.best[name], expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(last.detach(), training.average[name]), "the training itself goes on"


def test_a_mean_survives_an_interruption(start, tmp_path, monkeypatch):
    whole = config_of(start, tmp_path, "whole", average=0.7, hold_out=0.0)
    train(whole, LocalSession(tmp_path / "state"))

    class Dies(LocalSession):
        def report(self, metrics: Any, folder: Path | None) -> None:
            super().report(metrics, folder)
            if len(self.reports) == 2:
                raise KeyboardInterrupt

    parts = config_of(start, tmp_path, "parts", average=0.7, hold_out=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(parts, Dies(tmp_path / "state2"))
    train(parts, LocalSession(tmp_path / "state2"))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"average": 1.0}, "--average must be from 0 to below 1"),
        ({"overlay": True, "task": "ner,embed"}, "--overlay is for one task"),
        ({"overlay": True, "output": "s3://bucket/new"}, "and for local folders"),
    ],
)
def test_settings_that_cannot_be(values, message):
    given = {"task": "ner", "model": "m", "train": ("a",), "output": "o"} | values
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**given)
