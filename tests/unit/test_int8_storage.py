"""Weights stored as int8 rows: half the size of float16, rounded once and never again."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from erniem_batch.cli import main
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model import convert as convert_module
from erniem_batch.model.checkpoint import from_int8, save_overlay, to_int8
from erniem_batch.model.convert import convert
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import (
    HEADS,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)

WORDS = "ernie_m.embeddings.word_embeddings.weight"
LINEAR = "ernie_m.encoder.layers.2.linear2.weight"
# A quotient of up to 127 is rounded to 24 bits before it is rounded to a whole number.
HALF_A_STEP = 0.5 + 1e-5


@pytest.fixture
def base(random_model, tmp_path, tokenizer) -> Path:
    """A complete int8 folder of a token classifier whose padding row is zero, and a tokenizer."""
    model = random_model(ErnieMForTokenClassification)
    with torch.no_grad():
        model.get_parameter(WORDS)[1].zero_()
    model.save_pretrained(tmp_path / "base", storage="int8")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _round_trip(matrix: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    stored = to_int8({WORDS: matrix})
    return from_int8(stored, Path("file"))[WORDS], stored


# ---- rows -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    exponent=st.integers(-80, 120),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_rows_are_rounded_once(seed, exponent, dtype):
    """Within half a scale, and what is read and stored again is the same to the bit."""
    generator = torch.Generator().manual_seed(seed)
    exponent = exponent if dtype != torch.float16 else exponent % 36 - 24
    matrix = torch.randn(9, 33, generator=generator).clamp(-1.9, 1.9).double() * 2.0**exponent
    matrix = matrix.to(dtype)
    matrix[3] = 0
    matrix[4, 1:] = 0
    matrix[5] *= -1e-3
    again, stored = _round_trip(matrix)
    codes, scale = stored[f"{WORDS}.int8"], stored[f"{WORDS}.int8_scale"]
    assert (codes.dtype, scale.dtype, again.dtype) == (torch.int8, torch.float32, torch.float32)
    assert (codes.shape, scale.shape) == (matrix.shape, (9,))
    torch.testing.assert_close(
        scale.double(), matrix.double().abs().amax(1) / 127, rtol=2**-17, atol=0
    )
    error = (again.double() - matrix.double()).abs()
    assert (error <= HALF_A_STEP * scale[:, None].double()).all()
    assert (again[3] == 0).all()
    assert (codes.abs().amax(1) == (matrix != 0).any(1) * 127).all()
    for _ in range(2):
        again, once_more = _round_trip(again)
        assert torch.equal(once_more[f"{WORDS}.int8"], codes)
        assert torch.equal(once_more[f"{WORDS}.int8_scale"], scale)


def test_extreme_rows():
    """Too small for a scale is zero; the largest floats are not too large."""
    largest = torch.finfo(torch.float32).max
    matrix = torch.tensor([[1e-31, -1e-40], [1e-30, 0], [largest * 0.999, 1], [-0.0, 0]])
    again, stored = _round_trip(matrix)
    assert stored[f"{WORDS}.int8"].tolist() == [[0, 0], [127, 0], [127, 0], [0, 0]]
    assert again[0].tolist() == [0, 0]
    torch.testing.assert_close(again[1:, 0], matrix[1:, 0], rtol=2**-17, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_int8_cannot_hold_are_refused(random_model, tmp_path, value):
    model = random_model(ErnieMForTokenClassification)
    with torch.no_grad():
        model.get_parameter(LINEAR)[3, 4] = value
    with pytest.raises(CheckpointError, match=f"not all numbers are finite: {LINEAR}$"):
        model.save_pretrained(tmp_path / "new", storage="int8")
    assert not (tmp_path / "new").exists()


def test_floats_beside_int8_do_not_overflow(random_model, tmp_path):
    model = random_model(ErnieMForTokenClassification)
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    model.save_pretrained(tmp_path, storage="int8")
    assert torch.equal(_stored(tmp_path)["classifier.bias"], model.classifier.bias)


# ---- whole folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_what_is_stored_and_loaded(random_model, tmp_path, name):
    model = random_model(HEADS[name])
    model.save_pretrained(tmp_path, storage="int8")
    stored = _stored(tmp_path)
    again = HEADS[name].from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    heads = ("classifier.", "qa_outputs.", "linear_start.", "linear_end.")
    for key, tensor in model.state_dict().items():
        loaded = again.state_dict()[key]
        if tensor.ndim == 2 and not key.startswith(heads):
            assert key not in stored
            scale = stored[f"{key}.int8_scale"]
            assert ((loaded - tensor).abs() <= HALF_A_STEP * scale[:, None]).all(), key
            assert not torch.equal(loaded, tensor)
        else:
            assert stored[key].dtype == torch.float16
            assert torch.equal(loaded, tensor.half().float()), key
    values = _settings(tmp_path)
    assert (values["weight_storage"], values["torch_dtype"]) == ("int8", "float32")
    assert values["architectures"] == [name]


def test_saving_again_changes_nothing(base, tmp_path):
    model = ErnieMForTokenClassification.from_pretrained(base)
    model.save_pretrained(tmp_path / "again", storage="int8")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_the_padding_row_stays_zero(base):
    words = ErnieMForTokenClassification.from_pretrained(base).get_parameter(WORDS)
    assert (words[1] == 0).all()
    assert (words != 0).any(1).sum() == len(words) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(base, dtype):
    model = ErnieMForTokenClassification.from_pretrained(base, dtype=dtype)
    exact = ErnieMForTokenClassification.from_pretrained(base).to(dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact.state_dict()[name])


def test_outputs_are_close(random_model, base, batch):
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        exact = random_model(ErnieMForTokenClassification)(**batch).logits[real]
        rounded = ErnieMForTokenClassification.from_pretrained(base)(**batch).logits[real]
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_saved_as_floats_it_is_an_ordinary_folder(base, tmp_path):
    model = ErnieMForTokenClassification.from_pretrained(base)
    model.save_pretrained(tmp_path / "floats")
    assert "weight_storage" not in _settings(tmp_path / "floats")
    stored = _stored(tmp_path / "floats")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[key], t) for key, t in model.state_dict().items())


def test_size(random_model, tiny_config, tmp_path):
    config = replace(tiny_config, vocab_size=3000, hidden_size=128, intermediate_size=512)
    model = random_model(ErnieMForTokenClassification, config)
    model.save_pretrained(tmp_path / "int8", storage="int8")
    model.half().save_pretrained(tmp_path / "half")
    small, large = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "half")
    )
    assert 0.5 < small / large < 0.55


def test_encoders_and_heads_load_from_each_other(random_model, base, tmp_path):
    head = ErnieMForTokenClassification.from_pretrained(base)
    encoder = ErnieMModel.from_pretrained(base, allow_new_head=True)
    assert torch.equal(encoder.embeddings.word_embeddings.weight, head.get_parameter(WORDS))
    encoder.save_pretrained(tmp_path / "encoder", storage="int8")
    assert "embeddings.word_embeddings.weight.int8" in _stored(tmp_path / "encoder")
    again = ErnieMForTokenClassification.from_pretrained(tmp_path / "encoder", allow_new_head=True)
    assert torch.equal(again.get_parameter(WORDS), head.get_parameter(WORDS))


def test_unknown_storages(random_model, base, tmp_path):
    model = random_model(ErnieMForTokenClassification)
    for save in (
        lambda: model.save_pretrained(tmp_path / "new", storage="int4"),
        lambda: save_overlay(model, tmp_path / "new", base, storage="int4"),
        lambda: convert(base, tmp_path / "new", storage="int4"),
    ):
        with pytest.raises(ConfigError, match="storage must be one of int8 or None, got 'int4'"):
            save()
    assert not (tmp_path / "new").exists()


# ---- overlays ---------------------------------------------------------------------------------


def _trained_head(base: Path, **options: Any) -> ErnieMForQuestionAnswering:
    torch.manual_seed(1)
    return ErnieMForQuestionAnswering.from_pretrained(base, allow_new_head=True, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_overlay_holds_only_the_head(base, tmp_path, batch, dtype):
    """In bfloat16 too, where the rounded rows would have other scales."""
    model = _trained_head(base, dtype=dtype)
    save_overlay(model, tmp_path / "overlay", base, storage="int8")
    stored = _stored(tmp_path / "overlay")
    assert set(stored) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    values = _settings(tmp_path / "overlay")
    assert (values["weight_storage"], values["base_model"]) == ("int8", "../base")
    again = ErnieMForQuestionAnswering.from_pretrained(tmp_path / "overlay")
    head = model.qa_outputs.weight.half().float()
    assert torch.equal(again.qa_outputs.weight, head)
    below = ErnieMForTokenClassification.from_pretrained(base)
    for name, tensor in below.ernie_m.state_dict().items():
        assert torch.equal(again.ernie_m.state_dict()[name], tensor)


def test_heads_of_overlays_may_be_written_exactly(base, tmp_path):
    model = _trained_head(base)
    save_overlay(model, tmp_path / "overlay", base, storage="int8", dtype="float32")
    stored = _stored(tmp_path / "overlay")
    assert set(stored) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert torch.equal(stored["qa_outputs.weight"], model.qa_outputs.weight)


def test_changed_matrices_are_written_as_int8(base, tmp_path):
    model = _trained_head(base)
    weight = model.get_parameter(LINEAR)
    with torch.no_grad():
        weight[0, 0] += weight[0].abs().max() / 100  # more than a step
    save_overlay(model, tmp_path / "overlay", base, storage="int8")
    changed = {f"{LINEAR}.int8", f"{LINEAR}.int8_scale"}
    assert set(_stored(tmp_path / "overlay")) == changed | {"qa_outputs.weight", "qa_outputs.bias"}
    again = ErnieMForQuestionAnswering.from_pretrained(tmp_path / "overlay").get_parameter(LINEAR)
    assert (again != ErnieMForTokenClassification.from_pretrained(base).get_parameter(LINEAR)).any()
    assert ((again - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253).all()


def test_changes_that_int8_rounds_away_are_not_written(base, tmp_path):
    model = ErnieMForTokenClassification.from_pretrained(base)
    weight = model.get_parameter(LINEAR)
    step = weight.abs().amax(1, keepdim=True) / 127
    with torch.no_grad():
        small = weight.abs() < 100 * step  # not the largest, which is the scale
        weight += 0.4 * step * small * torch.randn_like(weight).sign()
    save_overlay(model, tmp_path / "overlay", base, storage="int8")
    assert _stored(tmp_path / "overlay") == {}
    save_overlay(model, tmp_path / "floats", base)
    assert set(_stored(tmp_path / "floats")) == {LINEAR}
    assert "weight_storage" not in _settings(tmp_path / "floats")


def test_int8_over_a_base_of_floats(random_model, tmp_path):
    """Nothing is written anew only because it would be rounded."""
    random_model(ErnieMForTokenClassification).half().save_pretrained(tmp_path / "base")
    model = _trained_head(tmp_path / "base")
    save_overlay(model, tmp_path / "overlay", tmp_path / "base", storage="int8")
    assert set(_stored(tmp_path / "overlay")) == {"qa_outputs.weight", "qa_outputs.bias"}
    again = ErnieMForQuestionAnswering.from_pretrained(tmp_path / "overlay")
    assert torch.equal(again.get_parameter(LINEAR), model.get_parameter(LINEAR))


# ---- other libraries --------------------------------------------------------------------------


@pytest.fixture
def reference() -> Any:
    with warnings.catch_warnings():
        # transformers 4.40.2 is older than our Python and torch: its own warnings aren't ours.
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        from transformers.models import ernie_m
    transformers.logging.set_verbosity_error()
    return ernie_m


@pytest.mark.filterwarnings("ignore:::transformers")
def test_transformers_finds_the_weights_missing(reference, base):
    """It must not take codes for weights."""
    cls = reference.ErnieMForTokenClassification
    _, info = cls.from_pretrained(base, output_loading_info=True)
    matrices = {key.removesuffix(".int8") for key in _stored(base) if key.endswith(".int8")}
    assert len(matrices) == 2 + 6 * 3
    assert set(info["missing_keys"]) == matrices
    assert set(info["unexpected_keys"]) == {
        f"{key}.{kind}" for key in matrices for kind in ("int8", "int8_scale")
    }


@pytest.mark.filterwarnings("ignore:::transformers")
def test_converted_to_floats_it_loads_in_transformers(reference, base, tmp_path, batch):
    report = convert(base, tmp_path / "floats", layout="hf")
    assert report.max_difference == 0
    cls = reference.ErnieMForTokenClassification
    theirs, info = cls.from_pretrained(tmp_path / "floats", output_loading_info=True)
    assert not any(info.values())
    ours = ErnieMForTokenClassification.from_pretrained(base)
    with torch.inference_mode():
        expected, actual = theirs.eval()(**batch).logits, ours(**batch).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# ---- convert ----------------------------------------------------------------------------------


def test_convert_to_int8_and_back(random_model, tokenizer, tmp_path):
    model = random_model(ErnieMForSequenceClassification)
    model.save_pretrained(tmp_path / "floats")
    tokenizer.save_pretrained(tmp_path / "floats")
    report = convert(tmp_path / "floats", tmp_path / "int8", storage="int8")
    assert (report.target_layout, report.n_tensors) == ("hf", len(model.state_dict()))
    assert 0.001 < report.max_difference < 1
    assert any("int8" in note and "transformers" in note for note in report.notes)
    assert "ernie_m.pooler.dense.weight.int8" in _stored(tmp_path / "int8")
    assert (tmp_path / "int8" / "vocab.txt").is_file()

    back = convert(tmp_path / "int8", tmp_path / "back", layout="hf")
    assert back.max_difference == 0
    assert not any("int8" in note for note in back.notes)
    assert "weight_storage" not in _settings(tmp_path / "back")
    stored = _stored(tmp_path / "back")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = ErnieMForSequenceClassification.from_pretrained(tmp_path / "int8").state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in stored.items())

    again = convert(tmp_path / "back", tmp_path / "again", storage="int8")
    assert again.max_difference == 0
    for name in ("model.safetensors", "config.json"):
        a, b = (tmp_path / folder / name for folder in ("again", "int8"))
        assert a.read_bytes() == b.read_bytes()


def test_convert_on_the_command_line(random_model, tmp_path, capsys):
    random_model(ErnieMForTokenClassification).save_pretrained(tmp_path / "floats")
    a, b, c = (str(tmp_path / name) for name in ("floats", "int8", "back"))
    assert main(["convert", a, b, "--storage", "int8"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target_layout"] == "hf"
    assert report["max_difference"] > 0.001
    assert main(["convert", b, c, "--layout", "hf"]) == 0
    assert json.loads(capsys.readouterr().out)["max_difference"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_convert_other_types_to_int8(random_model, tmp_path, dtype):
    random_model(ErnieMForTokenClassification).to(dtype).save_pretrained(tmp_path / "floats")
    assert convert(tmp_path / "floats", tmp_path / "int8", storage="int8").max_difference < 1
    assert _settings(tmp_path / "int8")["torch_dtype"] == "float32"


def test_convert_an_int8_folder_for_paddle(random_model, tiny_config, tmp_path):
    config = replace(tiny_config, intermediate_size=128)
    model = random_model(ErnieMForTokenClassification, config)
    model.save_pretrained(tmp_path / "int8", storage="int8")
    assert convert(tmp_path / "int8", tmp_path / "paddle").target_layout == "paddle"
    assert "weight_storage" not in _settings(tmp_path / "paddle")
    report = convert(tmp_path / "paddle", tmp_path / "again", storage="int8")
    assert (report.source_layout, report.max_difference) == ("paddle", 0)
    a, b = (tmp_path / name / "model.safetensors" for name in ("again", "int8"))
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(ConfigError, match="storage='int8' is for the layout hf"):
        convert(tmp_path / "int8", tmp_path / "new", layout="paddle", storage="int8")


def test_convert_an_overlay_over_int8(base, tmp_path):
    model = _trained_head(base)
    save_overlay(model, tmp_path / "overlay", base, storage="int8")
    assert convert(tmp_path / "overlay", tmp_path / "full", layout="hf").max_difference == 0
    stored = _stored(tmp_path / "full")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(stored[LINEAR], model.get_parameter(LINEAR))
    small = convert(tmp_path / "overlay", tmp_path / "small", storage="int8")
    assert small.max_difference == 0
    assert f"{LINEAR}.int8" in _stored(tmp_path / "small")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("tensor", r"changed 1 tensors \(ernie_m\.encoder"), ("outputs", "what the model computes")],
)
def test_a_mistake_in_rounding_is_found(random_model, tmp_path, monkeypatch, kind, message):
    """A step more than int8 needs, and outputs that its rounding does not explain."""
    random_model(ErnieMForTokenClassification).save_pretrained(tmp_path / "floats")
    if kind == "tensor":
        original = convert_module._write_hf

        def write(model: Any, tokenizer: Any, folder: Path, storage: str | None) -> None:
            original(model, tokenizer, folder, storage)
            tensors = {name: t.clone() for name, t in _stored(folder).items()}
            tensors[f"{LINEAR}.int8"][0] -= tensors[f"{LINEAR}.int8"][0].sign()
            save_file(tensors, folder / "model.safetensors")

        monkeypatch.setattr(convert_module, "_write_hf", write)
    else:
        outputs, calls = convert_module._outputs, []

        def changed(*arguments: Any) -> list[Tensor]:
            calls.append(arguments)
            return [t + 1e-3 * (len(calls) == 2) for t in outputs(*arguments)]

        monkeypatch.setattr(convert_module, "_outputs", changed)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "floats", tmp_path / "int8", storage="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["floats"]


# ---- damage -----------------------------------------------------------------------------------

CODES, SCALE = f"{LINEAR}.int8", f"{LINEAR}.int8_scale"
SHAPE = (32, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CODES: None}, f"{SCALE} without {CODES}"),
        ({SCALE: None}, f"{CODES} without {SCALE}"),
        ({SCALE: torch.ones(31)}, f"{SCALE} is float32 (31,), expected float32 (32,)"),
        ({SCALE: torch.ones(32, 1)}, f"{SCALE} is float32 (32, 1), expected float32 (32,)"),
        ({SCALE: torch.ones(32).half()}, f"{SCALE} is float16 (32,), expected float32 (32,)"),
        ({SCALE: torch.full((32,), torch.nan)}, f"{SCALE} holds numbers that are negative or not"),
        ({SCALE: -torch.ones(32)}, f"{SCALE} holds numbers that are negative or not finite"),
        ({CODES: torch.ones(SHAPE)}, f"{CODES} is float32 (32, 48), expected int8 (rows, columns)"),
        ({CODES: torch.ones(32, dtype=torch.int8)}, f"{CODES} is int8 (32,), expected int8 (rows"),
        ({LINEAR: torch.ones(SHAPE)}, f"{LINEAR} is there as floats and as {CODES}"),
        ({CODES: None, SCALE: None}, f"1 tensors missing ({LINEAR})"),
        (
            {CODES: torch.ones(48, 32, dtype=torch.int8), SCALE: torch.ones(48)},
            f"{LINEAR} is (48, 32), expected (32, 48)",
        ),
        ({CODES: None, f"{WORDS}.int8_scale": None}, f"{WORDS}.int8 without {WORDS}.int8_scale"),
        ({CODES: None, f"{WORDS}.int8_scale": None}, f"{SCALE} without {CODES}"),
    ],
)
def test_damage_is_named(base, changes, message):
    tensors = {name: tensor.clone() for name, tensor in _stored(base).items()} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, base / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ErnieMForTokenClassification.from_pretrained(base)
    assert message in str(caught.value)
    assert str(base) in str(caught.value)


def test_a_truncated_file_is_named(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        ErnieMForTokenClassification.from_pretrained(base)


def test_loading_goes_by_the_tensors(base, tmp_path):
    """The config tells people; a folder whose config lost the line is read all the same."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    values = _settings(copy)
    del values["weight_storage"]
    (copy / "config.json").write_text(json.dumps(values))
    a, b = map(ErnieMForTokenClassification.from_pretrained, (copy, base))
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
