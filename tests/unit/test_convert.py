import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paddle_files import as_old_uie, as_paddle, write_pdparams
from safetensors.torch import load_file, save_file

from erniem_batch import ErnieMConfig, ErnieMTokenizer
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model import convert as module
from erniem_batch.model.checkpoint import save_overlay
from erniem_batch.model.convert import CONVERTIBLE, convert
from erniem_batch.model.heads import (
    ErnieMForInformationExtraction,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)

EXTRACTION = "ErnieMForInformationExtraction"
TOKENIZER_FILES = ["sentencepiece.bpe.model", "tokenizer_config.json", "vocab.txt"]


@pytest.fixture(scope="session")
def config(tiny_config: ErnieMConfig) -> ErnieMConfig:
    """What PaddleNLP can express. The matrices of attention and pooler are square anyway."""
    return replace(tiny_config, intermediate_size=4 * tiny_config.hidden_size)


@pytest.fixture
def hf_folder(random_model, config, tokenizer, tmp_path) -> Callable[..., Path]:
    """Makes a folder of transformers with a random model and the small tokenizer."""

    def make(name: str = "ErnieMForTokenClassification", *, dtype: Any = None, **changes) -> Path:
        folder = tmp_path / "hf"
        model = random_model(CONVERTIBLE[name], replace(config, **changes))
        model.to(dtype or torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**_json(path), **changes}), encoding="utf-8")


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """As PaddleNLP reads them: with the ordinary unpickler."""
    arrays = pickle.loads((folder / "model_state.pdparams").read_bytes())
    assert all(type(array) is np.ndarray and array.flags.writeable for array in arrays.values())
    return arrays


def _assert_equal_folders(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


# ---- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_to_paddle_and_back_is_the_same_to_the_byte(hf_folder, tmp_path, name):
    hf = hf_folder(name)
    there = convert(hf, tmp_path / "paddle")
    back = convert(tmp_path / "paddle", tmp_path / "again")
    assert (there.head, back.head) == (name, name)
    assert (there.source_layout, there.target_layout) == ("hf", "paddle")
    assert (back.source_layout, back.target_layout) == ("paddle", "hf")
    assert there.max_difference == back.max_difference == 0
    assert there.n_tensors == back.n_tensors == len(load_file(hf / "model.safetensors"))
    assert there.n_ids_checked == back.n_ids_checked > 500
    _assert_equal_folders(hf, tmp_path / "again")


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_what_paddle_gets(hf_folder, tmp_path, name):
    """Compared with what another piece of code makes of the model: as for PaddleNLP's own files."""
    hf = hf_folder(name)
    convert(hf, tmp_path / "paddle")
    expected = as_paddle(CONVERTIBLE[name].from_pretrained(hf).requires_grad_(False))
    arrays = _arrays(tmp_path / "paddle")
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[key], err_msg=key)
    q_proj = load_file(hf / "model.safetensors")
    prefix = "" if name == "ErnieMModel" else "ernie_m."
    np.testing.assert_array_equal(
        arrays[f"{prefix}encoder.layers.1.self_attn.q_proj.weight"],
        q_proj[f"{prefix}encoder.layers.1.self_attn.self_attn.q_proj.weight"].T,
    )
    assert ("classifier.weight" in arrays) == (name != "ErnieMModel" and name != EXTRACTION)
    settings = _json(tmp_path / "paddle" / "config.json")
    assert settings["architectures"] == ["UIEM" if name == EXTRACTION else name]
    assert settings["dtype"] == "float32"
    assert settings["paddlenlp_version"] == "2.8.1"
    assert not settings.keys() & {"act_dropout", "layer_norm_eps", "torch_dtype", "id2label"}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_from_paddle(random_model, config, tokenizer_dir, tmp_path, name):
    model = random_model(CONVERTIBLE[name], config).requires_grad_(False)
    paddle = tmp_path / "paddle"
    write_pdparams(paddle, {**as_paddle(model), "StructuredToParameterName@@": {"a": "b"}})
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer_dir / file, paddle)
    values = {k: v for k, v in config.to_dict().items() if k not in ("mask_mode", "architectures")}
    architecture = "UIEM" if name == EXTRACTION else name
    values |= {"architectures": [architecture], "paddlenlp_version": None}
    (paddle / "config.json").write_text(json.dumps(values))
    report = convert(paddle, tmp_path / "hf")
    assert report.head == name
    assert report.max_difference == 0
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(stored[key], tensor), key
    settings = _json(tmp_path / "hf" / "config.json")
    assert settings["mask_mode"] == ("paddle" if name == EXTRACTION else "pad")
    assert settings["architectures"] == [name]
    assert not settings.keys() & {"paddlenlp_version", "dtype", "type_vocab_size"}
    assert ErnieMTokenizer.from_pretrained(tmp_path / "hf").lone_underline == "paddle"
    assert any("lone_underline" in note for note in report.notes)


