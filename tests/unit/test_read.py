import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ADDED_SCHEMA, bad_utf8_strings, read_unit, write_bytes, write_jsonl, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.job.lines import row_number
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import files_of, find_files, plan_units


def files(path):
    return list(files_of(find_files([str(path)])))


def read(path, text_column="text", columns=None, unit_bytes=1 << 20):
    """The chunks of a file or folder, planned and read as a job does."""
    schema = input_schema(files(path), text_column, columns, added=ADDED_SCHEMA.names)
    units = plan_units(files(path), unit_bytes, text_column)
    return [c for unit in units for c in read_unit(unit, text_column, columns, schema)]


def read_lines(folder, *lines, **options):
    content = b"".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return read(write_bytes(folder / "a.jsonl", content), **options)


def carried(chunks):
    return [row for chunk in chunks for row in chunk.table.to_pylist()]


def rows(chunk):
    return [row_number(place) for place in chunk.places]


def bad_rows(chunks):
    return [bad for chunk in chunks for bad in chunk.bad]


def reasons(chunks):
    return {row_number(bad.place): bad.failure.reason for bad in bad_rows(chunks)}


# ---- JSONL values ---------------------------------------------------------------------------


def test_strings_that_look_like_something_else_stay_strings(tmp_path):
    rows = [
        {"id": "0007", "text": "a", "day": "2024-01-01", "at": "2024-01-01T10:00:00Z"},
        {"id": "1e5", "text": "b", "day": "2024-13-45", "at": "true"},
    ]
    chunks = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert carried(chunks) == rows
    assert set(chunks[0].table.schema.types) == {pa.string()}


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([1, -(2**63), 2**63 - 1], pa.int64()),
        ([1, None, 3], pa.int64()),
        ([0.1, 1e300, None], pa.float64()),
        ([1, 2.5, 10], pa.float64()),  # JSON does not tell 1 from 1.0
        ([True, False, None], pa.bool_()),
        ([[1, 2], [], None], pa.list_(pa.int64())),
        ([{"a": 1, "b": ["x"]}, {"a": 2, "b": []}, None], None),
        ([None, None, None], pa.null()),
        ([[], [], []], pa.list_(pa.null())),
    ],
)
def test_values_come_back_as_they_were(tmp_path, values, type_):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "v": v} for v in values])
    (chunk,) = read(path)
    assert [row["v"] for row in carried([chunk])] == values
    if type_ is not None:
        assert chunk.table.schema.field("v").type == type_
    pq.write_table(chunk.table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["v"].to_pylist() == values


@pytest.mark.parametrize(
    "values",
    [
        [1, "1"],
        [True, 1],
        [2**63, 1],
        [2**70],
        [2**53 + 1, 0.5],  # as a double it would be another number
        [[1], 1],
        [{"a": 1}, {"a": "1"}],
        [{}],
        [[{}]],
        [{"a": {}}, {"a": {"b": 1}, "c": {}}],
    ],
)
def test_values_that_no_type_holds_become_json(tmp_path, values):
    """Once, an empty object made a type that Parquet cannot write, and the unit was lost."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "v": v} for v in values])
    (chunk,) = read(path)
    assert [json.loads(row["v"]) for row in carried([chunk])] == values
    pq.write_table(chunk.table, tmp_path / "out.parquet")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab "), inner, max_size=3)
    ),
    max_leaves=8,
)


def _without_nulls(value):
    """Fields of objects that are null may come and go."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(JSON, min_size=1, max_size=4), st.booleans())
def test_any_json_value_is_kept(tmp_path, values, ascii_only):
    rows = [{"text": "x", "v": value} for value in values]
    (chunk,) = read(write_jsonl(tmp_path / "a.jsonl", rows, ascii_only))
    pq.write_table(chunk.table, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")["v"].to_pylist()
    if found != values:
        as_json = [v if v is None else json.loads(v) if isinstance(v, str) else v for v in found]
        assert list(map(_without_nulls, found)) == list(map(_without_nulls, values)) or (
            as_json == values
        )


def test_numbers_that_json_does_not_know(tmp_path):
    (chunk,) = read_lines(tmp_path, '{"text": "a", "v": NaN}\n{"text": "b", "v": -Infinity}\n')
    values = [row["v"] for row in carried([chunk])]
    assert math.isnan(values[0])
    assert values[1] == -math.inf


def test_columns_that_appear_later(tmp_path):
    """The schema comes from the first megabyte; what it has not seen is carried all the same."""
    head = [{"text": "x" * 300_000}] * 5
    path = write_jsonl(tmp_path / "a.jsonl", [*head, {"text": "y", "n": 1}])
    chunks = read(path, unit_bytes=1 << 30)
    assert carried(chunks)[-1] == {"text": "y", "n": 1}
    assert carried(chunks)[0]["n"] is None


def test_a_type_that_changes_later_is_not_forced(tmp_path):
    head = [{"text": "x" * 400_000, "n": 1, "id": 7}] * 3
    tail = [{"text": "y", "n": 2.5, "id": "0007"}]
    path = write_jsonl(tmp_path / "a.jsonl", head + tail)
    last = read(path, unit_bytes=600_000)[-1]
    assert carried([last]) == tail


def test_chunks_have_one_schema_and_all_rows(tmp_path):
    written = [{"text": f"t{i}", "n": None if i < 3000 else i} for i in range(5000)]
    chunks = read(write_jsonl(tmp_path / "a.jsonl", written))
    assert [len(c.table) for c in chunks] == [2048, 2048, 904]
    assert len({c.table.schema for c in chunks}) == 1
    assert carried(chunks) == written
    assert [row for c in chunks for row in rows(c)] == list(range(5000))
    assert [c.share for c in chunks] == sorted(c.share for c in chunks)
    assert chunks[-1].share == 1.0


# ---- JSONL lines that cannot be read ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "hidden words"', "not JSON"),
        (b"hidden words", "not JSON"),
        (b'{"text": "hidden \xff words"}', "not UTF-8 at byte 17 of the line"),
        (b'["hidden words"]', "expected a JSON object, got list"),
        (b'"hidden words"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"text": "hidden \\ud800 words"}', "a lone surrogate"),
        (b'{"text": "hidden", "n": ' + b"9" * 5000 + b"}", "more than 4300 digits"),
        (b'{"text": "hidden", "n": ' + b"[" * 99999 + b"]" * 99999 + b"}", "nested more than 100"),
        (b'{"text": "hidden", "n": ' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 100"),
    ],
)
def test_a_bad_line_fails_alone(tmp_path, line, reason):
    lines = [b'{"text": "a"}\n', b"\n", line + b"\n", b'{"text": "b"}\n']
    chunks = read_lines(tmp_path, *lines)
    assert [(c.texts, rows(c)) for c in chunks] == [(["a", "b"], [0, 3])]
    (bad,) = chunks[0].bad
    assert (bad.place.row, bad.failure.stage, bad.failure.error) == (2, "read", "RecordError")
    assert bad.place.line == line + b"\n"
    assert (bad.n_rows, bad.rest) == (1, None)
    assert reason in bad.failure.reason
    assert "hidden" not in bad.failure.reason


def test_a_column_that_clashes_later_fails_its_rows(tmp_path):
    head = [{"text": "x" * 600_000}] * 2
    rows = [*head, {"text": "y", "entities": []}, {"text": "z"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert "adds a column 'entities' itself" in reasons(read(path))[2]
    assert reasons(read(path, columns=["text"])) == {}


def test_lines_with_many_brackets_are_fine_if_they_are_not_deep(tmp_path):
    rows = [{"text": "x", "v": [[i] for i in range(200)], "s": "[" * 300}]
    assert carried(read(write_jsonl(tmp_path / "a.jsonl", rows))) == rows


def test_columns_nested_deep_can_be_written(tmp_path):
    deep = 1
    for _ in range(90):
        deep = [deep]
    (chunk,) = read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "v": deep}]))
    pq.write_table(chunk.table, tmp_path / "out.parquet")
    (value,) = pq.read_table(tmp_path / "out.parquet")["v"].to_pylist()
    assert json.loads(value) == deep


