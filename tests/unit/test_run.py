"""Whole runs without Ray: the units are tagged in this process, and it stops where a test says."""

import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import KILLER, Killed, RefusingTagger, write_bytes, write_jsonl, write_parquet

from erniem_batch import storage
from erniem_batch.errors import ConfigError, JobError, StorageError
from erniem_batch.job import finish, result_files, run
from erniem_batch.job.actor import UnitTagger


def data(output):
    """Bytes of all files that a reader may come across."""
    paths = [p for p in output.rglob("*") if p.is_file() and p.name[0] != "."]
    return {
        p.relative_to(output).as_posix(): p.read_bytes() for p in paths if "_run" not in p.parts
    }


def texts(output):
    return [
        text
        for path in result_files(str(output))
        for text in pq.read_table(path)["text"].to_pylist()
    ]


def unowned(output):
    """The files, but for which run has published them."""
    files = {name: content for name, content in data(output).items() if name != "_SUCCESS"}
    values = json.loads(files["_manifest.json"])
    del values["lease"], values["checksum"]
    return files | {"_manifest.json": values}


def corpus(tmp_path, n=6):
    for i in range(n):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [{"text": f"Ada {i} {j}"} for j in range(3)])


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_a_killed_run_is_gone_on_with(tmp_path, job, output_format):
    corpus(tmp_path)
    job(output=str(tmp_path / "undisturbed"), output_format=output_format)
    numbers = []
    for units in (2, 0, 3):
        with pytest.raises(Killed):
            job(units=units, output_format=output_format)
        assert not (tmp_path / "out" / "_manifest.json").exists()
        numbers.append(len(data(tmp_path / "out")))
    assert numbers == [2, 2, 5]
    report, done = job(output_format=output_format)
    assert (report.exit_code, len(done), report.n_rows) == (0, 1, 18)
    assert unowned(tmp_path / "out") == unowned(tmp_path / "undisturbed")
    report, done = job(output_format=output_format)
    assert (report.exit_code, done) == (0, [])


def test_success_is_taken_away_first(tmp_path, job):
    corpus(tmp_path, 2)
    job()
    before = data(tmp_path / "out")
    write_jsonl(tmp_path / "in" / "9.jsonl", [{"text": "Bob"}])
    with pytest.raises(Killed):
        job(units=0)
    after = data(tmp_path / "out")
    assert before.keys() - after.keys() == {"_SUCCESS"}
    assert texts(tmp_path / "out") == [f"Ada {i} {j}" for i in range(2) for j in range(3)]
    report, _ = job()
    assert (report.exit_code, texts(tmp_path / "out")[-1]) == (0, "Bob")


@pytest.mark.parametrize("killed_at", ["publish", "delete", "write_report", "mark_success"])
@pytest.mark.parametrize("change", ["file", "settings"])
def test_killed_while_it_publishes(tmp_path, job, monkeypatch, killed_at, change):
    """A reader finds the night before or this one, and nothing is left lying about."""
    corpus(tmp_path, 3)
    job()
    old = sorted(texts(tmp_path / "out"))
    options = {}
    if change == "file":
        write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": "new"}])
        new = sorted([text for text in old if not text.startswith("Ada 1")] + ["new"])
    else:
        options = {"min_score": 0.9, "overwrite": True}
        new = old

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        targets = {
            "publish": (finish, "publish"),
            "write_report": (run.RunFolder, "write_report"),
            "mark_success": (finish, "mark_success"),
        }
        if killed_at == "delete":
            publish = finish.publish

            def publish_and_die(*arguments):
                publish(*arguments)
                raise Killed

            patch.setattr(finish, "publish", publish_and_die)
        else:
            patch.setattr(*targets[killed_at], kill)
        with pytest.raises(Killed):
            job(**options)
    assert sorted(texts(tmp_path / "out")) in (old, new)
    options.pop("overwrite", None)
    if killed_at == "publish" and change == "settings":
        options["overwrite"] = True
    report, done = job(**options)
    assert (report.exit_code, done) == (0, [])
    assert sorted(texts(tmp_path / "out")) == new
    named = {Path(path).name for path in result_files(str(tmp_path / "out"))}
    assert data(tmp_path / "out").keys() == named | {"_manifest.json", "_SUCCESS"}


