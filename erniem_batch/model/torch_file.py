"""Weights as torch stores them: `pytorch_model.bin`, of any version.

Since torch 1.6 the file is a zip archive, whose numbers lie there as they are; before, it was five
pickles and the numbers behind them. Both are read by `pickles`, so that nothing of torch sees what
a file says of itself.
"""

import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erniem_batch.errors import CheckpointError
from erniem_batch.model.files import short_repr
from erniem_batch.model.mapped import mapped
from erniem_batch.model.pickles import Function, StandIn, as_mapping, read_pickle

MAX_DIMENSIONS = 8
# The list of what an archive holds: 100 bytes for each tensor.
MAX_DIRECTORY_BYTES = 4 << 20
_MAX_SIZE = 1 << 62
_ARCHIVE = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a `pytorch_model.bin`; what else it holds is left out.

    Numbers stay in the file, mapped into memory.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors and plain values.
    """
    with mapped(path) as data:
        try:
            if bytes(data[:4]) == _ARCHIVE:
                return _read_archive(path, data)
            return _read_legacy(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: cannot be read safely: {error}") from None


# ---- stand-ins --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Storage:
    """Numbers of one type in a row, by the name of their place in the file."""

    key: str
    dtype: torch.dtype
    n_numbers: int


class _Tensor(StandIn):
    """A tensor: a place in a storage, with sizes and strides in numbers."""

    def __init__(self, storage: Any, offset: Any, sizes: Any, strides: Any) -> None:
        if not isinstance(storage, _Storage):
            raise CheckpointError("a tensor without a storage")
        if not (isinstance(sizes, tuple) and isinstance(strides, tuple)):
            raise CheckpointError("a tensor without sizes")
        if len(sizes) != len(strides) or len(sizes) > MAX_DIMENSIONS:
            raise CheckpointError(f"expected a tensor of at most {MAX_DIMENSIONS} dimensions")
        if not all(_is_size(number) for number in (offset, *sizes, *strides)):
            raise CheckpointError(
                f"a tensor of the sizes {short_repr(sizes)} and strides {short_repr(strides)}"
            )
        self.storage, self.offset = storage, offset
        self.sizes, self.strides = sizes, strides
        self._check_extent()

    def _check_extent(self) -> None:
        """The tensor lies within its storage, and no number is there twice."""
        numbers = math.prod(self.sizes)
        steps = zip(self.sizes, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        if numbers and (last >= self.storage.n_numbers or numbers > self.storage.n_numbers):
            raise CheckpointError(
                f"a tensor {short_repr(self.sizes)} in a storage of {self.storage.n_numbers}"
            )
        if not numbers and math.prod(max(size, 1) for size in self.sizes) >= _MAX_SIZE:
            raise CheckpointError(f"an empty tensor of the sizes {short_repr(self.sizes)}")

    @property
    def n_bytes(self) -> int:
        return math.prod(self.sizes) * self.storage.dtype.itemsize


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < _MAX_SIZE


def _rebuilt(arguments: tuple[Any, ...]) -> _Tensor:
    """`_rebuild_tensor_v2(storage, offset, sizes, strides, …)`."""
    if len(arguments) < 4:
        raise CheckpointError("a tensor without sizes")
    return _Tensor(*arguments[:4])


def _parameter(arguments: tuple[Any, ...]) -> _Tensor:
    """`_rebuild_parameter(tensor, …)`."""
    if not arguments or not isinstance(arguments[0], _Tensor):
        raise CheckpointError("a parameter without a tensor")
    return arguments[0]


_STORAGES = {Function(f"torch.{name}"): dtype for name, dtype in _DTYPES.items()}
_NAMES = {
    ("collections", "OrderedDict"): Function("collections.OrderedDict", as_mapping),
    ("torch._utils", "_rebuild_tensor"): Function("_rebuild_tensor", _rebuilt),
    ("torch._utils", "_rebuild_tensor_v2"): Function("_rebuild_tensor_v2", _rebuilt),
    ("torch._utils", "_rebuild_parameter"): Function("_rebuild_parameter", _parameter),
} | {("torch", function.name.partition(".")[2]): function for function in _STORAGES}


def _storage(reference: Any) -> _Storage:
    """The storage of a persistent id: ("storage", type, key, device, count[, view])."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6):
        raise CheckpointError("an unknown reference to a storage")
    kind, storage_type, key, _, n_numbers, *view = reference
    dtype = _STORAGES.get(storage_type) if isinstance(storage_type, Function) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or view not in ([], [None]):
        raise CheckpointError("an unknown reference to a storage")
    if not _is_size(n_numbers):
        raise CheckpointError(f"a storage of {short_repr(n_numbers)} numbers")
    return _Storage(key, dtype, n_numbers)


# ---- archives ---------------------------------------------------------------------------------


def _read_archive(path: Path, data: memoryview) -> dict[str, Tensor]:
    _check_directory(data)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(f"damaged archive: {error}") from error
    folder = next((n.removesuffix("/data.pkl") for n in entries if n.endswith("/data.pkl")), None)
    if folder is None:
        raise CheckpointError("an archive without data.pkl")
    order = entries.get(f"{folder}/byteorder")
    if order is not None and bytes(_content(order, data)) != b"little":
        raise CheckpointError("numbers in another byte order: expected little")
    pickled = _content(entries[f"{folder}/data.pkl"], data)
    values, _ = read_pickle(pickled, _NAMES, persistent=_storage)
    places: dict[str, memoryview] = {}
    for tensor in _tensors_in(values).values():
        key = tensor.storage.key
        entry = entries.get(f"{folder}/data/{key}")
        if entry is None:
            raise CheckpointError(f"an archive without data/{short_repr(key)}")
        places[key] = _content(entry, data)
    return _filled(values, places, len(data))