def test_labels_and_other_settings_travel(hf_folder, tmp_path):
    extra = {"task_specific_params": {"ner": {"min_score": 0.5}}}
    labels = {0: "O", 1: "B-Ort", 2: "人"}
    changes = {"id2label": labels, "num_labels": None, "classifier_dropout": 0.25, "extra": extra}
    hf = hf_folder(**changes, problem_type="regression", mask_mode="paddle_padded")
    convert(hf, tmp_path / "paddle")
    settings = _json(tmp_path / "paddle" / "config.json")
    assert settings["id2label"] == {"0": "O", "1": "B-Ort", "2": "人"}
    assert settings["classifier_dropout"] == 0.25
    convert(tmp_path / "paddle", tmp_path / "again")
    _assert_equal_folders(hf, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(hf_folder, tmp_path, dtype):
    hf = hf_folder(dtype=dtype)
    report = convert(hf, tmp_path / "paddle")
    assert report.max_difference == 0
    kind = {torch.bfloat16: "uint16", torch.float16: "float16", torch.float64: "float64"}[dtype]
    assert {str(array.dtype) for array in _arrays(tmp_path / "paddle").values()} == {kind}
    assert _json(tmp_path / "paddle" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    convert(tmp_path / "paddle", tmp_path / "again")
    _assert_equal_folders(hf, tmp_path / "again")


def test_types_may_be_mixed(hf_folder, tmp_path):
    hf = hf_folder()
    tensors = load_file(hf / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].half()
    tensors["ernie_m.embeddings.word_embeddings.weight"] = torch.full((120, 32), torch.nan).half()
    tensors["ernie_m.embeddings.word_embeddings.weight"][:] = 0.5
    save_file(tensors, hf / "model.safetensors")
    convert(hf, tmp_path / "paddle")
    convert(tmp_path / "paddle", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {k: t.dtype for k, t in again.items()} == {k: t.dtype for k, t in tensors.items()}
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "options",
    [
        {"do_lower_case": True, "lone_underline": "paddle"},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 100},
    ],
    ids=str,
)
def test_tokenizer_settings_travel(hf_folder, tokenizer_dir, tmp_path, options):
    hf = hf_folder()
    ErnieMTokenizer.from_pretrained(tokenizer_dir, **options).save_pretrained(hf)
    convert(hf, tmp_path / "paddle")
    written = _json(tmp_path / "paddle" / "tokenizer_config.json")
    assert written.get("lone_underline", "paddle") == options.get("lone_underline", "hf")
    assert written["do_lower_case"] == options.get("do_lower_case", False)
    convert(tmp_path / "paddle", tmp_path / "again")
    _assert_equal_folders(hf, tmp_path / "again")


def test_sampling_of_the_tokenizer_stays_in_a_folder_of_transformers(
    hf_folder, tokenizer_dir, tmp_path
):
    """Its ids differ from call to call, so they are compared without it."""
    hf = hf_folder()
    sampling = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    tokenizer = ErnieMTokenizer.from_pretrained(tokenizer_dir, sp_model_kwargs=sampling)
    tokenizer.save_pretrained(hf)
    assert convert(hf, tmp_path / "new", layout="hf").n_ids_checked > 500
    assert ErnieMTokenizer.from_pretrained(tmp_path / "new").sp_model_kwargs == sampling
    with pytest.raises(ConfigError, match="sampling"):
        convert(hf, tmp_path / "paddle")


def test_the_same_layout_makes_a_clean_folder(hf_folder, tmp_path):
    """Old formats and names become today's."""
    hf = hf_folder()
    old = tmp_path / "old"
    shutil.copytree(hf, old)
    tensors = load_file(old / "model.safetensors")
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert convert(old, tmp_path / "new", layout="hf").target_layout == "hf"
    _assert_equal_folders(hf, tmp_path / "new")


def test_overlay_becomes_a_folder_that_stands_alone(hf_folder, tmp_path):
    hf = hf_folder()
    model = ErnieMForTokenClassification.from_pretrained(hf)
    torch.nn.init.normal_(model.classifier.weight)
    save_overlay(model, tmp_path / "overlay", hf)
    model.save_pretrained(tmp_path / "full")
    convert(tmp_path / "overlay", tmp_path / "paddle")
    assert "base_model" not in _json(tmp_path / "paddle" / "config.json")
    convert(tmp_path / "paddle", tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "full" / file).read_bytes()
    assert (tmp_path / "again" / "vocab.txt").is_file()


# ---- real and old folders ---------------------------------------------------------------------


def test_real_paddle_folder(data_dir, tmp_path):
    """It has no tokenizer beside it."""
    source = data_dir / "uiem_paddle"
    report = convert(source, tmp_path / "hf")
    assert report.head == EXTRACTION
    assert (report.n_tensors, report.max_difference, report.n_ids_checked) == (58, 0, 0)
    assert any("no tokenizer" in note for note in report.notes)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    expected = np.load(source / "uiem_raw.npz")
    ids = torch.from_numpy(expected["ids51"])
    model = ErnieMForInformationExtraction.from_pretrained(
        tmp_path / "hf", mask_mode="paddle_padded"
    )
    with torch.inference_mode():
        start = model(ids).start_logits.sigmoid().numpy()
    np.testing.assert_allclose(start, expected["start51"], rtol=0, atol=1e-5)

    convert(tmp_path / "hf", tmp_path / "paddle")
    original = pickle.loads((source / "model_state.pdparams").read_bytes(), encoding="latin1")
    del original["StructuredToParameterName@@"]
    arrays = _arrays(tmp_path / "paddle")
    assert arrays.keys() == original.keys()
    assert all(np.array_equal(arrays[key], array) for key, array in original.items())
    written, stated = (_json(f / "config.json") for f in (tmp_path / "paddle", source))
    assert stated.items() <= written.items()
    assert written.keys() - stated.keys() == {"mask_mode", "paddlenlp_version"}


@pytest.mark.parametrize("form", ["nested", "flat", "encoder only"])
def test_legacy_folders(random_model, config, tmp_path, form):
    """model_config.json, and parameters of UIE-M from before PaddleNLP 2.4.5."""
    model = random_model(ErnieMForInformationExtraction, config).requires_grad_(False)
    old = tmp_path / "old"
    write_pdparams(old, as_old_uie(as_paddle(model)))
    known = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    values = {key: getattr(config, key) for key in (*known, "max_position_embeddings")}
    written = {
        "nested": {"init_args": [{**values, "init_class": "ErnieMModel"}], "init_class": "UIEM"},
        "flat": {**values, "init_class": "UIEM"},
        "encoder only": values,
    }[form]
    (old / "model_config.json").write_text(json.dumps(written))
    report = convert(old, tmp_path / "hf")
    assert (report.head, report.source_layout) == (EXTRACTION, "paddle")
    again = ErnieMForInformationExtraction.from_pretrained(tmp_path / "hf")
    assert again.config.mask_mode == "paddle"
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert convert(tmp_path / "hf", tmp_path / "new").target_layout == "paddle"
    assert "ernie_m.embeddings.word_embeddings.weight" in _arrays(tmp_path / "new")


def test_paddle_safetensors(random_model, config, tmp_path):
    model = random_model(ErnieMForQuestionAnswering, config).requires_grad_(False)
    paddle = tmp_path / "paddle"
    model.save_pretrained(paddle)
    tensors = {name: torch.from_numpy(array) for name, array in as_paddle(model).items()}
    save_file(tensors, paddle / "model.safetensors", metadata={"format": "np"})
    report = convert(paddle, tmp_path / "hf")
    assert (report.head, report.source_layout) == ("ErnieMForQuestionAnswering", "paddle")
    assert "qa_outputs.weight" in load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("name", ["uiem_paddle", "uiem_dense"])
def test_golden_folders_are_the_model_they_were_made_of(shared_dir, tmp_path, name):
    """Its heads were rescaled, so those alone differ."""
    convert(shared_dir / "golden" / name, tmp_path / "hf")
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    theirs = load_file(shared_dir / "golden" / "extract" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    different = {key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])}
    heads = {f"linear_{side}.{kind}" for side in ("start", "end") for kind in ("weight", "bias")}
    assert different <= heads
    assert "linear_start.weight" in different
    convert(tmp_path / "hf", tmp_path / "paddle")
    for file in ("vocab.txt", "sentencepiece.bpe.model"):
        original = shared_dir / "golden" / name / file
        assert (tmp_path / "paddle" / file).read_bytes() == original.read_bytes()
    written, stated = (
        _json(f / "tokenizer_config.json")
        for f in (tmp_path / "paddle", shared_dir / "golden" / name)
    )
    assert written == stated


