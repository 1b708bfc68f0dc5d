"""What units find, counted: from the predictions to the sums over a run."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fakes import KILLER, Killed, RefusingTagger, write_jsonl

from erniem_batch import storage
from erniem_batch.job import rundir
from erniem_batch.job.actor import Receipt
from erniem_batch.job.details import labels
from erniem_batch.job.findings import (
    LABEL,
    LENGTH,
    LETTER,
    MOST_LABELS,
    MOST_LANGUAGES,
    NO_SCORE,
    NOTHING,
    OTHERS,
    SUM_SCHEMA,
    Findings,
    capped,
    findings_table,
    length_bin,
    length_range,
    score_bin,
    summed,
)
from erniem_batch.job.rundir import LEDGER_SEGMENTS, RunFolder
from erniem_batch.records import Failure


def rows(findings):
    return sorted(tuple(row) for row in json.loads(findings.as_text()))


def test_labels_lengths_and_reasons():
    findings = Findings()
    findings.add("de", 5, [("PER", 0.93), ("PER", 1.0), ("LOC", 0.0)])
    findings.add(None, 0, [])
    findings.add("de", 4, None)
    findings.add_failure(Failure("7", "encode", "RecordError", "secret"), 3)
    assert rows(findings) == [
        (LABEL, "", NOTHING, NO_SCORE, 1),
        (LABEL, "de", "LOC", 0, 1),
        (LABEL, "de", "PER", 18, 1),
        (LABEL, "de", "PER", 19, 1),
        (LENGTH, "", "", 0, 1),
        (LENGTH, "de", "", 3, 2),
        (LETTER, "", "encode: RecordError", 0, 3),
    ]
    assert "secret" not in findings.as_text()


def test_names_from_the_data_cannot_grow_without_end():
    findings = Findings()
    for i in range(MOST_LABELS + 50):
        findings.add(f"l-{i}", 1, [(f"name {i} " + "x" * 500, 0.5)])
    labels = {row[2] for row in rows(findings) if row[0] == LABEL}
    assert len(labels) == MOST_LABELS + 1
    assert OTHERS in labels
    assert max(map(len, labels)) <= 60
    assert sum(row[-1] for row in rows(findings) if row[0] == LABEL) == MOST_LABELS + 50


@pytest.mark.parametrize(
    ("score", "expected"), [(0, 0), (0.049, 0), (0.05, 1), (1, 19), (1.5, NO_SCORE), (-1, NO_SCORE)]
)
def test_bins_of_scores(score, expected):
    assert score_bin(score) == expected


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 4, 511, 512, 50_000])
def test_bins_of_lengths(n_tokens):
    first, last = length_range(length_bin(n_tokens))
    assert first <= n_tokens <= last


def receipt(unit, n, label="PER"):
    findings = Findings()
    for _ in range(n):
        findings.add("de", 3, [(label, 0.9)])
    return Receipt(unit, f"{unit}.parquet", findings=findings.as_text())


def sums(table):
    return {(r["kind"], r["label"]): r["n"] for r in table.to_pylist()}


NOBODY = pa.array([], pa.string())


def test_a_unit_counts_once_with_what_was_said_last(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.add_receipts(1, [receipt("a", 2), receipt("b", 3)])
    folder.add_receipts(1, [receipt("a", 5, "LOC")])
    folder.add_receipts(2, [receipt("a", 70)])
    both = folder.read_findings(1, pa.array(["a", "b"]), NOBODY)
    assert sums(both) == {(LABEL, "LOC"): 5, (LABEL, "PER"): 3, (LENGTH, ""): 8}
    assert sums(folder.read_findings(1, pa.array(["b"]), NOBODY)) == {
        (LABEL, "PER"): 3, (LENGTH, ""): 3,
    }  # fmt: skip
    assert len(folder.read_findings(1, NOBODY, NOBODY)) == 0
    assert "findings" not in folder.read_ledger(1).column_names


def test_many_segments_become_one(tmp_path):
    folder = RunFolder(str(tmp_path))
    for i in range(LEDGER_SEGMENTS + 2):
        folder.add_receipts(1, [receipt(f"u{i}", 1), receipt("same", i + 1)])
    ids = pa.array([f"u{i}" for i in range(LEDGER_SEGMENTS + 2)] + ["same"])
    for _ in range(2):
        found = sums(folder.read_findings(1, ids, NOBODY))
        assert found[LABEL, "PER"] == 2 * LEDGER_SEGMENTS + 4
        assert len(list(storage.find(f"{tmp_path}/_run/findings"))) == 1


def test_summed_adds_up():
    one = findings_table([("a", receipt("a", 2).findings), ("b", receipt("b", 3).findings)])
    total = summed([one, summed([one])])
    assert sums(total) == {(LABEL, "PER"): 10, (LENGTH, ""): 10}
    assert total.schema == SUM_SCHEMA
    assert summed([]).schema == SUM_SCHEMA


def test_rare_names_of_many_units_are_put_together():
    """Each unit may have names of its own: a million units must not."""
    texts = []
    for unit in range(10):
        findings = Findings()
        findings.add("de", 3, [("PER", 0.9)] * 5)
        findings.add("de", 3, [])
        findings.add_failure(Failure("7", "encode", "RecordError", "x"), 1)
        for i in range(200):
            findings.add(f"l-{unit}-{i}", 3, [(f"name {unit} {i}", 0.9)])
        texts.append((str(unit), findings.as_text()))
    all_of_it = summed([findings_table(texts)])
    found = capped(all_of_it)
    labels = set(found.filter(pc.equal(found["kind"], LABEL))["label"].to_pylist())
    assert len(labels) == MOST_LABELS + 2
    assert {NOTHING, OTHERS, "PER"} <= labels
    assert len(found["language"].unique()) == MOST_LANGUAGES + 2  # with OTHERS, and none
    for kind in (LABEL, LENGTH, LETTER):
        before, after = (t.filter(pc.equal(t["kind"], kind))["n"] for t in (all_of_it, found))
        assert pc.sum(before) == pc.sum(after)
    assert sums(found)[LETTER, "encode: RecordError"] == 10
    assert capped(found).sort_by("label") == found.sort_by("label")
    few = findings_table([("a", receipt("a", 2).findings)]).select(SUM_SCHEMA.names)
    assert capped(few) == few


def test_sums_do_not_depend_on_when_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "SUMMED_ROWS", 1)
    test_a_unit_counts_once_with_what_was_said_last(tmp_path)


# ---- whole runs -------------------------------------------------------------------------------


def labels_in(output):
    """Counted from the files themselves."""
    found = {}
    for path in output.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            for entity in row["entities"] or [{"label": NOTHING}]:
                key = row["lang"] or "", entity["label"]
                found[key] = found.get(key, 0) + 1
    return found


def write_corpus(tmp_path, first=0, n_files=4):
    for i in range(first, first + n_files):
        rows = [
            {"text": f"Ada {i} {j} lived in London", "lang": "de" if j % 3 else None}
            for j in range(7)
        ]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [*rows, {"text": None, "lang": "de"}])


SETTINGS = {"fields": {"language": "lang"}, "max_dead_letters": "50%"}


def reported(report):
    return {
        (language, item["label"]): n
        for item in report["labels"]
        for language, n in item["languages"].items()
    }


@pytest.mark.parametrize("killed_after", [None, 1, 3])
def test_the_report_says_what_stands_in_the_files(tmp_path, job, killed_after):
    write_corpus(tmp_path)
    if killed_after is not None:
        with pytest.raises(Killed):
            job(units=killed_after, **SETTINGS)
    report, _ = job(**SETTINGS)
    assert report.exit_code == 0
    written = RunFolder(str(tmp_path / "out")).read_report()
    assert reported(written) == labels_in(tmp_path / "out")
    assert {x["language"]: x["rows"] for x in written["languages"]} == {"de": 16, "": 12}
    assert sum(x["rows"] for x in written["lengths"]) == 28
    assert written["dead_letters"] == [{"reason": "encode: RecordError", "rows": 4}]
    assert (written["n_rows"], written["exit_code"]) == (32, 0)


def test_changed_files_and_replays_count_once(tmp_path, job):
    write_jsonl(
        tmp_path / "in" / "a.jsonl", [{"text": "Ada", "lang": "en"}, {"text": KILLER, "lang": "en"}]
    )
    write_corpus(tmp_path, 1, 1)
    job(tagger=RefusingTagger, **SETTINGS)
    folder = RunFolder(str(tmp_path / "out"))
    letters = {x["reason"]: x["rows"] for x in folder.read_report()["dead_letters"]}
    assert letters == {"encode: RecordError": 1, "forward: RuntimeError": 1}
    job(replay=True)  # with a model that takes all
    assert folder.read_report()["dead_letters"] == [{"reason": "encode: RecordError", "rows": 1}]
    assert reported(folder.read_report()) == labels_in(tmp_path / "out")
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Grace Hopper", "lang": "nl"}])
    job(**SETTINGS)
    assert reported(folder.read_report()) == labels_in(tmp_path / "out")
    assert {x["language"] for x in folder.read_report()["languages"]} == {"nl", "de", ""}


@pytest.mark.parametrize("language", ["Ada met Charles in London.", "x" * 40, "a b"])
def test_a_language_column_that_holds_text_is_not_repeated(language):
    findings = Findings()
    findings.add(language, 3, [("PER", 0.9)])
    findings.add("pt-BR", 3, [])
    assert {row[1] for row in rows(findings)} == {OTHERS, "pt-BR"}
    assert language not in findings.as_text()


def test_mean_scores_by_language():
    findings = Findings()
    for language, score in (("de", 0.91), ("de", 0.99), ("fr", 0.52), ("fr", 7.0)):
        findings.add(language, 1, [("PER", score)])
    (found,) = labels(summed([findings_table([("u", findings.as_text())])]))
    assert found["mean_scores"] == {"de": 0.95, "fr": 0.525}