def test_row_numbers_in_later_slices(tmp_path):
    lines = [b'{"text": "%d"}\n' % i for i in range(60)]
    lines[41] = b"{bad}\n"
    lines[20] = b"\n"
    chunks = read_lines(tmp_path, *lines, unit_bytes=100)
    assert len(chunks) > 5
    assert list(reasons(chunks)) == [41]
    found = [(row, text) for c in chunks for row, text in zip(rows(c), c.texts, strict=True)]
    assert found == [(i, str(i)) for i in range(60) if i not in (20, 41)]


def test_surrogate_pairs_are_fine(tmp_path):
    (chunk,) = read_lines(tmp_path, '{"text": "\\ud83d\\ude00", "\\u00e9": 1}\n')
    assert chunk.texts == ["\U0001f600"]
    assert not chunk.bad


def test_byte_order_mark(tmp_path):
    (chunk,) = read_lines(tmp_path, b"\xef\xbb\xbf", '{"text": "a"}\n')
    assert carried([chunk]) == [{"text": "a"}]


def test_byte_order_mark_on_a_line_of_its_own(tmp_path):
    (chunk,) = read_lines(tmp_path, b"\xef\xbb\xbf\r\n", '{"text": "a"}\n')
    assert (rows(chunk), chunk.texts, chunk.bad) == ([1], ["a"], [])