@pytest.mark.parametrize("name", ["embed", "classify", "choose", "ner", "qa", "extract"])
def test_golden_folders_of_transformers(shared_dir, tmp_path, name):
    source = shared_dir / "golden" / name
    there = convert(source, tmp_path / "paddle")
    back = convert(tmp_path / "paddle", tmp_path / "hf")
    assert there.head == back.head
    if (source / "model.safetensors").is_file():
        again = (tmp_path / "hf" / "model.safetensors").read_bytes()
        assert again == (source / "model.safetensors").read_bytes()


# ---- which head -------------------------------------------------------------------------------


def _without_architectures(folder: Path) -> Path:
    _edit(folder / "config.json", architectures=None)
    return folder


@pytest.mark.parametrize(
    ("name", "n_labels"),
    [
        ("ErnieMModel", 2),
        (EXTRACTION, 2),
        ("ErnieMForQuestionAnswering", 2),
        ("ErnieMForTokenClassification", 1),
        ("ErnieMForTokenClassification", 2),
        ("ErnieMForSequenceClassification", 3),
    ],
)
def test_head_is_read_from_the_tensors(hf_folder, tmp_path, name, n_labels):
    hf = _without_architectures(hf_folder(name, id2label=None, num_labels=n_labels))
    assert convert(hf, tmp_path / "paddle").head == name


