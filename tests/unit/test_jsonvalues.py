"""JSON output: every Arrow type in, valid JSON out."""

import base64
import datetime
import json
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import bad_utf8_strings, make_tagger, ner_config, write_bytes, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.job import JobConfig
from erniem_batch.job.jsonvalues import is_plain, json_faults, json_line, json_text, json_values
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import files_of, find_files, plan_units, to_table

WHEN = datetime.datetime(2024, 1, 2, 3, 4, 5, 678900)
HUGE = 2**60
B64 = base64.b64encode(b"\xfe").decode()


def in_zone(*ticks, unit="ns", zone="Europe/Berlin"):
    return pa.array(ticks, pa.timestamp(unit, zone))


def tensor():
    values = pa.array([[1, 2]], pa.list_(pa.float32(), 2))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), values)


CASES = {
    "null": (pa.nulls(2), [None, None]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
    "half": (pa.array([np.float16(0.5), np.float16("nan")], pa.float16()), [0.5, "NaN"]),
    "double": (pa.array([float("inf"), -float("inf"), None]), ["Infinity", "-Infinity", None]),
    "decimal": (pa.array([Decimal("1.10"), None], pa.decimal128(9, 2)), ["1.10", None]),
    "decimal256": (pa.array([Decimal("1.10")], pa.decimal256(70, 2)), ["1.10"]),
    "binary": (pa.array([b"\xfe", None]), [B64, None]),
    "large_binary": (pa.array([b"\xfe"], pa.large_binary()), [B64]),
    "binary_view": (pa.array([b"\xfe"], pa.binary_view()), [B64]),
    "fixed": (pa.array([b"\xfe"], pa.binary(1)), [B64]),
    "string_view": (pa.array(["a"], pa.string_view()), ["a"]),
    "date": (pa.array([WHEN.date(), None]), ["2024-01-02", None]),
    "date beyond Python": (pa.array([6585227], pa.date32()), ["19999-09-28"]),
    "date before Christ": (pa.array([-800_000], pa.date32()), ["-0221-09-04"]),
    "date64": (pa.array([6585227 * 86_400_000], pa.date64()), ["19999-09-28"]),
    "time": (pa.array([WHEN.time()]), ["03:04:05.678900"]),
    "time of nanoseconds": (pa.array([1, None], pa.time64("ns")), ["00:00:00.000000001", None]),
    "time32": (pa.array([3661], pa.time32("s")), ["01:01:01"]),
    "timestamp": (pa.array([WHEN, None]), ["2024-01-02 03:04:05.678900", None]),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001"]),
    "zone": (in_zone(1), ["1970-01-01 01:00:00.000000001+01:00"]),
    "fixed zone": (in_zone(0, unit="s", zone="+02:00"), ["1970-01-01 02:00:00+02:00"]),
    "unknown zone": (in_zone(0, unit="s", zone="Mars/Base"), ["1970-01-01 00:00:00+00:00"]),
    "far": (in_zone(HUGE, unit="us"), ["38504-08-17 21:30:06.846976+00:00"]),
    "duration": (pa.array([datetime.timedelta(1, 2)]), ["1 day, 0:00:02"]),
    "long duration": (pa.array([HUGE], pa.duration("s")), [f"{HUGE // 86400} days, 13:56:16"]),
    "short duration": (pa.array([-1], pa.duration("ns")), ["-1 day, 23:59:59.999999999"]),
    "interval": (pa.array([pa.MonthDayNano([1, 2, 3]), None]), [[1, 2, 3], None]),
    "dictionary": (pa.array([b"\xfe", None]).dictionary_encode(), [B64, None]),
    "runs": (pa.RunEndEncodedArray.from_arrays([2, 3], [b"\xfe", None]), [B64, B64, None]),
    "list": (pa.array([[b"\xfe", None], None, []]), [[B64, None], None, []]),
    "large_list": (pa.array([[0.5]], pa.large_list(pa.float32())), [[0.5]]),
    "fixed_list": (pa.array([[0.5, None]], pa.list_(pa.float32(), 2)), [[0.5, None]]),
    "list_view": (pa.array([[0.5], None], pa.list_view(pa.float32())), [[0.5], None]),
    "struct": (pa.array([{"a": b"\xfe"}, None]), [{"a": B64}, None]),
    "one name twice": (
        pa.StructArray.from_arrays([pa.array([1]), pa.array([0.5])], ["a", "a"]),
        [[["a", 1], ["a", 0.5]]],
    ),
    "map": (
        pa.array([[("k", b"\xfe")], None], pa.map_(pa.string(), pa.binary())),
        [[["k", B64]], None],
    ),
    "uuid": (pa.array([uuid.UUID(int=3)], pa.uuid()), [str(uuid.UUID(int=3))]),
    "json": (pa.array(['{"a":1}'], pa.json_()), ['{"a":1}']),
    "bool8": (
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8())),
        [True, None],
    ),
    "tensor": (tensor(), [[1.0, 2.0]]),
    "sparse union": (
        pa.UnionArray.from_sparse(
            pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
        ),
        [1, "b"],
    ),
    "dense union": (
        pa.UnionArray.from_dense(
            pa.array([0, 1, 0], pa.int8()),
            pa.array([0, 0, 1], pa.int32()),
            [pa.array([1.0, float("nan")]), pa.array([b"\xfe"])],
        ),
        [1.0, B64, "NaN"],
    ),
}


