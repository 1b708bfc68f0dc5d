"""Damage to files of a model folder: seeded, of bytes and of what the bytes mean."""

import json
import pickle
import pickletools
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

_SIZES = (
    0,
    1,
    2,
    7,
    255,
    256,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**9, 1 << 31, 1 << 63, 1 << 70, 10**400, 1e308),
    *(float("nan"), float("inf"), "", "x", "[UNK]", "../x", "\x00", "\ud800", "9" * 5000),
    *([], {}, [[]], {"a": {}}, ["UIEM"], [1, 2, 3], {"0": "a", "1": "b"}, {"1": [0]}),
)


# ---- bytes ------------------------------------------------------------------------------------


def _place(random: Random, content: bytes) -> int:
    """Anywhere, more often near the beginning or the end, where formats keep their sizes."""
    n = len(content)
    near = min(n, 200)
    which = random.random()
    if which < 0.3:
        return random.randrange(near)
    return n - 1 - random.randrange(near) if which < 0.5 else random.randrange(n)


def flip(random: Random, content: bytes) -> bytes:
    """Some bytes become others."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        changed[_place(random, content)] = random.choice((0, 0xFF, random.randrange(256)))
    return bytes(changed)


def resize(random: Random, content: bytes) -> bytes:
    """The file is cut, or a part is taken out, put in twice or made up."""
    at, n = _place(random, content), random.choice((1, 4, 8, 100, 4096))
    return random.choice(
        (
            content[:at],
            content[:at] + content[at + n :],
            content[:at] + content[at : at + n] * 2 + content[at + n :],
            content[:at] + random.randbytes(n) + content[at:],
            content + random.randbytes(n),
            b"",
        )
    )


def number(random: Random, content: bytes) -> bytes:
    """A number of 1 to 8 bytes becomes a very small or large one."""
    form = random.choice("BHIQ")
    size = struct.calcsize(form)
    at = _place(random, content)
    value = struct.pack(f"<{form}", random.choice(_SIZES) & ((1 << 8 * size) - 1))
    return content[:at] + value + content[at + size :]


# ---- JSON -------------------------------------------------------------------------------------


def json_value(random: Random, content: bytes) -> bytes:
    """A value is replaced, removed or renamed, or a key is there twice."""
    values = json.loads(content)
    places = list(_places(values))
    if not places:
        return flip(random, content)
    holder, key = random.choice(places)
    what = random.random()
    if what < 0.7:
        holder[key] = random.choice(_VALUES)
    elif what < 0.8:
        del holder[key]
    elif isinstance(holder, dict):
        holder[random.choice(["x", "0", "init_args", "base_model", "num_classes"])] = holder[key]
    text = json.dumps(values)
    if what > 0.95:
        text = text.replace("{", random.choice(('{"a": 1, "a": 2, ', "[" * 5000 + "{")), 1)
    return text.encode("utf-8", "surrogatepass")


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield values, key
        if isinstance(value, dict | list):
            yield from _places(value)


def safetensors_header(random: Random, content: bytes) -> bytes:
    """The header says something else, and its size is right."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json_value(random, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


# ---- pickles ----------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


_DTYPE = b"cnumpy\ndtype\n" + _string("V8") + b"\x89\x88\x87R"
# Programs that leave one value on the stack.
_PROGRAMS: tuple[bytes, ...] = (
    *(b"N", b"\x88", b"K\x07", b"J\xff\xff\xff\xff", b"]", b"}", b")", _string("a")),
    *(b"\x8a\x09" + b"\xff" * 9, b"\x8b\xff\xff\xff\x7f", b"C\x04\x00\x00\x80\x3f"),
    *(_DTYPE, _DTYPE.replace(b"V8", b"O8"), _DTYPE.replace(b"V8", b"f4"), b"cnumpy\nndarray\n"),
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
    b"(K\x01K\x04\x85" + _DTYPE + b"\x89C\x10" + b"A" * 16 + b"t",
    b"(K\x03" + _string("|") + b"NNNK\x08K\x01K\x3ft",
    b"(K\x03" + _string("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t",
    b"ccollections\nOrderedDict\n)R",
    b"cbuiltins\neval\n" + _string("1") + b"\x85R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b")" + b"2\x86" * 40,
    b"]" + b"2a" * 40,
)
_SIMPLE = b"012abehtsuRb\x81\x85\x86\x87\x93\x94.(Qq\x00h\x00h\x01"


def opcodes(random: Random, content: bytes) -> bytes:
    """Instructions are left out, repeated, moved and made up."""
    try:
        steps = [position for _, _, position in pickletools.genops(content) if position is not None]
    except Exception:  # damaged already
        return flip(random, content)
    for _ in range(random.choice((1, 1, 2, 4))):
        i = random.randrange(len(steps))
        at = steps[i]
        after = steps[i + 1] if i + 1 < len(steps) else len(content)
        made_up = random.choice((*_PROGRAMS, bytes([random.choice(_SIMPLE)])))
        content = random.choice(
            (
                content[:at] + content[after:],
                content[:after] + content[at:after] + content[after:],
                content[:at] + made_up + content[at:],
                content[:at] + made_up + content[after:],
                content[:at] + random.choice(_PROGRAMS) + b"b" + content[at:],
                content[:at] + bytes([random.choice(_SIMPLE)]) + content[at + 1 :],
            )
        )
        steps = [position for position in steps if position < at] or [0]
    return content


def archived_opcodes(random: Random, content: bytes) -> bytes:
    """The same within a zip archive of torch; what comes after keeps its place."""
    start = content.find(b"\x80\x02}") if b"\x80\x02}" in content else content.find(b"\x80\x02c")
    if start < 0:
        return number(random, content)
    end = content.find(b".PK", start) + 1 or start + 100
    changed = opcodes(random, content[start:end])
    return content[:start] + changed[: end - start].ljust(end - start, b".") + content[end:]


def new_pickle(random: Random, content: bytes) -> bytes:
    """A program of made-up instructions."""
    steps = [random.choice((*_PROGRAMS, bytes([random.choice(_SIMPLE)]))) for _ in range(30)]
    pairs = b"".join(_string(chr(97 + i)) + step + b"s" for i, step in enumerate(steps[:8]))
    return random.choice(
        (
            b"\x80\x04}" + pairs + b".",
            b"\x80\x02" + b"".join(steps) + b".",
            pickle.dumps({"a": [0] * random.choice((10, 100_000))}, protocol=4),
        )
    )


# ---- text -------------------------------------------------------------------------------------


def lines(random: Random, content: bytes) -> bytes:
    """Lines are repeated, emptied or shuffled."""
    parts = content.split(b"\n")
    what = random.randrange(4)
    if what == 0:
        parts += parts[: random.randrange(len(parts))]
    elif what == 1:
        parts[random.randrange(len(parts))] = b""
    elif what == 2:
        parts = [b""] * random.choice((1, 10, 2_000_000))
    else:
        random.shuffle(parts)
    return b"\n".join(parts)


BYTES: tuple[Mutation, ...] = (flip, resize, number)


def mutations_for(name: str) -> tuple[Mutation, ...]:
    """The damage that suits a file."""
    if name.endswith(".json"):
        return (json_value, json_value, json_value, flip, resize)
    if name.endswith(".safetensors"):
        return (*BYTES, safetensors_header, safetensors_header)
    if name.endswith(".pdparams"):
        return (*BYTES, opcodes, opcodes, new_pickle)
    if name.endswith(".bin"):
        return (*BYTES, archived_opcodes, archived_opcodes)
    return (*BYTES, lines) if name.endswith(".txt") else BYTES
