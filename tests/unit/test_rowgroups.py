"""Parquet in bounded memory: small files that stand for gigabytes."""

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import bad_utf8_strings, letters_path, make_tagger, ner_config, write_parquet

from erniem_batch import storage
from erniem_batch.job import JobConfig, pages, rowgroups
from erniem_batch.job.parquet import WholeRows
from erniem_batch.job.read import UnitReader
from erniem_batch.job.rowgroups import RowGroups, take_rows, value_sizes
from erniem_batch.job.units import files_of, find_files, plan_units, to_table

LARGE = "b " * 50_000  # 100 kB


def unit_of(path):
    (unit,) = plan_units(files_of(find_files([str(path)])), 1 << 40, "text")
    return unit


def chunks_of(path, columns=None, **options):
    schema = pq.read_schema(path).remove_metadata()
    return list(UnitReader(unit_of(path), "text", columns, schema, **options).chunks())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(rowgroups, "CHUNK_BYTES", 1 << 20)


# ---- the same values as Arrow's own reader -------------------------------------------------------


def columns_of_all_types():
    struct = pa.struct([("a", pa.string()), ("b", pa.list_(pa.string()))])
    value = {"a": "x", "b": ["y"]}
    tensor = pa.fixed_shape_tensor(pa.float32(), [2])
    pairs = pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
    return {
        "int": pa.array([1, None]),
        "string": pa.array(["a", None]),
        "large_string": pa.array(["a", None], pa.large_string()),
        "string_view": pa.array(["a", None], pa.string_view()),
        "binary": pa.array([b"a", None]),
        "binary_view": pa.array([b"a", None], pa.binary_view()),
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "dictionary": pa.array(["x", None]).dictionary_encode(),
        "numbers": pa.array([1, 2]).dictionary_encode(),
        "list": pa.array([["a", None], None], pa.list_(pa.string())),
        "large_list": pa.array([["a"], None], pa.large_list(pa.large_string())),
        "fixed_list": pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)),
        "list_view": pa.array([["a"], None], pa.list_view(pa.string())),
        "map": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
        "struct": pa.array([value, None], struct),
        "structs": pa.array([[value, None], None], pa.list_(struct)),
        "uuid": pa.array([uuid.UUID(int=1), None], pa.uuid()),
        "json": pa.array(["{}", None], pa.json_()),
        "at": pa.array([1, None], pa.timestamp("ns", "UTC")),
        "money": pa.array([1, None], pa.decimal128(30, 2)),
        "nothing": pa.nulls(2),
        "half": pa.array([np.float16(1), None], pa.float16()),
        "time": pa.array([1, None], pa.time64("ns")),
        "tensor": pa.ExtensionArray.from_storage(tensor, pairs),
        "inner": pa.array([["a"], None]).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    }


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 25])
@pytest.mark.parametrize(
    "options", [{}, {"store_schema": False}, {"use_dictionary": False}], ids=str
)
def test_every_type_comes_back(tmp_path, monkeypatch, chunk_bytes, options):
    monkeypatch.setattr(rowgroups, "CHUNK_BYTES", chunk_bytes)
    table = pa.concat_tables([pa.table(columns_of_all_types())] * 3)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, **options)
    wanted = pq.read_table(path).replace_schema_metadata(None)
    with storage.InputFile(str(path)) as source:
        pieces = list(RowGroups(source, 1 << 20).tables(0))
    found = pa.concat_tables([piece.table for piece in pieces])
    assert len(pieces) == (1 if chunk_bytes > 1 else 6)
    assert found.schema.equals(wanted.schema, check_metadata=True)
    assert found.to_pylist() == wanted.to_pylist()


def test_strings_that_are_not_utf8_stay_as_they_are(tmp_path):
    strings = [b"\xfe", b"ok", b"\xfe"]
    nested = pa.StructArray.from_arrays([bad_utf8_strings(strings)], ["a"])
    table = pa.table({"text": bad_utf8_strings(strings), "n": nested})
    (chunk,) = chunks_of(write_parquet(tmp_path / "a.parquet", table))
    assert chunk.texts == [b"\xfe", "ok", b"\xfe"]
    inner = chunk.table["n"].combine_chunks().field("a")
    assert inner.cast(pa.binary()).to_pylist() == strings