@pytest.mark.parametrize("name", ["ErnieMForSequenceClassification", "ErnieMForMultipleChoice"])
def test_one_score_may_be_two_heads(hf_folder, tmp_path, name):
    hf = _without_architectures(hf_folder(name, id2label=None, num_labels=1))
    with pytest.raises(ConfigError, match=r"MultipleChoice or .*SequenceClassification.*--head"):
        convert(hf, tmp_path / "paddle")
    assert convert(hf, tmp_path / "paddle", head=name).head == name


def test_head_of_a_paddle_folder_may_be_three(hf_folder, tmp_path):
    """There, question answering calls it `classifier` too, and every model has a pooler."""
    convert(hf_folder("ErnieMForSequenceClassification"), tmp_path / "paddle")
    _without_architectures(tmp_path / "paddle")
    with pytest.raises(ConfigError, match=r"QuestionAnswering or .*Sequence.* or .*Token.*--head"):
        convert(tmp_path / "paddle", tmp_path / "new")
    report = convert(tmp_path / "paddle", tmp_path / "new", head="ErnieMForQuestionAnswering")
    assert report.head == "ErnieMForQuestionAnswering"
    assert report.notes[0].endswith("no use for them: pooler.dense.bias, pooler.dense.weight")
    assert "qa_outputs.bias" in load_file(tmp_path / "new" / "model.safetensors")


def test_architectures_that_do_not_fit_the_tensors(hf_folder, tmp_path):
    hf = hf_folder(EXTRACTION)
    _edit(hf / "config.json", architectures=["ErnieMModel"])
    with pytest.raises(ConfigError, match=rf"ErnieMModel.*does not go with.*{EXTRACTION}.*--head"):
        convert(hf, tmp_path / "paddle")
    assert convert(hf, tmp_path / "paddle", head="UIEM").head == EXTRACTION
    report = convert(hf, tmp_path / "encoder", head="ErnieMModel")
    assert "linear_start.weight" in report.notes[0]


