"""Names of outputs: those that the program makes are never those of an input, nor used twice."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from fakes import KILLER, RefusingTagger, write_jsonl

from erniem_batch import storage
from erniem_batch.job.rundir import RunFolder


def found(output):
    """How often each text is in the results; and in the dead letters."""
    manifest = json.loads((output / "_manifest.json").read_bytes())
    texts, dead = Counter(), Counter()
    for entry in manifest["files"]:
        texts.update(pq.read_table(output / entry["name"])["text"].to_pylist())
    for entry in manifest["dead_letters"]:
        lines = pq.read_table(output / entry["name"])["line"].to_pylist()
        dead.update(json.loads(line)["text"] for line in lines)
    return texts, dead


def names(output):
    return sorted(p.name for p in output.glob("*.parquet"))


def put(tmp_path, name, *texts):
    write_jsonl(tmp_path / "in" / name, [{"text": text} for text in texts])


def test_a_replay_beside_an_input_of_its_name(tmp_path, job):
    """Once, the replay of x.jsonl was written over the results of x.replay-1.jsonl."""
    put(tmp_path, "x.jsonl", "a", KILLER)
    put(tmp_path, "x.replay-1.jsonl", "b", "c", KILLER)
    report, _ = job(RefusingTagger)
    assert (report.exit_code, report.n_dead) == (4, 2)
    report, _ = job(RefusingTagger, replay=True)
    assert (report.exit_code, report.n_rows, report.n_dead) == (4, 5, 2)
    assert found(tmp_path / "out") == (Counter("abc"), Counter({KILLER: 2}))
    report, _ = job(replay=True)
    assert (report.exit_code, report.n_rows, report.n_ok) == (0, 5, 5)
    assert found(tmp_path / "out")[0] == Counter({"a": 1, "b": 1, "c": 1, KILLER: 2})
    assert names(tmp_path / "out") == [
        "x.parquet", "x.replay-1.parquet", "x.replay-1.replay-1.parquet",
        "x.replay-1.replay-2.parquet", "x.replay-2.parquet", "x.replay-3.parquet",
    ]  # fmt: skip


def test_an_input_that_comes_with_the_name_of_a_replay(tmp_path, job):
    put(tmp_path, "x.jsonl", "a", KILLER)
    job(RefusingTagger)
    job(replay=True)
    put(tmp_path, "x.replay-1.jsonl", "b")
    report, _ = job()
    assert (report.exit_code, report.n_rows) == (0, 3)
    assert found(tmp_path / "out")[0] == Counter({"a": 1, "b": 1, KILLER: 1})


def test_a_changed_input_beside_one_of_its_new_name(tmp_path, job):
    """Once, this was refused every night."""
    put(tmp_path, "a.jsonl", "one")
    put(tmp_path, "a.2.jsonl", "two")
    job()
    put(tmp_path, "a.jsonl", "three")
    report, _ = job()
    assert (report.exit_code, found(tmp_path / "out")[0]) == (0, Counter(["two", "three"]))
    assert names(tmp_path / "out") == ["a.2.parquet", "a.3.parquet"]


def test_a_new_input_of_the_name_that_a_changed_one_gets(tmp_path, job):
    put(tmp_path, "a.jsonl", "one")
    job()
    put(tmp_path, "a.jsonl", "three")
    put(tmp_path, "a.2.jsonl", "two")
    report, _ = job()
    assert (report.exit_code, found(tmp_path / "out")[0]) == (0, Counter(["two", "three"]))
    assert names(tmp_path / "out") == ["a.2.parquet", "a.3.parquet"]


def test_overwriting_beside_a_name_of_an_edition(tmp_path, job):
    """The results that are valid until the new ones are complete are not written over."""
    put(tmp_path, "a.jsonl", "one")
    put(tmp_path, "a.2.jsonl", "two")
    job()
    before = (tmp_path / "out" / "a.2.parquet").read_bytes()
    seen = []

    class Looking(RefusingTagger):
        def tag(self, unit):
            seen.append((unit.output, (tmp_path / "out" / "a.2.parquet").read_bytes() == before))
            return super().tag(unit)

    report, _ = job(Looking, overwrite=True, min_score=0.9)
    assert report.exit_code == 0
    assert sorted(seen) == [("a.2.3", True), ("a.3", True)]
    assert names(tmp_path / "out") == ["a.2.3.parquet", "a.3.parquet"]


def test_a_late_plan_of_a_run_before_this_one(tmp_path, job, monkeypatch):
    """It has taken the number of our edition; what it has planned is planned."""
    put(tmp_path, "a.jsonl", "one")
    add = RunFolder.add_to_plan

    def late(self, generation, edition, units):
        monkeypatch.setattr(RunFolder, "add_to_plan", add)
        add(self, generation, edition, units)
        return add(self, generation, edition, units)

    monkeypatch.setattr(RunFolder, "add_to_plan", late)
    report, _ = job()
    assert (report.exit_code, report.n_units, names(tmp_path / "out")) == (0, 1, ["a.parquet"])


@pytest.mark.parametrize("name", ["a.rows-0123abcd", "a.replay-1", "a-00000", "a.2"])
def test_any_name_of_the_program_as_an_input(tmp_path, job, name):
    put(tmp_path, f"{name}.jsonl", "a", KILLER)
    put(tmp_path, "a.jsonl", "b", KILLER)
    job(RefusingTagger)
    put(tmp_path, "a.jsonl", "c", KILLER)
    job(RefusingTagger)
    report, _ = job(replay=True)
    assert (report.exit_code, report.n_rows, report.n_ok) == (0, 4, 4)
    assert found(tmp_path / "out")[0] == Counter({"a": 1, "c": 1, KILLER: 2})
    listed = {info.path for info in storage.find(str(tmp_path / "out" / "_dead_letters"))}
    assert not listed