def test_only_bad_lines(tmp_path):
    (chunk,) = read_lines(tmp_path, "{\n", "[]\n")
    assert len(chunk.table) == 0
    assert list(reasons([chunk])) == [0, 1]


# ---- text column --------------------------------------------------------------------------------

NESTED = [{"doc": {"body": "a"}}, {"doc": {"body": None}}, {"doc": None}, {"doc": {"body": "d"}}]


def test_nested_text_in_jsonl(tmp_path):
    rows = [*NESTED, {"doc": "no object"}, {"other": 1}]
    (chunk,) = read(write_jsonl(tmp_path / "a.jsonl", rows), "doc.body")
    assert chunk.texts == ["a", None, None, "d", None, None]


@pytest.mark.parametrize("columns", [None, ["n"], ["doc"], []])
def test_nested_text_in_parquet(tmp_path, columns):
    table = pa.table({"n": range(4), "doc": [row["doc"] for row in NESTED]})
    (chunk,) = read(write_parquet(tmp_path / "a.parquet", table), "doc.body", columns)
    assert chunk.texts == ["a", None, None, "d"]
    assert chunk.table.column_names == (["n", "doc"] if columns is None else columns)
    assert len(chunk.table) == 4


def test_a_literal_name_with_a_dot_comes_first(tmp_path):
    rows = [{"doc.body": "literal", "doc": {"body": "nested"}}]
    (jsonl,) = read(write_jsonl(tmp_path / "j" / "a.jsonl", rows), "doc.body")
    (parquet,) = read(
        write_parquet(tmp_path / "p" / "a.parquet", pa.Table.from_pylist(rows)), "doc.body"
    )
    (alone,) = read(tmp_path / "p", "doc.body", ["doc.body"])
    assert jsonl.texts == parquet.texts == alone.texts == ["literal"]
    assert alone.table.column_names == ["doc.body"]


@pytest.mark.parametrize("column", ["body", "doc.text", "doc.body.more", "doc.", ""])
def test_no_such_text_column(tmp_path, column):
    write_jsonl(tmp_path / "j" / "a.jsonl", NESTED)
    write_parquet(tmp_path / "p" / "a.parquet", pa.Table.from_pylist(NESTED))
    for folder in ("j", "p"):
        with pytest.raises(ConfigError, match=r"there is no column .* it has doc; .*--text-column"):
            read(tmp_path / folder, column)


def test_a_text_column_of_nulls_is_there(tmp_path):
    """Once, this was refused with "there is no column 'text': it has text"."""
    (chunk,) = read(write_jsonl(tmp_path / "a.jsonl", [{"text": None}]))
    assert chunk.texts == [None]


def test_values_that_are_no_strings_are_left_to_the_predictor(tmp_path):
    rows = [{"text": "a"}, {"text": 5}, {"text": ["a"]}, {}]
    (chunk,) = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert chunk.texts == ["a", 5, ["a"], None]


@pytest.mark.parametrize("bad", [5, ["a"], None, {"body": 1}])
def test_a_bad_text_does_not_change_the_types_of_other_rows(tmp_path, bad):
    """Once, one number among the texts turned all of them into JSON text, with quotes."""
    good = [{"text": "a", "doc": {"body": "a"}}, {"text": "b", "doc": {"body": "b"}}]
    path = write_jsonl(
        tmp_path / "a.jsonl", [good[0], {"text": bad, "doc": {"body": bad}}, good[1]]
    )
    for column in ("text", "doc.body"):
        (chunk,) = read(path, column, ["text"] if column == "text" else ["doc"])
        found = carried([chunk])
        assert [found[0], found[2]] == [
            {name: row[name] for name in chunk.table.column_names} for row in good
        ]
        assert chunk.texts == ["a", bad, "b"]