def test_unknown_heads_and_layouts(hf_folder, tmp_path):
    hf = hf_folder()
    with pytest.raises(ConfigError, match=r"head must be one of .*UIEM.*got 'UIE'"):
        convert(hf, tmp_path / "new", head="UIE")
    with pytest.raises(ConfigError, match="layout must be one of hf, paddle, got 'onnx'"):
        convert(hf, tmp_path / "new", layout="onnx")
    with pytest.raises(ConfigError, match="mask_mode must be"):
        convert(hf, tmp_path / "new", mask_mode="cls")
    with pytest.raises(CheckpointError, match="qa_outputs"):
        convert(hf, tmp_path / "new", head="ErnieMForQuestionAnswering")
    assert not (tmp_path / "new").exists()


def test_mask_mode_can_be_given(hf_folder, tmp_path):
    hf = hf_folder(EXTRACTION)
    assert any("attention_mask" in n for n in convert(hf, tmp_path / "as it is").notes)
    report = convert(hf, tmp_path / "paddle", mask_mode="paddle")
    assert not any("attention_mask" in note for note in report.notes)
    for name, mode in (("as it is", "pad"), ("paddle", "paddle")):
        assert ErnieMConfig.from_pretrained(tmp_path / name).mask_mode == mode


# ---- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"act_dropout": 0.1}, r"act_dropout=0\.1"),
        ({"act_dropout": None}, "act_dropout=None"),
        ({"layer_norm_eps": 1e-12}, r"layer_norm_eps=1e-12 \(must be 1e-05\)"),
        ({"intermediate_size": 48}, r"intermediate_size=48 \(must be 4 x hidden_size = 128\)"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"hidden_act": "linear"}, "hidden_act='linear'"),
        ({"pruned_heads": {0: [1]}}, "pruned_heads"),
        ({"act_dropout": 0.5, "hidden_act": "laplace"}, r"act_dropout=0\.5.*hidden_act='laplace'"),
    ],
    ids=str,
)
def test_models_that_paddle_cannot_express(hf_folder, tmp_path, changes, named):
    hf = hf_folder(**changes)
    with pytest.raises(ConfigError, match=f"PaddleNLP cannot express .*{named}"):
        convert(hf, tmp_path / "paddle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert convert(hf, tmp_path / "new", layout="hf").max_difference == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"added_tokens": {"<e>": 8002}}, r"vocab\.txt lacks; added tokens that are not special"),
        ({"sep_token": "</s>"}, r"vocab\.txt lacks"),
        (None, r"a tokenizer without vocab\.txt"),
    ],
    ids=str,
)
def test_tokenizers_that_paddle_cannot_express(hf_folder, tokenizer_dir, tmp_path, options, named):
    hf = hf_folder()
    ErnieMTokenizer.from_pretrained(tokenizer_dir, **(options or {})).save_pretrained(hf)
    if options is None:
        (hf / "vocab.txt").unlink()
        _edit(hf / "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(ConfigError, match=named):
        convert(hf, tmp_path / "paddle")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_target_that_is_taken(hf_folder, tmp_path, what):
    hf, target = hf_folder(), tmp_path / "taken"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    with pytest.raises(ConfigError, match="taken exists already"):
        convert(hf, target)
    with pytest.raises(ConfigError, match="hf exists already"):
        convert(hf, hf)
    assert target.read_text() == "mine" if what == "file" else (target / "mine").exists()


def test_empty_and_nested_targets(hf_folder, tmp_path):
    hf = hf_folder()
    (tmp_path / "empty").mkdir()
    convert(hf, tmp_path / "empty")
    convert(hf, tmp_path / "new" / "inside")
    _assert_equal_folders(tmp_path / "empty", tmp_path / "new" / "inside")
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "new").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1


