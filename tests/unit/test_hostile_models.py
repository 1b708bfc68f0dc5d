"""Model folders that a stranger made: refused before they cost memory, and never run."""

import io
import json
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from erniem_batch import ErnieMConfig, ErnieMTokenizer
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model import pickles
from erniem_batch.model.checkpoint import tensors_of
from erniem_batch.model.files import MAX_JSON_BYTES, read_json
from erniem_batch.model.heads import ErnieMForTokenClassification
from erniem_batch.model.overlay import base_name
from erniem_batch.model.paddle_file import read_paddle
from erniem_batch.model.torch_file import read_torch
from erniem_batch.tasks.make import min_score_of
from erniem_batch.thresholds import read_thresholds


@contextmanager
def at_most(n_bytes):
    """No more memory is taken at any moment."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n_bytes


def _file(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


# ---- pickles ----------------------------------------------------------------------------------


def _text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _dtype(name, order="<", parts=b"NNN", flags=0):
    """The instructions that make a dtype, as numpy writes them."""
    state = b"(K\x03" + _text(order) + parts + b"J\xff\xff\xff\xffJ\xff\xff\xff\xff"
    return b"cnumpy\ndtype\n" + _text(name) + b"\x89\x88\x87R" + state + bytes([75, flags]) + b"tb"


def _array(dtype, shape=b"K\x02\x85", data=b"C\x08" + bytes(8), is_fortran=b"\x89"):
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return empty + b"(K\x01" + shape + dtype + is_fortran + data + b"tb"


def _paddle(value):
    return b"\x80\x04}" + _text("a") + value + b"s."


PLAIN = _dtype("f4")
FOUR_GIGABYTES = b"J\xff\xff\xff\x3f\x85"
# A structure with an object in it: numpy takes the numbers of the array for addresses.
OBJECTS = (
    b"("
    + b"K\x03"
    + _text("|")
    + b"N"
    + _text("f")
    + b"\x85}"
    + _text("f")
    + b"cnumpy\ndtype\n"
    + _text("O8")
    + b"\x89\x88\x87RK\x00\x86sK\x08K\x01K\x3ftb"
)

HOSTILE = {
    "a dtype that is changed below its array": (
        b"\x80\x04cnumpy\ndtype\n"
        + _text("f8")
        + b"\x89\x88\x87Rq\x00}"
        + _text("a")
        + _array(b"h\x00", b"K\x01\x85")
        + b"sh\x00"
        + OBJECTS
        + b"0."
    ),
    "a structure of objects": _paddle(_array(_dtype("V8", "|"))),
    "objects": _paddle(_array(_dtype("O8", "|"))),
    "a list of objects": _paddle(_array(PLAIN, data=b"]")),
    "a dtype with fields": _paddle(_array(_dtype("f4", parts=b"N)N"))),
    "a dtype of a dtype": _paddle(_array(_dtype("f4", parts=b"NN}"))),
    "a name of a dtype with a shape": _paddle(_array(_dtype("(9,9)f4"))),
    "no dtype": _paddle(_array(b"N")),
    "an array as a dtype": _paddle(_array(_array(PLAIN))),
    "more numbers than bytes": _paddle(_array(PLAIN, FOUR_GIGABYTES)),
    "fewer numbers than bytes": _paddle(_array(PLAIN, b"K\x01\x85")),
    "a negative shape": _paddle(_array(PLAIN, b"J\xfe\xff\xff\xff\x85")),
    "a shape of booleans": _paddle(_array(PLAIN, b"\x88K\x02\x86")),
    "an empty shape beyond all numbers": _paddle(
        _array(PLAIN, b"K\x00" + (b"\x8a\x08" + b"\xff" * 7 + b"\x0f") * 2 + b"\x87", b"C\x00")
    ),
    "many dimensions": _paddle(_array(PLAIN, b"(" + b"K\x01" * 33 + b"t")),
    "a state for a function": _paddle(b"cnumpy\nndarray\nNb"),
    "a call of an array": _paddle(_array(PLAIN) + b")R"),
    "a class made anew": _paddle(b"cnumpy\nndarray\n)\x81"),
    "an extension": _paddle(b"\x82\x01"),
    "a persistent id": _paddle(b"NQ"),
    "a text of protocol 0": _paddle(b"I1\n"),
    "a number of a gigabyte": b"\x80\x04\x8b\x00\x00\x00\x40" + bytes(100),
    "a text of a gigabyte": b"\x80\x04X\x00\x00\x00\x40" + bytes(100),
    "a key that takes for ever to hash": (
        b"\x80\x04})" + b"2\x86" * 60 + b"Ns."  # a tuple of 2 ** 60 empty ones
    ),
    "a list in itself": b"\x80\x04]2a.",
    "an encoding": _paddle(b"c_codecs\nencode\n" + _text("a") + _text("zlib") + b"\x86R"),
    "another protocol": b"\x80\x63}.",
    "a mark below": b"\x80\x04(0000.",
    "nothing": b"\x80\x04.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path, content):
    """The first ended in a segmentation fault, at an address that the file chose."""
    path = _file(tmp_path, "model_state.pdparams", content)
    with at_most(1 << 20), pytest.raises(CheckpointError, match=r"model_state\.pdparams: ") as told:
        tensors_of(tmp_path)
    assert len(str(told.value)) < 500 + len(str(path))


@pytest.mark.parametrize("instructions", [b"]\x94", b"K\x00\x85\x94", b"}2", b")\x85"])
def test_an_instruction_costs_little(tmp_path, monkeypatch, instructions):
    """Every byte of a file may be an empty list, which takes 64 bytes and a place to remember."""
    assert pickles.MAX_INSTRUCTIONS == 1_000_000
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 10_000)
    _file(tmp_path, "model_state.pdparams", b"\x80\x04" + instructions * 10_000 + b".")
    with at_most(300 * 10_000), pytest.raises(CheckpointError, match="at most 10,000 instructions"):
        tensors_of(tmp_path)


def test_bytes_are_not_paid_twice(tmp_path):
    """One megabyte, and a thousand arrays of it: a gigabyte."""
    million = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x01"
    size = b"J" + struct.pack("<i", 1 << 18) + b"\x85"
    arrays = [_array(PLAIN, size, million), *(_array(PLAIN, size, b"h\x01"),) * 1_000]
    pairs = b"".join(_text(str(i)) + array + b"s" for i, array in enumerate(arrays))
    _file(tmp_path, "model_state.pdparams", b"\x80\x04}" + pairs + b".")
    with at_most(16 << 20), pytest.raises(CheckpointError, match=r"arrays of 1,0\d\d,.* in a file"):
        tensors_of(tmp_path)


_GOOD = [
    np.arange(6, dtype="f4").reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    np.arange(6, dtype=">f4").reshape(3, 2).T,
    np.array(2.5, dtype="f2"),
    np.zeros((0, 4), dtype="f4"),
    np.array([True, False]),
    np.arange(5, dtype="i8")[::2],
    np.array([250, 3], dtype="u1"),
    np.array([-3, 3], dtype="<i2"),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", _GOOD, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_of_every_protocol(tmp_path, protocol, array):
    same = {"x": array, "tied": array, "pair": ("x", array), "note": {"a": "b"}}
    content = pickle.dumps(OrderedDict(same), protocol=protocol)
    found = read_paddle(_file(tmp_path, "model_state.pdparams", content))
    assert list(found) == ["x", "tied", "pair"]
    for tensor in found.values():
        assert tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array, strict=array.dtype.str[0] != ">")


def test_arrays_of_python_2(tmp_path):
    """Its strings are bytes, names as well as numbers."""
    content = pickle.dumps({"a": np.array([1.5, -2.0], dtype="f4")}, protocol=3)
    numbers = b"\x00\x00\xc0\x3f\x00\x00\x00\xc0"
    assert content.count(b"C\x08" + numbers) == 1
    content = content.replace(b"C\x08" + numbers, b"U\x08" + numbers).replace(
        b"\x80\x03", b"\x80\x02"
    )
    path = _file(tmp_path, "model_state.pdparams", content)
    assert read_paddle(path)["a"].tolist() == [1.5, -2.0]


def test_what_is_no_boolean(tmp_path):
    """A byte of 7 in an array of booleans is true, and nothing else."""
    dtype = _dtype("b1", "|")
    path = _file(tmp_path, "model_state.pdparams", _paddle(_array(dtype, data=b"C\x02\x07\x00")))
    assert read_paddle(path)["a"].view(torch.uint8).tolist() == [1, 0]


_STEPS = [
    *(bytes([code]) for code in b"(012Nabehjquts)]}RbQ.\x81\x85\x86\x87\x88\x89\x93\x94\x95"),
    *(
        b"K\x00",
        b"q\x00",
        b"h\x00",
        b"h\x01",
        b"J\xff\xff\xff\xff",
        _text("a"),
        b"C\x01\x80",
        b"\x80\x04",
    ),
    *(
        PLAIN,
        _array(PLAIN),
        _dtype("O8"),
        OBJECTS,
        b"cnumpy\nndarray\n",
        b"ccollections\nOrderedDict\n",
    ),
    *(b"cnumpy._core.numeric\n_frombuffer\n", b"c_codecs\nencode\n", b"ctorch\nFloatStorage\n"),
]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(_STEPS) | st.binary(max_size=3), max_size=25))
def test_any_program_is_read_or_refused(tmp_path, steps):
    for name, read in (("a.pdparams", read_paddle), ("a.bin", read_torch)):
        path = _file(tmp_path, name, b"\x80\x04}" + _text("a") + b"".join(steps) + b"s.")
        with suppress(CheckpointError):
            assert all(isinstance(tensor, torch.Tensor) for tensor in read(path).values())


# ---- torch ------------------------------------------------------------------------------------


def _saved(tmp_path, values, **options):
    torch.save(values, tmp_path / "pytorch_model.bin", **options)
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
def test_tensors_of_torch(tmp_path, is_zip, dtype):
    """As torch reads them: views, tied ones, parameters, empty ones, and what is no tensor."""
    whole = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))
    values = OrderedDict(
        whole=whole,
        turned=whole.T,
        part=whole[1:, ::2],
        tied=whole,
        empty=whole[:0],
        one=whole[2, 3],
    )
    if whole.is_floating_point():
        values["parameter"] = torch.nn.Parameter(whole)
    values["note"], values["deep"] = [1, "x"], {"inner": torch.ones(3)}
    path = _saved(tmp_path, values, _use_new_zipfile_serialization=is_zip)
    found = read_torch(path)
    assert list(found) == [name for name in values if name not in ("note", "deep")]
    for name, tensor in found.items():
        assert tensor.dtype == values[name].dtype
        assert torch.equal(tensor, values[name]), name
    before = path.read_bytes()
    found["whole"].zero_()
    assert path.read_bytes() == before


def _rezipped(path, change):
    """The archive with changed entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name, content in entries.items():
            change(archive, name, content)
    path.write_bytes(changed.getvalue())


