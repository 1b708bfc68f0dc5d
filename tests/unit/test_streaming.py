"""JSONL in bounded memory: blocks instead of whole units, with the results of whole units."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ADDED_SCHEMA, letters_path, make_tagger, ner_config, write_bytes, write_jsonl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from erniem_batch.errors import RecordError
from erniem_batch.gold import rows_of
from erniem_batch.job import JobConfig, actor, jsonl, lines, sizes
from erniem_batch.job.jsontypes import infer_schema, join_types
from erniem_batch.job.lines import bounded_lines, count_rows
from erniem_batch.job.read import UnitReader, input_schema
from erniem_batch.job.settle import OneSchema
from erniem_batch.job.sizes import grouped
from erniem_batch.job.units import files_of, find_files, plan_units, to_table
from erniem_batch.records import Record

TEXT = pa.schema([("text", pa.string())])


def units(path, unit_bytes=1 << 20, **options):
    return list(plan_units(files_of(find_files([str(path)])), unit_bytes, "text", **options))


def chunks_of(path, schema=TEXT, columns=None, **options):
    (unit,) = units(path, 1 << 40)
    return list(UnitReader(unit, "text", columns, schema, **options).chunks())


@pytest.fixture
def tag(tmp_path, ner_model_dir):
    """Tags all rows of a file as one unit; gives receipts."""

    def run(source, schema=TEXT, **options):
        options = {"input": [str(source)], "output": str(tmp_path / "out"), **options}
        config = ner_config(JobConfig, model=str(ner_model_dir), **options)
        return make_tagger(config, schema)(to_table(units(source, 1 << 40))).to_pylist()

    return run


def table_of(folder, chunks):
    """All rows of a unit, with one schema."""
    with OneSchema(str(folder)) as one:
        found = [table for c in chunks for table in one.add(c.table, c.settled)]
        return pa.concat_tables([*found, *one.rest()])


# ---- blocks -------------------------------------------------------------------------------------

SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.integers(-9, 9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "a", "7", "é"]),
)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=5,
)


def without_nulls(value):
    """Fields of objects that are null may come and go."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(VALUES, min_size=1, max_size=8), st.integers(0, 8))
@example([1, 2, 2.5, None], 2)
@example([2**53 + 1, 0.5], 0)
@example(["a", "b", 5], 2)
@example([1, "a"], 0)
@example([{"a": 1}, {"b": "x"}, {"a": 2.5}], 1)
@example([[1], [], [0.5], None, [{}]], 0)
def test_blocks_give_what_the_whole_unit_gives(tmp_path, monkeypatch, values, n_known):
    """The same values, in the same type or as JSON text, whatever block they are in."""
    rows = [{"text": "x", "v": value} for value in values]
    known = infer_schema([{"text": "x"}, *rows[:n_known]])
    path = write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    whole = table_of(tmp_path, chunks_of(path, known))
    monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", 1)
    chunks = chunks_of(path, known)
    assert len(chunks) == len(rows)
    parts = table_of(tmp_path, chunks)
    pq.write_table(parts, tmp_path / "parts.parquet")
    assert parts.column_names == whole.column_names
    assert parts["text"].to_pylist() == ["x"] * len(rows)
    one, other = whole["v"], parts["v"]
    if one.type == other.type and one.to_pylist() == other.to_pylist():
        return
    # Of numbers, JSON does not tell 1 from 1.0; of objects, fields that are null may come and go.
    text = pa.types.is_string(other.type)
    strings_stay = text and "v" in known.names and known.field("v").metadata is None
    for value, found in zip(values, other.to_pylist(), strict=True):
        if found is None or not text or (strings_stay and isinstance(value, str)):
            assert without_nulls(found) == without_nulls(value)
        else:
            assert without_nulls(json.loads(found)) == without_nulls(value)


