"""How sure figures are, and what thresholds bring: resampling, comparison, search."""

import itertools
import json
import random

import numpy as np
import pytest

from erniem_batch.evaluate.bootstrap import interval, intervals, mcnemar, paired, resample
from erniem_batch.evaluate.compare import compare
from erniem_batch.evaluate.make import make_scorer
from erniem_batch.evaluate.measure import Measure, f1, mean_of_groups, pearson, share
from erniem_batch.evaluate.tune import (
    best_threshold,
    candidates_of,
    filtered,
    search,
    tune,
    write_default,
    write_thresholds,
)
from erniem_batch.evaluate.values import FoundItem, FoundLabel, FoundSpan, passing
from erniem_batch.gold import annotated
from erniem_batch.thresholds import Thresholds, read_thresholds


def share_of(values):
    values = np.asarray(values, float)
    return Measure(np.stack([values, np.ones(len(values))], axis=1), share)


# ---- resampling -------------------------------------------------------------------------------


def test_resamples_are_draws_with_replacement():
    counts = np.eye(5)
    sums = resample(counts, 4000, 1)
    assert (sums.sum(axis=1) == 5).all()
    assert sums.mean(axis=0) == pytest.approx(np.ones(5), abs=0.06)
    assert sums.var(axis=0) == pytest.approx(np.full(5, 0.8), abs=0.08)


def test_resamples_do_not_depend_on_blocks(monkeypatch):
    from erniem_batch.evaluate import bootstrap

    whole = resample(np.arange(10.0)[:, None], 50, 3)
    monkeypatch.setattr(bootstrap, "DRAWS", 30)
    assert (resample(np.arange(10.0)[:, None], 50, 3) == whole).all()


def test_intervals_are_the_same_for_the_same_seed():
    measures = {"a": share_of(np.arange(40) % 3 == 0)}
    assert intervals(measures, 200, 7) == intervals(measures, 200, 7)
    assert intervals(measures, 200, 7) != intervals(measures, 200, 8)
    assert intervals(measures, 0, 7) == {}