def test_parquet_text_of_another_type(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.table({"text": [1, 2]}))
    with pytest.raises(ConfigError, match="must hold strings, but is int64"):
        read(tmp_path)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_parquet_string_types(tmp_path, type_):
    column = pa.array(["a", None, "b"])
    column = column.dictionary_encode() if type_ == "dictionary" else column.cast(type_)
    (chunk,) = read(write_parquet(tmp_path / "a.parquet", pa.table({"text": column})))
    assert chunk.texts == ["a", None, "b"]


def test_parquet_text_that_is_not_utf8(tmp_path):
    """Once, one such row raised in the actor and ended the whole job."""
    column = bad_utf8_strings([b"ok", b"\xff\xfe hidden", "né".encode()])
    (chunk,) = read(write_parquet(tmp_path / "a.parquet", pa.table({"text": column})))
    assert chunk.texts == ["ok", b"\xff\xfe hidden", "né"]


# ---- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDED_SCHEMA.names)
def test_columns_the_job_adds_are_refused(tmp_path, name):
    rows = [{"text": "a", name: 1}]
    write_jsonl(tmp_path / "j" / "a.jsonl", rows)
    write_parquet(tmp_path / "p" / "a.parquet", pa.Table.from_pylist(rows))
    for folder in ("j", "p"):
        with pytest.raises(ConfigError, match=f"adds itself \\({name}\\)"):
            read(tmp_path / folder)
        assert carried(read(tmp_path / folder, columns=["text"])) == [{"text": "a"}]


def test_chosen_columns_in_the_order_chosen(tmp_path):
    rows = [{"text": "a", "x": 1, "y": 2}]
    write_jsonl(tmp_path / "j" / "a.jsonl", rows)
    write_parquet(tmp_path / "p" / "a.parquet", pa.Table.from_pylist(rows))
    for folder in ("j", "p"):
        (chunk,) = read(tmp_path / folder, columns=["y", "x"])
        assert list(carried([chunk])[0].items()) == [("y", 2), ("x", 1)]
        assert chunk.texts == ["a"]
        with pytest.raises(ConfigError, match=r"no column 'z' .*--columns"):
            read(tmp_path / folder, columns=["x", "z"])


def test_no_columns_at_all(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    (chunk,) = read(tmp_path, columns=[])
    assert (len(chunk.table), chunk.table.num_columns) == (3, 0)


def test_parquet_files_of_different_columns(tmp_path):
    """Each output has the columns of its own file; a file without text is a dead letter."""
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "n": [1]}))
    write_parquet(tmp_path / "b.parquet", pa.table({"text": ["b"], "n": ["1"]}))
    write_parquet(tmp_path / "c.parquet", pa.table({"other": ["c"] * 3}))
    a, b, c = read(tmp_path)
    assert (a.table.to_pylist(), b.table.to_pylist()) == (
        [{"text": "a", "n": 1}],
        [{"text": "b", "n": "1"}],
    )
    (bad,) = c.bad
    assert (bad.n_rows, bad.failure.error, len(c.table)) == (3, "ConfigError", 0)
    assert "no column 'text'" in bad.failure.reason
    *_, c = read(tmp_path, columns=["text", "n"])
    assert c.bad[0].n_rows == 3


def test_parquet_columns_of_one_name(tmp_path):
    """Once, a KeyError: Arrow finds a column only if its name is unique."""
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["a"]}))
    write_parquet(tmp_path / "b.parquet", pa.table([["a"], [1], [2]], names=["text", "n", "n"]))
    (bad,) = bad_rows(read(tmp_path))
    assert "several columns have the same name (n)" in bad.failure.reason
    assert bad.n_rows == 1


# ---- damaged files ------------------------------------------------------------------------------


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:-100]
    elif kind == "overwritten":
        content[:100] = content[:10] + b"\xff" * 90
    else:
        content = b"plain text"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["cut", "overwritten", "another format"])
