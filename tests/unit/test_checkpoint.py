import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paddle_files import as_old_uie, as_paddle, write_pdparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from erniem_batch.errors import CheckpointError
from erniem_batch.model.checkpoint import parse_dtype, tensors_of
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import (
    HEADS,
    ErnieMForInformationExtraction,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)


@pytest.fixture
def ner_folder(random_model, tmp_path) -> Path:
    random_model(ErnieMForTokenClassification).save_pretrained(tmp_path / "ner")
    return tmp_path / "ner"


def _rewrite(folder: Path, change: Any) -> None:
    """Applies a change to the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    expected = b.state_dict()
    assert a.state_dict().keys() == expected.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", HEADS)
def test_save_and_load(random_model, tmp_path, name):
    model = random_model(HEADS[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    again = HEADS[name].from_pretrained(tmp_path / "new" / "folder")
    _assert_same_weights(again, model)
    assert not again.training
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert again.config.architectures == [name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", torch.float64])
def test_dtype(ner_folder, dtype):
    model = ErnieMForTokenClassification.from_pretrained(ner_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {parse_dtype(dtype)}
    model.save_pretrained(ner_folder)
    again = ErnieMForTokenClassification.from_pretrained(ner_folder, dtype=dtype)
    _assert_same_weights(again, model)
    assert again.config.extra["torch_dtype"] == str(parse_dtype(dtype)).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["int8", "half a float", "nn", None, torch.int64])
def test_impossible_dtype(ner_folder, dtype):
    with pytest.raises(CheckpointError, match="dtype must be"):
        ErnieMForTokenClassification.from_pretrained(ner_folder, dtype=dtype)


def test_mask_mode_and_config_can_be_given(ner_folder, tiny_config):
    cls = ErnieMForTokenClassification
    assert cls.from_pretrained(ner_folder, mask_mode="paddle").config.mask_mode == "paddle"
    config = tiny_config.with_labels(["yes", "no"])
    assert cls.from_pretrained(ner_folder, config=config).config.labels == ["yes", "no"]


# ---- strictness -------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(ner_folder):
    """The reference fills what is missing with random numbers and only logs it."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["ernie_m.encoder.layers.2.norm2.bias"]
        del tensors["ernie_m.embeddings.layer_norm.weight"]
        tensors["cls.bias"] = torch.zeros(1)
        tensors["ernie_m.encoder.layers.0.linear1.weight"] = torch.zeros(48, 31)

    _rewrite(ner_folder, change)
    with pytest.raises(CheckpointError) as caught:
        ErnieMForTokenClassification.from_pretrained(ner_folder, allow_new_head=True)
    message = str(caught.value)
    for part in (
        str(ner_folder),
        "2 tensors missing",
        "ernie_m.encoder.layers.2.norm2.bias",
        "ernie_m.embeddings.layer_norm.weight",
        "1 tensors unexpected (cls.bias)",
        "ernie_m.encoder.layers.0.linear1.weight is (48, 31), expected (48, 32)",
    ):
        assert part in message


