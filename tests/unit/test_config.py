import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.config import ErnieMConfig


def _written(folder: Path, values: object, name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_defaults_are_those_of_ernie_m_base():
    config = ErnieMConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (250002, 768, 12)
    assert config.max_tokens == 512
    assert config.labels == ["LABEL_0", "LABEL_1"]


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ErnieMConfig().vocab_size = 3  # type: ignore[misc]


def test_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="hiden_size"):
        ErnieMConfig(hiden_size=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", 2.0),
        ("hidden_size", -4),
        ("hidden_size", 770),  # not a multiple of 12 heads
        ("num_hidden_layers", "12"),
        ("intermediate_size", None),
        ("max_position_embeddings", 2),
        ("pad_token_id", -1),
        ("pad_token_id", 250002),
        ("hidden_dropout_prob", 1.5),
        ("hidden_dropout_prob", None),
        ("attention_probs_dropout_prob", float("nan")),
        ("classifier_dropout", -0.1),
        ("act_dropout", "0"),
        ("layer_norm_eps", float("nan")),
        ("initializer_range", -1),
        ("hidden_act", "gelu2"),
        ("hidden_act", ["gelu"]),
        ("mask_mode", "cls"),
        ("problem_type", "ranking"),
        ("return_dict", None),
        ("output_attentions", "yes"),
        ("architectures", "UIEM"),
        ("num_labels", 0),
        ("id2label", {}),
        ("id2label", ["A", "B"]),
        ("id2label", {0: "A", 2: "B"}),
        ("id2label", {"zero": "A"}),
        ("pruned_heads", {12: [0]}),
        ("pruned_heads", {0: [12]}),
        ("pruned_heads", {0: list(range(12))}),
        ("pruned_heads", {0: 5}),
        ("pruned_heads", {"x": [0]}),
        ("pruned_heads", [0]),
    ],
)
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        ErnieMConfig(**{name: value})


def test_hidden_act_may_be_a_function_but_cannot_be_written():
    config = ErnieMConfig(hidden_act=torch.relu)
    with pytest.raises(ConfigError, match="hidden_act"):
        config.to_dict()


def test_labels():
    config = ErnieMConfig(id2label={"1": "b", "0": "a"}, num_labels=9)  # type: ignore[dict-item]
    assert config.labels == ["a", "b"]
    assert config.num_labels == 2
    assert config.label2id == {"a": 0, "b": 1}
    assert config.with_labels(["x", "y", "z"]).labels == ["x", "y", "z"]
    assert ErnieMConfig(num_labels=3).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_label2id_alone_is_enough():
    assert ErnieMConfig.from_dict({"label2id": {"b": 1, "a": 0}}).labels == ["a", "b"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_labels": 5},
        {"id2label": {0: "Grüße", 1: "人"}, "problem_type": "multi_label_classification"},
        {"pruned_heads": {3: [2, 1]}},
        {"mask_mode": "paddle_padded", "act_dropout": None, "classifier_dropout": 0.0},
        {"extra": {"transformers_version": "4.40.2", "something": [1, {"a": None}]}},
        {"architectures": ["ErnieMModel"], "return_dict": False},
    ],
    ids=str,
)
def test_save_and_load_give_the_same_config(tmp_path, changes):
    config = ErnieMConfig(**changes)
    config.save_pretrained(tmp_path)
    again = ErnieMConfig.from_pretrained(tmp_path)
    assert replace(again, extra=config.extra) == replace(config, architectures=again.architectures)
    assert config.extra.items() <= again.extra.items()


def test_paddle_flat_config():
    values = {
        "architectures": ["UIEM"],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "type_vocab_size": 16,
        "paddlenlp_version": None,
        "model_type": "ernie_m",
        "num_classes": 4,
        "dropout": 0.0,
    }
    config = ErnieMConfig.from_dict(values)
    assert config.mask_mode == "paddle"
    assert config.intermediate_size == 128
    assert config.num_labels == 4
    assert config.classifier_dropout == 0.0
    assert config.extra["type_vocab_size"] == 16


def test_explicit_mask_mode_wins_over_the_architecture():
    assert (
        ErnieMConfig.from_dict({"architectures": ["UIEM"], "mask_mode": "pad"}).mask_mode == "pad"
    )


def test_paddle_legacy_nested_config(tmp_path):
    inner = {"hidden_size": 48, "num_attention_heads": 4, "init_class": "ErnieMModel"}
    nested = {"init_args": [inner, 0.1], "init_class": "UIEM"}
    config = ErnieMConfig.from_pretrained(_written(tmp_path, nested, "model_config.json"))
    assert config.hidden_size == 48
    assert config.intermediate_size == 192
    assert config.architectures == ["UIEM"]
    assert config.mask_mode == "paddle"


@pytest.mark.parametrize("mark", [{"paddlenlp_version": None}, {"architectures": ["UIEM"]}])
def test_paddle_builds_four_times_the_width_whatever_it_wrote(mark):
    """PaddleNLP writes the 3072 of a base model into the config of a large one, too."""
    values = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 3072}
    assert ErnieMConfig.from_dict({**values, **mark}).intermediate_size == 4096
    assert ErnieMConfig.from_dict(values).intermediate_size == 3072


def test_config_json_wins_over_the_legacy_file(tmp_path):
    _written(tmp_path, {"hidden_size": 24}, "model_config.json")
    assert ErnieMConfig.from_pretrained(_written(tmp_path, {"hidden_size": 48})).hidden_size == 48


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "bert"},
        {"is_decoder": True},
        {"position_embedding_type": "relative_key"},
        {"hidden_size": "many"},
        ["hidden_size"],
        "text",
        None,
    ],
    ids=str,
)
def test_unusable_file_names_its_path(tmp_path, values):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ErnieMConfig.from_pretrained(_written(tmp_path, values))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_damaged_file_names_its_path(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ErnieMConfig.from_pretrained(tmp_path)


def test_absent_file_or_folder(tmp_path):
    (tmp_path / "weights.txt").touch()
    with pytest.raises(CheckpointError, match=r"weights\.txt"):
        ErnieMConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        ErnieMConfig.from_pretrained(tmp_path / "absent")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "1", "a", "init_class"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [
        *("vocab_size", "hidden_size", "num_attention_heads", "num_labels", "id2label", "label2id"),
        *("pruned_heads", "hidden_act", "architectures", "init_args", "init_class", "num_classes"),
        *("dropout", "layer_norm_eps", "return_dict", "mask_mode", "extra", "intermediate_size"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_NAMES, _JSON, max_size=4))
def test_any_json_is_a_config_or_a_config_error(values):
    """A null or a list in the wrong place once came out as AttributeError."""
    try:
        config = ErnieMConfig.from_dict(values)
    except ConfigError:
        return
    assert config.labels
