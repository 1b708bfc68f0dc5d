"""The second run: nothing twice, only what is new, nothing mixed, and old results until the end."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ner_config, write_jsonl, write_parquet
from faulty import FailingTagger, words

from erniem_batch import storage
from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job import JobConfig, result_files, run, run_job
from erniem_batch.job.manifest import read_manifest
from erniem_batch.job.stream import stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def _rows(name, n=30):
    return [{"id": f"{name}-{i}", "text": words(i)} for i in range(n)]


def _config(source, output, model, **options):
    return ner_config(
        JobConfig,
        input=[str(source)], output=str(output), model=str(model), window_tokens=64,
        overlap_tokens=16, num_cpus_per_actor=1, actors="1", **{"unit_bytes": 2000, **options},
    )  # fmt: skip


def _ids(output):
    ids = []
    for path in result_files(str(output)):
        ids += pq.read_table(pa.BufferReader(storage.read(path)))["id"].to_pylist()
    return ids


def _no_ray(monkeypatch):
    def refuse(config):
        raise AssertionError("Ray was started for nothing")

    monkeypatch.setattr(run, "connect", refuse)


def test_night_after_night(tmp_path, ner_model_dir, workers, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "out"
    write_jsonl(source / "a.jsonl", _rows("a"))
    write_parquet(source / "b.parquet", pa.Table.from_pylist(_rows("b")))
    config = _config(source, output, ner_model_dir)
    first = run_job(config)
    assert (first.exit_code, first.n_ok) == (0, 60)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.glob("*.parquet")}

    with monkeypatch.context() as patch:
        _no_ray(patch)
        second = run_job(config)
        assert (second.exit_code, second.n_units_now, second.n_ok) == (0, 0, 60)
        for changes, name in (
            ({"min_score": 0.4}, "--min-score was 0.0, now 0.4"),
            ({"max_batch_tokens": 99}, "--max-batch-tokens was found, now 99"),
            ({"columns": "id"}, r"--columns was None, now \['id'\]"),
        ):
            with pytest.raises(ConfigError, match=name):
                run_job(_config(source, output, ner_model_dir, **changes))
    assert (output / "_SUCCESS").exists()

    write_jsonl(source / "sub" / "c.jsonl", _rows("c", 5))
    third = run_job(config)
    assert (third.exit_code, third.n_units_now, third.n_ok) == (0, 1, 65)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before

    write_jsonl(source / "a.jsonl", _rows("new", 3))
    (source / "b.parquet").unlink()
    fourth = run_job(config)
    assert (fourth.n_units_now, fourth.n_removed_inputs) == (1, 1)
    wanted = [f"{name}-{i}" for name, n in (("new", 3), ("b", 30), ("c", 5)) for i in range(n)]
    assert sorted(_ids(output)) == sorted(wanted)
    names = {p.relative_to(output).as_posix() for p in output.rglob("*.parquet")}
    assert {n for n in names if not n.startswith("_")} == {
        "a.3.parquet", "b.parquet", "sub/c.parquet"
    }  # fmt: skip


def test_lost_results_are_made_again(tmp_path, ner_model_dir, workers):
    """A file that was deleted, one that another program wrote over, a ledger that is gone."""
    source, output = tmp_path / "in", tmp_path / "out"
    for name in "abcd":
        write_jsonl(source / f"{name}.jsonl", _rows(name))
    config = _config(source, output, ner_model_dir)
    run_job(config)
    before = {p.name: p.read_bytes() for p in output.glob("*.parquet")}
    (output / "a-00000.parquet").unlink()
    (output / "b-00000.parquet").write_bytes(before["c-00000.parquet"] + b"x")
    for path in (output / "_run" / "ledger").iterdir():
        path.unlink()
    report = run_job(config)
    assert (report.exit_code, report.n_units_now) == (0, 2)
    assert {p.name: p.read_bytes() for p in output.glob("*.parquet")} == before


def test_a_failed_unit_is_left_for_the_next_run(tmp_path, ner_model_dir, workers, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "out"
    for name in "abc":
        write_jsonl(source / f"{name}.jsonl", _rows(name, 5))
    config = _config(source, output, ner_model_dir)
    with monkeypatch.context() as patch:
        patch.setattr(run, "stream", partial(stream, tagger=FailingTagger))
        report = run_job(config)
    assert (report.exit_code, report.n_missing) == (3, 1)
    assert [r.error for r in report.failed_units] == ["the storage is on fire"]
    assert read_manifest(str(output)) is None
    with pytest.raises(JobError, match="no run has been completed"):
        result_files(str(output))
    again = run_job(config)
    assert (again.exit_code, again.n_units_now, again.n_ok) == (0, 1, 15)
    assert read_manifest(str(output)).names == {"a.parquet", "b.parquet", "c.parquet"}


def test_input_that_changes_during_the_run(tmp_path, ner_model_dir, workers, monkeypatch):
    """Half of the old file and half of the new one is neither."""
    source, output = tmp_path / "in", tmp_path / "out"
    write_jsonl(source / "a.jsonl", _rows("old"))
    config = _config(source, output, ner_model_dir)
    connect = run.connect

    def connect_late(config):
        write_jsonl(source / "a.jsonl", _rows("new", 40))
        return connect(config)

    with monkeypatch.context() as patch:
        patch.setattr(run, "connect", connect_late)
        report = run_job(config)
    assert report.exit_code == 3
    assert {"changed since" in r.error for r in report.failed_units} == {True}
    assert run_job(config).exit_code == 0
    assert _ids(output) == [f"new-{i}" for i in range(40)]


def test_overwrite_keeps_the_old_until_the_new_is_complete(
    tmp_path, ner_model_dir, workers, monkeypatch
):
    source, output = tmp_path / "in", tmp_path / "out"
    for name in "abc":
        write_jsonl(source / f"{name}.jsonl", _rows(name, 5))
    run_job(_config(source, output, ner_model_dir))
    old = {path: Path(path).read_bytes() for path in result_files(str(output))}
    config = _config(source, output, ner_model_dir, min_score=0.9, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "stream", partial(stream, tagger=FailingTagger))
        assert run_job(config).exit_code == 3
    assert {path: Path(path).read_bytes() for path in result_files(str(output))} == old
    assert not (output / "_SUCCESS").exists()
    report = run_job(config)  # goes on, and does not start anew once more
    assert (report.exit_code, report.n_units_now) == (0, 1)
    assert not any(Path(path).exists() for path in old)
    assert sorted(_ids(output)) == sorted(f"{name}-{i}" for name in "abc" for i in range(5))
    with pytest.raises(ConfigError, match=r"--min-score was 0\.9, now 0\.0"):
        run_job(_config(source, output, ner_model_dir))
    assert run_job(config).n_units_now == 3  # it was complete: anew


def test_files_of_others_are_not_written_over(tmp_path, ner_model_dir):
    write_jsonl(tmp_path / "in" / "a.jsonl", _rows("a", 2))
    write_parquet(tmp_path / "out" / "a.parquet", pa.table({"x": [1]}))
    with pytest.raises(ConfigError, match=r"1 files that are not of this run.*a\.parquet"):
        run_job(_config(tmp_path / "in", tmp_path / "out", ner_model_dir))


@pytest.mark.parametrize(
    ("kind", "output_format"),
    [
        ("s3", "parquet"),
        pytest.param("s3", "jsonl", marks=pytest.mark.slow),
        pytest.param("gs", "parquet", marks=pytest.mark.slow),
    ],
)
def test_object_storage(tmp_path, ner_model_dir, request, monkeypatch, kind, output_format):
    """Model too: read, written and gone on with, and the same as from the local disk."""
    folder = request.getfixturevalue(f"{kind}_folder")
    request.getfixturevalue("local_ray")
    rows = [*_rows("a"), {"id": "bad", "text": None}]
    table = pa.Table.from_pylist(_rows("b"))
    write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    write_jsonl(tmp_path / "in" / "z.jsonl.gz", _rows("z", 9))
    write_parquet(tmp_path / "in" / "b b%+ü.parquet", table, group_rows=7)
    for path in (tmp_path / "in").iterdir():
        storage.write(f"{folder}/in/{path.name}", path.read_bytes())
    options = {"output_format": output_format, "max_dead_letters": "2%", "unit_bytes": 900}
    for path in ner_model_dir.iterdir():
        storage.write(f"{folder}/model/{path.name}", path.read_bytes())
    local = run_job(_config(tmp_path / "in", tmp_path / "out", ner_model_dir, **options))
    config = _config(f"{folder}/in", f"{folder}/out", f"{folder}/model", **options)
    report = run_job(config)
    assert (report.exit_code, report.n_ok, report.n_dead) == (0, 69, 1)
    assert (report.n_found, report.n_units) == (local.n_found, local.n_units)
    manifests = [read_manifest(str(out)) for out in (tmp_path / "out", f"{folder}/out")]
    assert manifests[0].names == manifests[1].names
    assert storage.stat(f"{folder}/out/_SUCCESS") is not None
    name = manifests[1].files[1].name
    before = storage.read(f"{folder}/out/{name}")
    storage.delete([f"{folder}/out/{name}"])
    again = run_job(config)
    assert (again.exit_code, again.n_units_now) == (0, 1)
    assert storage.read(f"{folder}/out/{name}") == before
    with monkeypatch.context() as patch:
        _no_ray(patch)
        assert run_job(config).n_units_now == 0


def test_wrong_secret_is_told_before_any_work(tmp_path, ner_model_dir, s3):
    """On the command line: one sentence, exit code 2, and nothing was begun."""
    write_jsonl(tmp_path / "in" / "a.jsonl", _rows("a", 2))
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong", "PYTHONPATH": str(ROOT)}
    for source, output in (
        (s3.url("in"), str(tmp_path / "out")),
        (str(tmp_path / "in"), s3.url("wrong-secret")),
    ):
        command = [sys.executable, "pipelines/ner.py", "--model", str(ner_model_dir)]
        command += ["--input", source, "--output", output]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "credentials" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_report_is_kept(tmp_path, ner_model_dir, local_ray):
    write_jsonl(tmp_path / "in" / "a.jsonl", _rows("a", 4))
    report = run_job(_config(tmp_path / "in", tmp_path / "out", ner_model_dir))
    kept = json.loads((tmp_path / "out" / "_run" / "report.json").read_text())
    line = json.loads(report.as_line())
    assert {name: kept[name] for name in line} == line
    assert kept["n_bytes_read"] > 0
    assert kept["versions"]["torch"]
    assert kept["stage_seconds"]["forward"] > 0
    assert kept["timeline"][-1][1] <= kept["n_tokens_now"]
    page = (tmp_path / "out" / "_run" / "report.html").read_text()
    assert "Where the time went" in page
