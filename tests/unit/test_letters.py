"""Dead letters: what they keep, and that the same rows come back from them."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import bad_utf8_strings, write_bytes, write_jsonl, write_parquet

from erniem_batch import storage
from erniem_batch.job.chunks import BadRow
from erniem_batch.job.letters import LETTER_SCHEMA, letters_name, read_letters, write_letters
from erniem_batch.job.read import UnitReader
from erniem_batch.job.units import Unit, files_of, find_files, plan_units
from erniem_batch.records import Failure

WHY = Failure("7", "forward", "RuntimeError", "no kernel")


def plan(path, **options):
    return list(plan_units(files_of(find_files([str(path)])), 1 << 20, "text", **options))


def reader(unit, columns=None):
    return UnitReader(unit, "text", columns, pa.schema([("text", pa.string())]))


def bury(tmp_path, unit, rows=None, attempts=1):
    """Makes rows of a unit dead letters, beside those that cannot be read; gives the table."""
    bad = []
    for chunk in reader(unit).chunks():
        bad += chunk.bad
        for i, place in enumerate(chunk.places):
            if rows is None or place.row in rows:
                whole = None if chunk.whole is None else chunk.whole.slice(i, 1)
                bad.append(BadRow(place, WHY, whole))
    write_letters(str(tmp_path / "out"), letters_name(unit.output), unit, bad, attempts, "m1")
    return pq.read_table(tmp_path / "out" / letters_name(unit.output))


def dig_up(tmp_path, unit, columns=None):
    """The chunks of a replay of a unit's dead letters."""
    replay = Unit(
        id="r1",
        path=unit.path,
        format=unit.format,
        output=f"{unit.output}.replay-1",
        version=unit.version,
        letters=letters_name(unit.output),
        retires=unit.output,
    )
    return list(read_letters(reader(replay, columns), str(tmp_path / "out"))), replay


def test_what_a_letter_says(tmp_path):
    source = write_jsonl(tmp_path / "sub" / "a.jsonl", [{"text": f"t{i}"} for i in range(5)])
    (unit,) = plan(tmp_path / "sub")
    before = datetime.datetime.now(datetime.UTC)
    table = bury(tmp_path, unit, [3, 1], attempts=4)
    assert table.schema == LETTER_SCHEMA
    first, second = table.to_pylist()
    assert before <= first.pop("time") <= datetime.datetime.now(datetime.UTC)
    assert first == {
        "source_file": str(source),
        "source_row": 1,
        "source_byte": 15,
        "n_rows": 1,
        "unit": unit.id,
        "stage": "forward",
        "error": "RuntimeError",
        "reason": "no kernel",
        "attempts": 4,
        "model": "m1",
        "line": b'{"text": "t1"}\n',
        "rest": None,
    }
    assert second["source_row"] == 3


def all_types():
    """A table of all that Parquet holds, its third text not UTF-8."""
    nested = pa.list_(pa.struct([("k", pa.map_(pa.string(), pa.int8())), ("v", pa.float32())]))
    when = datetime.datetime(2024, 1, 1, 1, 2, 3, 456789)
    return pa.table(
        {
            "text": bad_utf8_strings([b"Ada", b"", b"\xff\xfe", "Zoë".encode()]),
            "other": bad_utf8_strings([b"\xff", b"a", b"b\x00", b"c"]),
            "blob": pa.array([b"\xff\x00", None, b"", b"x"], pa.binary()),
            "fixed": pa.array([b"ab", b"cd", None, b"\xff\xff"], pa.binary(2)),
            "small": pa.array([1, None, -128, 127], pa.int8()),
            "large": pa.array([2**63 - 1, -(2**63), 0, None], pa.int64()),
            "unsigned": pa.array([2**64 - 1, 0, None, 1], pa.uint64()),
            "real": pa.array([0.1, float("inf"), None, -0.0], pa.float64()),
            "money": pa.array([decimal.Decimal("1.10"), None] * 2, pa.decimal128(38, 2)),
            "at": pa.array([when, None, when, when], pa.timestamp("us", "Europe/Berlin")),
            "local": pa.array([when] * 4, pa.timestamp("ns")),
            "day": pa.array([when.date(), None] * 2, pa.date32()),
            "time": pa.array([when.time()] * 4, pa.time64("us")),
            "flag": [True, False, None, True],
            "kind": pa.array(["a", None, "b", "a"]).dictionary_encode(),
            "nested": pa.array(
                [[{"k": [("x", 1)], "v": 0.5}], [], None, [{"k": None, "v": None}, None]], nested
            ),
            "nothing": pa.nulls(4),
            "big": pa.array(["a" * 5000, None, "b", "c"], pa.large_string()),
        }
    )


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2], [1, 3]])
def test_a_parquet_row_is_kept_whole(tmp_path, rows, gone):
    """Every column with its type and value, carried or not, though the input is gone."""
    table = all_types()
    source = write_parquet(tmp_path / "a.parquet", table, 3)
    given = pq.read_table(source).replace_schema_metadata(None)
    (unit,) = plan(source)
    bury(tmp_path, unit, rows)
    if gone:
        source.unlink()
    (chunk,), _ = dig_up(tmp_path, unit)
    assert chunk.table.schema == given.schema
    assert chunk.table.combine_chunks().equals(given.take(pa.array(rows)).combine_chunks())
    assert [place.row for place in chunk.places] == rows
    texts = ["Ada", "", b"\xff\xfe", "Zoë"]
    assert chunk.texts == [texts[i] for i in rows]
    (chunk,), _ = dig_up(tmp_path, unit, columns=["day"])
    assert chunk.table.column_names == ["day"]


