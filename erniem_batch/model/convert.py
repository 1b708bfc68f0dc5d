"""Model folders of PaddleNLP turned into those of transformers, and back.

The counterpart of `checkpoint.py`, which reads both forms: here PaddleNLP's is written as well. A
folder appears only after both sides were loaded and gave the same; what the other library cannot
express is refused, and what it does in another way is told.
"""

import json
import logging
import pickle
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.checkpoint import (
    BASE_PREFIX,
    STORAGE_KEY,
    PreTrainedModel,
    check_storage,
    from_int8,
    is_paddle_layout,
    tensors_for,
    tensors_of,
    to_int8,
    to_our_names,
)
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.files import read_json
from erniem_batch.model.heads import HEADS
from erniem_batch.model.overlay import BASE_KEY, base_folder
from erniem_batch.text.tokenizer import SPECIAL_TOKENS, VOCAB_FILE, ErnieMTokenizer

logger = logging.getLogger(__name__)

LAYOUTS = ("hf", "paddle")
TOLERANCE = 1e-6
PADDLENLP_VERSION = "2.8.1"

# The classes that both libraries have.
CONVERTIBLE = {name: cls for name, cls in HEADS.items() if name != "ErnieMForEmbedding"}

_EXTRACTION = "ErnieMForInformationExtraction"
_PADDLE_NAMES = {_EXTRACTION: "UIEM"}
_OUR_NAMES = {paddle: ours for ours, paddle in _PADDLE_NAMES.items()}

# Named alike in paddle.nn.functional, where PaddleNLP looks them up, and the same function there.
_PADDLE_ACTIVATIONS = frozenset(
    ("gelu", "relu", "relu6", "leaky_relu", "silu", "swish", "tanh", "sigmoid", "mish")
)
_PADDLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Keys of a config.json that say something about the other library's folder only.
_PADDLE_KEYS = frozenset(("paddlenlp_version", "dtype", "type_vocab_size"))
_HF_KEYS = frozenset(
    ("torch_dtype", "transformers_version", "_name_or_path", BASE_KEY, STORAGE_KEY)
)

