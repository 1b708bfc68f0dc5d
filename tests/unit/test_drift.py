"""Drift: distances of distributions, what chance makes, and the gate of a run."""

import numpy as np
import pytest
from fakes import KILLER, Killed, RefusingTagger, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError
from erniem_batch.job.config import JobConfig
from erniem_batch.job.drift import by_chance, compare, jensen_shannon, shift, stability_index
from erniem_batch.job.findings import SUM_SCHEMA, Findings, findings_table, summed
from erniem_batch.job.rundir import RunFolder

shares = st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any)


@settings(deadline=None)
@given(shares, shares)
def test_distance_is_that_of_scipy(a, b):
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = np.array(a) / sum(a), np.array(b) / sum(b)
    assert jensen_shannon(p, q) == pytest.approx(distance.jensenshannon(p, q, base=2), abs=1e-7)
    assert jensen_shannon(p, q) == pytest.approx(jensen_shannon(q, p), abs=1e-12)


def test_distances_at_the_ends():
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert jensen_shannon(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    assert stability_index(np.array([50, 50]), np.array([50, 50])) == 0
    # By hand: (0.5 - 0.9) ln(0.5 / 0.9) + (0.5 - 0.1) ln(0.5 / 0.1), but for the halves added.
    found = stability_index(np.array([9000, 1000]), np.array([5000, 5000]))
    assert found == pytest.approx(0.8789, abs=1e-3)


@pytest.mark.parametrize("n_kinds", [2, 5, 20])
def test_the_test_of_chance_agrees_with_scipy(n_kinds):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n_kinds)
    told = 0
    for _ in range(300):
        p = rng.dirichlet(np.ones(n_kinds))
        q = 0.8 * p + 0.2 * rng.dirichlet(np.ones(n_kinds))
        counts = np.array([rng.multinomial(400, p), rng.multinomial(700, q)], dtype=float)
        counts = counts[:, counts.sum(axis=0) > 0]
        exact = max(
            stats.chi2_contingency(counts, correction=False, lambda_=kind).pvalue
            for kind in ("log-likelihood", "pearson")
        )
        if not 0.5e-4 < exact < 2e-4:  # our quantile is an approximation
            assert by_chance(counts) == (exact > 1e-4)
            told += exact < 1e-4
    assert told > 10


@pytest.mark.parametrize(("n_before", "n_now"), [(300, 300), (3000, 3000), (100_000, 1000)])
@pytest.mark.parametrize("kind", ["even", "a few frequent"])
def test_many_rare_kinds_are_no_alarm(n_before, n_now, kind):
    """The G-test alone found 37 % of two draws of 300 from 300 kinds to differ."""
    rng = np.random.default_rng(5)
    p = np.ones(300) if kind == "even" else 1 / np.arange(1, 301)
    draws = (rng.multinomial(n, p / p.sum(), 400).astype(float) for n in (n_before, n_now))
    alarms = sum(not by_chance(np.array(pair)) for pair in zip(*draws, strict=True))
    assert alarms <= 2
    # What matters is still seen: ten dead letters among twenty rows, where one was in ten thousand.
    assert not by_chance(np.array([[9999.0, 1], [10, 10]]))


def test_nothing_is_compared_with_nothing():
    nothing = SUM_SCHEMA.empty_table()
    assert compare(nothing, nothing) == []
    assert compare(nothing, findings(np.random.default_rng(3), 300, 0.4)) == []


def test_a_small_sample_proves_nothing():
    few = shift("labels", {"a": 3, "b": 1}, {"a": 1, "b": 3}, 0.1)
    many = shift("labels", {"a": 300, "b": 100}, {"a": 100, "b": 300}, 0.1)
    assert few.distance == many.distance > 0.3
    assert (few.drifted, many.drifted) == (False, True)
    assert many.most == ("a", 0.75, 0.25)
    assert str(many) == "labels: distance 0.434, a 75.0% -> 25.0%"


def findings(rng, n, p_per, language="de", tokens=20):
    found = Findings()
    for _ in range(n):
        label = "PER" if rng.random() < p_per else "LOC"
        found.add(language, int(rng.poisson(tokens)), [(label, float(rng.beta(9, 2)))])
    return summed([findings_table([("u", found.as_text())])])


def test_two_draws_of_one_corpus_do_not_drift():
    rng = np.random.default_rng(1)
    alarms = sum(
        any(s.drifted for s in compare(findings(rng, 300, 0.4), findings(rng, 300, 0.4)))
        for _ in range(60)
    )
    assert alarms == 0


def test_what_moved_is_named():
    rng = np.random.default_rng(2)
    before = summed([findings(rng, 800, 0.4), findings(rng, 800, 0.4, "fr")])
    now = summed([findings(rng, 800, 0.4), findings(rng, 800, 0.8, "fr")])
    moved = {s.what for s in compare(before, now) if s.drifted}
    assert moved == {"labels", "labels: fr"}
    longer = findings(rng, 1600, 0.4, tokens=200)
    moved = {s.what for s in compare(findings(rng, 1600, 0.4), longer) if s.drifted}
    assert moved == {"lengths"}
    other = findings(rng, 1600, 0.4, "it")
    moved = {s.what for s in compare(findings(rng, 1600, 0.4), other) if s.drifted}
    assert moved == {"languages"}


