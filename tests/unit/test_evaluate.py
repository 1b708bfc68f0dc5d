"""`erniem-batch evaluate` from files to figures, on predictions without a model, and once with."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl

from erniem_batch import storage
from erniem_batch.cli import main
from erniem_batch.errors import ConfigError
from erniem_batch.evaluate import EvaluateConfig
from erniem_batch.evaluate.libraries import library
from erniem_batch.evaluate.predict import schema_of
from erniem_batch.evaluate.read import joined, own_gold, read_run
from erniem_batch.gold import annotated
from erniem_batch.thresholds import read_thresholds

SECRET = "Ada met Bob"


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit code, the figures in the last line, and stderr of a command line."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments):
        code = main(["evaluate", *map(str, arguments)])
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err
        line = captured.out.strip().split("\n")[-1]
        return code, json.loads(line) if line.startswith("{") else {}, captured.err

    return call


def entity(start, end, label, score=0.9):
    return {"start": start, "end": end, "label": label, "text": SECRET[start:end], "score": score}


def ner_row(i, found=(), spans=((0, 3, "PER"), (8, 11, "PER")), **more):
    row = {"id": f"r{i}", "text": SECRET, "spans": [list(s) for s in spans]}
    return {**row, "entities": [entity(*item) for item in found], **more}


BOTH = ((0, 3, "PER"), (8, 11, "PER"))


def test_a_run_that_carries_its_gold(run, tmp_path):
    rows = [
        ner_row(0, BOTH, lang="en"),
        ner_row(1, [(0, 3, "PER", 0.4)], lang="de"),
        # As the job writes lists of mixed types.
        ner_row(2, [], lang="de") | {"spans": '[[0, 3, "PER"]]'},
    ]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    code, figures, err = run("--task", "ner", "--predictions", path, "--bootstrap", 50)
    assert code == 0
    assert figures["figures"]["precision"] == 1.0
    assert figures["figures"]["recall"] == pytest.approx(3 / 5)
    assert figures["languages"]["en"]["f1"] == 1.0
    assert figures["languages"]["de"]["interval"][0] == 0.0
    assert (figures["n_rows"], figures["n_missing"]) == (3, 0)
    assert "macro" in err
    _, stricter, _ = run("--task", "ner", "--predictions", path, "--min-score", 0.5)
    assert stricter["figures"]["recall"] == pytest.approx(2 / 5)


def finished_run(folder, rows, dead=(), **settings):
    """A folder as a batch run leaves it."""
    pq.write_table(pa.Table.from_pylist(rows), _made(folder / "part-0.parquet"))
    letters = []
    if dead:
        lines = [{"row": None, "line": json.dumps(r).encode(), "n_rows": 1} for r in dead]
        pq.write_table(pa.Table.from_pylist(lines), _made(folder / "_dead_letters/part-0.parquet"))
        letters = [{"name": "_dead_letters/part-0.parquet", "n_rows": len(dead)}]
    manifest = {
        "format": 1,
        "generation": 1,
        "fingerprint": "f",
        "files": [{"name": "part-0.parquet", "n_rows": len(rows)}],
        "dead_letters": letters,
    }
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    info = {"settings": {"task": "ner", "offset-unit": "codepoint", "min-score": 0, **settings}}
    _made(folder / "_run/run.json").write_text(json.dumps(info))
    return folder


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_dead_letters_count_as_nothing_found(run, tmp_path):
    rows = [ner_row(0, BOTH) | {"spans": json.dumps([[0, 3, "PER"], [8, 11, "PER"]])}]
    lost = ner_row(1)
    del lost["entities"]
    folder = finished_run(tmp_path / "run", rows, [lost, {"id": "r2", "text": None}])
    code, figures, err = run("--predictions", folder)
    assert (code, figures["task"], figures["n_rows"], figures["n_missing"]) == (0, "ner", 2, 1)
    assert figures["figures"]["recall"] == 0.5
    assert "dead letters without a gold row are left out n=1" in err


def test_offsets_of_the_run_are_converted(tmp_path):
    row = {"id": "a", "text": "😀 Ada", "spans": "[]", "entities": [entity(3, 6, "PER")]}
    folder = finished_run(tmp_path / "run", [row], **{"offset-unit": "utf16"})
    _, values = own_gold("ner", read_run(str(folder)))
    assert values[0][0][:3] == (2, 5, "PER")
    row["entities"][0]["start"] = 1
    folder = finished_run(tmp_path / "odd", [row], **{"offset-unit": "utf16"})
    with pytest.raises(ConfigError, match=r"a place of the run \(utf16 1\) is inside a character"):
        own_gold("ner", read_run(str(folder)))


def test_a_run_that_is_not_complete(run, tmp_path):
    _made(tmp_path / "_run/run.json").write_text("{}")
    code, _, err = run("--task", "ner", "--predictions", tmp_path)
    assert code == 2
    assert "the run there is not complete" in err


def test_gold_of_its_own_file(run, tmp_path):
    """Rows without prediction count as nothing found."""
    gold = write_jsonl(tmp_path / "gold.jsonl", [ner_row(i) for i in range(3)])
    found = [{"id": "r1", "entities": [entity(0, 3, "PER"), entity(4, 7, "PER")]}]
    path = write_jsonl(tmp_path / "found.jsonl", [*found, {"id": "r0", "entities": []}])
    code, figures, _ = run("--task", "ner", "--predictions", path, "--gold", gold)
    assert (code, figures["n_missing"]) == (0, 1)
    assert figures["figures"]["precision"] == 0.5
    assert figures["figures"]["recall"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "r9"}], "1 rows have an id that no gold row has, the first: 'r9'"),
        ([{"id": "r0"}, {"id": "r0"}], "1 ids stand in several rows, the first: 'r0'"),
        ([{"id": None}], "1 rows have no id to be joined by, the first: 'found:0'"),
        ([{"id": "r0", "entities": None}], "entities: expected a list, as a batch run writes it"),
        ([{"id": "r0", "text": "other"}], "its text has 5 characters and is not the same"),
    ],
)
def test_rows_that_do_not_fit(run, tmp_path, rows, message):
    gold = write_jsonl(tmp_path / "gold.jsonl", [ner_row(0)])
    rows = [{"entities": [], **row} for row in rows]
    path = write_jsonl(tmp_path / "found.jsonl", rows)
    code, _, err = run("--task", "ner", "--predictions", path, "--gold", gold)
    assert code == 2
    assert message in err


def test_ids_that_stand_in_several_languages(tmp_path):
    gold = [annotated("ner", ner_row(0, lang=lang)) for lang in ("de", "en")]
    rows = [
        {"id": "r0", "lang": "en", "entities": [entity(0, 3, "PER")]},
        {"id": "r0", "lang": "de", "entities": []},
    ]
    found = joined("ner", gold, read_run(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert [len(value) for value in found] == [0, 1]
    with pytest.raises(ConfigError, match=r"'r0' \(de\)"):
        joined("ner", [gold[0], gold[0]], read_run(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --predictions"),
        (("--model", "demo"), "--model needs --gold"),
        (("--model", "demo", "--gold", "g"), "--model needs --task"),
        (("--predictions", "p", "--task", "embed"), "--task embed needs --model"),
        (("--predictions", "p", "--task", "qa", "--tune", "t.json"), "--tune is for ner"),
        (("--predictions", "p", "--tune", "t.yaml"), "--tune must name a .json file"),
        (("--predictions", "p", "--fail-below", "f1"), "--fail-below must be METRIC=NUMBER"),
        (("--predictions", "p", "--fail-below", "difference=0"), "needs --compare"),
        (("--predictions", "p", "--fail-below", "ece=0.1"), "less is better"),
        (("--predictions", "p", "--rename", "a"), "--rename must be PREDICTED=GOLD"),
        (("--predictions", "p", "--option", "top_k=2"), "--option is for --model"),
        (("--predictions", "p", "--bootstrap", "-1"), "--bootstrap must be at least 0"),
        (("--predictions", "p", "--write-default"), "needs --model"),
        (("--predictions", "absent", "--task", "ner"), "--predictions absent: no file matches"),
        (("--model", "demo", "--gold", "absent", "--task", "ner"), "--gold absent: no file"),
        (
            ("--model", "demo", "--gold", "g", "--task", "ner", "--option", "top_k=2"),
            "ner has no option 'top_k'",
        ),
        (
            ("--model", "absent", "--gold", "g", "--task", "ner", "--write-default"),
            "there is no such file",
        ),
    ],
)
def test_wrong_usage(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_limits(run, tmp_path):
    rows = [ner_row(0, BOTH, lang="en"), ner_row(1, BOTH[:1], lang="de")]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    call = ("--task", "ner", "--predictions", path, "--fail-below")
    assert run(*call, "f1=0.8")[0] == 0
    code, figures, err = run(*call, "f1.de=0.7", "--fail-below", "f1.en=0.9")
    assert code == 6
    assert figures["below"] == [{"metric": "f1.de", "value": pytest.approx(2 / 3), "limit": 0.7}]
    assert "f1.de 0.6667 < 0.7" in err
    assert run(*call, "recall.PER=0.9")[0] == 6
    for limit, message in (("f2=0.5", "no such figure"), ("f1.xx=0.5", "xx is no language")):
        code, _, err = run(*call, limit)
        assert code == 2
        assert message in err


def test_another_run(run, tmp_path):
    rows = [ner_row(i, BOTH, lang="en") for i in range(20)]
    old = [{**row} for row in rows]
    old[3] = ner_row(3, BOTH[:1], lang="en")
    rows[5] = ner_row(5, [(0, 2, "PER")], lang="en")
    rows[6] = ner_row(6, [], lang="en")
    before = write_jsonl(tmp_path / "before.jsonl", old)
    after = write_jsonl(tmp_path / "after.jsonl", rows)
    report = tmp_path / "report"
    arguments = ("--task", "ner", "--predictions", after, "--compare", before)
    code, figures, _ = run(*arguments, "--report", report, "--fail-below", "difference=-0.01")
    assert code == 6
    found = figures["compare"]
    assert found["difference"] == pytest.approx(found["after"] - found["before"])
    assert found["interval"][0] < found["difference"] < found["interval"][1] <= 0.05
    changed = [json.loads(line) for line in (report / "changed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in changed] == ["r3", "r5", "r6"]
    assert changed[0]["before"] == {"missed": [[8, 11, "PER"]], "wrong": []}
    assert changed[1]["after"]["wrong"] == [[0, 2, "PER"]]
    assert SECRET[:3] not in (report / "changed.jsonl").read_text()
    assert json.loads((report / "metrics.json").read_text()) == figures
    table = (report / "table.md").read_text()
    assert "| language | precision | recall | f1 |" in table
    assert run(*arguments, "--fail-below", "difference=-0.5")[0] == 0


def test_tuning_a_run(run, tmp_path):
    rows = []
    for i in range(40):
        found = [(0, 3, "PER", 0.5 + i / 100), (4, 7, "PER", 0.1 + i / 100)]
        rows.append(ner_row(i, found, spans=[[0, 3, "PER"]], lang="en"))
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    target = tmp_path / "min_score.json"
    code, figures, err = run("--task", "ner", "--predictions", path, "--tune", target)
    assert code == 0
    assert figures["tune"]["before"]["f1"] == pytest.approx(2 / 3)
    assert figures["tune"]["after"]["f1"] == 1.0
    assert figures["tune"]["cross_validated"]["f1"] > 0.9
    assert read_thresholds(str(target)) == figures["tune"]["thresholds"]
    assert "cross validated" in err
    _, figures, _ = run("--task", "ner", "--predictions", path, "--min-score", target)
    assert figures["figures"]["f1"] == 1.0


def test_a_run_with_a_threshold_cannot_be_tuned(run, tmp_path):
    rows = [ner_row(0, BOTH) | {"spans": "[]"}]
    folder = finished_run(tmp_path / "run", rows, **{"min-score": 0.7})
    code, _, err = run("--predictions", folder, "--tune", tmp_path / "t.json")
    assert code == 2
    assert "was made with min_score 0.7: run it again with --min-score 0" in err
    code, _, err = run("--predictions", folder, "--task", "qa")
    assert code == 2
    assert "is a run of ner, not of qa" in err


def test_labels_with_other_names(run, tmp_path):
    rows = [ner_row(0, [(0, 3, "Person"), (8, 11, "Person")])]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    code, figures, err = run("--task", "ner", "--predictions", path)
    assert (code, figures["figures"]["f1"]) == (0, 0.0)
    assert "labels=Person gold=PER; --rename PREDICTED=GOLD" in err
    _, figures, _ = run("--task", "ner", "--predictions", path, "--rename", "Person=PER")
    assert figures["figures"]["f1"] == 1.0


def label_row(i, label, *scores):
    found = [{"label": name, "score": score} for name, score in scores]
    first = found[0] if found else {"label": None, "score": None}
    more = {"predicted_label": first["label"], "predicted_score": first["score"]}
    return {"id": f"r{i}", "text": SECRET, "label": label, "label_scores": found, **more}


def test_labels_of_texts(run, tmp_path):
    rows = [label_row(0, "a", ("a", 0.9)), label_row(1, "b", ("a", 0.6)), label_row(2, "b")]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    report = tmp_path / "report"
    code, figures, _ = run("--task", "classify", "--predictions", path, "--report", report)
    assert code == 0
    assert figures["figures"]["accuracy"] == pytest.approx(1 / 3)
    assert figures["figures"]["ece"] == pytest.approx((0.1 + 0.6) / 2)
    assert storage.read(str(report / "reliability.png"))[:4] == b"\x89PNG"


def test_several_labels_count_from_one_half_on(run, tmp_path):
    rows = [label_row(0, ["a"], ("a", 0.9), ("b", 0.3)), label_row(1, ["b"], ("b", 0.4))]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    _, figures, _ = run("--task", "classify", "--predictions", path)
    assert figures["figures"]["subset_accuracy"] == 0.5
    _, figures, _ = run("--task", "classify", "--predictions", path, "--min-score", 0.35)
    assert figures["figures"]["subset_accuracy"] == 1.0
    _, figures, _ = run("--task", "classify", "--predictions", path, "--min-score", 0)
    assert figures["figures"]["micro_f1"] == pytest.approx(4 / 5)


def test_numbers_of_texts(run, tmp_path):
    rows = [label_row(i, float(i), ("LABEL_0", i + 0.5)) for i in range(5)]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    code, figures, _ = run("--task", "classify", "--predictions", path)
    assert code == 0
    assert figures["figures"]["mse"] == 0.25
    assert figures["figures"]["pearson"] == pytest.approx(1.0)
    code, _, err = run("--task", "classify", "--predictions", path, "--tune", tmp_path / "t.json")
    assert code == 2
    assert "numbers as labels" in err


def test_a_schema_from_the_gold_rows():
    row = {
        "text": "Ada of ACME",
        "spans": [[0, 3, "PER"], [7, 11, "ORG"]],
        "relations": [[1, "founder", 0]],
    }
    gold = [annotated("extract", row).gold]
    assert schema_of(gold, {"Person": "PER"}) == {"ORG": ["founder"], "Person": []}
    prompted = annotated("extract", {"content": "Ada", "prompt": "Person", "result_list": []})
    assert schema_of([prompted.gold], {}) is None


def test_a_library_that_is_not_there():
    with pytest.raises(ConfigError, match=r"pip install 'erniem-batch\[eval\]'"):
        library("absent_library.metrics")


def test_settings_are_checked_when_they_are_made():
    config = EvaluateConfig(predictions="p", rename=["A=B"], fail_below=["f1.de=.5"])
    assert (config.names, config.limits) == ({"A": "B"}, [("f1.de", 0.5)])
    with pytest.raises(ConfigError, match="a value of the wrong kind"):
        EvaluateConfig(task="qa", model="m", gold=["g"], option=["top_k=many"])


def test_a_model_is_run(run, tmp_path, ner_model_dir):
    """With thresholds, a default for the model, and itself to compare with."""
    rows = [ner_row(i, lang="en") for i in range(4)]
    gold = write_jsonl(tmp_path / "gold.jsonl", rows)
    model = tmp_path / "model"
    model.mkdir()
    for path in ner_model_dir.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    code, figures, _ = run(
        *("--task", "ner", "--model", model, "--gold", gold, "--threads", 1, "--device", "cpu"),
        *("--window-tokens", 32, "--overlap-tokens", 8, "--max-batch-tokens", 128),
        *("--tune", tmp_path / "t.json", "--write-default", "--compare-model", ner_model_dir),
        *("--bootstrap", 20, "--option", "aggregation-strategy=first"),
    )
    assert (code, figures["n_rows"], figures["n_missing"]) == (0, 4, 0)
    assert figures["compare"]["n_changed"] == 0
    written = json.loads((model / "config.json").read_text())["task_specific_params"]["ner"]
    assert written["min_score"] == figures["tune"]["thresholds"]["*"]
