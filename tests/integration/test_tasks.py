"""Every pipeline but NER from end to end, as its user starts it; NER is in test_job.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import save_tiny_models
from task_rows import JOBS, rows_of, write_rows

from erniem_batch import ErnieMTokenizer, cli
from erniem_batch.job import result_files
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.write import COUNTED_SCHEMA
from erniem_batch.options import OPTIONS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

N_ROWS = 200

Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> dict[str, Path]:
    """A tiny random model for each task."""
    return save_tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture
def command(local_ray, models, capsys, monkeypatch) -> Command:
    """Runs one command: exit code, report (None without one), and what went to stderr."""
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)  # its handler outlives the test

    def run(task: str, source: Path, output: Path, *flags: str) -> tuple[int, Any, str]:
        arguments = [task, "--input", str(source), "--output", str(output), *JOBS[task].flags]
        arguments += ["--model", str(models[task]), "--window-tokens", "64"]
        arguments += ["--overlap-tokens", "16", "--num-cpus-per-actor", "1", "--actors", "1"]
        arguments += ["--max-dead-letters", "20%", *flags]
        code = cli.main(arguments)
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


@pytest.mark.parametrize(
    ("task", "kind", "change", "told"),
    [
        ("classify", "parquet", ["--pooling", "max"], "--pooling was mean, now max"),
        ("choose", "jsonl", ["--premise-column", "question"], "--premise-column was premise, now"),
        ("qa", "parquet", ["--max-answer-tokens", "3"], "--max-answer-tokens was 15, now 3"),
        ("embed", "jsonl", ["--no-normalize"], "--normalize was True, now False"),
        ("extract", "parquet", ["--position-prob", "0.4"], "--position-prob was 0.5, now 0.4"),
    ],
)
def test_a_pipeline(tmp_path, command, task, kind, change, told):
    """Rows in are rows out and dead letters, in order; a second run does nothing; a third one
    with another option is refused, and its flag is named."""
    rows = rows_of(task, N_ROWS)
    source = write_rows(tmp_path / "in", task, rows, kind, per_file=120)
    output = tmp_path / "out"
    code, report, _ = command(task, source, output)
    bad = [row for row in rows if JOBS[task].is_bad(row)]
    assert bad
    assert (code, report["n_rows"], report["n_dead"]) == (0, N_ROWS, len(bad))
    assert report["n_ok"] == N_ROWS - len(bad)
    assert report["n_found"] > 0
    tables = [pq.read_table(path) for path in result_files(str(output))]
    assert len(tables) == 2
    found = [row for table in tables for row in table.to_pylist()]
    assert [row["id"] for row in found] == [row["id"] for row in rows if row not in bad]
    letters = [
        letter
        for path in sorted((output / DEAD_LETTERS).glob("*.parquet"))
        for letter in pq.read_table(path).to_pylist()
    ]
    kept = [x["row"] if kind == "parquet" else json.loads(x["line"]) for x in letters]
    assert kept == bad
    added = (*OPTIONS[task].output_columns, *COUNTED_SCHEMA.names)
    for table in tables:
        names = [name for name in table.column_names if name != "extracted_json"]
        assert names == ["id", *(name for name, _ in JOBS[task].columns), *added]
    assert (output / "_SUCCESS").exists()

    before = {p: p.stat().st_mtime_ns for p in output.glob("*.parquet")}
    code, report, _ = command(task, source, output)
    assert (code, report["n_units_now"], report["n_ok"]) == (0, 0, N_ROWS - len(bad))
    code, report, error = command(task, source, output, *change)
    assert (code, report) == (2, None)
    assert told in error
    assert {p: p.stat().st_mtime_ns for p in output.glob("*.parquet")} == before
    assert (output / "_SUCCESS").exists()