def test_overwrite_of_a_run_that_was_never_complete(tmp_path, job):
    """Its files are no result of anything: a reader of the whole folder would read rows twice."""
    corpus(tmp_path, 3)
    with pytest.raises(Killed):
        job(units=2)
    with pytest.raises(ConfigError, match="--min-score"):
        job(min_score=0.9)
    with pytest.raises(Killed):
        job(units=1, min_score=0.9, overwrite=True)
    report, _ = job(min_score=0.8, overwrite=True)
    assert (report.exit_code, report.n_rows) == (0, 9)
    named = {Path(path).name for path in result_files(str(tmp_path / "out"))}
    assert data(tmp_path / "out").keys() == named | {"_manifest.json", "_SUCCESS"}


def test_a_run_that_lost_its_lease_publishes_nothing(tmp_path, job, monkeypatch):
    corpus(tmp_path, 2)
    job()
    before = texts(tmp_path / "out")
    write_jsonl(tmp_path / "in" / "9.jsonl", [{"text": "Bob"}])
    assess = run.RunFolder.assess
    calls = []

    def taken_over(self, *arguments):
        calls.append(1)
        if len(calls) == 2:  # the work is done; this process stood still, another took over
            storage.delete([f"{self.output}/_run/lease.json"])
            run.Lease(self.output).acquire()
            monkeypatch.setattr("erniem_batch.job.lease.BEAT_S", -1.0)
        return assess(self, *arguments)

    monkeypatch.setattr(run.RunFolder, "assess", taken_over)
    with pytest.raises(JobError, match="another run has taken over"):
        job()
    assert texts(tmp_path / "out") == before


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_run_that_lost_its_lease_says_so(tmp_path, job, monkeypatch, is_lost):
    """The other run has removed an unfinished file of this one: that is not what matters."""
    corpus(tmp_path, 1)

    def fail(folder, *_):
        if is_lost:
            storage.delete([f"{folder.output}/_run/lease.json"])
            run.Lease(folder.output).acquire()
        raise StorageError("x: another run has removed its unfinished file")

    monkeypatch.setattr(run, "finish", fail)
    error, text = (JobError, "taken over") if is_lost else (StorageError, "its unfinished file")
    with pytest.raises(error, match=text):
        job()


def test_rows_that_do_not_add_up_are_not_published(tmp_path, job):
    corpus(tmp_path, 2)

    class Losing(UnitTagger):
        def _chunks(self, reader, attempt):
            for chunk in super()._chunks(reader, attempt):
                yield type(chunk)(chunk.table.slice(1), chunk.texts[1:], chunk.places[1:])

    write_parquet(tmp_path / "in" / "p.parquet", pa.table({"text": ["a", "b"]}))
    with pytest.raises(JobError, match=r"differ in 1 units \(p\.parquet\)"):
        job(Losing)
    assert not (tmp_path / "out" / "_manifest.json").exists()


# ---- replay -------------------------------------------------------------------------------------


def test_a_replay_that_was_killed(tmp_path, job):
    """Once, it was planned a second time, and its rows counted twice."""
    for name in "ab":
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": name}, {"text": KILLER}])
    report, _ = job(RefusingTagger)
    assert (report.exit_code, report.n_ok, report.n_dead) == (4, 2, 2)
    for units in (0, 1):
        with pytest.raises(Killed):
            job(replay=True, units=units)
    assert texts(tmp_path / "out") == ["a", "b"]
    report, done = job(replay=True)
    assert (report.exit_code, report.n_rows, report.n_ok, report.n_units) == (0, 4, 4, 4)
    assert len(done) == 1
    assert texts(tmp_path / "out") == ["a", "b", KILLER, KILLER]
    assert not [name for name in data(tmp_path / "out") if name.startswith("_dead_letters")]


def test_a_killed_replay_is_finished_by_the_next_run(tmp_path, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}, {"text": KILLER}])
    job(RefusingTagger)
    with pytest.raises(Killed):
        job(replay=True, units=0)
    report, done = job()
    assert (report.exit_code, report.n_rows, report.n_ok, len(done)) == (0, 2, 2, 1)


