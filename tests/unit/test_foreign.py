"""What is beside the data: refused before the work, or left out by name."""

import json
import logging

import pyarrow as pa
import pytest
from fakes import write_bytes, write_jsonl, write_parquet

from erniem_batch.errors import ConfigError
from erniem_batch.job.jsonsample import NotLines, require_all_lines
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import files_of, find_files

ROWS = [{"text": f"Ada {i}", "n": i} for i in range(5000)]
TABLE = pa.table({"text": ["Ada"]})


def files(path):
    return list(files_of(find_files([str(path)])))


# ---- JSON that is no JSON Lines -----------------------------------------------------------------

NOT_LINES = {
    "array in one line": json.dumps(ROWS[:3]),
    "large array in one line": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS[:3], indent=2),
    "large pretty array": json.dumps(ROWS, indent=2),
    "a row in each line": "[\n" + ",\n".join(map(json.dumps, ROWS[:3])) + "\n]\n",
    "large, a row in each line": "[" + ",\n".join(map(json.dumps, ROWS)) + "]",
    "pretty object": json.dumps(ROWS[0], indent=2),
    "pretty objects": "\n".join(json.dumps(row, indent=1) for row in ROWS[:3]),
    "large pretty object": json.dumps({"rows": ROWS}, indent=2),
    "long text": json.dumps([{"text": "x" * 300_000}], indent=2),
    "empty array": "[]",
    "blank lines before": "\n\n  [\n" + json.dumps(ROWS[0]) + "\n]",
    "byte order mark": "\ufeff" + json.dumps(ROWS[:3]),
}


@pytest.mark.parametrize("kind", NOT_LINES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_not_json_lines(tmp_path, kind, name):
    """Once, each line of it became a dead letter at the end of the night."""
    path = write_bytes(tmp_path / name, NOT_LINES[kind].encode())
    what = "a JSON object over several lines" if "object" in kind else "a JSON array"
    remedy = r"jq -c \." if "object" in kind else r"jq -c '\.\[\]'"
    with pytest.raises(ConfigError, match=f"{name}: {what}, not JSON Lines: .*{remedy}"):
        input_schema(files(path), "text", None)


LINES = {
    "objects": '{"text": "a"}\n{"text": "b"}\n',
    "one object": '{"text": "a"}',
    "one long object": json.dumps({"text": "x" * 300_000}),
    "a bad line first": '{"text": "a"\n{"text": "b"}\n',
    "a list first": '["a", "b"]\n{"text": "b"}\n',
    "lists of strings": '["a", "b"]\n["a"]\n',
    "only bad lines": "{\n[]\n",
    "text": "[not JSON]\n",
    "nested": "[" * 5000,
    "nothing": "",
}


@pytest.mark.parametrize("kind", LINES)
def test_json_lines_good_or_bad(tmp_path, kind):
    """What may be lines is left to the reader, which makes dead letters of bad ones."""
    path = write_bytes(tmp_path / "a.json", LINES[kind].encode())
    input_schema(files(path), "text", None)
    require_all_lines(files(path))


def test_an_array_among_good_files_is_refused(tmp_path):
    """Files named .json are all looked at; only some of the others are."""
    for i in range(9):
        write_jsonl(tmp_path / f"{i}.jsonl", ROWS[:2])
    write_bytes(tmp_path / "z.json.gz", json.dumps(ROWS[:2]).encode())
    assert "text" in input_schema(files(tmp_path), "text", None).names
    with pytest.raises(NotLines, match=r"z\.json\.gz: a JSON array"):
        require_all_lines(files(tmp_path))


def test_a_job_refuses_an_array_before_the_work(tmp_path, job):
    write_bytes(tmp_path / "in" / "a.json", json.dumps(ROWS[:2]).encode())
    with pytest.raises(ConfigError, match="a JSON array, not JSON Lines"):
        job()
    (tmp_path / "in" / "a.json").unlink()
    write_jsonl(tmp_path / "in" / "b.jsonl", ROWS[:2])
    assert job()[0].n_ok == 2
    write_bytes(tmp_path / "in" / "c.json", json.dumps(ROWS[:2]).encode())
    with pytest.raises(ConfigError, match="a JSON array, not JSON Lines"):  # the next night, too
        job()


# ---- left out -----------------------------------------------------------------------------------


def test_files_that_are_left_out_are_named(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    for name in ("dataset_info.json", "de/state.json", "b.csv", "c.jsonl.bz2", "README"):
        write_bytes(tmp_path / name, b"{}")
    with caplog.at_level(logging.INFO):
        found = files(tmp_path)
    assert [file.name for file in found] == ["a"]
    for name in ("dataset_info.json", "de/state.json"):
        assert f"left out, it describes data: {tmp_path / name}" in caplog.text
    assert "left out files=3 such as " in caplog.text


def test_a_description_that_is_named_is_read(tmp_path):
    path = write_jsonl(tmp_path / "state.json", ROWS[:1])
    assert [file.name for file in files(path)] == ["state"]
    with pytest.raises(ConfigError, match="none of the files found there is"):
        files(tmp_path)


# ---- tables of other formats --------------------------------------------------------------------

TABLES = {
    "Delta Lake": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/v1.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
}


@pytest.mark.parametrize("format_", TABLES)
@pytest.mark.parametrize("asked", ["t", "t/*.parquet", "t/data", "t/data/x.parquet", "."])
def test_tables_of_other_formats(tmp_path, format_, asked):
    """Read as plain Parquet, deleted rows would come back."""
    write_parquet(tmp_path / "t" / "data" / "x.parquet", TABLE)
    write_parquet(tmp_path / "t" / "y.parquet", TABLE)
    write_bytes(tmp_path / "t" / TABLES[format_], b"{}")
    with pytest.raises(ConfigError, match=f"/t is a table of {format_}: .*deleted"):
        files(tmp_path / asked)


def test_folders_that_look_like_tables(tmp_path):
    write_parquet(tmp_path / "t" / "x.parquet", TABLE)
    write_jsonl(tmp_path / "t" / "metadata" / "a.jsonl", ROWS[:1])
    write_bytes(tmp_path / "t" / "_old" / "_delta_log" / "0.json", b"{}")
    assert len(files(tmp_path / "t")) == 2
