"""Reading pickles of weights without running them.

Weights of PaddleNLP and of older torch are pickles. A pickle is a program, and Python's own reader
gives its values to the constructors and `__setstate__` methods of other libraries, which trust
them: numpy's dtype writes to memory that a file chooses. So the few instructions that weights need
are read here. A name in the file stands for a function of ours or is refused, objects are our own
stand-ins, and the number of instructions is bounded, so that memory stays a small multiple of the
size of the file.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from erniem_batch.errors import CheckpointError
from erniem_batch.model.files import short_repr

# 256 layers of 16 tensors take about 200,000.
MAX_INSTRUCTIONS = 1_000_000
# The longest that weights hold is torch's magic number, 10 bytes.
MAX_INTEGER_BYTES = 16
MAX_NAME_BYTES = 255
PROTOCOLS = range(2, 6)


class StandIn:
    """An object of a pickle: plain values that were checked, and no code of another library."""

    def set_state(self, state: Any) -> None:
        """Takes the state that the pickle gives to an object.

        Raises:
            CheckpointError: this object has none, or the state is impossible.
        """
        raise CheckpointError(f"refused: state for {type(self).__name__.strip('_')}")


class Function:
    """A function that a pickle may call by name; called with the tuple of arguments."""

    def __init__(self, name: str, call: Callable[[tuple[Any, ...]], Any] | None = None) -> None:
        self.name = name
        self._call = call

    def __call__(self, arguments: Any) -> Any:
        if self._call is None or not isinstance(arguments, tuple):
            raise CheckpointError(f"refused: a call of {self.name}")
        return self._call(arguments)


Names = Mapping[tuple[str, str], Function]


def read_pickle(
    data: memoryview,
    names: Names,
    *,
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The value of a pickle and where the pickle ends.

    Bytes are given as views of `data`, without a copy. Keys of mappings are strings.

    Args:
        names: what each (module, name) in the pickle stands for.
        start: where the pickle begins.
        persistent: gives the object of a persistent id; None: the pickle may have none.

    Raises:
        CheckpointError: damaged, or asks for something else than `names`; says what, not in which
            file.
    """
    reader = _Reader(data, start, names, persistent)
    for _ in range(MAX_INSTRUCTIONS):
        code = reader.take(1)[0]
        if code == _STOP:
            return reader.pop(), reader.at
        step = _STEPS.get(code)
        if step is None:
            raise CheckpointError(f"the instruction {bytes([code])!r}, which no weights file needs")
        step(reader)
    raise CheckpointError(f"expected at most {MAX_INSTRUCTIONS:,} instructions")


class _Reader:
    """The state of a pickle that is being read: a stack, marks on it and remembered values."""

    def __init__(
        self,
        data: memoryview,
        start: int,
        names: Names,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._data = data
        self.at = start
        self._names = names
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._remembered: dict[int, Any] = {}

    # ---- bytes ----------------------------------------------------------------------------

    def take(self, n_bytes: int) -> memoryview:
        """The next bytes."""
        if n_bytes > len(self._data) - self.at:
            raise CheckpointError("the file ends too early")
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at]

    def number(self, form: str) -> Any:
        """The next number, in a form of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """The next line, which must be a short name."""
        near = bytes(self._data[self.at : self.at + MAX_NAME_BYTES + 1])
        end = near.find(b"\n")
        if end < 0:
            raise CheckpointError("a name without an end")
        self.at += end + 1
        return _text(near[:end])

    # ---- stack ----------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise CheckpointError("an instruction without a value")
        return self._stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError("an instruction without a mark")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def push_tuple(self, n: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(n)])))

    # ---- remembered values ----------------------------------------------------------------

    def remember(self, index: int | None = None) -> None:
        self._remembered[len(self._remembered) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self._remembered:
            raise CheckpointError("a value that was not there before")
        self.push(self._remembered[index])

    # ---- containers -----------------------------------------------------------------------

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise CheckpointError(f"items for {type(target).__name__}, expected a list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise CheckpointError(f"pairs for {type(target).__name__}, expected a mapping")
        target.update(zip(map(_key, values[::2]), values[1::2], strict=True))

    # ---- names and objects ----------------------------------------------------------------

    def find(self, module: Any, name: Any) -> None:
        found = self._names.get((module, name)) if {type(module), type(name)} == {str} else None
        if found is None:
            raise CheckpointError(
                f"refused: the file wants to run {_shown(module)}.{_shown(name)}; "
                "a weights file holds arrays only"
            )
        self.push(found)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Function):
            raise CheckpointError(f"refused: a call of {type(function).__name__}")
        self.push(function(arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, StandIn):
            target.set_state(state)
        elif type(target) is not dict:  # of an OrderedDict: attributes that nobody reads
            raise CheckpointError(f"refused: state for {type(target).__name__}")

    def find_persistent(self) -> None:
        if self._persistent is None:
            raise CheckpointError("refused: the file refers to objects outside it")
        self.push(self._persistent(self.pop()))

    def start_protocol(self) -> None:
        if (protocol := self.take(1)[0]) not in PROTOCOLS:
            raise CheckpointError(f"expected a pickle of protocol 2 to 5, got {protocol}")

    def integer(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= MAX_INTEGER_BYTES:
            raise CheckpointError(
                f"expected integers of at most {MAX_INTEGER_BYTES} bytes, got {n_bytes}"
            )
        self.push(int.from_bytes(self.take(n_bytes), "little", signed=True))


def as_mapping(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of `OrderedDict`, which are none or a list of pairs, as a mapping."""
    pairs = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(pairs, list):
        raise CheckpointError("refused: arguments for OrderedDict")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise CheckpointError("refused: arguments for OrderedDict")
    return {_key(pair[0]): pair[1] for pair in pairs}


