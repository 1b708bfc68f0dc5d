"""`status`: how far a run is, from its folder alone."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import count

import pytest
from fakes import KILLER, Killed, RefusingTagger, write_jsonl

from erniem_batch.cli import main
from erniem_batch.errors import ConfigError
from erniem_batch.job import lease, status
from erniem_batch.job.actor import UnitTagger
from erniem_batch.job.lease import Lease
from erniem_batch.job.rundir import RunFolder


def corpus(tmp_path, n=4):
    for i in range(n):
        rows = [{"text": f"Ada {i} {j}"} for j in range(3)] + [{"text": None}]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", rows)


def test_a_run_that_has_ended(tmp_path, job, capsys):
    corpus(tmp_path)
    job(max_dead_letters="50%")
    assert main(["status", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert found["state"] == "ended"
    assert (found["units"], found["units_done"], found["done_share"]) == (4, 4, 1.0)
    assert (found["rows"], found["n_ok"], found["n_dead"]) == (16, 12, 4)
    assert (found["success"], found["exit_code"], found["task"]) == (True, 0, "ner")
    assert "ner into" in error
    assert "has ended" in error


def test_a_run_that_went_wrong(tmp_path, job):
    corpus(tmp_path)
    job(max_dead_letters="1")
    found = status.status(str(tmp_path / "out"))
    assert (found.state, found.exit_code, found.success) == ("ended", 4, False)
    assert "exit code 4: more dead letters" in found.words


class FailingTagger(UnitTagger):
    """Cannot do one of the units."""

    def _work(self, unit, name, attempt):
        if unit.output == "2":
            raise ValueError
        return super()._work(unit, name, attempt)


def test_units_that_are_missing(tmp_path, job):
    corpus(tmp_path)
    job(tagger=FailingTagger, max_dead_letters="50%")
    found = status.status(str(tmp_path / "out"))
    assert (found.units_done, found.units, found.exit_code) == (3, 4, 3)
    assert "has ended incomplete" in found.words


def lease_of(tmp_path, **changes):
    """The lease as a run would have left it that came to no end."""
    path = tmp_path / "out" / "_run" / "lease.json"
    held = json.loads(path.read_text()) | {"released": "", **changes}
    path.write_text(json.dumps(held))


def test_a_run_whose_process_has_died(tmp_path, job):
    corpus(tmp_path)
    with pytest.raises(Killed):
        job(units=2, max_dead_letters="50%")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lease_of(tmp_path, pid=ended.pid)
    found = status.status(str(tmp_path / "out"))
    assert found.state == "dead"
    assert "run the same command again" in found.words


@pytest.fixture
def fast(monkeypatch):
    for module in (lease, status):
        monkeypatch.setattr(module, "BEAT_S", 0.2)


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_run_that_gives_signs_of_life(tmp_path, job, fast, host):
    corpus(tmp_path)
    with pytest.raises(Killed):
        job(units=2)
    held = Lease(str(tmp_path / "out")).acquire()
    try:
        if host == "elsewhere":  # where process numbers mean nothing
            held._held(machine="another")
        found = status.status(str(tmp_path / "out"))
        assert (found.state, found.pid) == ("running", os.getpid())
    finally:
        held.release("stopped")
    assert status.status(str(tmp_path / "out")).state == "stopped"


def test_a_run_elsewhere_that_is_silent(tmp_path, job, fast):
    corpus(tmp_path)
    with pytest.raises(Killed):
        job(units=2)
    lease_of(tmp_path, machine="another", pid=1)
    assert status.status(str(tmp_path / "out")).state == "dead"


@pytest.mark.parametrize(
    ("apart", "age", "known"), [(10, 0, True), (0.01, 0, False), (10, 999, False)]
)
def test_speed_and_time_left(tmp_path, job, fast, monkeypatch, apart, age, known):
    """Not told of units that came at one moment, nor from those of a run that is long over."""
    corpus(tmp_path)
    folder = RunFolder(str(tmp_path / "out"))

    class Noting(UnitTagger):
        def tag(self, unit):
            receipt = super().tag(unit)
            folder.add_receipts(1, [receipt])
            return receipt

    now = time.time_ns()
    moments = count(now - int((2 * apart + age) * 1e9), int(apart * 1e9 / 2))  # two files a unit
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(moments))
        with pytest.raises(Killed):
            job(tagger=Noting, units=3)
    per_unit = folder.read_ledger(1)["n_tokens"].to_pylist()[0]
    held = Lease(folder.output).acquire()
    try:
        found = status.status(folder.output)
    finally:
        held.release("ended")
    assert found.done_share == pytest.approx(0.75, abs=0.01)
    if known:
        assert found.tokens_per_s == pytest.approx(per_unit / 10, abs=0.1)
        assert found.eta_seconds == pytest.approx(10, abs=0.5)
    else:
        assert (found.tokens_per_s, found.eta_seconds) == (None, None)


def test_watching_ends_with_the_run(tmp_path, job, fast, capsys):
    corpus(tmp_path)
    job(max_dead_letters="50%")
    held = Lease(str(tmp_path / "out")).acquire()
    end = threading.Timer(1.0, held.release, ("ended",))
    end.start()
    assert main(["status", str(tmp_path / "out"), "--watch", "0.2"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states[0] == "running"
    assert states[-1] == "ended"
    assert len(states) > 2


def test_no_run(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no run"):
        status.status(str(tmp_path))
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_dead_letters_that_a_replay_took_over_count_once(tmp_path, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}, {"text": KILLER}, {"text": None}])
    job(RefusingTagger, max_dead_letters="100%")
    report, _ = job(replay=True)
    found = status.status(str(tmp_path / "out"))
    assert (found.rows, found.n_ok, found.n_dead) == (3, 2, 1)
    assert (found.rows, found.n_ok, found.n_dead) == (report.n_rows, report.n_ok, report.n_dead)


def test_records_that_are_just_being_written(tmp_path, job):
    corpus(tmp_path, 1)
    job(max_dead_letters="50%")
    attempts = tmp_path / "out" / "_run" / "attempts"
    attempts.mkdir(exist_ok=True)
    (attempts / f".x.json.{'a' * 32}.tmp").write_bytes(b"")
    (attempts / "y.json").write_text('{"number": 2}')
    assert status.status(str(tmp_path / "out")).n_repeated == 1
