"""Model folders: foreign file formats and names in, strictly matching tensors out.

Reads what transformers and PaddleNLP write (`tensors_of`), turns foreign names and layouts into
ours (`to_our_names`), and refuses a folder that does not match the model exactly. With
`convert.py`, which writes PaddleNLP's form, the only file that knows how others call things.
A compact form of our own, for small downloads, is `to_int8`.
"""

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.files import MAX_JSON_BYTES, read_shard_names, short_reason
from erniem_batch.model.overlay import BASE_KEY, base_folder, base_name, relative_base
from erniem_batch.model.paddle_file import read_paddle
from erniem_batch.model.torch_file import read_torch

logger = logging.getLogger(__name__)

BASE_PREFIX = "ernie_m."

# Tensors that only some of the classes have. A checkpoint may hold those of another class.
_HEAD_TENSORS = re.compile(
    r"^(ernie_m\.)?pooler\.|^(classifier|qa_outputs|linear_start|linear_end)\."
)

_PADDLE_QKV = re.compile(r"(layers\.\d+\.self_attn)\.([qkv]_proj\.)")
_EMBEDDING = re.compile(r"_embeddings\.weight$")

# How weights may be stored but as floats, and where a config.json says so. Loading goes by the
# names of the tensors: other libraries do not find those of int8, and say that weights are missing.
STORAGES = ("int8",)
STORAGE_KEY = "weight_storage"
_INT8, _SCALE = ".int8", ".int8_scale"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Heads stay floats: they are small, and their rows are few.
_STORED_AS_INT8 = re.compile(r"^(ernie_m\.)?(embeddings|encoder\.layers|pooler\.dense)\.")

# A row without a larger number is stored as zeros. No weight is that small, and products with a
# scale stay far above 1e-38, where float32 loses bits.
_NEGLIGIBLE = 1e-30