# ---- the gate of a run ------------------------------------------------------------------------


def texts(tmp_path, folder, words, n=300):
    for i in range(3):
        rows = [{"text": f"{words[(i + j) % len(words)]} {j}"} for j in range(n)]
        write_jsonl(tmp_path / folder / f"{i}.jsonl", rows)


FEW = ["Ada lived in London", "a b c", "Bob"]
OTHER = ["北京は大きい", "Сергей живёт в Москве и любит"]


def test_a_shift_ends_a_run_without_success(tmp_path, job):
    texts(tmp_path, "in", FEW)
    job()
    success = tmp_path / "next" / "_SUCCESS"
    settings = {"output": str(tmp_path / "next"), "compare": str(tmp_path / "out")}
    report, _ = job(fail_on_drift=True, **settings)
    assert (report.exit_code, report.drifted) == (0, ())
    assert success.exists()

    texts(tmp_path, "shifted", OTHER)
    settings |= {"input": [str(tmp_path / "shifted")], "output": str(tmp_path / "third")}
    report, _ = job(**settings)
    assert report.exit_code == 0
    assert any(what.startswith("labels:") for what in report.drifted)
    report, done = job(fail_on_drift=True, **settings)
    assert (report.exit_code, done) == (5, [])
    assert not (tmp_path / "third" / "_SUCCESS").exists()
    assert (tmp_path / "third" / "_manifest.json").exists()
    written = RunFolder(str(tmp_path / "third")).read_report()
    assert written["exit_code"] == 5
    assert written["drift"][0]["drifted"]
    report, _ = job(**settings)  # looked at, and found to be right
    assert report.exit_code == 0
    assert (tmp_path / "third" / "_SUCCESS").exists()


def test_what_a_night_adds_is_compared_with_what_was_there(tmp_path, job):
    texts(tmp_path, "in", FEW)
    settings = {"compare": str(tmp_path / "out"), "fail_on_drift": True}
    report, _ = job(**settings)  # the first night has nothing to compare with
    assert (report.exit_code, report.drifted) == (0, ())
    assert RunFolder(str(tmp_path / "out")).read_report()["drift"] is None
    texts(tmp_path, "in/second", FEW)
    assert job(**settings)[0].exit_code == 0
    texts(tmp_path, "in/third", OTHER)
    report, done = job(**settings)
    assert (report.exit_code, len(done)) == (5, 3)
    # The same command again has nothing to do, and is no way around the gate.
    report, done = job(**settings)
    assert (report.exit_code, len(done)) == (5, 0)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert job(compare=settings["compare"])[0].exit_code == 0
    report, done = job(**settings)  # somebody has looked: all of it is what was there
    assert (report.exit_code, report.drifted, done) == (0, (), [])


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_night_is_one_however_often_it_was_killed(tmp_path, job, killed_after):
    texts(tmp_path, "in", FEW)
    settings = {"compare": str(tmp_path / "out"), "fail_on_drift": True}
    job(**settings)
    texts(tmp_path, "in/second", OTHER)
    write_jsonl(tmp_path / "in" / "second" / "9.jsonl", [{"text": "Ada"}])
    with pytest.raises(Killed):
        job(units=killed_after, **settings)
    report, done = job(**settings)
    assert (report.exit_code, len(done)) == (5, 4 - killed_after)
    rows = {x["what"]: x for x in RunFolder(str(tmp_path / "out")).read_report()["drift"]}["rows"]
    assert (rows["n_before"], rows["n_now"]) == (900, 901)


def test_a_replay_stands_before_the_gate_of_the_last_run(tmp_path, job):
    texts(tmp_path, "in", FEW)
    job()
    texts(tmp_path, "shifted", OTHER)
    write_jsonl(tmp_path / "shifted" / "k.jsonl", [{"text": KILLER}])
    settings = {
        "input": [str(tmp_path / "shifted")], "compare": str(tmp_path / "before"),
        "max_dead_letters": "50%",
    }  # fmt: skip
    (tmp_path / "out").rename(tmp_path / "before")
    assert job(RefusingTagger, fail_on_drift=True, **settings)[0].exit_code == 5
    report, done = job(RefusingTagger, replay=True)
    assert (report.exit_code, len(done)) == (5, 1)
    assert job(RefusingTagger, **settings)[0].exit_code == 0
    report, done = job(replay=True)
    assert (report.exit_code, report.n_dead, len(done)) == (0, 0, 1)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_there_must_be_something_to_compare_with(tmp_path, job):
    texts(tmp_path, "in", FEW, n=2)
    with pytest.raises(ConfigError, match="no run has ended there"):
        job(compare=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out" / "_run" / "ledger").exists()
    with pytest.raises(ConfigError, match="--fail-on-drift needs --compare"):
        JobConfig(fail_on_drift=True)
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match="--drift-threshold must be"):
            JobConfig(drift_threshold=wrong)