def test_a_compressed_archive_is_refused(tmp_path):
    """A bomb: torch asks for as much memory as the archive says."""
    path = _saved(tmp_path, {"a": torch.zeros(8 << 20)})
    _rezipped(
        path,
        lambda archive, name, content: archive.writestr(
            zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED
        ),
    )
    assert path.stat().st_size < 100_000
    with at_most(2 << 20), pytest.raises(CheckpointError, match=r"bin: .*a compressed entry"):
        tensors_of(tmp_path)


def test_a_long_list_of_entries_is_refused(tmp_path):
    path = _saved(tmp_path, {"a": torch.zeros(3)})

    def many(archive, name, content):
        for i in range(5_000 if name.endswith("0") else 1):
            archive.writestr(f"{name}{i or ''}".ljust(1_000, "-") if i else name, content[:1])

    _rezipped(path, many)
    with at_most(2 << 20), pytest.raises(CheckpointError, match="a list of entries of at most"):
        tensors_of(tmp_path)


def test_entries_of_an_archive_that_lie_over_each_other_are_refused(tmp_path):
    """A hundred in one place that is not aligned: each would be copied."""
    path = _saved(tmp_path, {str(i): torch.full((1024,), float(i))[:1] for i in range(100)})

    def emptied(archive, name, content):
        is_copy = "/data/" in name and not name.endswith("/data/0")
        archive.writestr(name, b"" if is_copy else content)

    _rezipped(path, emptied)
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("pytorch_model/data/0").header_offset
        start = archive.start_dir
    content = bytearray(path.read_bytes())
    at = start
    while content[at : at + 4] == b"PK\x01\x02":
        n_name, n_extra = struct.unpack("<HH", content[at + 28 : at + 32])
        if b"/data/" in content[at + 46 : at + 46 + n_name]:
            content[at + 20 : at + 28] = struct.pack("<II", 4096, 4096)
            content[at + 42 : at + 46] = struct.pack("<I", first)
        at += 46 + n_name + n_extra
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="storages of 409,600 bytes in a file of"):
        read_torch(path)