@pytest.mark.parametrize("change", ["removed", "other rows"])
def test_a_letter_of_a_letter_is_the_same_row(tmp_path, change):
    """Once, a row that failed again was looked up in the input, whatever that held by then."""
    source = write_parquet(tmp_path / "a.parquet", all_types())
    (unit,) = plan(source)
    first = bury(tmp_path, unit, [1, 2])
    if change == "removed":
        source.unlink()
    else:
        write_parquet(source, pa.table({"text": ["new"] * 9}))
    (chunk,), replay = dig_up(tmp_path, unit)
    bad = [BadRow(place, WHY, chunk.whole.slice(i, 1)) for i, place in enumerate(chunk.places)]
    write_letters(str(tmp_path / "out"), letters_name(replay.output), replay, bad, 1, "m1")
    second = pq.read_table(tmp_path / "out" / letters_name(replay.output))
    same = ["source_file", "source_row", "row"]
    assert second.select(same).equals(first.select(same))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_is_kept_to_the_byte(tmp_path, name):
    lines = [
        b'\xef\xbb\xbf{"text": "a",  "n": 1.0}\r\n',
        b'{"text": "\xff"}\n',
        b"{broken\n",
        b"\n",
        '{"text": "Zoë \\ud83d\\ude00", "id": "0007"}'.encode(),
    ]
    source = write_bytes(tmp_path / name, b"".join(lines))
    (unit,) = plan(source)
    table = bury(tmp_path, unit)
    assert table["line"].to_pylist() == [lines[0], lines[1], lines[2], lines[4]]
    assert table["source_row"].to_pylist() == [0, 1, 2, 4]
    source.unlink()
    (chunk,), _ = dig_up(tmp_path, unit)
    assert chunk.texts == ["a", "Zoë \U0001f600"]
    assert [bad.place.row for bad in chunk.bad] == [1, 2]
    assert [place.row for place in chunk.places] == [0, 4]
    assert [bad.place.line for bad in chunk.bad] == lines[1:3]


def test_no_text_outside_the_row_itself(tmp_path):
    source = write_bytes(
        tmp_path / "a.jsonl",
        b'{"text": "canary"}\n{canary\n{"text": "canary\xff"}\n["canary"]\n'
        b'{"text": "canary \\ud800"}\n',
    )
    (unit,) = plan(source)
    table = bury(tmp_path, unit)
    assert len(table) == 5
    assert all(b"canary" in line for line in table["line"].to_pylist())
    others = table.drop_columns(["line"]).to_pylist()
    assert "canary" not in json.dumps(others, default=str)


# ---- what could not be reached ----------------------------------------------------------------