def _key(value: Any) -> str:
    # Other keys can take for ever to compare.
    if type(value) is not str:
        raise CheckpointError(f"a key of the type {type(value).__name__}, expected a string")
    return value


def _text(data: bytes | memoryview) -> str:
    try:
        return str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CheckpointError("text that is not UTF-8") from error


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else short_repr(value)


_STOP = ord(".")

# As in the module pickletools, which names them and says what each does. Left out are those of
# protocol 0, sets, extensions, buffers outside the file, and those that call a class.
_INSTRUCTIONS: dict[bytes, Callable[[_Reader], Any]] = {
    b"\x80": _Reader.start_protocol,
    b"\x95": lambda r: r.take(8),  # the size of a frame; frames only help who reads from a stream
    b"(": _Reader.mark,
    b"0": _Reader.pop,
    b"1": _Reader.pop_to_mark,
    b"2": lambda r: r.push(r.top()),
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"K": lambda r: r.push(r.number("<B")),
    b"M": lambda r: r.push(r.number("<H")),
    b"J": lambda r: r.push(r.number("<i")),
    b"G": lambda r: r.push(r.number(">d")),
    b"\x8a": lambda r: r.integer(r.number("<B")),
    b"\x8b": lambda r: r.integer(r.number("<i")),
    b"\x8c": lambda r: r.push(_text(r.take(r.number("<B")))),
    b"X": lambda r: r.push(_text(r.take(r.number("<I")))),
    b"\x8d": lambda r: r.push(_text(r.take(r.number("<Q")))),
    # Strings of Python 2: names, and the numbers of its arrays.
    b"U": lambda r: r.push(str(r.take(r.number("<B")), "latin-1")),
    b"T": lambda r: r.push(str(r.take(r.number("<I")), "latin-1")),
    b"C": lambda r: r.push(r.take(r.number("<B"))),
    b"B": lambda r: r.push(r.take(r.number("<I"))),
    b"\x8e": lambda r: r.push(r.take(r.number("<Q"))),
    b"\x96": lambda r: r.push(r.take(r.number("<Q"))),
    b")": lambda r: r.push_tuple(0),
    b"\x85": lambda r: r.push_tuple(1),
    b"\x86": lambda r: r.push_tuple(2),
    b"\x87": lambda r: r.push_tuple(3),
    b"t": lambda r: r.push(tuple(r.pop_to_mark())),
    b"]": lambda r: r.push([]),
    b"a": lambda r: r.append([r.pop()]),
    b"e": lambda r: r.append(r.pop_to_mark()),
    b"}": lambda r: r.push({}),
    b"s": lambda r: r.set_items([r.pop(), r.pop()][::-1]),
    b"u": lambda r: r.set_items(r.pop_to_mark()),
    b"q": lambda r: r.remember(r.number("<B")),
    b"r": lambda r: r.remember(r.number("<I")),
    b"\x94": lambda r: r.remember(),
    b"h": lambda r: r.recall(r.number("<B")),
    b"j": lambda r: r.recall(r.number("<I")),
    b"c": lambda r: r.find(r.line(), r.line()),
    b"\x93": lambda r: r.find(*[r.pop(), r.pop()][::-1]),
    b"R": _Reader.call,
    b"b": _Reader.build,
    b"Q": _Reader.find_persistent,
}
_STEPS = {code[0]: step for code, step in _INSTRUCTIONS.items()}