def _torch_pickle(storage, tensor):
    """The pickle in an archive, with made-up sizes."""
    ref = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + storage
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + ref + b"tQ" + tensor + b"\x89NtR"
    return b"\x80\x02}" + _text("a") + rebuilt + b"s."


@pytest.mark.parametrize(
    ("storage", "tensor"),
    [
        (b"K\x08", b"K\x00" + FOUR_GIGABYTES + b"K\x00\x85"),  # a billion times the same number
        (b"K\x08", b"K\x00K\x09\x85K\x01\x85"),
        (b"K\x08", b"K\x01K\x08\x85K\x01\x85"),
        (b"K\x08", b"K\x00K\x02\x85K\x08\x85"),
        (b"K\x08", b"J\xff\xff\xff\xffK\x02\x85K\x01\x85"),
        (b"K\x08", b"K\x01K\x02\x85J\xff\xff\xff\xff\x85"),
        (b"K\x08", b"K\x00K\x02\x85K\x01K\x01\x86"),
        (b"J\xff\xff\xff\x7f", b"K\x00K\x02\x85K\x01\x85"),  # more than the archive holds
        (b"K\x07", b"K\x00K\x02\x85K\x01\x85"),
        (b"N", b"K\x00K\x02\x85K\x01\x85"),
    ],
)
def test_sizes_that_a_torch_file_lacks_are_refused(tmp_path, storage, tensor):
    path = _saved(tmp_path, {"a": torch.zeros(8)})
    pickled = _torch_pickle(storage, tensor)
    _rezipped(
        path,
        lambda archive, name, content: archive.writestr(
            name, pickled if name.endswith("data.pkl") else content
        ),
    )
    with at_most(1 << 20), pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        tensors_of(tmp_path)


