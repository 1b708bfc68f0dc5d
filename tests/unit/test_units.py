import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import read_unit, write_bytes, write_jsonl, write_parquet
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError
from erniem_batch.job.lines import row_number
from erniem_batch.job.units import (
    UNIT_SCHEMA,
    Unit,
    files_of,
    find_files,
    from_table,
    plan_units,
    require_unique,
    to_table,
)

ROWS = [{"text": f"row {i}", "n": i} for i in range(40)]


def plan(*inputs, unit_bytes=1 << 20, limit=None, input_format="auto"):
    files = files_of(find_files([str(path) for path in inputs], input_format))
    units = list(plan_units(files, unit_bytes, "text", limit))
    require_unique(to_table(units))
    return units


def rows_of(units, text_column="text"):
    """(row of the file, text) of each row in the units, failures with their reason."""
    found = []
    for unit in units:
        here = []
        for chunk in read_unit(unit, text_column, None, pa.schema([])):
            here += zip(map(row_number, chunk.places), chunk.texts, strict=True)
            here += [(row_number(bad.place), bad.failure) for bad in chunk.bad]
        found += sorted(here, key=lambda pair: pair[0])
    return found


# ---- which files ------------------------------------------------------------------------------


def _names(*inputs, input_format="auto"):
    return find_files([str(path) for path in inputs], input_format)["name"].to_pylist()


def _file(path, input_format="auto"):
    (file,) = files_of(find_files([str(path)], input_format))
    return file


def test_folder_is_searched_in_depth_without_hidden_names(tmp_path):
    for name in (
        "b.jsonl",
        "a.parquet",
        "de/x.jsonl",
        "de/deep/y.jsonl.gz",
        "_dead_letters/b.jsonl",
        "_SUCCESS.jsonl",
        ".hidden.jsonl",
        ".git/z.jsonl",
        "README.md",
    ):
        write_bytes(tmp_path / name, b"")
    assert _names(tmp_path) == ["a", "b", "de/deep/y", "de/x"]


def test_a_hidden_folder_above_the_input_does_not_matter(tmp_path):
    write_jsonl(tmp_path / ".cache" / "_in" / "a.jsonl", ROWS)
    assert _names(tmp_path / ".cache" / "_in") == ["a"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("part-00042.parquet", ("part-00042", "parquet")),
        ("part.2024.jsonl", ("part.2024", "jsonl")),
        ("a.ndjson", ("a", "jsonl")),
        ("a.json", ("a", "jsonl")),
        ("a.jsonl.gz", ("a", "jsonl")),
        ("a.json.zst", ("a", "jsonl")),
        ("A.JSONL.GZ", ("A", "jsonl")),
        ("a.json.jsonl", ("a.json", "jsonl")),
        ("a.jsonl.parquet", ("a.jsonl", "parquet")),
    ],
)
def test_names_and_formats(tmp_path, name, expected):
    write_bytes(tmp_path / name, b"")
    file = _file(tmp_path)
    assert (file.name, file.format) == expected


def test_format_by_flag(tmp_path):
    write_jsonl(tmp_path / "a.txt", ROWS)
    with pytest.raises(ConfigError, match="none of the files found there is"):
        find_files([str(tmp_path)])
    file = _file(tmp_path, "jsonl")
    assert (file.name, file.format) == ("a.txt", "jsonl")