@pytest.mark.parametrize("killed_at", ["publish", "after publish"])
def test_a_replay_that_is_killed_while_it_publishes(tmp_path, job, monkeypatch, killed_at):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}, {"text": KILLER}])
    job(RefusingTagger)
    publish = finish.publish

    def die(*arguments):
        if killed_at == "after publish":
            publish(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finish, "publish", die)
        with pytest.raises(Killed):
            job(replay=True)
    report, done = job(replay=True)
    assert (report.exit_code, report.n_rows, report.n_ok, done) == (0, 2, 2, [])
    assert texts(tmp_path / "out") == ["a", KILLER]
    assert not [name for name in data(tmp_path / "out") if name.startswith("_dead_letters")]


def test_a_changed_file_retires_its_replays(tmp_path, job):
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}, {"text": KILLER}])
    job(RefusingTagger)
    job(replay=True)
    write_jsonl(source, [{"text": "b"}, {"text": None}])
    report, _ = job(max_dead_letters="1")
    assert (report.exit_code, report.n_rows, report.n_dead) == (0, 2, 1)
    assert texts(tmp_path / "out") == ["b"]
    names = [name for name in data(tmp_path / "out") if name[0] != "_" or "letters" in name]
    assert [re.sub(r"rows-\w{8}", "rows", name) for name in sorted(names)] == [
        "_dead_letters/a.3.rows.parquet", "a.3.parquet",
    ]  # fmt: skip


# ---- what else ----------------------------------------------------------------------------------


def test_limit_over_two_nights(tmp_path, job):
    corpus(tmp_path, 3)
    report, _ = job(limit=4)
    assert (report.n_rows, texts(tmp_path / "out")[-1]) == (4, "Ada 1 0")
    report, done = job(limit=4)
    assert (report.n_rows, report.exit_code, done) == (4, 0, [])


@pytest.mark.parametrize("name", ["1.jsonl", "1.parquet"])
def test_limit_and_a_file_that_vanishes(tmp_path, job, name):
    """Once, its rows were counted as one, so that rows in and out could never be equal."""
    corpus(tmp_path, 1)
    source = tmp_path / "in" / name
    if name.endswith("jsonl"):
        write_jsonl(source, [{"text": "b"}] * 5)
    else:
        write_parquet(source, pa.table({"text": ["b"] * 5}))
    with pytest.raises(Killed):
        job(units=1, limit=7)
    source.unlink()
    report, _ = job(limit=7)
    assert (report.exit_code, report.n_rows, report.n_ok, report.n_dead) == (4, 7, 3, 4)


def test_no_text_of_a_document_leaves_the_data(tmp_path, job, caplog, monkeypatch):
    """Not in logs, the run folder, names, the report; only in the rows themselves."""
    write_bytes(
        tmp_path / "in" / "a.jsonl",
        b'{"text": "canary one"}\n{"text": 7, "x": "canary"}\n{canary\n["canary"]\n'
        b'{"text": "canary \xff"}\n{"text": "canary \\ud800"}\n{"canary": 1}\n',
    )
    table = pa.table({"text": ["canary", None], "x": ["canary", "canary"]})
    write_parquet(tmp_path / "in" / "b.parquet", table)
    monkeypatch.setattr(logging.getLogger("erniem_batch"), "propagate", True)
    with caplog.at_level(logging.DEBUG):
        report, done = job()
    assert (report.n_ok, report.n_dead) == (2, 7)
    told = caplog.text + report.as_line() + repr(done)
    assert "canary" not in told
    output = tmp_path / "out"
    for path in [output / "_manifest.json", *(output / "_run").rglob("*")]:
        if path.is_file() and "plan" not in path.parts:
            assert b"canary" not in path.read_bytes(), path
    for path in (output / "_dead_letters").rglob("*.parquet"):
        letters = pq.read_table(path)
        kept = [name for name in ("line", "row") if name in letters.column_names]
        assert "canary" not in json.dumps(letters.drop_columns(kept).to_pylist(), default=str)
