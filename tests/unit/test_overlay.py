"""Model folders that hold only what differs from another one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from erniem_batch import ErnieMTokenizer
from erniem_batch.errors import CheckpointError
from erniem_batch.model.checkpoint import save_overlay
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.fetch import model_digest
from erniem_batch.model.heads import (
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)

CHANGED = "ernie_m.encoder.layers.2.linear2.bias"


@pytest.fixture
def base(random_model, tmp_path, tokenizer_dir):
    """A complete folder: a token classifier in float16, and a tokenizer."""
    folder = tmp_path / "base"
    random_model(ErnieMForTokenClassification).half().save_pretrained(folder)
    ErnieMTokenizer.from_pretrained(tokenizer_dir, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    """Another head over the base, with one bias of the encoder changed."""
    torch.manual_seed(1)
    model = ErnieMForQuestionAnswering.from_pretrained(base, allow_new_head=True)
    with torch.no_grad():
        model.get_parameter(CHANGED).add_(1.0)
    return model


@pytest.fixture
def overlay(model, base, tmp_path):
    folder = tmp_path / "overlay"
    save_overlay(model, folder, base, dtype="float16")
    return folder


def _settings(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**_settings(folder), **values}), encoding="utf-8")


def test_only_what_differs_is_written(overlay):
    tensors = load_file(overlay / "model.safetensors")
    assert set(tensors) == {CHANGED, "qa_outputs.weight", "qa_outputs.bias"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    settings = _settings(overlay)
    assert settings["base_model"] == "../base"
    assert settings["architectures"] == ["ErnieMForQuestionAnswering"]
    assert settings["torch_dtype"] == "float16"
    assert sorted(p.name for p in overlay.iterdir()) == ["config.json", "model.safetensors"]


def test_round_trip(model, overlay, batch):
    again = ErnieMForQuestionAnswering.from_pretrained(overlay)
    with torch.inference_mode():
        expected = model.half().float()(**batch)
        actual = again(**batch)
    assert torch.equal(actual.start_logits, expected.start_logits)
    assert torch.equal(actual.end_logits, expected.end_logits)


def test_differences_that_the_dtype_rounds_away_are_not_written(base, tmp_path):
    model = ErnieMForTokenClassification.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(CHANGED).mul_(1 + 1e-6)
    save_overlay(model, tmp_path / "same", base, dtype="float16")
    assert load_file(tmp_path / "same" / "model.safetensors") == {}
    again = ErnieMForTokenClassification.from_pretrained(tmp_path / "same")
    assert torch.equal(
        again.get_parameter(CHANGED),
        ErnieMForTokenClassification.from_pretrained(base).get_parameter(CHANGED),
    )
    save_overlay(model, tmp_path / "other", base)
    assert set(load_file(tmp_path / "other" / "model.safetensors")) == {CHANGED}


def test_a_head_of_another_shape_is_written(base, tmp_path):
    config = ErnieMForTokenClassification.from_pretrained(base).config
    model = ErnieMForTokenClassification.from_pretrained(
        base, config=config.with_labels(["a", "b", "c"]), allow_new_head=True
    )
    save_overlay(model, tmp_path / "overlay", base)
    assert set(load_file(tmp_path / "overlay" / "model.safetensors")) == {
        "classifier.weight",
        "classifier.bias",
    }
    again = ErnieMForTokenClassification.from_pretrained(tmp_path / "overlay")
    assert again.config.labels == ["a", "b", "c"]


def test_encoders_load_from_overlays_and_under_them(random_model, overlay, model, tmp_path):
    encoder = ErnieMModel.from_pretrained(overlay, allow_new_head=True)
    assert torch.equal(
        encoder.get_parameter(CHANGED.removeprefix("ernie_m.")),
        model.half().float().get_parameter(CHANGED),
    )
    random_model(ErnieMModel).save_pretrained(tmp_path / "encoder")
    head = ErnieMForSequenceClassification.from_pretrained(
        tmp_path / "encoder", allow_new_head=True
    )
    save_overlay(head, tmp_path / "head", tmp_path / "encoder")
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    assert set(tensors) == {"classifier.weight", "classifier.bias"}
    again = ErnieMForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(again.classifier.weight, head.classifier.weight)


def test_other_heads_are_still_refused(overlay):
    with pytest.raises(CheckpointError, match=r"ernie_m\.pooler\.dense\.bias.*allow_new_head"):
        ErnieMForSequenceClassification.from_pretrained(overlay)


def test_the_tokenizer_is_that_of_the_base(overlay, base):
    ours, theirs = map(ErnieMTokenizer.from_pretrained, (overlay, base))
    assert ours.do_lower_case
    assert ours.encode("Berlin, 北京") == theirs.encode("Berlin, 北京")
    shutil.copy(base / "sentencepiece.bpe.model", overlay)  # its own, without the settings
    assert not ErnieMTokenizer.from_pretrained(overlay).do_lower_case


def test_saving_in_full(overlay, batch, tmp_path):
    model = ErnieMForQuestionAnswering.from_pretrained(overlay)
    model.save_pretrained(tmp_path / "elsewhere" / "full")
    folder = tmp_path / "elsewhere" / "full"
    assert "base_model" not in _settings(folder)
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    again = ErnieMForQuestionAnswering.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(again(**batch).start_logits, model(**batch).start_logits)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt"])
def test_the_digest_covers_the_base(overlay, base, name):
    before = model_digest(overlay)
    assert model_digest(overlay) == before
    (base / "README.md").write_text("no part of the model")
    assert model_digest(overlay) == before
    content = (base / name).read_bytes()
    (base / name).write_bytes(content + b"\n")
    assert model_digest(overlay) != before
    (base / name).write_bytes(content)
    assert model_digest(overlay) == before


def test_the_digest_is_that_of_the_place_of_the_base_too(overlay, base, tmp_path):
    before = model_digest(overlay)
    assert before != model_digest(base)
    shutil.copytree(base, tmp_path / "deeper" / "base")
    shutil.copytree(overlay, tmp_path / "deeper" / "overlay")
    assert model_digest(tmp_path / "deeper" / "overlay") == before  # the same on every node


# ---- what is refused --------------------------------------------------------------------------


def _ways_in(folder):
    return [
        lambda: ErnieMForQuestionAnswering.from_pretrained(folder),
        lambda: ErnieMTokenizer.from_pretrained(folder),
        lambda: model_digest(folder),
    ]


def test_a_missing_base_is_named(overlay, base):
    shutil.rmtree(base)
    for way in _ways_in(overlay):
        with pytest.raises(CheckpointError, match=r"overlay.*'\.\./base', which is not there"):
            way()


def test_a_chain_of_overlays_is_refused(overlay, model, tmp_path):
    with pytest.raises(CheckpointError, match="must be another, complete model"):
        save_overlay(model, tmp_path / "second", overlay)
    shutil.copytree(overlay, tmp_path / "second")
    _change(tmp_path / "second", base_model="../overlay")
    for way in _ways_in(tmp_path / "second"):
        with pytest.raises(CheckpointError, match="only one level is read"):
            way()


def test_an_overlay_of_itself_is_refused(model, overlay, base):
    with pytest.raises(CheckpointError, match="must be another, complete model"):
        save_overlay(model, base, base)
    _change(overlay, base_model=".")
    with pytest.raises(CheckpointError, match="only one level is read"):
        ErnieMForQuestionAnswering.from_pretrained(overlay)


@pytest.mark.parametrize("name", ["s3://bucket/base", "/models/base", "", 7, ["../base"]])
def test_the_base_is_a_relative_path(overlay, name):
    _change(overlay, base_model=name)
    for way in _ways_in(overlay):
        with pytest.raises(CheckpointError, match="base_model must be the relative path"):
            way()
