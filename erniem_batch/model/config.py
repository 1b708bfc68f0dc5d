"""ErnieMConfig: the numbers of one model, read from and written to `config.json`.

Reads the files that transformers 4.40.2 and PaddleNLP (flat and legacy nested) write; writes the
transformers form. Knows nothing of weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.activations import get_activation
from erniem_batch.model.files import read_json, short_repr

MASK_MODES = ("pad", "paddle", "paddle_padded")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# PaddleNLP adds 2 to every position id, so the first two rows of the table are never used.
POSITION_OFFSET = 2

# The largest ErnieM has 24 layers, a hidden size of 1,024 and 250,002 words. A file with numbers
# above these limits is refused before memory for them is allocated.
MAX_SIZES = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 256,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 18,
    "max_position_embeddings": 1 << 17,
    "num_labels": 100_000,
}
# PaddleNLP nests one level.
MAX_NESTED = 4
MAX_DIGITS = 9
# What float32 holds.
MAX_FLOAT = 1e38

# PaddleNLP name -> ours. PaddleNLP's ErnieM has no act_dropout and no layer_norm_eps.
_FOREIGN_NAMES = {"num_classes": "num_labels", "dropout": "classifier_dropout"}


@dataclass(frozen=True, kw_only=True)
class ErnieMConfig:
    """Shape and behaviour of an ErnieM model; the defaults are those of ernie-m-base.

    Args:
        hidden_act: a name known to transformers 4.40.2, or a function of one tensor.
        act_dropout: dropout after the activation; None means `hidden_dropout_prob`, as in the
            reference.
        classifier_dropout: dropout before a classifier; None means `hidden_dropout_prob`.
        max_position_embeddings: rows of the position table; two are unused, so texts of up to
            `max_position_embeddings - 2` tokens fit (`max_tokens`).
        id2label: label names by index. PARITY: wins over a conflicting `num_labels`.
        mask_mode: which keys are hidden when no attention_mask is given.
            `pad`: padding (transformers). `paddle`: [CLS] and padding: what PaddleNLP's UIE-M
            weights were trained with, made independent of the padded length. `paddle_padded`:
            [CLS] only, padding is attended: exactly what PaddleNLP's Taskflow computes.
        pruned_heads: heads removed per layer, as transformers stores them.
        extra: keys of a config.json that this class does not use; written back unchanged.

    Raises:
        ConfigError: a value is impossible; says what was expected and what came.
    """

    vocab_size: int = 250002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable[[Tensor], Tensor] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 514
    initializer_range: float = 0.02
    pad_token_id: int = 1
    layer_norm_eps: float = 1e-5
    classifier_dropout: float | None = None
    act_dropout: float | None = 0.0
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    mask_mode: str = "pad"
    pruned_heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    architectures: Sequence[str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._set_labels()
        pruned = {
            layer: _sorted_ints("pruned_heads", heads)
            for layer, heads in _int_keys("pruned_heads", self.pruned_heads).items()
        }
        object.__setattr__(self, "pruned_heads", pruned)
        known_heads = set(range(self.num_attention_heads))
        for layer, heads in pruned.items():
            if layer not in range(self.num_hidden_layers) or not set(heads) < known_heads:
                raise ConfigError(
                    f"pruned_heads[{layer}]={short_repr(heads)} does not fit "
                    f"{self.num_hidden_layers} layers of {self.num_attention_heads} heads "
                    "(at least one head must stay)"
                )

    def _check_numbers(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            _require_int(name, getattr(self, name), minimum=1)
        _require_int("max_position_embeddings", self.max_position_embeddings, POSITION_OFFSET + 1)
        _require_int("pad_token_id", self.pad_token_id, minimum=0)
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id={short_repr(self.pad_token_id)} is not below "
                f"vocab_size={self.vocab_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _require_probability(name, getattr(self, name))
        for name in ("classifier_dropout", "act_dropout"):
            if getattr(self, name) is not None:
                _require_probability(name, getattr(self, name))
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < MAX_FLOAT:
                raise ConfigError(f"{name} must be a number >= 0, got {short_repr(value)}")
        for name in ("output_hidden_states", "output_attentions", "return_dict"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be true or false, got {short_repr(getattr(self, name))}"
                )
        if self.architectures is not None and not _is_names(self.architectures):
            raise ConfigError(
                f"architectures must be a list of names, got {short_repr(self.architectures)}"
            )
        get_activation(self.hidden_act)
        _require_choice("mask_mode", self.mask_mode, MASK_MODES)
        if self.problem_type is not None:
            _require_choice("problem_type", self.problem_type, PROBLEM_TYPES)

    def _set_labels(self) -> None:
        if self.id2label is not None:
            given = _int_keys("id2label", self.id2label)
            _require_int("the number of labels in id2label", len(given), 1, MAX_SIZES["num_labels"])
            id2label = {index: _label(index, label) for index, label in given.items()}
            if sorted(id2label) != list(range(len(id2label))):
                raise ConfigError(
                    f"id2label must number its labels 0, 1, 2, …; got the keys "
                    f"{short_repr(sorted(id2label))}"
                )
            id2label = dict(sorted(id2label.items()))
        else:
            count = 2 if self.num_labels is None else self.num_labels
            _require_int("num_labels", count, minimum=1)
            id2label = {index: f"LABEL_{index}" for index in range(count)}
        object.__setattr__(self, "id2label", id2label)
        object.__setattr__(self, "num_labels", len(id2label))
        object.__setattr__(self, "label2id", {label: i for i, label in id2label.items()})

    @property
    def labels(self) -> list[str]:
        """Label names in index order."""
        assert self.id2label is not None  # set in __post_init__
        return list(self.id2label.values())

    @property
    def max_tokens(self) -> int:
        """Longest sequence the position table can hold, special tokens included."""
        return self.max_position_embeddings - POSITION_OFFSET

    def with_labels(self, labels: Sequence[str]) -> Self:
        """A copy for a head with these labels."""
        return replace(self, id2label=dict(enumerate(labels)), label2id=None, num_labels=None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that transformers 4.40.2 reads.

        Raises:
            ConfigError: `hidden_act` is a function, which JSON cannot hold.
        """
        if not isinstance(self.hidden_act, str):
            raise ConfigError("hidden_act is a function; only a named activation can be written")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        extra = values.pop("extra")
        del values["num_labels"]  # transformers derives it from id2label
        if not values["pruned_heads"]:
            del values["pruned_heads"]
        if values["problem_type"] is None:
            del values["problem_type"]
        return {**extra, **values, "model_type": "ernie_m"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from the content of a config.json of transformers or PaddleNLP.

        Raises:
            ConfigError: not an ErnieM config, or a value is impossible.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config is a JSON object, got {type(values).__name__}")
        flat = _flatten_paddle(values)
        model_type = flat.pop("model_type", "ernie_m")
        if model_type not in ("ernie_m", "ernie-m"):
            raise ConfigError(f"model_type must be 'ernie_m', got {short_repr(model_type)}")
        if flat.pop("is_decoder", False):
            raise ConfigError(
                "is_decoder=true: ErnieM is an encoder and cannot be used as a decoder"
            )
        if flat.pop("position_embedding_type", "absolute") != "absolute":
            raise ConfigError("position_embedding_type must be 'absolute'; no ErnieM has another")
        known = {f.name for f in fields(cls)} - {"extra"}
        ours = {name: value for name, value in flat.items() if name in known}
        extra = {name: value for name, value in flat.items() if name not in known}
        if ours.get("pruned_heads") is None:
            ours.pop("pruned_heads", None)
        if ours.get("id2label") is None and isinstance(ours.get("label2id"), Mapping):
            ours["id2label"] = _inverted(ours["label2id"]) or None
        hidden_size = ours.get("hidden_size", cls.hidden_size)
        architectures = ours.get("architectures")
        is_uie = isinstance(architectures, list) and "UIEM" in architectures
        is_paddle = is_uie or "paddlenlp_version" in extra
        if (is_paddle or "intermediate_size" not in ours) and isinstance(hidden_size, int):
            # PaddleNLP always builds 4 x hidden_size. Its file may say nothing, or, for a large
            # model, the 3072 of a base one.
            ours["intermediate_size"] = 4 * hidden_size
        if "mask_mode" not in ours and is_uie:
            ours["mask_mode"] = "paddle"
        return cls(**ours, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The config of a model folder.

        Raises:
            CheckpointError: the folder has no readable config.json or model_config.json.
        """
        for name in ("config.json", "model_config.json"):
            path = Path(folder) / name
            if path.is_file():
                try:
                    return cls.from_dict(read_json(path))
                except (ValueError, TypeError) as error:  # ConfigError is one
                    raise CheckpointError(f"{path}: {error}") from error
        raise CheckpointError(
            f"{folder}: expected a model folder with config.json (or PaddleNLP's "
            f"model_config.json), found {_listing(Path(folder))}"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json into the folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")


def _flatten_paddle(values: Mapping[str, Any], level: int = 0) -> dict[str, Any]:
    """PaddleNLP's legacy nested model_config.json as one flat mapping; others unchanged."""
    if level > MAX_NESTED:
        raise ConfigError(f"init_args must be nested at most {MAX_NESTED} levels deep")
    flat = dict(values)
    init_args = flat.pop("init_args", [])
    for item in init_args if isinstance(init_args, list) else [init_args]:
        if isinstance(item, Mapping):
            for name, value in _flatten_paddle(item, level + 1).items():
                flat.setdefault(name, value)
    init_class = flat.pop("init_class", None)
    if init_class is not None:
        flat["architectures"] = [init_class]
    for foreign, ours in _FOREIGN_NAMES.items():
        if foreign in flat:
            flat.setdefault(ours, flat.pop(foreign))
    return flat


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"


def _int_keys(name: str, mapping: Any) -> dict[int, Any]:
    """The mapping with its keys, which JSON writes as strings, as integers."""
    if not isinstance(mapping, Mapping) or not all(map(_is_index, mapping)):
        raise ConfigError(f"{name} must be a mapping with whole numbers, got {short_repr(mapping)}")
    found = {int(key): value for key, value in mapping.items()}
    if len(found) < len(mapping):
        raise ConfigError(f"{name} must name each number once, got {short_repr(mapping)}")
    return found


def _is_index(key: Any) -> bool:
    if isinstance(key, str):
        return len(key) <= MAX_DIGITS and key.isascii() and key.isdecimal()
    return isinstance(key, int) and not isinstance(key, bool)


def _inverted(label2id: Mapping[str, Any]) -> dict[str, str]:
    if not all(_is_index(index) for index in label2id.values()):
        raise ConfigError(f"label2id must hold whole numbers, got {short_repr(label2id)}")
    return {str(index): label for label, index in label2id.items()}


def _label(index: int, label: Any) -> str:
    if isinstance(label, Mapping | list | tuple):
        raise ConfigError(f"id2label[{index}] must be a name, got {short_repr(label)}")
    return str(label)


def _is_names(names: Any) -> bool:
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    return is_list and all(isinstance(name, str) for name in names)


def _sorted_ints(name: str, values: Any) -> list[int]:
    is_list = isinstance(values, Sequence | set | frozenset) and not isinstance(values, str)
    if not is_list or not all(isinstance(value, int) for value in values):
        raise ConfigError(f"{name} must hold lists of whole numbers, got {short_repr(values)}")
    return sorted(values)


def _require_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    maximum = maximum or MAX_SIZES.get(name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < minimum:
        raise ConfigError(f"{name} must be an integer >= {minimum}, got {short_repr(value)}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} must be at most {maximum:,}, got {short_repr(value)}")


def _require_probability(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, got {short_repr(value)}")


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {short_repr(value)}")