def test_intervals_cover():
    """Of 200 samples with a share of 0.3, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(200):
        low, high = intervals({"a": share_of(rng.random(80) < 0.3)}, 200, seed)["a"]
        held += low <= 0.3 <= high
    assert 176 <= held <= 199


def test_resampled_figures_are_those_of_the_drawn_rows():
    """Vectorised sums give what a loop over drawn rows gives."""
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 4, (12, 3)).astype(float)
    drawn = np.random.default_rng(7).integers(0, 12, (6, 12))
    expected = [f1(counts[rows].sum(axis=0)) for rows in drawn]
    assert f1(resample(counts, 6, 7)) == pytest.approx(np.array(expected))


def test_intervals_leave_out_what_has_no_figure():
    assert interval(np.array([np.nan, np.nan])) is None
    assert interval(np.array([np.nan, 2.0])) == (2.0, 2.0)
    assert np.isnan(pearson(np.array([3.0, 3, 3, 3, 3, 3])))


def test_mean_of_groups_leaves_out_what_was_not_drawn():
    measure = mean_of_groups(share_of([1, 1, 0, 0]), [np.array([0, 1]), np.array([2, 3])])
    assert measure.value == 0.5
    assert measure.of(np.array([0, 0, 1])).value == 1.0


def test_paired_differences():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.6
    better = before | (rng.random(400) < 0.3)
    limits, p = paired(share_of(better), share_of(before), 1000, 7)
    assert limits[0] > 0
    assert p < 0.01
    limits, p = paired(share_of(before), share_of(before), 1000, 7)
    assert (limits, p) == ((0.0, 0.0), 1.0)
    limits, p = paired(share_of(rng.permutation(before)), share_of(before), 1000, 7)
    assert limits[0] < 0 < limits[1]
    assert p > 0.5


def test_the_p_value_is_the_share_of_differences_as_far_away():
    one = np.array([1, 1, 1, 0, 1, 1, 0, 1, 1, 1.0])
    two = np.array([1, 0, 1, 0, 0, 1, 1, 1, 0, 1.0])
    found = one.mean() - two.mean()
    drawn = np.random.default_rng(7).integers(0, 10, (500, 10))
    differences = [one[rows].mean() - two[rows].mean() for rows in drawn]
    n_far = sum(abs(d - found) >= abs(found) - 1e-12 for d in differences)
    assert 0 < n_far < 250
    limits, p = paired(share_of(one), share_of(two), 500, 7)
    assert p == pytest.approx((1 + n_far) / 501)
    assert limits == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 * 0.5**5)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


# ---- comparison -------------------------------------------------------------------------------


def test_planted_changes_are_found():
    rng = random.Random(3)
    rows = [
        {"id": f"r{i}", "text": "secret words", "label": rng.choice("ab"), "lang": "de"}
        for i in range(60)
    ]
    gold = [annotated("classify", row) for row in rows]
    before = [[FoundLabel(row["label"], 0.9)] for row in rows]
    after = list(before)
    before[4], before[9] = [FoundLabel("c", 0.9)], None
    after[20] = [FoundLabel("b" if rows[20]["label"] == "a" else "a", 0.9)]
    new, old = (make_scorer("classify", gold, values, {}) for values in (after, before))
    found = compare(new, old, 500, 7)
    assert [row["id"] for row in found.changed] == ["r4", "r9", "r20"]
    assert [row["right_after"] for row in found.changed] == [True, True, False]
    assert found.changed[1]["before"] == {"gold": rows[9]["label"], "predicted": None}
    assert found.mcnemar == {"n_only_after_right": 2, "n_only_before_right": 1, "p_value": 1.0}
    assert found.figures["difference"] == pytest.approx(1 / 60)
    assert found.languages["de"]["difference"] == pytest.approx(1 / 60)
    assert found.figures["interval"][0] < 1 / 60 < found.figures["interval"][1]
    assert "secret" not in json.dumps(found.as_dict()) + json.dumps(found.changed)


def test_without_resamples_there_is_a_difference_only():
    gold = [annotated("classify", {"id": "x", "text": "t", "label": "a"})]
    scorer = make_scorer("classify", gold, [[FoundLabel("a", 0.9)]], {})
    figures = compare(scorer, scorer, 0, 7).figures
    assert figures == {"after": 1.0, "before": 1.0, "difference": 0.0}


# ---- thresholds -------------------------------------------------------------------------------


def f1_at(threshold, scores, correct, n_gold):
    kept = scores >= threshold
    total = kept.sum() + n_gold
    return 2 * (kept & correct).sum() / total if total else 0.0


@pytest.mark.parametrize("seed", range(200))
def test_the_search_is_optimal(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    # Rounded, so that scores are equal now and then; one point below the other now and then.
    scores = rng.random(n).round(int(rng.integers(1, 8)))
    correct = rng.random(n) < 0.5
    n_gold = int(correct.sum() + rng.integers(0, 4))
    threshold = best_threshold(scores, correct, n_gold)
    assert 0 <= threshold <= 1
    best = max(f1_at(t, scores, correct, n_gold) for t in [*scores, 0.0, 1.1])
    assert f1_at(threshold, scores, correct, n_gold) == pytest.approx(best)


def ner_case(seed=0, n=120):
    """Persons are right from 0.3 on, places from 0.6, places in German from 0.8."""
    rng = random.Random(seed)
    rows, values = [], []
    for i in range(n):
        language = rng.choice(["de", "en"])
        spans, found = [], []
        for k, kind in enumerate(("PER", "LOC", "ODD")):
            if kind == "ODD" and i > 5:
                continue
            limit = {"PER": 0.3, "LOC": 0.8 if language == "de" else 0.6, "ODD": 0.5}[kind]
            score = rng.random()
            place = (2 * k, 2 * k + 1)
            found.append(FoundSpan(*place, {"PER": "Person"}.get(kind, kind), score))
            if score >= limit:
                spans.append([*place, kind])
        rows.append({"id": str(i), "text": "abcdefgh", "spans": spans, "lang": language})
        values.append(found)
    return [annotated("ner", row) for row in rows], values


def test_thresholds_by_label_and_language(tmp_path):
    gold, values = ner_case()
    scorer = make_scorer("ner", gold, values, {"Person": "PER"})
    found = search(candidates_of(scorer), 10)
    assert set(found) == {"*", "Person", "LOC", "de", "en"}
    assert 0.25 <= found["Person"] <= 0.35
    assert found["de"]["LOC"] == pytest.approx(0.8, abs=0.07)
    assert found["en"]["LOC"] == pytest.approx(0.6, abs=0.07)
    path = tmp_path / "tuned.json"
    write_thresholds(str(path), found)
    assert read_thresholds(str(path)) == found
    kept = filtered("ner", gold, values, read_thresholds(str(path)))
    after = make_scorer("ner", gold, kept, {"Person": "PER"})
    assert after.by_label()["LOC"]["f1"] == 1.0
    assert after.by_label()["PER"]["f1"] == 1.0


def test_a_label_with_little_support_goes_by_the_others():
    gold, values = ner_case()
    found = search(candidates_of(make_scorer("ner", gold, values, {"Person": "PER"})), 10**6)
    assert set(found) == {"*"}


def test_labels_are_searched_one_by_one():
    """As good as the best of all combinations, label by label."""
    gold, values = ner_case(4, 14)
    scorer = make_scorer("ner", gold, values, {"Person": "PER"})
    found = search(candidates_of(scorer), 1)
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    tuned = make_scorer("ner", gold, filtered("ner", gold, values, flat), scorer.names)
    for label in ("Person", "LOC"):
        scores = [s.score for value in values for s in value if s.label == label]
        name = scorer.names.get(label, label)
        best = max(
            make_scorer("ner", gold, filtered("ner", gold, values, {label: t}), scorer.names)
            .by_label()
            .get(name, {"f1": 0.0})["f1"]
            for t in [*scores, 0.0]
        )
        assert tuned.by_label()[name]["f1"] == pytest.approx(best)


def test_tuning_is_cross_validated():
    gold, values = ner_case(1)
    scorer = make_scorer("ner", gold, values, {"Person": "PER"})
    tuning = tune("ner", scorer, scorer, 10, 7)
    figures = {name: f["f1"] for name, f in tuning.figures.items()}
    assert figures["before"] < figures["cross_validated"] <= figures["after"]
    # Labels that say nothing: what was searched looks better than it is.
    rng = random.Random(1)
    noise = [
        [FoundSpan(0, 1, "PER", rng.random())] if rng.random() < 0.9 else [] for _ in range(40)
    ]
    rows = [
        {"id": str(i), "text": "ab", "spans": [[0, 1, "PER"]] * (rng.random() < 0.3)}
        for i in range(40)
    ]
    gold = [annotated("ner", row) for row in rows]
    tuning = tune("ner", make_scorer("ner", gold, noise, {}), scorer, 1, 7)
    figures = {name: f["f1"] for name, f in tuning.figures.items()}
    assert figures["cross_validated"] < figures["after"]


def test_thresholds_for_several_labels_a_text():
    rng = random.Random(2)
    rows, values = [], []
    for i in range(60):
        scores = {label: rng.random() for label in "ab"}
        true = [label for label, s in scores.items() if s > {"a": 0.2, "b": 0.7}[label]]
        rows.append({"id": str(i), "text": "t", "label": true})
        values.append([FoundLabel(label, s) for label, s in scores.items()])
    gold = [annotated("classify", row) for row in rows]
    found = search(candidates_of(make_scorer("classify", gold, values, {})), 5)
    assert found["a"] == pytest.approx(0.2, abs=0.06)
    assert found["b"] == pytest.approx(0.7, abs=0.06)


def test_thresholds_for_items_and_relations():
    row = {"text": "abcdef", "spans": [[0, 1, "A"], [2, 3, "B"]], "relations": [[0, "r", 1]]}
    value = [
        FoundItem(0, None, "A", "a", 0, 1, 0.9),
        FoundItem(1, 0, "r", "c", 2, 3, 0.6),
        FoundItem(2, 0, "r", "e", 4, 5, 0.4),
        FoundItem(3, None, "A", "b", 1, 2, 0.3),
        FoundItem(4, 3, "r", "c", 2, 3, 0.95),
    ]
    gold = [annotated("extract", {"id": "x", **row})]
    found = search(candidates_of(make_scorer("extract", gold, [value], {})), 1)
    assert 0.3 < found["A"] < 0.9
    assert 0.4 < found["r"] <= 0.6
    kept = passing("extract", value, Thresholds(found), "")
    assert [item.id for item in kept] == [0, 1]


def test_the_default_of_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"b": 1, "task_specific_params": {"qa": {"x": 1}}}))
    write_default(path, "ner", 0.7)
    config = json.loads(path.read_text())
    assert config == {
        "b": 1,
        "task_specific_params": {"qa": {"x": 1}, "ner": {"min_score": 0.7}},
    }


@pytest.mark.parametrize("scores", list(itertools.product([0.2, 0.2000001, 0.9], repeat=3)))
def test_scores_that_lie_close_together_are_told_apart(scores):
    scores = np.array(scores)
    correct = scores > 0.2
    threshold = best_threshold(scores, correct, int(correct.sum()))
    if correct.any():
        assert f1_at(threshold, scores, correct, int(correct.sum())) == 1.0