def test_damaged_sources_are_told(hf_folder, tmp_path):
    hf = hf_folder()
    for file, content in (("tokenizer_config.json", "{"), ("config.json", "[]")):
        damaged = tmp_path / f"without {file}"
        shutil.copytree(hf, damaged)
        (damaged / file).write_text(content)
        with pytest.raises(CheckpointError, match=file):
            convert(damaged, tmp_path / "new")
    convert(hf, tmp_path / "paddle")
    (tmp_path / "paddle" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        convert(tmp_path / "paddle", tmp_path / "new")
    (hf / "sentencepiece.bpe.model").unlink()  # the rest of a tokenizer is there
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model"):
        convert(hf, tmp_path / "new")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "absent", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- checked before it appears ----------------------------------------------------------------


def _swap(kind: str) -> Callable[..., Any]:
    """A writer with a mistake in it."""
    original = getattr(module, kind)

    def wrong(*arguments: Any) -> Any:
        result = original(*arguments)
        if kind == "_paddle_arrays":  # as if one square matrix had not been transposed
            name = "ernie_m.encoder.layers.2.self_attn.out_proj.weight"
            result[name] = np.ascontiguousarray(result[name].T)
        elif kind == "_paddle_config":
            result["hidden_act"] = "relu"
        elif kind == "_write_paddle_tokenizer":
            path = arguments[1] / "vocab.txt"
            lines = path.read_text(encoding="utf-8").split("\n")
            lines[500], lines[501] = lines[501], lines[500]
            path.write_text("\n".join(lines), encoding="utf-8")
        return result

    return wrong


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("_paddle_arrays", r"changed 1 tensors \(ernie_m\.encoder\.layers\.2\.self_attn"),
        ("_paddle_config", "changed hidden_act"),
        ("_write_paddle_tokenizer", "changed the vocabulary"),
    ],
)
def test_a_mistake_in_writing_is_found(hf_folder, tmp_path, monkeypatch, kind, message):
    hf = hf_folder()
    monkeypatch.setattr(module, kind, _swap(kind))
    with pytest.raises(CheckpointError, match=message):
        convert(hf, tmp_path / "paddle")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_other_outputs_are_found(hf_folder, tmp_path, monkeypatch, value):
    """The last line of defence: the tensors are the same, but not what is computed with them."""
    original, calls = module._outputs, []

    def outputs(*arguments: Any) -> list[torch.Tensor]:
        calls.append(arguments)
        tensors = original(*arguments)
        return [t + value if len(calls) == 2 else t for t in tensors]

    hf = hf_folder()
    monkeypatch.setattr(module, "_outputs", outputs)
    with pytest.raises(CheckpointError, match="what the model computes"):
        convert(hf, tmp_path / "paddle")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_token_ids_are_found(hf_folder, tmp_path):
    """PaddleNLP's rule in place of the other changes ids, and nothing else."""
    hf = hf_folder()
    convert(hf, tmp_path / "paddle")
    path = tmp_path / "paddle" / "tokenizer_config.json"
    _edit(path, lone_underline="paddle")
    with pytest.raises(CheckpointError, match=r"token ids of the sample texts \[0, 1"):
        module._sample_ids(hf, "hf", tmp_path / "paddle")


def test_interruption_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    hf = hf_folder()
    monkeypatch.setattr(module, "_compare_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "paddle")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_process_leaves_no_half_target(hf_folder, tmp_path):
    code = (
        "import os, signal, sys; from erniem_batch.model import convert as module; "
        "module._compare_outputs = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "module.convert(*sys.argv[1:])"
    )
    hf, target = hf_folder(), tmp_path / "paddle"
    done = subprocess.run([sys.executable, "-c", code, hf, target], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert convert(hf, target).max_difference == 0


def test_a_long_position_table_is_not_needed(hf_folder, tmp_path):
    """The sample texts are cut to what the model holds, and to the rows of its word table."""
    hf = hf_folder(max_position_embeddings=6, vocab_size=10)
    assert convert(hf, tmp_path / "paddle").max_difference == 0


def test_classification_for_multiple_choice_is_told_what_paddle_needs(hf_folder, tmp_path):
    hf = hf_folder("ErnieMForMultipleChoice")
    assert any("num_choices" in note for note in convert(hf, tmp_path / "paddle").notes)
    _edit(hf / "config.json", num_choices=4)
    report = convert(hf, tmp_path / "with a number")
    assert not any("num_choices" in note for note in report.notes)
    assert _json(tmp_path / "with a number" / "config.json")["num_choices"] == 4


def test_models_of_other_classes_are_not_mixed_up(hf_folder, tmp_path):
    """A regression keeps its one output through PaddleNLP's form."""
    hf = hf_folder("ErnieMForSequenceClassification", id2label=None, num_labels=1)
    convert(hf, tmp_path / "paddle")
    again = ErnieMForSequenceClassification.from_pretrained(tmp_path / "paddle")
    assert again.config.labels == ["LABEL_0"]
