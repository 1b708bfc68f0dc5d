"""Weights as PaddleNLP stores them: a pickle of numpy arrays by name."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from erniem_batch.errors import CheckpointError
from erniem_batch.model.files import short_repr
from erniem_batch.model.mapped import mapped
from erniem_batch.model.pickles import Function, StandIn, as_mapping, read_pickle

MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 62

# By the names that numpy writes. uint16 is how Paddle stores bfloat16.
_DTYPES = frozenset(
    ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "bool")
)
# Byte orders by the mark that numpy writes; "|" is for types of one byte.
_BYTE_ORDERS: dict[str, Literal["<", ">", "="]] = {"<": "<", ">": ">", "=": "=", "|": "="}


def read_paddle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `model_state.pdparams`; what else it holds is left out.

    Raises:
        CheckpointError: the file is damaged or holds anything but arrays of numbers.
    """
    with mapped(path) as data:
        try:
            values, _ = read_pickle(data, _NAMES)
            if not isinstance(values, dict):
                raise CheckpointError(f"expected a mapping of arrays, got {type(values).__name__}")
            return _tensors(values, len(data))
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: damaged or not a PaddleNLP weights file: {error}"
            ) from None


class _DType(StandIn):
    """A numpy dtype: its name and its byte order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order: Literal["<", ">", "="] | None = None

    def set_state(self, state: Any) -> None:
        # Version, byte order; then subarray, names and fields, which plain numbers lack; sizes and
        # flags, which follow from the name.
        is_plain = (
            self.order is None
            and isinstance(state, tuple)
            and 5 <= len(state) <= 9
            and isinstance(state[1], str)
            and state[1] in _BYTE_ORDERS
            and all(part is None for part in state[2:5])
        )
        if not is_plain:
            raise CheckpointError(f"refused: a dtype that is not a plain {self.name}")
        self.order = _BYTE_ORDERS[state[1]]


class _Array(StandIn):
    """A numpy array: dtype and shape as plain values, and a view of its bytes."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype("f4")
        self.order: Any = "C"
        self.data: memoryview | None = None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise CheckpointError("refused: an array with an unknown state")
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran is True else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Takes the content, once.

        Raises:
            CheckpointError: an impossible type or shape, or bytes of another number.
        """
        if self.data is not None or not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise CheckpointError("refused: an array with an unknown state")
        data = _as_view(data)
        self.dtype = np.dtype(dtype.name).newbyteorder(dtype.order or "=")
        self.shape = _checked_shape(shape)
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        if n_bytes != len(data):
            raise CheckpointError(
                f"an array {short_repr(self.shape)} of {self.dtype} takes {n_bytes} bytes, "
                f"got {len(data)}"
            )
        self.order, self.data = order, data

    def to_tensor(self) -> Tensor:
        """A tensor with a copy of the numbers."""
        if not self.data:
            array: np.ndarray = np.zeros(self.shape, self.dtype.newbyteorder("="))
        elif self.dtype.kind == "b":  # a byte that is neither 0 nor 1 is no boolean
            array = np.frombuffer(self.data, np.uint8) != 0
        else:
            array = np.frombuffer(self.data, self.dtype)
        array = array.reshape(self.shape, order=self.order)
        array = np.array(array, dtype=self.dtype.newbyteorder("="), order="C")
        if array.dtype == np.uint16:  # how Paddle stores bfloat16
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _as_view(data: Any) -> memoryview:
    if isinstance(data, str):  # of Python 2
        try:
            data = memoryview(data.encode("latin-1"))
        except UnicodeEncodeError:
            raise CheckpointError("an array whose numbers are text") from None
    if not isinstance(data, memoryview):
        raise CheckpointError(f"an array whose numbers are of the type {type(data).__name__}")
    return data


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"expected a shape of at most {MAX_DIMENSIONS} numbers")
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape):
        raise CheckpointError(f"expected a shape of whole numbers, got {short_repr(shape)}")
    if 0 in shape and math.prod(max(size, 1) for size in shape) >= _MAX_SIZE:
        raise CheckpointError(f"an empty array of the shape {short_repr(shape)}")
    return shape


# ---- names ------------------------------------------------------------------------------------


def _dtype(arguments: tuple[Any, ...]) -> _DType:
    name = arguments[0] if arguments else None
    if not isinstance(name, str) or name not in _DTYPES or len(arguments) > 3:
        raise CheckpointError(f"a tensor of the unknown kind {short_repr(name)}")
    return _DType(name)


def _empty_array(arguments: tuple[Any, ...]) -> _Array:
    """`_reconstruct(ndarray, (0,), b"b")` or `ndarray((0,))`; its state comes afterwards."""
    if arguments[:1] == (_NDARRAY,):
        arguments = arguments[1:]
    if arguments[:1] != ((0,),):
        raise CheckpointError("refused: an array with an unknown constructor")
    return _Array()


def _array_of_buffer(arguments: tuple[Any, ...]) -> _Array:
    """`_frombuffer(bytes, dtype, shape, order)`, as protocol 5 writes arrays."""
    if len(arguments) != 4:
        raise CheckpointError("refused: an array with an unknown constructor")
    array = _Array()
    array.fill(*arguments)
    return array


def _encoded(arguments: tuple[Any, ...]) -> memoryview:
    """`encode(text, "latin1")`, as protocol 2 writes bytes."""
    if len(arguments) != 2 or arguments[1] not in ("latin1", "latin-1"):
        raise CheckpointError("refused: an unknown encoding")
    return _as_view(arguments[0])


_NDARRAY = Function("numpy.ndarray", _empty_array)
_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Function("numpy.dtype", _dtype),
    ("collections", "OrderedDict"): Function("collections.OrderedDict", as_mapping),
    ("_codecs", "encode"): Function("_codecs.encode", _encoded),
    ("__builtin__", "bytes"): Function("bytes", lambda _: memoryview(b"")),
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = Function("_reconstruct", _empty_array)
    _NAMES[f"{_core}.multiarray", "scalar"] = Function("scalar", lambda _: None)
    _NAMES[f"{_core}.numeric", "_frombuffer"] = Function("_frombuffer", _array_of_buffer)


# ---- tensors ----------------------------------------------------------------------------------


def _tensors(values: dict[str, Any], n_bytes: int) -> dict[str, Tensor]:
    """Tensors by name; an array that several names share is copied once.

    Args:
        n_bytes: size of the file. Arrays that take more share bytes, which numpy never writes.
    """
    arrays = {name: array for name, value in values.items() if (array := _array_of(value))}
    distinct = {id(array): array for array in arrays.values()}
    needed = sum(len(array.data or b"") for array in distinct.values())
    if needed > n_bytes:
        raise CheckpointError(f"arrays of {needed:,} bytes in a file of {n_bytes:,}")
    tensors = {key: array.to_tensor() for key, array in distinct.items()}
    return {name: tensors[id(array)] for name, array in arrays.items()}


def _array_of(value: Any) -> _Array | None:
    if isinstance(value, tuple) and len(value) == 2:  # some versions store (name, array)
        value = value[1]
    return value if isinstance(value, _Array) else None