def test_an_old_torch_file_that_claims_a_terabyte(tmp_path):
    path = _saved(tmp_path, {"a": torch.zeros(8)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"X\x03\x00\x00\x00cpuq") == 1
    place = content.index(b"K\x08", content.index(b"X\x03\x00\x00\x00cpuq"))
    size = b"\x8a\x06" + (1 << 38).to_bytes(6, "little")
    path.write_bytes(content[:place] + size + content[place + 2 :])
    with at_most(1 << 20), pytest.raises(CheckpointError, match="ends after the file"):
        tensors_of(tmp_path)


# ---- safetensors and shards -------------------------------------------------------------------


def test_a_large_header_is_refused_unread(tmp_path):
    size = MAX_JSON_BYTES + 8
    _file(tmp_path, "model.safetensors", struct.pack("<Q", size) + b"{}".ljust(size))
    with at_most(1 << 20), pytest.raises(CheckpointError, match="a header of at most 16,777,216"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_are_refused(random_model, tmp_path, dtype):
    random_model(ErnieMForTokenClassification).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not floats \(classifier\.bias is \w+\)"):
        ErnieMForTokenClassification.from_pretrained(tmp_path)


NAMES = [
    *("sub/model.safetensors", "../model.safetensors", "./model.safetensors", "model.bin", ""),
    *("optimizer.safetensors", ".hidden.safetensors", "model.safetensors/", "a\\b.safetensors"),
    *(
        "x\x00.safetensors",
        "x\n.safetensors",
        "x" * 300 + ".safetensors",
        "config.json",
        None,
        3,
        [],
    ),
]


@pytest.mark.parametrize("name", [*NAMES, "absolute"], ids=repr)
def test_shards_are_files_of_the_folder(tmp_path, name):
    """Others were read, though the digest of the model is of the files in the folder alone."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "model", tmp_path / "model" / "sub"):
        for file in ("model.safetensors", "optimizer.safetensors", ".hidden.safetensors"):
            save_file({"a": torch.ones(1)}, folder / file)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "right.safetensors")
    name = str(tmp_path / "model.safetensors") if name == "absolute" else name
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        CheckpointError, match=r"the name of a \.safetensors file in the same folder"
    ):
        tensors_of(tmp_path / "model")
    index.write_text(json.dumps({"weight_map": {"a": "right.safetensors"}}))
    assert tensors_of(tmp_path / "model").keys() == {"a"}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for i in (1, 2):
        save_file({"a": torch.full((1,), float(i))}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: holds tensors of another"):
        tensors_of(tmp_path)


# ---- JSON and configs -------------------------------------------------------------------------


def test_a_huge_json_file_is_not_read(tmp_path):
    path = _file(tmp_path, "config.json", b"{}")
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with (
        at_most(40 << 20),
        pytest.raises(CheckpointError, match="at most 16,777,216 bytes, got 1,073"),
    ):
        ErnieMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, "[" * 5000 + "]" * 5000, "[" * 101 + "]" * 101]
)
def test_deeply_nested_json_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_json(_file(tmp_path, "config.json", text.encode()))
    assert read_json(_file(tmp_path, "config.json", b"[" * 100 + b"]" * 100))


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """Which one counts differs from program to program."""
    path = _file(tmp_path, "config.json", b'{"x": [{"hidden_size": 8, "hidden_size": 16}]}')
    with pytest.raises(CheckpointError, match="the key 'hidden_size' is there twice"):
        read_json(path)


ABSURD = {
    "num_labels": [10**9, 100_001, -1, 0, True, 2.0, "2"],
    "vocab_size": [1 << 40, 1 << 70, 0, "250002"],
    "hidden_size": [1 << 40, 65_537],
    "num_hidden_layers": [3_000, 257, 2.5],
    "num_attention_heads": [1 << 30],
    "intermediate_size": [1 << 40],
    "max_position_embeddings": [1 << 40],
    "layer_norm_eps": [float("nan"), float("inf"), 1e300, 10**400, -1e-5, True, "1e-5"],
    "initializer_range": [float("inf")],
    "hidden_dropout_prob": [float("nan"), 10**400],
    "id2label": [{str(i): "x" for i in range(100_001)}, {"0": "a", "00": "b"}, {"1e0": "a"}],
    "label2id": [{"a": 1 << 70}, {"a": 1.5}, {"a": "x" * 10_000}],
    "architectures": [[["ErnieMModel"]], {"a": 1}, [None], 3],
    "init_args": [[{"init_args": [{"init_args": [{"init_args": [{"init_args": [{}]}]}]}]}]],
    "pruned_heads": [{"0": "12"}, {"0": [[]]}, {"300": [0]}],
    "model_type": [["ernie_m"], "x" * 10_000],
    "hidden_act": [{"gelu": 1}, "x" * 100_000],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in ABSURD.items() for v in values],
    ids=lambda value: str(value)[:20],
)
def test_absurd_configs_are_refused_before_memory_is_taken(tmp_path, name, value):
    path = _file(tmp_path, "config.json", json.dumps({name: value}).encode())
    with at_most(100 << 20), pytest.raises(CheckpointError, match=f"{path.name}: .") as told:
        ErnieMConfig.from_pretrained(tmp_path)
    assert len(str(told.value)) < 500 + len(str(path))


def test_as_many_labels_as_are_allowed(tmp_path):
    labels = {str(i): f"label {i}" for i in range(100_000)}
    _file(tmp_path, "config.json", json.dumps({"id2label": labels}).encode())
    assert len(ErnieMConfig.from_pretrained(tmp_path).labels) == 100_000


def test_sizes_that_the_weights_lack_are_refused(random_model, tmp_path):
    """Within the limits of a config, but 16 GB: only the header of the weights is looked at."""
    random_model(ErnieMForTokenClassification).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"hidden_size": 4096, "vocab_size": 1 << 20, "num_hidden_layers": 32}
    _file(tmp_path, "config.json", json.dumps(values).encode())
    with at_most(30 << 20), pytest.raises(CheckpointError, match="tensors of the wrong shape"):
        ErnieMForTokenClassification.from_pretrained(tmp_path, allow_new_head=True)


@pytest.mark.parametrize("params", [3, [1], {"ner": 3}, {"ner": [0.5]}, {"ner": {"min_score": {}}}])
def test_recommended_scores_of_no_sense(params):
    config = ErnieMConfig(extra={"task_specific_params": params})
    if params == {"ner": {"min_score": {}}}:
        assert min_score_of(PredictorConfig(), config) == {}
    else:
        with pytest.raises(ConfigError, match=r"task_specific_params\.ner in config\.json: "):
            min_score_of(PredictorConfig(), config)


@pytest.mark.parametrize(
    "base", ["/etc", "a\x00b", "x" * 2000, "y" * 300, "s3://a/b", "", 3, ["a"]]
)
def test_a_base_of_no_sense(tmp_path, base):
    _file(tmp_path, "config.json", json.dumps({"base_model": base}).encode())
    with pytest.raises(CheckpointError, match="base_model must be the relative path") as told:
        base_name(tmp_path)
    assert len(str(told.value)) < 500 + len(str(tmp_path))


# ---- tokenizers -------------------------------------------------------------------------------


@pytest.fixture
def words(tokenizer_dir, tmp_path):
    """A folder of a tokenizer to be damaged."""
    shutil.copytree(tokenizer_dir, tmp_path / "words")
    return tmp_path / "words"


def _model_with(content: bytes, change) -> bytes:
    """A SentencePiece model whose table of normal forms is changed."""
    size = b"\x00\xbc\x02\x00"  # of the trie, in bytes
    assert content.count(size) == 1
    start = content.index(size) + 4
    units = np.frombuffer(content, "<u4", 179_200 // 4, offset=start).copy()
    change(units)
    return content[:start] + units.tobytes() + content[start + units.nbytes :]


def _far_away(units):
    units[0] = (0x1FFFFF << 10) | 0x200  # two gigabytes further


def _no_replacement(units):
    units[units >> 31 == 1] = 0xFFFFFFF0


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1000],
        lambda content: content[:-7],
        lambda content: b"\xff" * 100,
        lambda content: content.replace("▁de".encode(), b"\xff\xff\xff\xff\xff", 1),
        lambda content: _model_with(content, _far_away),
        lambda content: _model_with(content, _no_replacement),
    ],
)
def test_a_damaged_sentencepiece_model(words, damage):
    """The last two name places outside of the file: a segmentation fault where nobody looks."""
    path = words / "sentencepiece.bpe.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{words}.*not a SentencePiece model"):
        ErnieMTokenizer.from_pretrained(words)


def test_huge_tokenizer_files_are_refused_unread(words):
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        before = (words / name).read_bytes()
        with (words / name).open("r+b") as file:
            file.truncate(65 << 20)
        with at_most(8 << 20), pytest.raises(CheckpointError, match=f"{name}: expected at most"):
            ErnieMTokenizer.from_pretrained(words)
        (words / name).write_bytes(before)
    (words / "vocab.txt").write_bytes(b"\n" * (1 << 21))
    with at_most(40 << 20), pytest.raises(CheckpointError, match="at most 1,048,576 lines"):
        ErnieMTokenizer.from_pretrained(words)
    (words / "vocab.txt").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: not UTF-8"):
        ErnieMTokenizer.from_pretrained(words)


SETTINGS = {
    "do_lower_case": ["yes", 1],
    "split_special_tokens": ["no"],
    "unk_token": [3, ["[UNK]"], "", {"a": "b"}],
    "sp_model_kwargs": [
        3,
        {"enable_sampling": True, "nbest_size": 10**9},
        {"enable_sampling": "yes"},
        {"alpha": float("nan")},
        {"alpha": "a"},
    ],
    "added_tokens_decoder": [
        3,
        {"x": {"content": "a"}},
        {"5": "a"},
        {"5": {}},
        {"5": {"content": 5}},
        {"5": {"content": ""}},
        {"99999999": {"content": "a"}},
        {"9" * 5000: {"content": "a"}},
        {str(i): {"content": f"t{i}"} for i in range(10_001)},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in SETTINGS.items() for v in values],
    ids=lambda value: str(value)[:20],
)
def test_settings_of_no_sense(words, name, value):
    path = words / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(CheckpointError, match=str(words)) as told:
        ErnieMTokenizer.from_pretrained(words)
    assert len(str(told.value)) < 500 + len(str(words))


@pytest.mark.parametrize("added", [{"a": "5"}, {"a": -1}, {"a": 1 << 70}, {"": 5}, {"a": True}])
def test_added_tokens_of_no_sense(words, added):
    (words / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(CheckpointError, match="added token"):
        ErnieMTokenizer.from_pretrained(words)


def test_architectures_that_are_no_list(words):
    (words / "config.json").write_text('{"architectures": 3}')
    assert ErnieMTokenizer.from_pretrained(words).lone_underline == "hf"


# ---- thresholds -------------------------------------------------------------------------------


def test_a_file_of_scores_that_names_itself_many_times(tmp_path):
    """Nine levels of ten: a billion numbers in a few bytes of YAML."""
    levels = ["a0: &a0 {x: 0.5}"]
    levels += [
        f"a{i}: &a{i} {{{', '.join(f'k{k}: *a{i - 1}' for k in range(10))}}}" for i in range(1, 10)
    ]
    path = _file(tmp_path, "scores.yaml", "\n".join(levels).encode())
    with at_most(4 << 20), pytest.raises(ConfigError, match="expected a number for each label"):
        read_thresholds(str(path))
    wide = f"a: &a {{{', '.join(f'k{k}: 1' for k in range(1000))}}}\n"
    path.write_text(wide + "\n".join(f"b{i}: *a" for i in range(200)))
    with pytest.raises(ConfigError, match="at most 100,000 numbers, got 201,201"):
        read_thresholds(str(path))


def test_a_huge_file_of_scores_is_not_read(tmp_path):
    path = _file(tmp_path, "scores.yaml", b"a: 1\n")
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with at_most(1 << 20), pytest.raises(ConfigError, match="at most 1,048,576 bytes, got 1,073"):
        read_thresholds(str(path))


@pytest.mark.parametrize("half", [r"\ud800", r"\uDC00", r"\udc00\ud800", r"\ud83d"])
@pytest.mark.parametrize("place", ['"{}": 1', '"a": ["{}"]', '"id2label": {{"0": "{}"}}'])
def test_half_a_surrogate_pair_is_refused(tmp_path, half, place):
    """No file in UTF-8 can hold it, so that a model could be read and not be saved."""
    path = tmp_path / "config.json"
    path.write_text("{" + place.format(half) + "}")
    with pytest.raises(CheckpointError, match=r"config\.json: a string has half of a surrogate"):
        read_json(path)
    path.write_text("{" + place.format(r"\ud83d\ude00") + "}")
    assert "\N{GRINNING FACE}" in repr(read_json(path))