@pytest.mark.parametrize("at", [0, 1])
def test_sizes_of_values(at):
    """Of a slice, too."""
    sizes = {
        "string": (pa.array(["é", None, "abc"]), [2, 0, 3]),
        "dictionary": (pa.array(["é", None, "abc"]).dictionary_encode(), [2, 0, 3]),
        "list": (pa.array([["a", "bc"], None, []]), [3, 0, 0]),
        "map": (pa.array([[("a", "b")], None, []], pa.map_(pa.string(), pa.string())), [2, 0, 0]),
        "fixed": (pa.array([[1, 2], [3, 4], None], pa.list_(pa.int32(), 2)), [8, 8, 8]),
        "view": (pa.array([["ab"], [], None], pa.list_view(pa.string())), [2, 0, 0]),
        "struct": (pa.array([{"a": "xy", "b": 1}] * 3), [10, 10, 10]),
        "bool": (pa.array([True, None, False]), [1, 1, 1]),
        "null": (pa.nulls(3), [0, 0, 0]),
        "uuid": (pa.array([uuid.UUID(int=1)] * 3, pa.uuid()), [16, 16, 16]),
    }
    for name, (array, expected) in sizes.items():
        assert value_sizes(array.slice(at)).tolist() == expected[at:], name


# ---- bombs --------------------------------------------------------------------------------------