class PreTrainedModel(nn.Module):
    """Loading and saving, shared by the encoder and all heads."""

    config: Any  # ErnieMConfig; a plain attribute of the encoder, a property of the heads
    base_prefix: ClassVar[str] = BASE_PREFIX

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: ErnieMConfig | None = None,
        mask_mode: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        allow_new_head: bool = False,
        **options: Any,
    ) -> Self:
        """A model in evaluation mode with the weights of a folder.

        Weights that are stored as `dtype` in a safetensors file stay memory-mapped: processes on
        one machine share them. Other dtypes are converted, which makes a private copy; so are
        weights stored as int8, which cannot be mapped as floats. For many processes on one
        machine, `erniem-batch convert` makes an ordinary folder of such a one.

        Args:
            folder: of transformers (`model.safetensors`, sharded, or `pytorch_model.bin`) or
                PaddleNLP (`model_state.pdparams` or safetensors in Paddle's layout); or an overlay
                (see `save_overlay`).
            config: instead of the folder's own, for example with other labels.
            mask_mode: instead of the config's; see ErnieMConfig.
            dtype: of the loaded weights, such as torch.bfloat16 or "bfloat16".
            allow_new_head: create a head that the folder lacks, freshly initialised, for training.
            options: of the class, such as `pooling` of ErnieMForEmbedding.

        Raises:
            CheckpointError: names every missing, unexpected or misshapen tensor at once.
        """
        folder = Path(folder)
        config = config or ErnieMConfig.from_pretrained(folder)
        if mask_mode is not None:
            config = replace(config, mask_mode=mask_mode)
        with torch.device("meta"):
            model = cls(config, **options)
        wanted = model.state_dict()
        tensors = _named_tensors(folder, cls.__name__, wanted)
        new = _check(tensors, wanted, folder, allow_new_head)
        target = parse_dtype(dtype)
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(target)
        for name in new:
            tensors[name] = torch.empty(wanted[name].shape, dtype=target)
        model.load_state_dict(tensors, strict=True, assign=True)
        for name in new:
            model._init_module(model.get_submodule(name.rpartition(".")[0]))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, storage: str | None = None) -> None:
        """Writes config.json and model.safetensors, readable by transformers 4.40.2.

        The folder stands alone, even if the model was loaded from an overlay.

        Args:
            storage: `int8` halves the size of float16, rounds (see `to_int8`), and is read by this
                package only; None: floats in the model's own dtype.

        Raises:
            ConfigError: no such storage.
            CheckpointError: a weight is not finite, so cannot be stored as int8.
        """
        check_storage(storage)
        if storage is None:
            _write(self, Path(folder), self.state_dict(), next(iter(self.parameters())).dtype)
        else:
            _write_int8(self, Path(folder), to_int8(self.state_dict()))

    def _init_all(self) -> None:
        if next(self.parameters()).is_meta:
            return
        for module in self.modules():
            self._init_module(module)

    @torch.no_grad()
    def _init_module(self, module: nn.Module) -> None:
        """Normal weights, zero biases, unit layer norms, a zero row for padding."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias.zero_()


def save_overlay(
    model: PreTrainedModel,
    folder: str | Path,
    base: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    storage: str | None = None,
) -> None:
    """Writes a model as what differs from another folder: config.json, model.safetensors.

    Tensors are compared as they are written, so that a difference which `dtype` or `storage` rounds
    away is not written.

    Args:
        base: a model folder that stands alone; has to stay at its place relative to `folder`.
        dtype: of the tensors written as floats; None: the model's own, float16 beside int8.
        storage: `int8` or None, as for `save_pretrained`, whatever the storage of the base.

    Raises:
        ConfigError: no such storage.
        CheckpointError: the base cannot be read, or is an overlay itself; or a weight is not
            finite, so cannot be stored as int8.
    """
    folder, base = Path(folder), Path(base)
    check_storage(storage)
    if base_name(base) is not None or base.resolve() == folder.resolve():
        raise CheckpointError(f"{base}: the base of an overlay must be another, complete model")
    own = next(iter(model.parameters())).dtype if storage is None else torch.float16
    target = parse_dtype(own if dtype is None else dtype)
    state = model.state_dict()
    below = _named_tensors(base, type(model).__name__, state)
    changed = {
        name: tensor
        for name, tensor in state.items()
        if name not in below
        or below[name].shape != tensor.shape
        or not _same_when_stored(name, tensor, below[name], target, storage)
    }
    extra = {BASE_KEY: relative_base(folder, base)}
    if storage is None:
        floats = {name: tensor.to(target) for name, tensor in changed.items()}
        _write(model, folder, floats, target, extra)
    else:
        _write_int8(model, folder, to_int8(changed, target), extra)


def _same_when_stored(
    name: str, ours: Tensor, base: Tensor, dtype: torch.dtype, storage: str | None
) -> bool:
    if storage is None:
        return torch.equal(base.to(ours.device, dtype), ours.to(dtype))
    if torch.equal(base.to(ours), ours):  # as they were loaded: in bfloat16, rows have other scales
        return True
    a, b = (to_int8({name: tensor}, dtype) for tensor in (ours.cpu(), base))
    return all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def _write(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    extra: Mapping[str, str] | None = None,
) -> None:
    """config.json with `extra` in it, and these tensors of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = (BASE_KEY, STORAGE_KEY)
    kept = {name: value for name, value in model.config.extra.items() if name not in ours}
    kept |= {"torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.40.2"}
    config = replace(
        model.config, architectures=[type(model).__name__], extra={**kept, **(extra or {})}
    )
    config.save_pretrained(folder)
    # Never written in place: this or another process may have the old file memory-mapped.
    partial, path = folder / "model.safetensors.partial", folder / "model.safetensors"
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; whoever reads the config needs both.
    shutil.copymode(folder / "config.json", partial)
    partial.replace(path)