def test_the_rest_of_a_file_that_breaks_off(tmp_path):
    """When the file is whole again it is another; as it was, it breaks off again."""
    rows = [{"text": f"t{i * 7919 % 10007}"} for i in range(2000)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    source.write_bytes(source.read_bytes()[:-300])
    (unit,) = plan(source)
    table = bury(tmp_path, unit, [])
    (letter,) = table.to_pylist()
    n = letter["source_row"]
    assert 0 < n < 2000
    assert (letter["n_rows"], letter["line"]) == (None, None)
    rest = Unit.from_row(json.loads(letter["rest"]))
    assert (rest.path, rest.version, rest.skip_rows) == (unit.path, unit.version, n)
    chunks, _ = dig_up(tmp_path, unit)
    assert [text for chunk in chunks for text in chunk.texts] == []
    (bad,) = [bad for chunk in chunks for bad in chunk.bad]
    assert (bad.place.row, bad.n_rows) == (n, None)
    assert bad.rest is not None
    assert bad.rest.skip_rows == n


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("then", ["as it was", "other rows", "gone"])
def test_the_rest_is_read_only_from_the_file_it_was(tmp_path, name, then):
    """A changed file is taken as a whole by the next run; its rows must not come twice."""
    path = tmp_path / name

    def write(n):
        if name.endswith(".parquet"):
            write_parquet(path, pa.table({"text": [f"t{i}" for i in range(n)]}))
        else:
            write_jsonl(path, [{"text": f"t{i}"} for i in range(n)])

    write(9)
    (unit,) = plan(path)
    rest = Unit.from_row({**unit.to_row(), "skip_rows": 4, "max_rows": 5})
    # As if storage had lost the file while it was read.
    (chunk,) = reader(Unit.from_row({**unit.to_row(), "path": str(tmp_path / "absent")})).chunks()
    (bad,) = chunk.bad
    bad = BadRow(bad.place, bad.failure, n_rows=5, rest=rest)
    write_letters(str(tmp_path / "out"), letters_name(unit.output), unit, [bad], 1, "m1")
    if then == "gone":
        path.unlink()
    elif then == "other rows":
        write(12)
    chunks, replay = dig_up(tmp_path, unit)
    texts = [text for chunk in chunks for text in chunk.texts]
    still_bad = [bad for chunk in chunks for bad in chunk.bad]
    if then == "as it was":
        assert texts == [f"t{i}" for i in range(4, 9)]
        assert still_bad == []
        rows = [place.row for chunk in chunks for place in chunk.places]
        assert rows == list(range(4, 9))
    else:
        assert texts == []
        (again,) = still_bad
        assert (again.rest, again.n_rows) == (rest, 5)
        write_letters(
            str(tmp_path / "out"), letters_name(replay.output), replay, still_bad, 1, "m1"
        )
        paths = [letters_name(unit.output), letters_name(replay.output)]
        first, second = (pq.read_table(tmp_path / "out" / p) for p in paths)
        same = ["source_file", "source_row", "n_rows", "stage", "error", "reason", "rest"]
        assert second.select(same).equals(first.select(same))


def test_rows_and_the_rest_together(tmp_path):
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(40)], "n": range(40)})
    source = write_parquet(tmp_path / "a.parquet", table, 10)
    column = pq.read_metadata(source).row_group(2).column(0)
    start, size = column.dictionary_page_offset, column.total_compressed_size
    content = bytearray(source.read_bytes())
    content[start : start + size] = b"\xff" * size
    source.write_bytes(content)
    (unit,) = plan(source)
    letters = bury(tmp_path, unit, [3, 35]).to_pylist()
    assert [letter["source_row"] for letter in letters] == [3, 20, 35]
    kept = [letter["row"] and letter["row"]["n"] for letter in letters]
    assert kept == [3, None, 35]
    chunks, _ = dig_up(tmp_path, unit)
    assert [place.row for chunk in chunks for place in chunk.places] == [3, 35]
    assert [(b.place.row, b.n_rows) for c in chunks for b in c.bad] == [(20, 10)]


def test_letters_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (unit,) = plan(source)
    bury(tmp_path, unit)
    before = storage.read(str(tmp_path / "out" / letters_name("a")))

    def broken(self, table, **_):
        raise OSError("the disk went away")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", broken)
    with pytest.raises(Exception, match="went away"):
        bury(tmp_path, unit)
    assert storage.read(str(tmp_path / "out" / letters_name("a"))) == before
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 1


def test_replays_of_which_no_row_can_be_read_have_a_file(tmp_path, job):
    """Once, its file was empty, so that the unit was never done."""
    path = write_parquet(tmp_path / "in" / "a.parquet", pa.table({"text": ["a"] * 9}))
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes(30) + whole[50:])
    job(max_dead_letters="9")
    path.unlink()
    for _ in range(2):
        report, _ = job(replay=True, max_dead_letters="9")
        assert (report.exit_code, report.n_rows, report.n_dead) == (0, 9, 9)
    (table,) = [pq.read_table(p) for p in (tmp_path / "out").glob("a.replay-1.parquet")]
    assert (len(table), "text" in table.column_names) == (0, True)