def strict(text):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", CASES)
def test_every_type(name):
    array, expected = CASES[name]
    assert json_values(array) == expected
    assert strict(json_line({"v": json_values(array)})) == {"v": expected}
    for at in range(len(array)):  # a slice, in a chunked column
        assert json_values(pa.chunked_array([array.slice(at)])) == expected[at:]


@pytest.mark.parametrize("name", CASES)
def test_every_type_in_others(name):
    """Also under a list and a struct."""
    array, expected = CASES[name]
    inner = pa.StructArray.from_arrays([array], ["x"])
    if pa.types.is_run_end_encoded(array.type):  # which Arrow cannot put into lists
        return
    lists = pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), inner)
    assert json_values(lists) == [[{"x": value} for value in expected]]


PYTHON = [
    (pa.date32(), st.dates()),
    (pa.timestamp("us"), st.datetimes()),
    (pa.timestamp("us", "UTC"), st.datetimes(timezones=st.just(datetime.UTC))),
    (pa.time64("us"), st.times()),
    (
        pa.duration("us"),
        st.timedeltas(datetime.timedelta(-99_999_999), datetime.timedelta(99_999_999)),
    ),
]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_times_are_written_as_python_writes_them(data):
    type_, values = data.draw(st.sampled_from(PYTHON))
    value = data.draw(values)
    assert json_values(pa.array([value], type_)) == [str(value)]


def test_plain_types_are_those_that_json_takes():
    assert is_plain(pa.list_(pa.struct([("a", pa.int8()), ("b", pa.string())])))
    assert not is_plain(pa.list_(pa.struct([("a", pa.float32())])))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, float("nan"), {"a": float("-inf")}], '[1, "NaN", {"a": "-Infinity"}]'),
        ({"é": [0.5]}, '{"é": [0.5]}'),
    ],
)
def test_json_text(value, text):
    assert json_text(value) == text


def test_faults_are_found_by_row():
    strings = [b"a", b"b\xff", b"\xfe"]
    nested = pa.ListArray.from_arrays([0, 1, 1, 2], bad_utf8_strings([b"a", b"xy\xff"]))
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1]), bad_utf8_strings(strings[:2]))
    table = pa.table({"s": bad_utf8_strings(strings), "n": nested, "d": dictionary, "i": [1, 2, 3]})
    assert json_faults(table) == {
        1: "column 's' is not UTF-8 at byte 1",
        2: "column 's' is not UTF-8 at byte 0",
    }
    assert json_faults(table.select(["n"])) == {2: "column 'n' is not UTF-8 at byte 2"}
    assert json_faults(table.select(["d"])) == {2: "column 'd' is not UTF-8 at byte 1"}
    assert json_faults(table.select(["i"])) == {}


@pytest.fixture
def tag(tmp_path, ner_model_dir):
    """Tags a file; gives the receipt."""

    def run(source, **options):
        options = {"input": [str(source)], "output": str(tmp_path / "out"), **options}
        config = ner_config(JobConfig, model=str(ner_model_dir), **options)
        files = list(files_of(find_files(config.input)))
        tagger = make_tagger(config, input_schema(files, "text", None))
        (receipt,) = tagger(to_table(plan_units(files, 1 << 30, "text"))).to_pylist()
        return receipt

    return run


def lines(tmp_path):
    text = (tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8")
    return [strict(line) for line in text.splitlines()]


def test_a_job_writes_every_type_that_parquet_holds(tmp_path, tag):
    columns, expected = {"text": ["Ada"]}, {"text": "Ada"}
    for name, (array, values) in CASES.items():
        table = pa.table({name: array.slice(0, 1)})
        try:
            pq.write_table(table, tmp_path / "try.parquet")
            again = pq.read_table(tmp_path / "try.parquet")
        except (pa.ArrowException, OSError):  # no type of Parquet
            continue
        if again.schema.equals(table.schema):
            columns[name], expected[name] = array.slice(0, 1), values[0]
    assert len(columns) > 30
    receipt = tag(write_parquet(tmp_path / "a.parquet", pa.table(columns)), output_format="jsonl")
    assert (receipt["error"], receipt["n_ok"]) == ("", 1)
    (row,) = lines(tmp_path)
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_numbers_of_json_that_are_none(tmp_path, tag, output_format):
    """NaN and 1e400: Parquet keeps them, JSON names them; in text of mixed columns, too."""
    content = b'{"text": "Ada", "x": NaN, "m": 1}\n{"text": "Ada", "x": 1e400, "m": ["a", NaN]}\n'
    receipt = tag(write_bytes(tmp_path / "a.jsonl", content), output_format=output_format)
    assert (receipt["error"], receipt["n_ok"]) == ("", 2)
    if output_format == "parquet":
        rows = pq.read_table(tmp_path / "out" / "a.parquet").to_pylist()
        assert [str(row["x"]) for row in rows] == ["nan", "inf"]
    else:
        rows = lines(tmp_path)
        assert [row["x"] for row in rows] == ["NaN", "Infinity"]
    assert [strict(row["m"]) for row in rows] == [1, ["a", "NaN"]]