def test_damaged_compressed_files_are_read_as_far_as_they_go(tmp_path, suffix, kind):
    """Once, zlib's own error, which is of no common kind, came through as a traceback."""
    lines = [{"text": f"{i * 7919 % 10007}"} for i in range(3000)]
    write_jsonl(tmp_path / "b.jsonl", lines[:1])
    damage(write_jsonl(tmp_path / f"a.jsonl.{suffix}", lines), kind)
    *chunks, last = read(tmp_path)
    assert carried([last]) == lines[:1]
    found = carried(chunks)
    assert found == lines[: len(found)]
    (bad,) = bad_rows(chunks)
    assert (bad.n_rows, bad.failure.stage, bad.place.row) == (None, "read", len(found))
    assert bad.rest is not None
    assert bad.rest.skip_rows == len(found)


def test_the_only_file_is_damaged_from_the_start(tmp_path):
    damage(write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "a"}]), "another format")
    (bad,) = bad_rows(read(tmp_path))
    assert bad.failure.reason


@pytest.mark.parametrize("limit", [None, 2500, 3500, 4500])
def test_readable_rows_of_a_damaged_parquet_file(tmp_path, limit):
    """Row group 3 of 5 is damaged: what is before and behind it is read."""
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(5000)]})
    path = write_parquet(tmp_path / "a.parquet", table, 1000)
    column = pq.read_metadata(path).row_group(3).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    (unit,) = plan_units(files(path), 1 << 30, "text", limit)
    chunks = list(read_unit(unit, "text", None, table.schema))
    found = {row: text for c in chunks for row, text in zip(rows(c), c.texts, strict=True)}
    last = limit or 5000
    expected = [*range(min(last, 3000)), *range(4000, last)]
    assert found == {i: f"Ada {i * 7919}" for i in expected}
    lost = [(bad.place.row, bad.n_rows, bad.rest.row_groups) for bad in bad_rows(chunks)]
    assert lost == ([] if last < 3000 else [(3000, min(1000, last - 3000), (3,))])
    assert sum(len(c.texts) + sum(b.n_rows for b in c.bad) for c in chunks) == last


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_vanishes(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, pa.table({"text": ["a"] * 7}))
    else:
        write_jsonl(path, [{"text": "a"}] * 7)
    (unit,) = plan_units(files(path), 1 << 20, "text")
    path.unlink()
    (chunk,) = read_unit(unit, "text", None, pa.schema([("text", pa.string())]))
    (bad,) = chunk.bad
    assert (bad.failure.error, bad.failure.reason) == (
        "FileNotFoundError",
        "the file is no longer there",
    )
    assert bad.n_rows == (7 if name.endswith(".parquet") else None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_changes(tmp_path, name):
    """It is not read as if it were the one that was planned."""
    path = tmp_path / name

    def write(n):
        if name.endswith(".parquet"):
            write_parquet(path, pa.table({"text": ["a"] * n}))
        else:
            write_jsonl(path, [{"text": "a"}] * n)

    write(7)
    (unit,) = plan_units(files(path), 1 << 20, "text")
    schema = pa.schema([("text", pa.string())])
    chunks = read_unit(unit, "text", None, schema)
    next(chunks)
    write(8)
    with pytest.raises(StorageError, match="changed since this run was planned"):
        list(chunks)
    with pytest.raises(StorageError, match="changed since this run was planned"):
        list(read_unit(unit, "text", None, schema))


def test_one_odd_value_leaves_the_strings_beside_it_alone(tmp_path):
    """A number among strings becomes text; once, every string of the unit got quotes."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "v": v} for v in ["a", "b"]])
    schema = input_schema(files(path), "text", None)
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "v": v} for v in ["a", 5, None]])
    (unit,) = plan_units(files(path), 1 << 20, "text")
    (chunk,) = read_unit(unit, "text", None, schema)
    assert chunk.table["v"].to_pylist() == ["a", "5", None]


def test_a_json_column_is_json_in_every_unit(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "v": v} for v in [1, "b", "c"]])
    schema = input_schema(files(path), "text", None)
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "v": "c"}])
    (unit,) = plan_units(files(path), 1 << 20, "text")
    (chunk,) = read_unit(unit, "text", None, schema)
    assert chunk.table["v"].to_pylist() == ['"c"']