def test_a_long_list_of_problems_is_cut_but_counted(ner_folder):
    _rewrite(ner_folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers" in n])
    with pytest.raises(CheckpointError, match=r"48 tensors missing .*… 40 more"):
        ErnieMForTokenClassification.from_pretrained(ner_folder)


def test_config_of_another_size(ner_folder, tiny_config):
    config = replace(tiny_config, vocab_size=121)
    with pytest.raises(CheckpointError, match=r"\(120, 32\), expected \(121, 32\)"):
        ErnieMForTokenClassification.from_pretrained(ner_folder, config=config)


@pytest.mark.parametrize("name", ["ErnieMForSequenceClassification", "ErnieMForQuestionAnswering"])
def test_a_head_that_was_not_trained_is_refused(ner_folder, name):
    with pytest.raises(CheckpointError, match=r"was not trained for this head.*allow_new_head"):
        HEADS[name].from_pretrained(ner_folder)


def test_a_head_with_other_labels_is_refused(ner_folder, tiny_config):
    config = tiny_config.with_labels(["a", "b", "c"])
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \(2, 32\).*allow_new_head"):
        ErnieMForTokenClassification.from_pretrained(ner_folder, config=config)


def test_a_new_head_is_allowed_loudly(ner_folder, tiny_config, caplog):
    config = tiny_config.with_labels(["a", "b", "c"])
    model = ErnieMForSequenceClassification.from_pretrained(
        ner_folder, config=config, allow_new_head=True
    )
    assert "NEW UNTRAINED HEAD" in caplog.text
    assert "classifier.weight" in caplog.text
    assert "ernie_m.pooler.dense.weight" in caplog.text
    assert model.classifier.weight.shape == (3, 32)
    assert 0.1 < model.classifier.weight.std() < 0.4  # initializer_range is 0.25
    assert model.classifier.bias.abs().max() == 0
    old = load_file(ner_folder / "model.safetensors")
    words = model.ernie_m.embeddings.word_embeddings.weight
    assert torch.equal(words, old["ernie_m.embeddings.word_embeddings.weight"])


def test_nothing_is_new_when_everything_is_there(ner_folder, caplog):
    model = ErnieMForTokenClassification.from_pretrained(ner_folder, allow_new_head=True)
    assert "NEW" not in caplog.text
    old = load_file(ner_folder / "model.safetensors")
    assert torch.equal(model.classifier.weight, old["classifier.weight"])


def test_a_head_that_is_not_wanted_is_left_out(random_model, tmp_path, caplog):
    classify = random_model(ErnieMForSequenceClassification)
    classify.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        encoder = ErnieMModel.from_pretrained(tmp_path)
    assert "classifier.bias" in caplog.text
    _assert_same_weights(encoder, classify.ernie_m)


def test_an_encoder_folder_serves_as_base_of_a_head(random_model, tmp_path):
    encoder = random_model(ErnieMModel)
    encoder.save_pretrained(tmp_path)
    cls = ErnieMForSequenceClassification
    _assert_same_weights(cls.from_pretrained(tmp_path, allow_new_head=True).ernie_m, encoder)
    with pytest.raises(CheckpointError, match="2 tensors missing"):
        cls.from_pretrained(tmp_path)


# ---- files ------------------------------------------------------------------------------------


def test_folder_without_weights_lists_what_there_is(tmp_path, tiny_config):
    tiny_config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*found config\.json"):
        ErnieMModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        tensors_of(tmp_path / "absent")


FORMATS = ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x04N."])
def test_damaged_files_are_named(tmp_path, tiny_config, name, content):
    tiny_config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        ErnieMModel.from_pretrained(tmp_path)


def test_truncated_file_is_named(ner_folder):
    path = ner_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        ErnieMForTokenClassification.from_pretrained(ner_folder)


def test_absent_shards_are_all_named(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors, model-2\.safetensors"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b"\xff", b'{"weight_map": 3}'])
def test_damaged_index_is_named(tmp_path, content):
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json"):
        tensors_of(tmp_path)


def test_old_torch_format(random_model, tmp_path):
    model = random_model(ErnieMModel)
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    _assert_same_weights(ErnieMModel.from_pretrained(tmp_path), model)


class _Command:
    """A pickle of this runs a command when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin"])
def test_files_cannot_run_code(tmp_path, tiny_config, name):
    tiny_config.save_pretrained(tmp_path)
    target = tmp_path / "was_run"
    payload = {"ernie_m.pooler.dense.bias": _Command(target)}
    if name.endswith(".bin"):
        torch.save(payload, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        ErnieMModel.from_pretrained(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "forbidden",
    [os.system, eval, __import__, getattr, subprocess.run, np.load, np.lib.format.open_memmap],
    ids=lambda f: f.__name__,
)
def test_restricted_unpickler_names_what_it_refused(tmp_path, forbidden):
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps({"a": forbidden}, protocol=4))
    with pytest.raises(CheckpointError, match=f"refused.*{forbidden.__name__}"):
        tensors_of(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_a_paddle_file_is_a_checkpoint_error(tmp_path, data):
    """Flipped bytes make a pickle raise nearly anything."""
    content = bytearray(pickle.dumps({"a": np.arange(6.0).reshape(2, 3), "b": [1, "x"]}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        tensors_of(tmp_path)


def test_a_damaged_paddle_file_does_not_fill_the_memory(tmp_path):
    """A few bytes that ask for a table of 134 million objects."""
    content = b"\x80\x04}r" + (0x7FFFFFF).to_bytes(4, "little") + b"."
    (tmp_path / "model_state.pdparams").write_bytes(content)
    tracemalloc.start()
    try:
        assert tensors_of(tmp_path) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# ---- memory -----------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines if line.endswith(str(path)))
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _lies_in(parameter: Tensor, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= parameter.data_ptr() < end for start, end in ranges)


@linux_only
def test_weights_of_the_stored_type_stay_memory_mapped(ner_folder):
    """So that many processes on one machine share one copy."""
    model = ErnieMForTokenClassification.from_pretrained(ner_folder)
    ranges = _mapped_ranges(ner_folder / "model.safetensors")
    assert all(_lies_in(parameter, ranges) for parameter in model.parameters())
    converted = ErnieMForTokenClassification.from_pretrained(ner_folder, dtype="bfloat16")
    ranges = _mapped_ranges(ner_folder / "model.safetensors")
    assert not any(_lies_in(parameter, ranges) for parameter in converted.parameters())


@linux_only
def test_training_a_mapped_model_leaves_the_file_alone(ner_folder, batch):
    path = ner_folder / "model.safetensors"
    before = path.read_bytes()
    model = ErnieMForTokenClassification.from_pretrained(ner_folder)
    other = ErnieMForTokenClassification.from_pretrained(ner_folder)
    expected = other(**batch).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch, labels=batch["input_ids"] % 2).loss.backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert torch.equal(other(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


def test_saving_over_a_mapped_file(ner_folder, batch):
    """Written in place, the new file would shine through in every process that mapped the old."""
    model = ErnieMForTokenClassification.from_pretrained(ner_folder)
    other = ErnieMForTokenClassification.from_pretrained(ner_folder)
    expected = other(**batch).logits
    model.resize_token_embeddings(500)
    model.save_pretrained(ner_folder)
    assert torch.equal(other(**batch).logits, expected)
    again = ErnieMForTokenClassification.from_pretrained(ner_folder)
    _assert_same_weights(again, model)
    assert sorted(p.name for p in ner_folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="access rights")
def test_weights_can_be_read_by_whoever_reads_the_config(ner_folder):
    """safetensors 0.8 writes files that only their owner can read."""
    modes = {(ner_folder / n).stat().st_mode for n in ("config.json", "model.safetensors")}
    assert len(modes) == 1


# ---- PaddleNLP --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("intermediate_size", [32, 48])
def test_paddle_layout(random_model, tiny_config, tmp_path, name, intermediate_size):
    """Square matrices load without complaint either way round, so every weight is compared."""
    config = replace(tiny_config, intermediate_size=intermediate_size)
    model = random_model(HEADS[name], config)
    model.config.save_pretrained(tmp_path)
    extra = {"StructuredToParameterName@@": {"a": "b"}}
    write_pdparams(tmp_path, {**as_paddle(model), **extra})
    _assert_same_weights(HEADS[name].from_pretrained(tmp_path), model)


@pytest.mark.parametrize("metadata", [{"format": "np"}, {"format": "pd"}, None])
def test_paddle_safetensors(random_model, tmp_path, metadata):
    model = random_model(ErnieMForInformationExtraction)
    model.config.save_pretrained(tmp_path)
    arrays = {name: torch.from_numpy(array) for name, array in as_paddle(model).items()}
    save_file(arrays, tmp_path / "model.safetensors", metadata=metadata)
    _assert_same_weights(ErnieMForInformationExtraction.from_pretrained(tmp_path), model)


def test_paddle_layout_under_our_names(random_model, tmp_path):
    """A half-converted file: its layout is read from the shapes."""
    model = random_model(ErnieMForTokenClassification)
    model.config.save_pretrained(tmp_path)
    tensors = {
        name: tensor.T.contiguous() if tensor.ndim == 2 and "_emb" not in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_same_weights(ErnieMForTokenClassification.from_pretrained(tmp_path), model)


def test_paddle_shards(random_model, tmp_path):
    model = random_model(ErnieMModel)
    model.config.save_pretrained(tmp_path)
    values = sorted(as_paddle(model).items())
    files = {}
    for i in range(3):
        file = f"model_state-0000{i + 1}-of-00003.pdparams"
        part = dict(values[i::3])
        (tmp_path / file).write_bytes(pickle.dumps(part))
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps(index))
    _assert_same_weights(ErnieMModel.from_pretrained(tmp_path), model)


def test_paddle_tuples_bfloat16_and_ordered_dicts(random_model, tmp_path):
    model = random_model(ErnieMModel)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.config.save_pretrained(tmp_path)
    values: OrderedDict[str, Any] = OrderedDict()
    for name, array in as_paddle(model).items():
        half = torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
        values[name] = (name, half)
    write_pdparams(tmp_path, values)
    _assert_same_weights(ErnieMModel.from_pretrained(tmp_path), model)


def test_paddle_arrays_of_no_number_are_refused(tmp_path):
    write_pdparams(tmp_path, {"a": np.array([None, "x"], dtype=object)})
    with pytest.raises(CheckpointError, match="unknown kind"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("name", ["ErnieMForInformationExtraction", "ErnieMModel"])
def test_legacy_prefix(random_model, tmp_path, name):
    """Before PaddleNLP 2.4.5 the whole model was called `encoder`."""
    model = random_model(ErnieMForInformationExtraction)
    values = as_old_uie(as_paddle(model))
    assert "encoder.encoder.layers.0.self_attn.q_proj.weight" in values
    model.config.save_pretrained(tmp_path)
    write_pdparams(tmp_path, values)
    loaded = HEADS[name].from_pretrained(tmp_path)
    _assert_same_weights(loaded, model if "Extraction" in name else model.ernie_m)


@pytest.mark.parametrize("prefix", ["", "ernie_m.", "encoder."])
def test_position_ids_of_old_versions_are_left_out(random_model, tmp_path, prefix):
    """A table 0, 1, 2, … that PaddleNLP once stored; it was taken for an unexpected tensor."""
    model = random_model(ErnieMForInformationExtraction if prefix else ErnieMModel)
    values: dict[str, Any] = dict(as_paddle(model))
    values = as_old_uie(values) if prefix == "encoder." else values
    values[f"{prefix}embeddings.position_ids"] = np.arange(66)[None]
    model.config.save_pretrained(tmp_path)
    write_pdparams(tmp_path, values)
    _assert_same_weights(type(model).from_pretrained(tmp_path), model)


def test_legacy_nested_config(data_dir, tmp_path):
    values = json.loads((data_dir / "uiem_paddle" / "config.json").read_text())
    encoder = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
    nested = {"init_args": [{**encoder, "init_class": "ErnieMModel"}], "init_class": "UIEM"}
    (tmp_path / "model_config.json").write_text(json.dumps(nested))
    shutil.copy(data_dir / "uiem_paddle" / "model_state.pdparams", tmp_path)
    legacy = ErnieMForInformationExtraction.from_pretrained(tmp_path)
    assert legacy.config.mask_mode == "paddle"
    modern = ErnieMForInformationExtraction.from_pretrained(data_dir / "uiem_paddle")
    _assert_same_weights(legacy, modern)


def test_paddle_question_answering_calls_its_head_classifier(random_model, tmp_path):
    model = random_model(ErnieMForQuestionAnswering)
    values = as_paddle(model)
    assert "classifier.weight" in values
    assert "qa_outputs.weight" not in values
    model.config.save_pretrained(tmp_path)
    write_pdparams(tmp_path, values)
    loaded = ErnieMForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(loaded.qa_outputs.weight, model.qa_outputs.weight)


def test_paddle_folder_saved_by_us_is_an_ordinary_one(data_dir, tmp_path, batch):
    model = ErnieMForInformationExtraction.from_pretrained(data_dir / "uiem_paddle")
    model.save_pretrained(tmp_path)
    again = ErnieMForInformationExtraction.from_pretrained(tmp_path)
    assert again.config.mask_mode == "paddle"
    _assert_same_weights(again, model)
    ids = batch["input_ids"]
    assert torch.equal(again(ids).start_logits, model(ids).start_logits)