def repeated(n, value):
    """So many times one value, which stands once in memory and in the file."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value]))


def in_lists(column):
    return pa.ListArray.from_arrays(pa.array(range(len(column) + 1), pa.int32()), column)


BOMBS = {
    "dictionary": (lambda n: repeated(n, LARGE), {}),
    "strings": (lambda n: repeated(n, LARGE), {"store_schema": False}),
    "lists": (lambda n: in_lists(repeated(n, LARGE)), {"store_schema": False}),
    "bytes": (lambda n: pa.array([LARGE.encode()] * n, pa.binary(len(LARGE))), {}),
    "prefixes": (
        lambda n: pa.array([f"{LARGE}{i}" for i in range(n)]),
        {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}},
    ),
    "pages": (lambda n: pa.array([LARGE] * n), {"use_dictionary": False}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_chunks_are_bounded_by_bytes(tmp_path, small_chunks, kind):
    make, options = BOMBS[kind]
    n = 100
    path = tmp_path / "a.parquet"
    encoding = {"text": "PLAIN", **options.get("column_encoding", {})}
    options = {**options, "column_encoding": encoding} if "column_encoding" in options else options
    table = pa.table({"text": [f"Ada {i}" for i in range(n)], "x": make(n)})
    pq.write_table(table, path, compression="zstd", **options)
    assert path.stat().st_size < 50_000
    chunks = chunks_of(path)
    assert [text for c in chunks for text in c.texts] == table["text"].to_pylist()
    assert max(len(c.texts) for c in chunks) <= 10
    assert not [bad for c in chunks for bad in c.bad]
    read = pa.concat_tables([c.table for c in chunks])
    assert read.equals(pq.read_table(path).replace_schema_metadata(None))


def test_small_rows_share_a_chunk_though_few_are_read_at_once(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(rowgroups, "_rows_at_once", lambda *_: 3)
    table = pa.table({"text": [f"Ada {i}" for i in range(5000)]})
    chunks = chunks_of(write_parquet(tmp_path / "a.parquet", table))
    assert [len(c.texts) for c in chunks] == [2046, 2046, 908]
    assert [text for c in chunks for text in c.texts] == table["text"].to_pylist()


@pytest.mark.parametrize("text", [LARGE, "Ada"])
def test_a_row_that_is_too_large_is_one_dead_letter(tmp_path, text):
    """Whatever column it is that is large; replay with a larger limit reads it."""
    large = {"text": text, "x": LARGE}
    rows = [{"text": f"Ada {i}", "x": "-"} for i in range(9)]
    rows[4], rows[8] = large, large
    path = write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows), 5)
    chunks = chunks_of(path, max_row_bytes=50_000)
    assert [text for c in chunks for text in c.texts] == [
        row["text"] for row in rows if row is not large
    ]
    bad = [bad for c in chunks for bad in c.bad]
    assert [(b.place.row, b.n_rows, b.failure.error) for b in bad] == [
        (4, 1, "RecordError"),
        (8, 1, "RecordError"),
    ]
    assert f"a row of {len(text) + len(LARGE)} bytes" in bad[0].failure.reason
    for item in bad:
        (again,) = UnitReader(item.rest, "text", None, chunks[0].table.schema).chunks()
        assert again.texts == [text]
        assert again.places[0].row == item.place.row


@pytest.mark.parametrize("kind", ["one string", "runs"])
def test_a_page_that_is_too_large_is_not_read(tmp_path, monkeypatch, kind):
    """Arrow would allocate what its header says."""
    if kind == "one string":
        table = pa.table({"text": [LARGE * 5]})
    else:
        values = pa.array(np.zeros(500_000, np.bool_))
        table = pa.table({"text": ["a"], "x": pa.ListArray.from_arrays([0, 500_000], values)})
    path = write_parquet(tmp_path / "a.parquet", table)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    (chunk,) = chunks_of(path, max_row_bytes=100_000)
    (bad,) = chunk.bad
    assert (bad.n_rows, bad.failure.error) == (1, "PageTooLarge")
    assert "smaller row groups" in bad.failure.reason
    monkeypatch.undo()
    (again,) = UnitReader(bad.rest, "text", None, table.schema).chunks()
    assert again.table.equals(table)


def test_sizes_in_page_headers(tmp_path):
    """As the footer sums them up, of both kinds of pages."""
    table = pa.table({"text": [f"Ada {i} " * 50 for i in range(3000)]})
    for options in ({}, {"data_page_version": "2.0"}, {"use_dictionary": False}):
        path = tmp_path / "a.parquet"
        pq.write_table(table, path, data_page_size=10_000, write_page_checksum=True, **options)
        column = pq.read_metadata(path).row_group(0).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        with storage.InputFile(str(path)) as source:
            found = list(pages.pages_of(source, start, start + column.total_compressed_size))
        assert len(found) > 1
        assert sum(p.n_values for p in found if not p.is_dictionary) == 3000
        headers = column.total_uncompressed_size - sum(p.n_bytes for p in found)
        assert 0 < headers < 1000 * len(found)


@pytest.mark.parametrize("seed", range(3))
def test_page_headers_of_noise(tmp_path, seed):
    """They end the list; nothing else happens."""
    noise = np.random.default_rng(seed).integers(0, 256, 2000, np.uint8).tobytes()
    path = tmp_path / "noise"
    path.write_bytes(noise)
    with storage.InputFile(str(path)) as source:
        for start in range(0, 2000, 7):
            assert all(p.n_bytes >= 0 for p in pages.pages_of(source, start, 2000))


# ---- dead letters -------------------------------------------------------------------------------


def tag(tmp_path, model, source, **options):
    options = {"input": [str(source)], "output": str(tmp_path / "out"), **options}
    config = ner_config(JobConfig, model=str(model), **options)
    schema = pq.read_schema(source).remove_metadata()
    (receipt,) = make_tagger(config, schema)(to_table([unit_of(source)])).to_pylist()
    return receipt


@pytest.mark.parametrize("columns", [None, "text"])
def test_dead_letters_of_a_bomb_are_written_in_groups(
    tmp_path, small_chunks, monkeypatch, ner_model_dir, columns
):
    monkeypatch.setattr("erniem_batch.job.settle.CHUNK_ROWS", 7)
    table = pa.table({"text": pa.nulls(50, pa.string()), "x": repeated(50, LARGE)})
    source = write_parquet(tmp_path / "a.parquet", table)
    receipt = tag(tmp_path, ner_model_dir, source, columns=columns)
    assert (receipt["error"], receipt["n_dead"]) == ("", 50)
    path = letters_path(tmp_path / "out")
    assert pq.read_metadata(path).num_row_groups == 8
    rows = pq.read_table(path)["row"].to_pylist()
    assert rows == table.to_pylist()


def test_whole_rows_in_one_pass(tmp_path, monkeypatch):
    table = pa.table({"text": [str(i) for i in range(100)], "n": range(100)})
    path = write_parquet(tmp_path / "a.parquet", table, 10)
    read = []
    tables = RowGroups.tables
    monkeypatch.setattr(RowGroups, "tables", lambda s, g, *a: read.append(g) or tables(s, g, *a))
    with WholeRows(unit_of(path), 1 << 20) as source:
        found = source.take([5, 7, 41])
        found |= source.take([42, 99])
        assert source.take([100]) == {}
    assert {row: t.to_pylist() for row, t in found.items()} == {
        i: [{"text": str(i), "n": i}] for i in (5, 7, 41, 42, 99)
    }
    assert read == [0, 4, 9]


def test_take_rows(tmp_path):
    table = pa.table({"text": [str(i) for i in range(100)], "n": range(100)})
    path = write_parquet(tmp_path / "a.parquet", table, 10)
    found = pa.concat_tables(take_rows(str(path), [3, 4, 77, 500], {"n"}.__contains__))
    assert found.to_pydict() == {"n": [3, 4, 77]}
