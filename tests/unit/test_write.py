import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from erniem_batch.job.units import Unit
from erniem_batch.job.write import (
    ADDED_SCHEMA,
    DEAD_LETTERS,
    add_predictions,
    atomic_file,
    write_dead_letters,
    write_tables,
)
from erniem_batch.records import Entity, Failure, Prediction

UNIT = Unit(id="u1", path="in/a.jsonl", format="jsonl", output="sub/a-00001")


def _tables(n, fail_after=None):
    for i in range(n):
        if i == fail_after:
            raise OSError("the disk went away")
        yield pa.table({"text": [f"a{i}", "б"], "n": [i, None]})


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_parquet(tmp_path):
    assert write_tables(tmp_path / "sub" / "a.parquet", _tables(3), "parquet") == 6
    assert _files(tmp_path) == ["sub/a.parquet"]
    found = pq.read_table(tmp_path / "sub" / "a.parquet")
    assert found.equals(pa.concat_tables(_tables(3)))


def test_jsonl(tmp_path):
    assert write_tables(tmp_path / "a.jsonl", _tables(2), "jsonl") == 4
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == pa.concat_tables(_tables(2)).to_pylist()
    assert "б" in lines[1]


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("fail_after", [0, 2])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch, output_format, fail_after):
    """Once, the writer of the lost file complained from the garbage collector."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    path = tmp_path / f"a.{output_format}"
    with pytest.raises(OSError, match="went away"):
        write_tables(path, _tables(4, fail_after), output_format)
    assert _files(tmp_path) == []
    assert complaints == []


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_tables(path, _tables(1), "jsonl")
    before = path.read_bytes()
    with pytest.raises(OSError, match="went away"):
        write_tables(path, _tables(4, 2), "jsonl")
    assert path.read_bytes() == before
    assert _files(tmp_path) == ["a.jsonl"]


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(".")  # so no job takes it for input
    assert path.read_bytes() == b"half"


def test_interrupt_leaves_nothing(tmp_path):
    def interrupted():
        yield from _tables(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tables(tmp_path / "a.parquet", interrupted(), "parquet")
    assert _files(tmp_path) == []


def test_predictions_become_columns():
    predictions = [
        Prediction("0", [Entity(0, 3, "PER", "Ada", 0.5), Entity(4, 5, "LOC", "b", 1.0)], 7, 1),
        Prediction("1", [], 0, 0),
        Prediction("2", [Entity(1, 2, "LOC", "б", 0.25)], 9, 2, truncated=True),
    ]
    table = add_predictions(pa.table({"id": ["x", "y", "z"]}), predictions)
    assert table.schema == pa.schema([("id", pa.string()), *ADDED_SCHEMA])
    assert table.to_pylist() == [
        {
            "id": "x",
            "entities": [
                {"start": 0, "end": 3, "label": "PER", "text": "Ada", "score": 0.5},
                {"start": 4, "end": 5, "label": "LOC", "text": "b", "score": 1.0},
            ],
            "n_tokens": 7,
            "n_windows": 1,
            "truncated": False,
        },
        {"id": "y", "entities": [], "n_tokens": 0, "n_windows": 0, "truncated": False},
        {
            "id": "z",
            "entities": [{"start": 1, "end": 2, "label": "LOC", "text": "б", "score": 0.25}],
            "n_tokens": 9,
            "n_windows": 2,
            "truncated": True,
        },
    ]


def test_no_rows_have_the_same_columns():
    empty = pa.table({"id": pa.array([], pa.string())})
    assert add_predictions(empty, []).schema == pa.schema([("id", pa.string()), *ADDED_SCHEMA])


def test_dead_letters(tmp_path):
    failures = {
        12: Failure("12", "encode", "RecordError", "text must be a string, got null"),
        3: Failure("3", "read", "RecordError", "not JSON: … at character 4 of the line"),
    }
    write_dead_letters(tmp_path, UNIT, failures)
    assert _files(tmp_path) == [f"{DEAD_LETTERS}/sub/a-00001.jsonl"]
    content = (tmp_path / DEAD_LETTERS / "sub" / "a-00001.jsonl").read_text(encoding="utf-8")
    letters = [json.loads(line) for line in content.splitlines()]
    assert letters == [
        {
            "source_file": "in/a.jsonl",
            "source_row": row,
            "unit": "u1",
            "stage": failures[row].stage,
            "error": "RecordError",
            "reason": failures[row].reason,
        }
        for row in (3, 12)
    ]
