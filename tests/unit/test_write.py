import hashlib
import json
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ADDED_SCHEMA, LABELS

from erniem_batch.job.write import (
    MARKS,
    Marks,
    add_predictions,
    read_marks,
    sidecar,
    write_tables,
)
from erniem_batch.records import Prediction
from erniem_batch.tasks.ner import Entity, NerTask

MARK = Marks("u1", "f1", {"path": "in/a.jsonl", "start": 0}, {"n_rows": 6, "n_ok": 6})
SIDECAR = "_run/sidecars/sub/a.jsonl.json"


def _tables(n, fail_after=None):
    for i in range(n):
        if i == fail_after:
            raise OSError("the disk went away")
        yield pa.table({"text": [f"a{i}", "б"], "n": [i, None]})


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _write(folder, name, tables, marks=lambda: MARK):
    return write_tables(str(folder), name, tables, marks)[:2]


def test_parquet(tmp_path):
    n_rows, n_bytes = _write(tmp_path, "sub/a.parquet", _tables(3))
    assert _files(tmp_path) == ["sub/a.parquet"]
    path = tmp_path / "sub" / "a.parquet"
    assert (n_rows, n_bytes) == (6, path.stat().st_size)
    found = pq.read_table(path)
    expected = pa.concat_tables(_tables(3))
    assert found.equals(expected)
    assert found.replace_schema_metadata(None).schema.equals(expected.schema)


def test_jsonl(tmp_path):
    n_rows, n_bytes = _write(tmp_path, "sub/a.jsonl", _tables(2))
    assert _files(tmp_path) == [SIDECAR, "sub/a.jsonl"]
    path = tmp_path / "sub" / "a.jsonl"
    assert (n_rows, n_bytes) == (4, path.stat().st_size)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == pa.concat_tables(_tables(2)).to_pylist()
    assert "б" in lines[1]


# ---- all or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("fail_after", [0, 2])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch, name, fail_after):
    """Once, the writer of the lost file complained from the garbage collector."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with pytest.raises(Exception, match="went away"):
        _write(tmp_path, name, _tables(4, fail_after))
    assert _files(tmp_path) == []
    assert read_marks(str(tmp_path), name) is None
    assert complaints == []


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_error_in_the_marks_leaves_nothing(tmp_path, name):
    def wrong():
        raise AssertionError("counts differ")

    with pytest.raises(AssertionError, match="counts differ"):
        _write(tmp_path, name, _tables(2), wrong)
    assert _files(tmp_path) == []


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_error_leaves_the_old_file(tmp_path, name):
    _write(tmp_path, name, _tables(1))
    before = {p: (tmp_path / p).read_bytes() for p in _files(tmp_path)}
    with pytest.raises(Exception, match="went away"):
        _write(tmp_path, name, _tables(4, 2), lambda: replace(MARK, unit="u2"))
    assert {p: (tmp_path / p).read_bytes() for p in _files(tmp_path)} == before
    marks = read_marks(str(tmp_path), name)
    assert marks is not None
    assert marks.unit == "u1"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_appears_only_when_it_is_complete(tmp_path, name):
    seen = []

    def tables():
        for table in _tables(3):
            seen.append(_files(tmp_path))
            yield table

    _write(tmp_path, name, tables())
    (temporary,) = {file for files in seen for file in files}
    assert temporary.startswith(".")  # so no job takes it for input
    assert name in _files(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_interrupt_leaves_nothing(tmp_path, name):
    def interrupted():
        yield from _tables(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, name, interrupted())
    assert _files(tmp_path) == []


# ---- marks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sub/a.parquet", "sub/a.jsonl"])
def test_marks_come_back(tmp_path, name):
    asked = []

    def marks():
        asked.append(len(asked))
        return MARK

    _, n_bytes = _write(tmp_path, name, _tables(3), marks)
    jsonl = name.endswith(".jsonl")
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    expected = replace(MARK, n_bytes=n_bytes, sha256=digest) if jsonl else MARK
    assert read_marks(str(tmp_path), name) == expected
    assert asked == [0]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_two_runs_write_the_same_bytes(tmp_path, name):
    for folder in ("one", "two"):
        _write(tmp_path / folder, name, _tables(3))
    one, two = (_files(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    for file in one:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_files_that_are_not_ours_have_no_marks(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "plain.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    other = pa.table({"text": ["a"]}).replace_schema_metadata({MARKS: b'{"unit": "u1"}'})
    pq.write_table(other, tmp_path / "other.parquet")
    (tmp_path / "plain.jsonl").write_bytes(b"{}\n")
    for name in ("plain.parquet", "cut.parquet", "other.parquet", "plain.jsonl", "absent.jsonl"):
        assert read_marks(str(tmp_path), name) is None, name


def test_marks_of_another_jsonl_file(tmp_path):
    """The two are written one after the other: only together they count."""
    _write(tmp_path, "a.jsonl", _tables(1))
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    assert read_marks(str(tmp_path), "a.jsonl") is None
    _write(tmp_path, "b.jsonl", _tables(1))
    (tmp_path / "b.jsonl").unlink()
    assert read_marks(str(tmp_path), "b.jsonl") is None
    with open(sidecar(str(tmp_path), "b.jsonl"), "wb") as file:
        file.write(b"{broken")
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    assert read_marks(str(tmp_path), "b.jsonl") is None


# ---- predictions ------------------------------------------------------------------------------


@pytest.fixture
def task(tokenizer):
    return NerTask(tokenizer, LABELS)


def test_predictions_become_columns(task):
    predictions = [
        Prediction("0", [Entity(0, 3, "PER", "Ada", 0.5), Entity(4, 5, "LOC", "b", 1.0)], 7, 1),
        Prediction("1", [], 0, 0),
        Prediction("2", [Entity(1, 2, "LOC", "б", 0.25)], 9, 2, truncated=True),
    ]
    table = add_predictions(pa.table({"id": ["x", "y", "z"]}), predictions, task)
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


def test_no_rows_have_the_same_columns(task):
    empty = pa.table({"id": pa.array([], pa.string())})
    assert add_predictions(empty, [], task).schema == pa.schema(
        [("id", pa.string()), *ADDED_SCHEMA]
    )