def test_glob_file_and_folder_together_each_file_once(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        write_bytes(tmp_path / name, b"")
    assert _names(tmp_path / "*.jsonl", tmp_path / "a.jsonl", tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("pattern", ["absent", "absent/*.jsonl", "ftp://host/x.jsonl"])
def test_input_that_is_not_there(tmp_path, pattern):
    path = pattern if "://" in pattern else str(tmp_path / pattern)
    with pytest.raises(ConfigError, match=r"no file matches|is no storage that can be used"):
        find_files([path])


def test_files_have_size_and_version(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}')
    before = _file(path)
    assert (before.path, before.size) == (str(path), 13)
    write_bytes(path, b'{"text": "bb"}')
    after = _file(path)
    assert after.size == 14
    assert after.version != before.version


def test_names_that_collide_are_refused(tmp_path):
    write_jsonl(tmp_path / "de" / "part.jsonl", ROWS)
    write_jsonl(tmp_path / "fr" / "part.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"would be written twice.*one folder above"):
        plan(tmp_path / "de", tmp_path / "fr")
    assert [u.output for u in plan(tmp_path)] == ["de/part", "fr/part"]


def test_a_slice_may_collide_with_a_whole_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "a-00001.jsonl", ROWS[:2])
    with pytest.raises(ConfigError, match="a-00001"):
        plan(tmp_path, unit_bytes=400)


def test_same_stem_in_two_formats_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_parquet(tmp_path / "a.parquet", pa.table({"text": ["x"]}))
    with pytest.raises(ConfigError, match="would be written twice"):
        plan(tmp_path)


# ---- Parquet ------------------------------------------------------------------------------------


def test_a_file_that_fits_keeps_its_name(tmp_path):
    write_parquet(tmp_path / "part-00042.parquet", pa.table({"text": ["a", "b"]}))
    (unit,) = plan(tmp_path)
    assert (unit.output, unit.row_groups, unit.n_rows) == ("part-00042", (0,), 2)


def test_row_groups_are_packed_and_never_divided(tmp_path):
    texts = [f"{i}" * 100 for i in range(10, 50)]
    path = write_parquet(tmp_path / "part-00042.parquet", pa.table({"text": texts}), group_rows=4)
    footer = pq.read_metadata(path)
    size = footer.row_group(0).column(0).total_uncompressed_size
    units = plan(path, unit_bytes=3 * size + 10)
    assert [u.row_groups for u in units] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    assert [u.output for u in units] == [f"part-00042-{i:05d}" for i in range(4)]
    assert [(u.first_row, u.n_rows) for u in units] == [(0, 12), (12, 12), (24, 12), (36, 4)]
    assert rows_of(units) == list(enumerate(texts))
    assert [u.row_groups for u in plan(path, unit_bytes=1)] == [(i,) for i in range(10)]


def test_size_is_that_of_the_text_column(tmp_path):
    table = pa.table({"text": ["a"] * 8, "blob": [bytes(range(256)) * 40] * 8})
    path = write_parquet(tmp_path / "a.parquet", table, group_rows=1)
    assert len(plan(path, unit_bytes=4096)) == 1


@pytest.mark.parametrize("group_rows", [None, 1])
def test_empty_parquet_file(tmp_path, group_rows):
    """Once, an empty row group gave no table at all, and a file of no bytes was written."""
    table = pa.table({"text": pa.array([], pa.string()), "n": pa.array([], pa.int16())})
    path = write_parquet(tmp_path / "a.parquet", table, group_rows)
    units = plan(path)
    (chunk,) = read_unit(units[0], "text", None, pa.schema([]))
    assert chunk.table.schema == table.schema
    assert chunk.places == chunk.texts == chunk.bad == []


def test_parquet_without_row_groups(tmp_path):
    schema = pa.schema([("text", pa.string())])
    pq.ParquetWriter(tmp_path / "a.parquet", schema).close()
    (unit,) = plan(tmp_path)
    (chunk,) = read_unit(unit, "text", None, pa.schema([]))
    assert chunk.table.schema == schema


def test_parquet_that_is_none(tmp_path):
    """Its reader will say why; other files of the corpus are worked on."""
    write_bytes(tmp_path / "a.parquet", b"PAR1 and then nothing")
    (unit,) = plan(tmp_path)
    assert (unit.output, unit.row_groups, unit.n_rows, unit.n_bytes) == ("a", (), None, 21)
    (chunk,) = read_unit(unit, "text", None, pa.schema([("text", pa.string())]))
    (bad,) = chunk.bad
    assert (bad.n_rows, bad.failure.stage, bad.rest) == (None, "read", unit)
    assert len(chunk.table) == 0


# ---- JSONL --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "zst", "GZ", "ZST"])
def test_compressed_files_are_one_unit(tmp_path, suffix):
    """Once, A.JSONL.GZ was read as if it were not compressed."""
    path = write_jsonl(tmp_path / f"a.jsonl.{suffix.lower()}", ROWS)
    path = path.rename(tmp_path / f"a.jsonl.{suffix}")
    (unit,) = plan(path, unit_bytes=10)
    assert (unit.output, unit.start, unit.end) == ("a", 0, None)
    assert rows_of([unit]) == [(i, row["text"]) for i, row in enumerate(ROWS)]


def test_slices_have_names_with_their_number(tmp_path):
    path = write_jsonl(tmp_path / "sub" / "part-00042.jsonl", ROWS)
    units = plan(tmp_path, unit_bytes=-(-path.stat().st_size // 4))
    assert [u.output for u in units] == [f"sub/part-00042-{i:05d}" for i in range(4)]
    assert rows_of(units) == [(i, row["text"]) for i, row in enumerate(ROWS)]


def test_empty_jsonl_file(tmp_path):
    write_bytes(tmp_path / "a.jsonl", b"")
    (unit,) = plan(tmp_path)
    assert unit.output == "a"
    assert rows_of([unit]) == []


def test_ids_are_stable_and_differ(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    first, second = plan(tmp_path, unit_bytes=100), plan(tmp_path, unit_bytes=100)
    assert first == second
    assert len({unit.id for unit in first}) == len(first)
    write_jsonl(tmp_path / "a.jsonl", ROWS[::-1])
    ids = {unit.id for unit in first}
    changed = [unit.path for unit in plan(tmp_path, unit_bytes=100) if unit.id not in ids]
    assert set(changed) == {str(tmp_path / "a.jsonl")}


def test_units_travel_as_plain_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_parquet(tmp_path / "b.parquet", pa.table({"text": ["x"] * 9}), group_rows=2)
    units = plan(tmp_path, unit_bytes=100)
    table = to_table(units)
    assert table.schema == UNIT_SCHEMA
    assert list(from_table(table)) == units
    assert [Unit.from_row(row) for row in table.to_pylist()] == units
    assert json.loads(json.dumps([unit.to_row() for unit in units]))


# ---- limit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 39, 40, 41, 79, 80, 1000])
@pytest.mark.parametrize("unit_bytes", [60, 500, 1 << 20])
def test_limit_takes_the_first_rows(tmp_path, limit, unit_bytes):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    table = pa.table({"text": [row["text"] for row in ROWS]})
    write_parquet(tmp_path / "b.parquet", table, group_rows=9)
    units = plan(tmp_path, unit_bytes=unit_bytes, limit=limit)
    expected = [(i, row["text"]) for i, row in enumerate(ROWS)] * 2
    assert rows_of(units) == expected[:limit]
    assert sum(unit.max_rows for unit in units) == min(limit, 80)


def test_limit_over_a_damaged_file(tmp_path):
    """Once, a traceback: only the limit makes the driver read files to their end."""
    path = write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    units = plan(tmp_path, limit=100)
    assert [unit.output for unit in units] == ["a", "b"]
    assert units[1].max_rows == 40


# ---- every row exactly once -------------------------------------------------------------------

LINE = st.one_of(
    st.text("ab é北\U0001f469", max_size=30).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
    ),
    st.sampled_from(
        [b"", b"  ", b"\t", b"{bad", b'{"text": "' + b"x" * 200 + b'"}', b"\xff", b"7"]
    ),
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(LINE, max_size=25),
    ends=st.sampled_from([b"\n", b"\r\n"]),
    final=st.booleans(),
    bom=st.booleans(),
    unit_bytes=st.integers(1, 120),
)
@example(
    lines=[b'{"text": "a"}', b'{"text": "b"}'], ends=b"\n", final=True, bom=False, unit_bytes=14
)
@example(
    lines=[b'{"text": "a"}', b'{"text": "b"}'], ends=b"\n", final=False, bom=True, unit_bytes=13
)
def test_slices_read_every_row_once_and_in_order(tmp_path, lines, ends, final, bom, unit_bytes):
    """Blank lines are no rows, but count as places, so that a row is where an editor shows it."""
    content = ends.join(lines) + (ends if final and lines else b"")
    path = write_bytes(tmp_path / "a.jsonl", (b"\xef\xbb\xbf" if bom else b"") + content)
    expected = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
            expected.append((i, value["text"]))
        except (ValueError, TypeError):
            expected.append((i, "failure"))
    units = plan(path, unit_bytes=unit_bytes)
    found = [(row, text if isinstance(text, str) else "failure") for row, text in rows_of(units)]
    assert found == expected
    assert max((unit.n_bytes for unit in units), default=0) <= max(unit_bytes, 1)