def _write_int8(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
) -> None:
    # Its torch_dtype is the one that loading gives.
    _write(model, folder, tensors, torch.float32, {**(extra or {}), STORAGE_KEY: "int8"})


def check_storage(storage: str | None) -> None:
    """Raises ConfigError: no such storage."""
    if storage not in (None, *STORAGES):
        raise ConfigError(f"storage must be one of {', '.join(STORAGES)} or None, got {storage!r}")


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch floating-point type by object or name.

    Raises:
        CheckpointError: no such floating-point type.
    """
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


# ---- files ------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder under the names of its files; the first format found wins.

    Raises:
        CheckpointError: no weights, a damaged file, or a shard named by the index is absent.
    """
    readers: list[tuple[str, Callable[[Path], dict[str, Tensor]]]] = [
        ("model.safetensors", _read_safetensors),
        ("pytorch_model.bin", read_torch),
        ("model_state.pdparams", read_paddle),
    ]
    for name, read in readers:
        for paths in (_single(folder / name), _shards(folder / f"{name}.index.json")):
            if paths:
                return _merged(paths, read)
    names = ", ".join(name for name, _ in readers)
    found = _shorten(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no folder"
    raise CheckpointError(f"{folder}: expected one of {names} (or its .index.json), found {found}")


def _merged(paths: Sequence[Path], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = read(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{path}: holds tensors of another shard: {_shorten(twice)}")
        tensors |= found
    return tensors


def _single(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _shards(index: Path) -> list[Path]:
    if not index.is_file():
        return []
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    names = sorted(set(read_shard_names(index, suffix).values()))
    paths = [index.parent / name for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{index}: shards are missing: {_shorten(absent)}")
    return paths


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        stored = load_file(path)
    except Exception as error:  # types of numbers and sizes that torch lacks raise many things
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file: {short_reason(error)}"
        ) from error
    return from_int8(stored, path)


def _check_header(path: Path) -> None:
    """The library reads a header of up to 100 MB and makes objects of it."""
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file: expected a header of at most "
            f"{MAX_JSON_BYTES:,} bytes, got {n_bytes:,}"
        )


# ---- int8 rows --------------------------------------------------------------------------------


def to_int8(
    tensors: Mapping[str, Tensor], floats: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Tensors under our names as they are stored for `storage="int8"`.

    Matrices of the encoder become NAME.int8, of the same shape, and NAME.int8_scale, float32, one
    number a row; heads and everything 1-D become `floats`, or float32 where those overflow. A row
    is its codes, -127 … 127, times its scale, which is 1/127 of the largest absolute value: no
    number is off by more than half a scale. A row of zeros stays one.

    What `from_int8` gives is stored again as the very same codes and scales.

    Raises:
        CheckpointError: names the matrices with numbers that are not finite.
    """
    stored: dict[str, Tensor] = {}
    not_finite = []
    for name, tensor in tensors.items():
        tensor = tensor.detach().float()
        if tensor.ndim == 2 and _STORED_AS_INT8.match(name):
            codes, scale = _quantised(tensor)
            stored |= {name + _INT8: codes, name + _SCALE: scale}
            if not (scale * 127).isfinite().all():
                not_finite.append(name)
        else:
            rounded = tensor.to(floats)
            stored[name] = rounded if rounded.isfinite().all() else tensor
    if not_finite:
        raise CheckpointError(
            f"cannot be stored as int8, for not all numbers are finite: {_shorten(not_finite)}"
        )
    return stored


def _quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix in float32."""
    largest = matrix.abs().amax(dim=1)
    # Only 17 significant bits of a scale are kept. With the 7 of a code, products are exact in
    # float32, and so is what comes of dividing the largest, 127 scales, by 127 once more.
    scale = (((largest / 127).view(torch.int32) + 64) & ~127).view(torch.float32)
    scale = torch.where(largest < _NEGLIGIBLE, 0.0, scale)
    divisor = torch.where(scale == 0, torch.inf, scale)
    codes = (matrix / divisor[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def from_int8(stored: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Matrices stored by `to_int8` in float32 under their own names; other tensors unchanged.

    Raises:
        CheckpointError: names every half of a pair, every wrong shape and every wrong scale.
    """
    tensors, problems = {}, []
    for name, tensor in stored.items():
        if name.endswith(_INT8):
            plain = name.removesuffix(_INT8)
            problem = _problem_of_int8(stored, plain)
            if problem is None:
                tensors[plain] = tensor.float().mul_(stored[plain + _SCALE][:, None])
            else:
                problems.append(problem)
        elif name.endswith(_SCALE):
            codes = name.removesuffix(_SCALE) + _INT8
            if codes not in stored:
                problems.append(f"{name} without {codes}")
        else:
            tensors[name] = tensor
    if problems:
        raise CheckpointError(f"{source}: damaged int8 weights: {_shorten(problems)}")
    return tensors


def _problem_of_int8(stored: Mapping[str, Tensor], name: str) -> str | None:
    codes, scale = stored[name + _INT8], stored.get(name + _SCALE)
    if scale is None:
        return f"{name}{_INT8} without {name}{_SCALE}"
    if name in stored:
        return f"{name} is there as floats and as {name}{_INT8}"
    if codes.dtype != torch.int8 or codes.ndim != 2:
        return f"{name}{_INT8} is {_form(codes)}, expected int8 (rows, columns)"
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        return f"{name}{_SCALE} is {_form(scale)}, expected float32 ({len(codes)},)"
    if not ((scale >= 0) & scale.isfinite()).all():
        return f"{name}{_SCALE} holds numbers that are negative or not finite"
    return None


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


# ---- names and layouts ------------------------------------------------------------------------


def _named_tensors(
    folder: Path, class_name: str, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a folder under our names, those of an overlay over those of its base."""
    base = base_folder(folder)
    if base is None:
        return _match_prefix(to_our_names(tensors_of(folder), class_name), wanted)
    # Only `save_overlay` writes overlays: their names are ours already, and too few to tell.
    above = _match_prefix(tensors_of(folder), wanted)
    return {**_named_tensors(base, class_name, wanted), **above}


def tensors_for(
    cls: type[PreTrainedModel], config: ErnieMConfig, folder: Path
) -> dict[str, Tensor]:
    """Exactly the tensors that a class needs, under our names, in the types they are stored in.

    Raises:
        CheckpointError: names every missing, unexpected or misshapen tensor at once.
    """
    with torch.device("meta"):
        wanted = cls(config).state_dict()
    tensors = _named_tensors(folder, cls.__name__, wanted)
    _check(tensors, wanted, folder, allow_new_head=False)
    return tensors


def is_paddle_layout(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names or shapes are those of PaddleNLP."""
    ours = any(".self_attn.self_attn." in name for name in tensors)
    return _is_transposed(tensors, guess=not ours) or not ours


def to_our_names(tensors: Mapping[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """Names and layouts of PaddleNLP turned into those of transformers; others unchanged.

    Paddle keeps linear weights as (in, out): every 2-D weight but the embeddings is transposed.
    Square ones would load without complaint and compute nonsense, so the layout is read from
    `linear1`, whose two sides differ, and only guessed from the names when they do not.
    """
    paddle_names = any(
        _PADDLE_QKV.search(name) and ".self_attn.self_attn." not in name for name in tensors
    )
    transposed = _is_transposed(tensors, guess=paddle_names)
    ours = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids"):
            continue  # 0, 1, 2, …: older versions stored it, nobody needs it
        name = _rename(name) if paddle_names else name
        if class_name == "ErnieMForQuestionAnswering" and paddle_names:
            name = re.sub(r"^classifier\.", "qa_outputs.", name)
        if transposed and tensor.ndim == 2 and not _EMBEDDING.search(name):
            tensor = tensor.T.contiguous()
        ours[name] = tensor
    return ours


def _rename(name: str) -> str:
    if (
        "ernie_m." not in name
        and name.startswith("encoder.")
        and not name.startswith("encoder.layers")
    ):
        # Checkpoints from before PaddleNLP 2.4.5 call the whole model `encoder`.
        name = BASE_PREFIX + name.removeprefix("encoder.")
    return name if ".self_attn.self_attn." in name else _PADDLE_QKV.sub(r"\1.self_attn.\2", name)


def _is_transposed(tensors: Mapping[str, Tensor], guess: bool) -> bool:
    for name, tensor in tensors.items():
        if not name.endswith("layers.0.linear1.weight") or tensor.ndim != 2:
            continue  # what is no matrix is refused later, by its name
        bias = tensors.get(name.replace("weight", "bias"))
        if tensor.size(0) != tensor.size(1) and bias is not None and bias.ndim == 1:
            return tensor.size(0) != bias.size(0)
    return guess


def _match_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds or removes `ernie_m.`, so that heads load into encoders and encoders into heads."""
    base_in_file = not any(name.startswith(BASE_PREFIX) for name in tensors)
    base_wanted = not any(name.startswith(BASE_PREFIX) for name in wanted)
    if base_in_file == base_wanted:
        return dict(tensors)
    if base_wanted:
        return {name.removeprefix(BASE_PREFIX): tensor for name, tensor in tensors.items()}
    body = ("embeddings.", "encoder.", "pooler.")
    return {(BASE_PREFIX + n if n.startswith(body) else n): t for n, t in tensors.items()}


def _check(
    tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], folder: Path, allow_new_head: bool
) -> list[str]:
    """Drops the heads of other classes; names of tensors to create; raises on anything else."""
    unexpected = sorted(tensors.keys() - wanted.keys())
    dropped = [name for name in unexpected if _HEAD_TENSORS.match(name)]
    unexpected = [name for name in unexpected if name not in dropped]
    for name in dropped:
        del tensors[name]
    wrong_shape = sorted(
        name for name in tensors.keys() & wanted.keys() if tensors[name].shape != wanted[name].shape
    )
    missing = sorted(wanted.keys() - tensors.keys())
    new_head = [n for n in [*missing, *wrong_shape] if _HEAD_TENSORS.match(n)]
    if allow_new_head:
        missing = [name for name in missing if name not in new_head]
        wrong_shape = [name for name in wrong_shape if name not in new_head]
    problems = [
        f"{len(names)} tensors {what} ({_shorten(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    no_floats = sorted(
        name for name in tensors.keys() & wanted.keys() if tensors[name].dtype not in _FLOATS
    )
    if no_floats:
        types = [f"{n} is {str(tensors[n].dtype).removeprefix('torch.')}" for n in no_floats]
        problems.append(f"{len(no_floats)} tensors that are not floats ({_shorten(types)})")
    if wrong_shape:
        shapes = [
            f"{n} is {tuple(tensors[n].shape)}, expected {tuple(wanted[n].shape)}"
            for n in wrong_shape
        ]
        problems.append(f"{len(wrong_shape)} tensors of the wrong shape ({_shorten(shapes)})")
    if problems:
        hint = ""
        if new_head and not unexpected and set(missing) | set(wrong_shape) <= set(new_head):
            hint = (
                ". The folder was not trained for this head: choose another model; in Python, "
                "allow_new_head=True creates an untrained head for fine-tuning"
            )
        raise CheckpointError(f"{folder}: {'; '.join(problems)}{hint}")
    if dropped:
        logger.info(
            "left out tensors of another head folder=%s tensors=%s", folder, _shorten(dropped)
        )
    if allow_new_head and new_head:
        logger.warning("NEW UNTRAINED HEAD folder=%s tensors=%s", folder, _shorten(new_head))
        return new_head
    return []


def _shorten(names: Sequence[str], limit: int = 8) -> str:
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