def _check_directory(data: memoryview) -> None:
    """The list of entries is at the end of the file, and small: a large one fills the memory."""
    end = bytes(data[-22:])
    if len(end) < 22 or end[:4] != b"PK\x05\x06":
        raise CheckpointError("damaged archive: no list of entries at its end")
    (size,) = struct.unpack("<I", end[12:16])
    locator = bytes(data[-42:-22])
    if locator[:4] == b"PK\x06\x07":
        (at,) = struct.unpack("<Q", locator[8:16])
        record = bytes(data[at : at + 56])
        if len(record) < 56 or len(data) - 42 - 56 != at:
            raise CheckpointError("damaged archive: no list of entries at its end")
        (size,) = struct.unpack("<Q", record[40:48])
    if size > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"expected a list of entries of at most {MAX_DIRECTORY_BYTES} bytes, got {size}"
        )


def _content(entry: zipfile.ZipInfo, data: memoryview) -> memoryview:
    """The bytes of an entry, which torch never compresses."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise CheckpointError(f"a compressed entry {short_repr(entry.filename)}")
    header = bytes(data[entry.header_offset : entry.header_offset + 30])
    if entry.header_offset < 0 or len(header) < 30 or header[:4] != _ARCHIVE:
        raise CheckpointError(f"no entry {short_repr(entry.filename)} where the list says")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > len(data):
        raise CheckpointError(f"the entry {short_repr(entry.filename)} ends after the file")
    return data[start : start + entry.file_size]


# ---- before torch 1.6 -------------------------------------------------------------------------


def _read_legacy(data: memoryview) -> dict[str, Tensor]:
    magic, at = read_pickle(data, {})
    version, at = read_pickle(data, {}, start=at)
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise CheckpointError("not a file of torch.save")
    system, at = read_pickle(data, {}, start=at)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("numbers in another byte order: expected little")
    storages: dict[str, _Storage] = {}

    def remembered(reference: Any) -> _Storage:
        storage = _storage(reference)
        return storages.setdefault(storage.key, storage)

    values, at = read_pickle(data, _NAMES, start=at, persistent=remembered)
    keys, at = read_pickle(data, {}, start=at)
    if not isinstance(keys, list) or not _are_in(keys, storages):
        raise CheckpointError("no list of storages")
    places = {}
    for key in keys:
        start = at + 8  # after the number of numbers, which the reference has told, too
        at = start + storages[key].n_numbers * storages[key].dtype.itemsize
        if at > len(data):
            raise CheckpointError(f"the storage {short_repr(key)} ends after the file")
        places[key] = data[start:at]
    return _filled(values, places, len(data))


def _are_in(keys: list[Any], storages: Mapping[str, _Storage]) -> bool:
    return all(isinstance(key, str) and key in storages for key in keys)


# ---- tensors ----------------------------------------------------------------------------------


def _tensors_in(values: Any) -> dict[str, _Tensor]:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"expected a mapping of tensors, got {type(values).__name__}")
    return {name: value for name, value in values.items() if isinstance(value, _Tensor)}


def _filled(values: Any, places: Mapping[str, memoryview], n_bytes: int) -> dict[str, Tensor]:
    tensors = _tensors_in(values)
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    needed = sum(tensor.n_bytes for tensor in distinct.values())
    if needed > 2 * n_bytes:  # tied weights are two tensors in one place
        raise CheckpointError(f"tensors of {needed:,} bytes in a file of {n_bytes:,}")
    needed = sum(map(len, places.values()))
    if needed > n_bytes:  # torch never puts two storages in one place
        raise CheckpointError(f"storages of {needed:,} bytes in a file of {n_bytes:,}")
    storages: dict[str, tuple[_Storage, Tensor]] = {}
    for storage in (tensor.storage for tensor in tensors.values()):
        if storage.key not in places:
            raise CheckpointError(f"no storage {short_repr(storage.key)}")
        if storage.key not in storages:
            storages[storage.key] = storage, _numbers(storage, places[storage.key])
        if storages[storage.key][0] != storage:
            raise CheckpointError(f"two types of the storage {short_repr(storage.key)}")
    return {name: _view(storages[t.storage.key][1], t) for name, t in tensors.items()}


def _view(storage: Tensor, tensor: _Tensor) -> Tensor:
    if 0 in tensor.sizes:
        return torch.empty(tensor.sizes, dtype=storage.dtype)
    return storage.as_strided(tensor.sizes, tensor.strides, tensor.offset)


def _numbers(storage: _Storage, place: memoryview) -> Tensor:
    """The numbers of a storage: mapped, or a copy where they are not aligned in the file."""
    needed = storage.n_numbers * storage.dtype.itemsize
    if needed != len(place):
        raise CheckpointError(f"a storage of {needed} bytes, and {len(place)} bytes in the file")
    if not place:
        return torch.empty(0, dtype=storage.dtype)
    raw = torch.frombuffer(place, dtype=torch.uint8)
    if storage.dtype == torch.bool:  # a byte that is neither 0 nor 1 is no boolean
        return raw != 0
    if raw.data_ptr() % storage.dtype.itemsize:
        raw = raw.clone()
    return raw.view(storage.dtype)