def test_columns_that_appear_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", 1)
    rows = [{"text": "a"}, {"text": "b", "n": 1}, {"m": [1], "text": "c"}]
    table = table_of(tmp_path, chunks_of(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert table.column_names == ["text", "n", "m"]
    assert table["n"].to_pylist() == [None, 1, None]
    assert table["m"].to_pylist() == [None, None, [1]]


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_the_output_has_one_schema(tmp_path, monkeypatch, tag, output_format):
    """The same bytes as if the unit had been read at once."""
    rows = [{"text": f"Ada {i}", "n": i if i < 50 else i / 2, "k": None} for i in range(99)]
    rows += [{"text": "Bob", "n": "text", "k": "new", "late": i} for i in range(9)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    schema = pa.schema([("text", pa.string()), ("n", pa.int64())])
    found = []
    for weight in (1 << 26, 5000):
        monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", weight)
        out = tmp_path / str(weight)
        (receipt,) = tag(source, output=str(out), output_format=output_format, schema=schema)
        assert (receipt["error"], receipt["n_ok"]) == ("", 108)
        if output_format == "parquet":
            found.append(pq.read_table(out / "a.parquet").drop_columns(["entities"]).to_pylist())
        else:
            text = (out / "a.jsonl").read_text(encoding="utf-8")
            found.append([json.loads(line) for line in text.splitlines()])
    whole, parts = found
    for row in (*whole, *parts):
        row["n"] = json.loads(row["n"])  # 1 and 1.0 are one number
    assert parts == whole
    assert [row["late"] for row in parts] == [None] * 99 + list(range(9))


def test_a_unit_of_one_block_passes_through(tmp_path):
    """No file is written for it."""
    (chunk,) = chunks_of(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))
    assert chunk.settled
    with OneSchema(str(tmp_path / "absent")) as one:
        assert list(one.add(chunk.table, chunk.settled)) == [chunk.table]
    assert not (tmp_path / "absent").exists()


def test_blocks_are_bounded_by_bytes(tmp_path, monkeypatch):
    """A compressed file is one unit, whatever it holds: it is not held at once."""
    monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", 200_000)
    rows = [{"text": f"t{i}", "ballast": "x" * 50_000} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    chunks = chunks_of(path)
    assert [len(c.texts) for c in chunks] == [3] * 13 + [1]
    assert [text for c in chunks for text in c.texts] == [row["text"] for row in rows]
    shares = [c.share for c in chunks]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_join_types():
    struct = pa.struct([("a", pa.int64())])
    wider = pa.struct([("a", pa.float64()), ("b", pa.string())])
    other = pa.struct([("a", pa.float64()), ("b", pa.string())])
    assert join_types(struct, other) == wider
    assert join_types(pa.list_(pa.null()), pa.list_(struct)) == pa.list_(struct)
    assert join_types(pa.bool_(), pa.int64()) is None
    assert join_types(struct, pa.struct([("a", pa.string())])) is None


# ---- long lines ---------------------------------------------------------------------------------

LONG = b'{"text": "' + b"hidden " * 20 + b'"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_long_line_is_a_dead_letter_that_can_be_read_again(tmp_path, name, end):
    content = [b'{"text": "a"}\n', b"\n", LONG + (end or b"\n"), b'{"text": "b"}\n', LONG + end]
    path = write_bytes(tmp_path / name, b"".join(content))
    (chunk,) = chunks_of(path, max_row_bytes=100)
    assert (chunk.texts, len(chunk.bad)) == (["a", "b"], 2)
    for bad, row in zip(chunk.bad, (2, 4), strict=True):
        assert (bad.place.row, bad.place.line, bad.n_rows) == (row, None, 1)
        assert bad.failure.error == "RecordError"
        assert "--max-row-bytes is 100" in bad.failure.reason
        assert "hidden" not in bad.failure.reason
        (again,) = UnitReader(bad.rest, "text", None, TEXT).slice_chunks(bad.rest)
        assert again.texts == [json.loads(LONG)["text"]]
        assert [place.row for place in again.places] in ([row], [None])


@pytest.mark.parametrize(("n", "fits"), [(len(LONG), True), (len(LONG) - 1, False)])
def test_the_limit_is_that_of_the_line_without_its_end(tmp_path, n, fits):
    for end in (b"\n", b"\r\n", b""):
        (chunk,) = chunks_of(write_bytes(tmp_path / "a.jsonl", LONG + end), max_row_bytes=n)
        assert len(chunk.texts) == fits
        assert len(chunk.bad) == (not fits)


def test_long_lines_in_slices(tmp_path):
    """A slice that begins within a long line skips to its end, and none is read twice."""
    rng = random.Random(5)
    content = [b'{"text": "%d%s"}' % (i, b"x" * rng.choice([0, 0, 0, 300])) for i in range(200)]
    path = write_bytes(tmp_path / "a.jsonl", b"\n".join(content))
    schema = input_schema(files_of(find_files([str(path)])), "text", None)
    texts, long = [], []
    for unit in units(path, 100):
        for chunk in UnitReader(unit, "text", None, schema, max_row_bytes=200).chunks():
            texts += chunk.texts
            long += [lines.row_number(bad.place) for bad in chunk.bad]
    assert long == [i for i, line in enumerate(content) if len(line) > 200]
    assert len(texts) + len(long) == 200
    assert texts == [json.loads(line)["text"] for line in content if len(line) <= 200]


def test_a_long_blank_line_is_blank(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", b" " * 500 + b'\n{"text": "a"}\n' + b"\t" * 500)
    (chunk,) = chunks_of(path, max_row_bytes=100)
    assert (chunk.texts, chunk.bad) == (["a"], [])


def test_long_lines_count_as_rows(tmp_path):
    content = b'{"text": "a"}\n' + LONG + b'\n{"text": "b"}\n' * 3
    path = write_bytes(tmp_path / "a.jsonl.gz", content)
    (unit,) = units(path)
    assert count_rows(unit, 99) == 5
    (limited,) = units(path, limit=3)
    (chunk,) = UnitReader(limited, "text", None, TEXT, max_row_bytes=100).chunks()
    assert (chunk.texts, len(chunk.bad)) == (["a", "b"], 1)


def test_replay_reads_a_long_line(tmp_path, job):
    """With a larger limit, and the run goes on with its other settings."""
    write_bytes(tmp_path / "in" / "a.jsonl.gz", b'{"text": "Ada"}\n' + LONG + b"\n")
    report, _ = job(max_row_bytes=100, max_dead_letters="9")
    assert (report.n_ok, report.n_dead) == (1, 1)
    letter = pq.read_table(letters_path(tmp_path / "out")).to_pylist()[0]
    assert (letter["source_row"], letter["n_rows"], letter["line"]) == (1, 1, None)
    report, _ = job(replay=True, max_row_bytes=1 << 20)
    assert (report.n_ok, report.n_dead) == (2, 0)
    (text,) = pq.read_table(tmp_path / "out" / "a.replay-1.parquet")["text"].to_pylist()
    assert text == json.loads(LONG)["text"]


@pytest.mark.parametrize("first", [100, 1 << 20])
def test_a_run_goes_on_with_another_limit(tmp_path, job, first):
    """It decides which rows are dead letters, not what is found: units that are done stay."""
    write_bytes(tmp_path / "in" / "a.jsonl", b'{"text": "Ada"}\n' + LONG + b"\n")
    job(max_row_bytes=first, max_dead_letters="9")
    write_bytes(tmp_path / "in" / "b.jsonl", LONG + b"\n")
    report, done = job(max_row_bytes=50, max_dead_letters="9")
    assert len(done) == 1
    assert (report.n_ok, report.n_dead) == ((1, 2) if first == 100 else (2, 1))


def test_too_many_values_in_a_row(tmp_path):
    """A few bytes each in the file, a hundred in memory; seen before they are parsed."""
    many = b'{"text": "a", "v": [' + b"[]," * 1_000_000 + b"[]]}"
    words = json.dumps({"text": ", [{\\" * 600_000}).encode()
    path = write_bytes(tmp_path / "a.jsonl", many + b"\n" + words + b"\n")
    chunks = chunks_of(path)
    assert [len(text) for c in chunks for text in c.texts] == [3_000_000]
    (bad,) = (bad for c in chunks for bad in c.bad)
    assert "more than 1000000 values in one row" in bad.failure.reason


def test_a_large_row_is_a_block_by_itself(tmp_path, monkeypatch):
    """A character beyond the first 65,536 makes all others of its text four bytes wide."""
    monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", 20_000)
    monkeypatch.setattr(jsonl, "LARGE_WEIGHT", 10_000)
    texts = ["a", "b", "x" * 9000, "c", "x" * 3000 + "\U0001f600", "d", "e"]
    chunks = chunks_of(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert [c.texts for c in chunks] == [texts[:4], [texts[4]], texts[5:]]


@pytest.mark.parametrize(("n", "n_groups"), [(10, 1), (2_000_000, 5), (4_000_000, 5)])
def test_texts_are_tokenized_in_groups(n, n_groups):
    records = [Record(str(i), "x" * n) for i in range(5)]
    groups = list(grouped(records))
    assert [r for group in groups for r in group] == records
    assert len(groups) == n_groups


def test_a_text_that_is_too_long(tmp_path, monkeypatch, tag):
    """Its tokens would take gigabytes; a larger --max-row-bytes reads it."""
    monkeypatch.setattr(sizes, "LEAST_LIMIT", 100)
    monkeypatch.setattr(sizes, "GROUP_CHARACTERS", 100)
    monkeypatch.setattr(actor, "GROUP_CHARACTERS", 100)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada " * 40}, {"text": "Ada"}])
    (receipt,) = tag(source, max_row_bytes=1000)
    assert (receipt["error"], receipt["n_ok"], receipt["n_dead"]) == ("", 1, 1)
    (letter,) = pq.read_table(letters_path(tmp_path / "out")).to_pylist()
    assert letter["reason"].startswith("160 characters of text: at most 100 are read")
    (receipt,) = tag(source, output=str(tmp_path / "more"), max_row_bytes=16_000)
    assert (receipt["n_ok"], receipt["n_dead"]) == (2, 0)


# ---- before the work ----------------------------------------------------------------------------


def test_the_sample_does_not_hold_a_long_line(tmp_path, monkeypatch):
    """Nor does it read beyond its limit to find the end of one."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "a"}\n')
    sizes = []
    read = lines._read_line
    monkeypatch.setattr(lines, "_read_line", lambda *a: sizes.append(read(*a)) or sizes[-1])
    assert input_schema(files_of(find_files([str(path)])), "text", None) == TEXT
    assert max(len(line.content or b"") for line in sizes if line) < 100
    monkeypatch.setattr("erniem_batch.job.jsonsample.SAMPLE_SKIPPED_BYTES", 20 << 20)
    sizes.clear()
    assert input_schema(files_of(find_files([str(path)])), "text", None) == pa.schema([])
    assert sizes[0].n_bytes < 25 << 20


def test_bounded_lines(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", b"ab\n" + b"c" * 99 + b"\nd")
    assert list(bounded_lines(str(path), 10)) == [b"ab\n", 100, b"d"]


def test_gold_rows_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("erniem_batch.job.lines.MAX_ROW_BYTES", 100)
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n' + LONG * 3)
    (file,) = files_of(find_files([str(path)]))
    row, error = rows_of(file)
    assert row == {"text": "a"}
    assert isinstance(error, RecordError)


# ---- dead letters -------------------------------------------------------------------------------


def test_many_dead_letters_are_not_held(tmp_path, monkeypatch, tag):
    """They wait on the disk, and are written in groups."""
    monkeypatch.setattr("erniem_batch.job.settle.CHUNK_BYTES", 100_000)
    content = b"".join(b'{"text": null, "n": %d}\n' % i for i in range(5000))
    source = write_bytes(tmp_path / "a.jsonl.gz", content)
    (receipt,) = tag(source)
    assert (receipt["error"], receipt["n_ok"], receipt["n_dead"]) == ("", 0, 5000)
    path = letters_path(tmp_path / "out")
    assert pq.read_metadata(path).num_row_groups > 20
    letters = pq.read_table(path)
    assert letters["source_row"].to_pylist() == list(range(5000))
    assert b"".join(letters["line"].to_pylist()) == content


def test_added_columns_clash_in_later_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK_WEIGHT", 1)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "entities": 1}])
    chunks = chunks_of(path, added=ADDED_SCHEMA.names)
    assert [bad.place.row for c in chunks for bad in c.bad] == [1]
