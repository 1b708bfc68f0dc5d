"""Every pipeline on 10,000 rows of Parquet and of JSONL (slow): nothing lost, nothing twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import save_tiny_models
from task_rows import JOBS, rows_of, write_rows

from erniem_batch import ErnieMTokenizer, cli
from erniem_batch.job import JobConfig, RunReport, result_files, run_job
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.write import COUNTED_SCHEMA
from erniem_batch.predictor import Predictor

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

N_ROWS = 10_000
PER_FILE = 2_000
SPANS = {"ner": "entities", "qa": "predicted_answers", "extract": "extracted"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> dict[str, Path]:
    """A tiny random model for each task."""
    return save_tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


def config_of(task: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> JobConfig:
    """The settings that a command line stands for."""
    configs: list[JobConfig] = []

    def catch(config: JobConfig, **_: Any) -> None:
        configs.append(config)
        raise cli.ConfigError("caught")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_job", catch)
        patch.setattr(cli, "configure_logging", lambda *_: None)
        patch.setattr(cli, "_say", lambda _: None)
        assert cli.main([task, *JOBS[task].flags, *flags]) == cli.EXIT_USAGE
    return configs[0]


def run(
    folder: Path, task: str, kind: str, model: Path, patch: pytest.MonkeyPatch
) -> tuple[RunReport, list[Path], Path, JobConfig]:
    source = write_rows(folder / kind, task, rows_of(task, N_ROWS), kind, PER_FILE)
    output = folder / f"out-{kind}"
    flags = ["--input", str(source), "--output", str(output), "--model", str(model)]
    flags += ["--window-tokens", "64", "--overlap-tokens", "16", "--actors", "2:2"]
    # A file is a unit and a chunk, in either format, so that batches are equal too.
    flags += ["--num-cpus-per-actor", "1", "--unit-bytes", "100000000"]
    config = config_of(task, patch, *flags, "--max-dead-letters", "20%")
    report = run_job(config)
    return report, [Path(path) for path in result_files(str(output))], output, config


@pytest.mark.parametrize("task", JOBS)
def test_10k(tmp_path, models, local_ray, monkeypatch, task):
    """Each row ends once, as a result or as a dead letter; both formats give the same; the columns
    of all files are the documented ones; every span is where it says."""
    rows = rows_of(task, N_ROWS)
    bad = {row["id"] for row in rows if JOBS[task].is_bad(row)}
    tables = {}
    for kind in ("parquet", "jsonl"):
        report, files, output, config = run(tmp_path, task, kind, models[task], monkeypatch)
        print(
            f"\n10k {task:>8} {kind:>7}: in {report.n_rows:,} out {report.n_ok:,} "
            f"dead {report.n_dead:,} found {report.n_found:,} windows {report.n_windows:,} "
            f"seconds {report.seconds:.1f} (working {report.working_seconds:.1f})"
        )
        assert report.exit_code == 0
        assert report.n_rows == N_ROWS == report.n_ok + report.n_dead
        assert report.n_found > 0
        assert len(files) == report.n_units == N_ROWS // PER_FILE

        predictor = Predictor.load(config.predictor)
        added = pa.schema([*predictor.task.schema, *COUNTED_SCHEMA])
        expected = pa.schema([("id", pa.string()), *JOBS[task].columns, *added])
        parts = [pq.read_table(path).replace_schema_metadata(None) for path in files]
        assert all(part.schema == expected for part in parts)
        tables[kind] = pa.concat_tables(parts)

        letters = pa.concat_tables(
            [pq.read_table(path) for path in sorted((output / DEAD_LETTERS).glob("*.parquet"))]
        ).to_pylist()
        dead = [_id_of(letter) for letter in letters]
        ids = tables[kind]["id"].to_pylist()
        assert ids == [row["id"] for row in rows if row["id"] not in bad]
        assert Counter(ids + dead) == Counter(row["id"] for row in rows)
        carried = tables[kind].select(expected.names[: 1 + len(JOBS[task].columns)]).to_pylist()
        assert carried == [row for row in rows if row["id"] not in bad]
        assert max(tables[kind]["n_windows"].to_pylist()) > 2
        if task in SPANS:
            _check_spans(files, SPANS[task], "context" if task == "qa" else "text")
    assert tables["parquet"].equals(tables["jsonl"])


def _id_of(letter: dict[str, Any]) -> str:
    if letter["line"] is None:
        row_id: str = letter["row"]["id"]
        return row_id
    return letter["line"].decode().split('"id": "')[1][:6]


def _check_spans(files: list[Path], column: str, text_column: str) -> None:
    """With pandas; extracted items also with DuckDB, by what SQL makes of code points."""
    frame = pd.concat([pd.read_parquet(path) for path in files])
    n_spans = 0
    for text, spans in zip(frame[text_column], frame[column], strict=True):
        for span in spans:
            if not pd.isna(span["start"]):  # as the starts of options are
                # pandas has floats where one of the integers of a list is null.
                assert text[int(span["start"]) : int(span["end"])] == span["text"]
                n_spans += 1
    assert n_spans > 0
    try:
        import duckdb
    except ImportError:
        return
    names = ", ".join(f"'{path}'" for path in files)
    query = f"""
        SELECT count(*), count(*) FILTER (
            array_to_string(string_split(body, '')[span."start" + 1 : span."end"], '') = span.text)
        FROM (SELECT {text_column} AS body, unnest({column}) AS span
              FROM read_parquet([{names}]))
        WHERE span."start" IS NOT NULL
    """
    assert duckdb.sql(query).fetchall() == [(n_spans, n_spans)]