# Scripts, widths, digits, a lone space before CJK, special tokens written out, nothing at all.
_SAMPLES = (
    "Ada Lovelace met Charles Babbage in London on 5 June 1833.",
    "北京 上海, 2月8日 3.14",
    "東京タワーは１９５８年に完成しました。",
    "서울은 대한민국의 수도이다.",
    "Москва — столица России; Київ — столиця України.",
    "القاهرة هي عاصمة مصر.",
    "กรุงเทพมหานครเป็นเมืองหลวงของไทย",
    "नई दिल्ली भारत की राजधानी है।",
    "İstanbul, Straße, ﬁn, ½ 😀 [SEP] [MASK]x",
    "  two spaces,\ttab\nand line ",
    "",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was converted, and how it was checked.

    Attributes:
        head: class of the model.
        source_layout, target_layout: `hf` or `paddle`.
        n_tensors: tensors written; each was read back and is equal, bit by bit, or as close as
            int8 comes.
        max_difference: largest difference between hidden states and outputs of both folders; with
            int8, what the rounding does to them.
        n_ids_checked: token ids compared; 0 if the source has no tokenizer.
        notes: what is not the same for a user of the other library.
    """

    head: str
    source_layout: str
    target_layout: str
    n_tensors: int
    max_difference: float
    n_ids_checked: int
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str | None = None,
    head: str | None = None,
    mask_mode: str | None = None,
    storage: str | None = None,
) -> Conversion:
    """Writes a model folder in the form of transformers (`hf`) or of PaddleNLP (`paddle`).

    Tensors keep their types; those of an int8 folder become float32. Written are config, weights
    and tokenizer, no other files. The target appears complete or not at all.

    Args:
        source: folder of transformers, PaddleNLP (any age) or an overlay.
        target: folder that does not exist yet, or is empty.
        layout: of the target; None: the one that the source does not have, or hf for a storage.
        head: class of the model; None: as `architectures` says, else by the tensors.
        mask_mode: instead of the source's; see ErnieMConfig.
        storage: `int8`, see PreTrainedModel.save_pretrained; None: floats.

    Raises:
        ConfigError: the target is taken, or PaddleNLP cannot express the model; names everything
            that is in the way.
        CheckpointError: the source cannot be read, or the target does not give the same.
    """
    source, target = Path(source), Path(target)
    if layout not in (None, *LAYOUTS):
        raise ConfigError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    check_storage(storage)
    if storage is not None and layout == "paddle":
        raise ConfigError(f"storage={storage!r} is for the layout hf: PaddleNLP cannot read it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already: choose a new or an empty folder")
    stored = _stored_tensors(source)
    source_layout = _layout_of(source, stored)
    target_layout = layout or ("paddle" if source_layout == "hf" and storage is None else "hf")
    name = _head_of(source, stored, source_layout, head)
    config = _config_of(source, source_layout, name, mask_mode)
    tokenizer = _tokenizer_of(source, source_layout)
    tensors = tensors_for(CONVERTIBLE[name], config, source)
    if _is_int8(source):
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
    model = _model_of(CONVERTIBLE[name], config, tensors)
    if target_layout == "paddle":
        _refuse_what_paddle_lacks(source, model, tokenizer)
    notes = _notes(model, tokenizer, stored, source_layout, target_layout)
    if storage is not None:
        notes.append(f"only erniem_batch reads {storage} weights: transformers finds them missing")

    del stored  # as large as the model
    # Hidden, and of this run alone: whoever kills it has this folder to remove, never the target.
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        if target_layout == "paddle":
            _write_paddle(model, tokenizer, partial)
        else:
            _write_hf(model, tokenizer, partial, storage)
        rows = _sample_ids(source, source_layout, partial)
        _compare_tensors(model, partial, storage)
        difference = _compare_outputs(type(model), source, config, partial, rows, storage)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("converted head=%s %s -> %s target=%s", name, source_layout, target_layout, target)
    return Conversion(
        head=name,
        source_layout=source_layout,
        target_layout=target_layout,
        n_tensors=len(tensors),
        max_difference=difference,
        n_ids_checked=sum(map(len, rows)),
        notes=tuple(notes),
    )


# ---- what the source is -----------------------------------------------------------------------


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    base = base_folder(folder)
    return {**({} if base is None else tensors_of(base)), **tensors_of(folder)}


def _is_int8(folder: Path) -> bool:
    """Whether a folder, or the base under it, was stored as int8."""
    folders = [folder, base_folder(folder) or folder]
    return any(ErnieMConfig.from_pretrained(f).extra.get(STORAGE_KEY) == "int8" for f in folders)


def _layout_of(folder: Path, stored: Mapping[str, Tensor]) -> str:
    # An overlay is ours, whatever it lies over.
    return "paddle" if base_folder(folder) is None and is_paddle_layout(stored) else "hf"


def _head_of(folder: Path, stored: Mapping[str, Tensor], layout: str, given: str | None) -> str:
    """Class name of the model in a folder.

    Raises:
        ConfigError: no such head, or it cannot be told which one it is.
    """
    known = [*CONVERTIBLE, *_OUR_NAMES]
    if given is not None:
        if given not in known:
            raise ConfigError(f"head must be one of {', '.join(known)}, got {given!r}")
        return _OUR_NAMES.get(given, given)
    possible = _possible_heads(stored, layout)
    architectures = ErnieMConfig.from_pretrained(folder).architectures or ()
    declared = [_OUR_NAMES.get(name, name) for name in architectures if name in known]
    if declared and declared[0] in possible:
        return declared[0]
    if declared:
        raise ConfigError(
            f"{folder}: architectures={declared} does not go with its tensors, which are those of "
            f"{' or '.join(sorted(possible))}: say which one is meant with --head"
        )
    if layout == "hf" and any("pooler." in name for name in stored):
        possible.discard("ErnieMForTokenClassification")  # transformers gives it no pooler
    if len(possible) > 1:
        raise ConfigError(
            f"{folder}: no known architectures in its config, and its tensors may be those of "
            f"{' or '.join(sorted(possible))}: say which one is meant with --head"
        )
    return possible.pop()


def _possible_heads(stored: Mapping[str, Tensor], layout: str) -> set[str]:
    possible = set()
    if "linear_start.weight" in stored:
        possible.add(_EXTRACTION)
    if "qa_outputs.weight" in stored:
        possible.add("ErnieMForQuestionAnswering")
    if "classifier.bias" in stored:
        n_labels = stored["classifier.bias"].numel()
        possible.add("ErnieMForTokenClassification")
        if any("pooler." in name for name in stored):
            possible.add("ErnieMForSequenceClassification")
            if n_labels == 1:
                possible.add("ErnieMForMultipleChoice")
        if n_labels == 2 and layout == "paddle":
            possible.add("ErnieMForQuestionAnswering")
    return possible or {"ErnieMModel"}


def _config_of(folder: Path, layout: str, head: str, mask_mode: str | None) -> ErnieMConfig:
    config = ErnieMConfig.from_pretrained(folder)
    if mask_mode is not None:
        return replace(config, mask_mode=mask_mode)
    if layout == "paddle" and head == _EXTRACTION and not _states(folder, "config", "mask_mode"):
        # Also where no `architectures` says that these are UIE-M weights.
        return replace(config, mask_mode="paddle")
    return config


def _tokenizer_of(folder: Path, layout: str, **changes: Any) -> ErnieMTokenizer | None:
    """The tokenizer of a folder; None if it has no file of one."""
    if layout == "paddle" and not _states(folder, "tokenizer_config", "lone_underline"):
        changes["lone_underline"] = "paddle"
    try:
        return ErnieMTokenizer.from_pretrained(folder, **changes)
    except CheckpointError:
        if any((folder / name).exists() for name in ("tokenizer_config.json", VOCAB_FILE)):
            raise
        return None


def _states(folder: Path, file: str, key: str) -> bool:
    try:
        values = read_json(folder / f"{file}.json")
    except CheckpointError:
        return False  # whoever needs the file says what is wrong with it
    return isinstance(values, dict) and key in values


def _model_of(
    cls: type[PreTrainedModel], config: ErnieMConfig, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model around these very tensors, each in its own type."""
    extra = {
        key: value for key, value in config.extra.items() if key not in _PADDLE_KEYS | _HF_KEYS
    }
    with torch.device("meta"):
        model = cls(replace(config, extra=extra))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


# ---- what the target cannot be ----------------------------------------------------------------


def _refuse_what_paddle_lacks(
    source: Path, model: PreTrainedModel, tokenizer: ErnieMTokenizer | None
) -> None:
    """Source: paddlenlp 2.8.1 transformers/ernie_m/{modeling,tokenizer}.py."""
    config: ErnieMConfig = model.config
    dtypes = {str(p.dtype) for p in model.parameters() if p.dtype not in _PADDLE_DTYPES}
    obstacles = [
        (config.act_dropout != 0, f"act_dropout={config.act_dropout} (must be 0)"),
        (config.layer_norm_eps != 1e-5, f"layer_norm_eps={config.layer_norm_eps} (must be 1e-05)"),
        (
            config.intermediate_size != 4 * config.hidden_size,
            f"intermediate_size={config.intermediate_size} (must be 4 x hidden_size = "
            f"{4 * config.hidden_size})",
        ),
        (
            config.hidden_act not in _PADDLE_ACTIVATIONS,
            f"hidden_act={config.hidden_act!r} (must be one of "
            f"{', '.join(sorted(_PADDLE_ACTIVATIONS))})",
        ),
        (bool(config.pruned_heads), "pruned_heads"),
        (bool(dtypes), f"tensors of type {', '.join(sorted(dtypes))}"),
    ]
    if tokenizer is not None:
        has_vocab, special = tokenizer._vocab_lines is not None, {*tokenizer.all_special_tokens}
        obstacles += [
            (not has_vocab, "a tokenizer without vocab.txt"),
            (has_vocab and len(tokenizer) > tokenizer.vocab_size, "tokens that vocab.txt lacks"),
            (bool(tokenizer._added.keys() - special), "added tokens that are not special ones"),
            (tokenizer.split_special_tokens, "split_special_tokens=true"),
            (bool(tokenizer.sp_model_kwargs.get("enable_sampling")), "sampling in sp_model_kwargs"),
        ]
    found = [what for is_obstacle, what in obstacles if is_obstacle]
    if found:
        raise ConfigError(f"{source}: PaddleNLP cannot express {'; '.join(found)}")


def _notes(
    model: PreTrainedModel,
    tokenizer: ErnieMTokenizer | None,
    stored: Mapping[str, Tensor],
    source_layout: str,
    target_layout: str,
) -> list[str]:
    """What a user of the other library has to know, in whole sentences."""
    name, config = type(model).__name__, model.config
    renamed = {n.removeprefix(BASE_PREFIX) for n in to_our_names(stored, name)}
    left_out = sorted(renamed - {n.removeprefix(BASE_PREFIX) for n in model.state_dict()})
    notes = []
    if left_out:
        notes.append(f"left out, for {name} has no use for them: {', '.join(left_out)}")
    if tokenizer is None:
        notes.append("the source has no tokenizer, so none was written")
    if target_layout == "hf":
        if config.mask_mode != "pad":
            notes.append(
                f"transformers does not read mask_mode={config.mask_mode!r}: there, pass an "
                "attention_mask that hides [CLS] (id 0) and padding"
            )
        if tokenizer is not None and tokenizer.lone_underline == "paddle":
            notes.append(
                "transformers does not read lone_underline='paddle': its tokenizer gives a token "
                "more where a lone space stands, as between CJK words"
            )
        return notes
    if config.mask_mode == "pad":
        notes.append(
            "PaddleNLP hides [CLS] and attends padding unless it is given an attention_mask: "
            "there, pass return_attention_mask=True to the tokenizer, and the mask to the model "
            "(its Taskflow passes none)"
        )
    if tokenizer is not None and tokenizer.lone_underline == "hf":
        notes.append(
            "PaddleNLP's tokenizer drops the lone space that this model was given as a token, as "
            "between CJK words"
        )
    if not any("pooler." in n for n in model.state_dict()):
        notes.append(f"PaddleNLP adds a pooler to {name} at random and says so; nothing reads it")
    if name == "ErnieMForMultipleChoice" and not config.extra.get("num_choices"):
        notes.append("PaddleNLP has to be told num_choices, in config.json or from_pretrained")
    return notes


# ---- the target -------------------------------------------------------------------------------


def _write_hf(
    model: PreTrainedModel, tokenizer: ErnieMTokenizer | None, folder: Path, storage: str | None
) -> None:
    model.save_pretrained(folder, storage=storage)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_paddle(model: PreTrainedModel, tokenizer: ErnieMTokenizer | None, folder: Path) -> None:
    _write_json(folder / "config.json", _paddle_config(model))
    with (folder / "model_state.pdparams").open("wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.dispatch_table = {np.ndarray: _array_in_parts}
        pickler.fast = True  # remembers nothing: otherwise every array is there twice until the end
        pickler.dump(_paddle_arrays(model.state_dict()))
    if tokenizer is not None:
        _write_paddle_tokenizer(tokenizer, folder)


def _paddle_config(model: PreTrainedModel) -> dict[str, Any]:
    config: ErnieMConfig = model.config
    name = type(model).__name__
    values = config.to_dict()
    for absent in ("act_dropout", "layer_norm_eps"):  # constants in PaddleNLP
        del values[absent]
    # Only what differs from the defaults of both libraries.
    defaults = ErnieMConfig(num_labels=len(config.labels)).to_dict()
    optional = ["classifier_dropout", "output_attentions", "output_hidden_states", "return_dict"]
    if len(config.labels) == 2:
        optional += ["id2label", "label2id"]
    for key in optional:
        if values[key] == defaults[key]:
            del values[key]
    return {
        **values,
        "architectures": [_PADDLE_NAMES.get(name, name)],
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "paddlenlp_version": PADDLENLP_VERSION,
        "type_vocab_size": 16,  # PaddleNLP writes it, and has no use for it
    }


def _paddle_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Names and layouts of PaddleNLP: the inverse of `to_our_names`."""
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "_embeddings." not in name:
            tensor = tensor.T
        tensor = tensor.detach().contiguous()
        name = name.replace(".self_attn.self_attn.", ".self_attn.")
        if name.startswith("qa_outputs."):
            name = name.replace("qa_outputs.", "classifier.")
        if tensor.dtype == torch.bfloat16:  # numpy has none
            arrays[name] = tensor.view(torch.int16).numpy().view(np.uint16)
        else:
            arrays[name] = tensor.numpy()
    return arrays


def _array_in_parts(array: np.ndarray) -> tuple[Any, ...]:
    """How to pickle an array for any numpy: 2 names a module that PaddleNLP's older one lacks."""
    return np.ndarray, ((0,),), array.__reduce__()[2]


def _write_paddle_tokenizer(tokenizer: ErnieMTokenizer, folder: Path) -> None:
    tokenizer.save_vocabulary(folder)
    specials = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    settings: dict[str, Any] = {
        **specials,
        "do_lower_case": tokenizer.do_lower_case,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "ErnieMTokenizer",
    }
    for name, default in (
        ("lone_underline", "paddle"),  # read by this package only
        ("padding_side", "right"),
        ("truncation_side", "right"),
    ):
        if getattr(tokenizer, name) != default:
            settings[name] = getattr(tokenizer, name)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", specials)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# ---- is it the same? --------------------------------------------------------------------------


def _sample_ids(source: Path, layout: str, folder: Path) -> list[list[int]]:
    """Ids of the sample texts, alone and in pairs, from both tokenizers alike.

    Without a tokenizer there are none.
    """
    certain: dict[str, Any] = {"sp_model_kwargs": {}}  # sampling would cut anew each time
    expected = _tokenizer_of(source, layout, **certain)
    if expected is None:
        return []
    found = ErnieMTokenizer.from_pretrained(folder, **certain)
    if found.get_vocab() != expected.get_vocab():
        raise CheckpointError("converting changed the vocabulary of the tokenizer")
    ids, expected_ids = (
        [*t(_SAMPLES)["input_ids"], *t(_SAMPLES, _SAMPLES[::-1])["input_ids"]]
        for t in (found, expected)
    )
    changed = [i for i, row in enumerate(ids) if row != expected_ids[i]]
    if changed:
        raise CheckpointError(f"converting changed the token ids of the sample texts {changed}")
    return ids


def _compare_tensors(model: PreTrainedModel, folder: Path, storage: str | None) -> None:
    config = ErnieMConfig.from_pretrained(folder)
    changed = [
        f.name
        for f in fields(config)
        if f.name not in ("architectures", "extra")
        and getattr(config, f.name) != getattr(model.config, f.name)
    ]
    if changed:
        raise CheckpointError(f"converting changed {', '.join(changed)} of the config")
    expected = model.state_dict()
    found = tensors_for(type(model), config, folder)
    is_same = _same_bits if storage is None else _close_as_int8
    changed = [name for name, tensor in found.items() if not is_same(tensor, expected[name])]
    if changed:
        raise CheckpointError(f"converting changed {len(changed)} tensors ({changed[0]}, …)")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type and in every bit, so that a NaN equals itself."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (a, b)))


def _close_as_int8(a: Tensor, b: Tensor) -> bool:
    """Equal but for half a step of int8, 1/254 of the largest in the row, or one of float16."""
    b = b.float()
    step = b.abs().amax(dim=-1, keepdim=True) / 253 + 2.0**-24
    return bool(((a.float() - b).abs() <= step).all())


def _compare_outputs(
    cls: type[PreTrainedModel],
    source: Path,
    config: ErnieMConfig,
    folder: Path,
    rows: Sequence[Sequence[int]],
    storage: str | None,
) -> float:
    """Largest difference between the hidden states and outputs of both folders.

    With int8, the target must give what the source gives with its weights rounded.
    """
    if not rows:
        rows = [[0, *map(ord, text), 2] for text in _SAMPLES]
    ids_BL = _padded(rows, config)
    # One after the other, so that only one copy in float32 is there at a time.
    expected = _outputs(cls.from_pretrained(source, config=config), ids_BL)
    found = _outputs(cls.from_pretrained(folder), ids_BL)
    difference = unexplained = _largest_difference(expected, found)
    if storage == "int8":
        rounded = cls.from_pretrained(source, config=config)
        rounded.load_state_dict(from_int8(to_int8(rounded.state_dict()), source))
        unexplained = _largest_difference(_outputs(rounded, ids_BL), found)
    if not unexplained <= TOLERANCE:  # NaN is not
        raise CheckpointError(
            f"converting changed what the model computes: outputs and hidden states differ by up "
            f"to {unexplained}, more than {TOLERANCE}"
        )
    return difference


def _largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """NaN if there is one anywhere."""
    return float(torch.stack([(x - y).abs().max() for x, y in zip(a, b, strict=True)]).max())


def _padded(rows: Sequence[Sequence[int]], config: ErnieMConfig) -> Tensor:
    width = min(max(map(len, rows)), config.max_tokens)
    ids_BL = torch.full((len(rows), width), config.pad_token_id)
    for i, row in enumerate(rows):
        kept = torch.tensor(row[:width])
        ids_BL[i, : len(kept)] = kept % config.vocab_size  # a table may be cut to fewer rows
    return ids_BL


@torch.inference_mode()
def _outputs(model: PreTrainedModel, ids_BL: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        # Sums depend on how the numbers lie in memory, and mapped files lie as they were written.
        parameter.data = parameter.data.clone()
    if type(model).__name__ == "ErnieMForMultipleChoice":
        ids_BL = ids_BL[None]
    output = model(ids_BL, output_hidden_states=True, return_dict=True)
    return [*output.hidden_states, *(t for t in output.to_tuple() if isinstance(t, Tensor))]
