"""The batch job from end to end. Each run costs seconds, so each proves several things."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import (
    ADDED_SCHEMA,
    KILLER,
    DyingTagger,
    RaisingTagger,
    RefusingTagger,
    ner_config,
    write_bytes,
    write_jsonl,
    write_parquet,
)

from erniem_batch import pipeline
from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job import JobConfig, replay_job, result_files, run, run_job
from erniem_batch.job.cluster import connect
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.stream import stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
TEXTS = [
    "Ada Lovelace lived in London.",
    "北京は大きい都市です。",
    "Сергей живёт в Москве",
    "one two three " * 60,
    "",
    "\U0001f469\u200d\U0001f467 ﬁne \u00a0 e\u0301",
]
BAD_ROWS = {4: None, 17: None, 55: None}


def _rows():
    rows = []
    for i in range(60):
        text = BAD_ROWS.get(i, f"{TEXTS[i % len(TEXTS)]} {i}")
        rows.append(
            {"id": f"{i:04}", "text": text, "n": i if i % 5 else None, "tags": ["a"] * (i % 3)}
        )
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same rows as JSONL (two files, one compressed, and a line that is none) and Parquet."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = _rows()
    write_jsonl(folder / "jsonl" / "part-00000.jsonl", rows[:40])
    write_jsonl(folder / "jsonl" / "sub" / "part-00001.jsonl.gz", rows[40:])
    table = pa.Table.from_pylist(rows)
    write_parquet(folder / "parquet" / "part-00000.parquet", table.slice(0, 40), group_rows=7)
    write_parquet(folder / "parquet" / "sub" / "part-00001.parquet", table.slice(40), group_rows=7)
    return folder


def _read_back(output):
    """(file, rows) of all output files, in the order of the input."""
    paths = [Path(path) for path in result_files(str(output))]
    there = {p for p in output.rglob("*.parquet") if not {DEAD_LETTERS, "_run"} & {*p.parts}}
    assert set(paths) == there
    return [(p.relative_to(output).as_posix(), pq.read_table(p).to_pylist()) for p in paths]


def _letters(output):
    letters = []
    for path in sorted((output / DEAD_LETTERS).rglob("*.parquet")):
        letters += pq.read_table(path).to_pylist()
    return letters


def _state(output):
    """Content and time of all files that a reader sees."""
    files = [p for p in output.rglob("*") if p.is_file() and "_run" not in p.parts]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files if p.name[0] != "."}


def _succeeded(output):
    if not (output / "_SUCCESS").exists():
        return False
    digest = json.loads((output / "_SUCCESS").read_bytes())["manifest_sha256"]
    return digest == hashlib.sha256((output / "_manifest.json").read_bytes()).hexdigest()


def _config(source, output, model, **options):
    defaults = {"window_tokens": 64, "overlap_tokens": 16, "num_cpus_per_actor": 1}
    return ner_config(
        JobConfig,
        input=[str(source)],
        output=str(output),
        model=str(model),
        **{**defaults, **options},
    )


@pytest.fixture(scope="module")
def parquet_run(corpus, ner_model_dir, local_ray, tmp_path_factory):
    """A run with two actors over units of single row groups."""
    output = tmp_path_factory.mktemp("parquet-out")
    receipts = []
    config = _config(corpus / "parquet", output, ner_model_dir, actors="2:2", unit_bytes=100)
    report = run_job(config, on_receipt=receipts.append)
    return report, receipts, output


@pytest.fixture(scope="module")
def jsonl_run(corpus, ner_model_dir, local_ray, tmp_path_factory):
    output = tmp_path_factory.mktemp("jsonl-out")
    config = _config(corpus / "jsonl", output, ner_model_dir, actors="1", unit_bytes=1500)
    return run_job(config), output


def _check_rows(report, output):
    """Rows in = rows out + dead letters, in order, with carried columns as they were."""
    files = _read_back(output)
    found = [row for _, rows in files for row in rows]
    expected = [row for row in _rows() if row["text"] is not None]
    carried = [{k: v for k, v in row.items() if k not in ADDED_SCHEMA.names} for row in found]
    assert carried == expected
    assert (report.n_rows, report.n_ok, report.n_dead) == (60, 57, 3)
    assert report.exit_code == 4
    assert report.n_found == sum(len(row["entities"]) for row in found) > 0
    for row in found:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]
    return found


def test_parquet(parquet_run, corpus):
    report, receipts, output = parquet_run
    _check_rows(report, output)
    names = [name for name, _ in _read_back(output)]
    assert names == [
        *(f"part-00000-{i:05}.parquet" for i in range(6)),
        *(f"sub/part-00001-{i:05}.parquet" for i in range(3)),
    ]
    assert report.n_units == len(receipts) == 9
    assert len({receipt.unit_id for receipt in receipts}) == 9
    own = pq.read_schema(corpus / "parquet" / "part-00000.parquet")
    for name in names:
        schema = pq.read_schema(output / name).remove_metadata()
        assert schema.equals(pa.schema([*own, *ADDED_SCHEMA]))
    assert {receipt.output for receipt in receipts} == set(names)
    assert not (output / "_SUCCESS").exists()  # three dead letters are more than were allowed
    assert json.loads((output / "_run" / "report.json").read_bytes())["n_ok"] == 57


def test_jsonl(jsonl_run):
    report, output = jsonl_run
    _check_rows(report, output)
    names = [name for name, _ in _read_back(output)]
    assert names[-1] == "sub/part-00001.parquet"
    assert len(names) > 3


def test_both_formats_give_the_same_entities(parquet_run, jsonl_run):
    """The units differ, and with them the batches: scores within 1e-5."""
    pairs = zip(
        *(
            [row for _, rows in _read_back(run[-1]) for row in rows]
            for run in (parquet_run, jsonl_run)
        ),
        strict=True,
    )
    for a, b in pairs:
        assert (a["id"], a["n_tokens"], a["n_windows"]) == (b["id"], b["n_tokens"], b["n_windows"])
        assert [(e["start"], e["end"], e["label"]) for e in a["entities"]] == [
            (e["start"], e["end"], e["label"]) for e in b["entities"]
        ]
        assert [e["score"] for e in a["entities"]] == pytest.approx(
            [e["score"] for e in b["entities"]], abs=1e-5
        )


def test_the_job_finds_what_a_local_call_finds(parquet_run, ner_model_dir):
    ner = pipeline(
        "ner", str(ner_model_dir), device="cpu", window_tokens=64, overlap_tokens=16, n_threads=1
    )
    rows = [row for _, rows in _read_back(parquet_run[2]) for row in rows]
    for row, entities in zip(rows, ner([row["text"] for row in rows]), strict=True):
        assert [(e["start"], e["end"], e["label"]) for e in row["entities"]] == [
            (e["start"], e["end"], e["entity_group"]) for e in entities
        ]


def test_no_output_file_holds_rows_of_two_units(parquet_run):
    for name, rows in _read_back(parquet_run[2]):
        first = 40 if name.startswith("sub/") else 0
        groups = {(int(row["id"]) - first) // 7 for row in rows}
        assert groups == {int(name.removesuffix(".parquet")[-5:])}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_dead_letters(parquet_run, jsonl_run, kind):
    output = (parquet_run if kind == "parquet" else jsonl_run)[-1]
    letters = _letters(output)
    assert [(Path(x["source_file"]).name.split(".")[0], x["source_row"]) for x in letters] == [
        ("part-00000", 4),
        ("part-00000", 17),
        ("part-00001", 15),
    ]
    assert {x["reason"] for x in letters} == {"text must be a string, got null"}
    assert {x["attempts"] for x in letters} == {1}
    if kind == "parquet":
        assert [x["row"] for x in letters] == [_rows()[i] for i in (4, 17, 55)]
    else:
        assert [json.loads(x["line"]) for x in letters] == [_rows()[i] for i in (4, 17, 55)]
    assert [p for p in output.rglob("*.tmp")] == []
    assert list((output / "_run" / "attempts").glob("*.json")) == []


# ---- once more --------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*_):
        raise AssertionError("there was nothing to do, yet Ray was started")

    monkeypatch.setattr(run, "connect", refuse)


def test_second_run_does_nothing(parquet_run, corpus, ner_model_dir, no_ray):
    """The size of units counts only for files that are new."""
    first, _, output = parquet_run
    before = _state(output)
    for unit_bytes in (100, 5000):
        report = run_job(_config(corpus / "parquet", output, ner_model_dir, unit_bytes=unit_bytes))
        assert (report.n_units, report.n_units_now, report.n_bytes_read) == (9, 0, 0)
        assert (report.n_rows, report.n_found) == (first.n_rows, first.n_found)
        assert report.exit_code == 4
    assert _state(output) == before
    config = _config(corpus / "parquet", output, ner_model_dir, max_dead_letters="5%")
    assert run_job(config).exit_code == 0
    assert _succeeded(output)
    (output / "_SUCCESS").unlink()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"min_score": 0.5}, "--min-score was 0.0, now 0.5"),
        ({"columns": "id"}, r"--columns was None, now \['id'\]"),
        ({"window_tokens": 40}, "--window-tokens was 64, now 40"),
    ],
)
def test_other_settings_are_refused(parquet_run, corpus, ner_model_dir, no_ray, options, name):
    output = parquet_run[2]
    before = _state(output)
    with pytest.raises(ConfigError, match=f"made with other settings: {name}"):
        run_job(_config(corpus / "parquet", output, ner_model_dir, **options))
    assert _state(output) == before


@pytest.mark.slow  # a shorter one of the same name is in test_resume.py
def test_night_after_night(tmp_path, ner_model_dir, local_ray):
    """New, changed and removed files; an output that is lost; other settings; each but once."""
    source, output = tmp_path / "in", tmp_path / "out"

    def night(expected, rows, **options):
        config = _config(source, output, ner_model_dir, actors="1", **options)
        receipts = []
        report = run_job(config, on_receipt=receipts.append)
        assert report.exit_code == 0
        assert _succeeded(output)
        assert sorted(receipt.output for receipt in receipts) == expected
        files = _read_back(output)
        assert sorted(row["text"] for _, rows in files for row in rows) == sorted(rows)
        assert (report.n_rows, report.n_ok) == (len(rows), len(rows))
        return report

    write_jsonl(source / "a.jsonl", [{"text": "a1"}])
    write_jsonl(source / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    night(["a.parquet", "b.parquet"], ["a1", "b1", "b2"])
    write_jsonl(source / "c.jsonl", [{"text": "c1"}])
    night(["c.parquet"], ["a1", "b1", "b2", "c1"])
    write_jsonl(source / "a.jsonl", [{"text": "a2"}, {"text": "a3"}])
    night(["a.3.parquet"], ["a2", "a3", "b1", "b2", "c1"])
    (source / "b.jsonl").unlink()
    assert night([], ["a2", "a3", "b1", "b2", "c1"]).n_removed_inputs == 1
    (output / "c.parquet").unlink()
    night(["c.parquet"], ["a2", "a3", "b1", "b2", "c1"])
    night(["a.4.parquet", "c.4.parquet"], ["a2", "a3", "c1"], min_score=0.9, overwrite=True)
    assert _state(output).keys() == {
        output / name for name in ("a.4.parquet", "c.4.parquet", "_manifest.json", "_SUCCESS")
    }


def test_a_ledger_that_is_lost(tmp_path, ner_model_dir, local_ray, monkeypatch):
    """It is a cache: the files themselves say what is done."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}, {"text": "Bob"}])
    config = _config(tmp_path / "in", tmp_path / "out", ner_model_dir)
    first = run_job(config)
    shutil.rmtree(tmp_path / "out" / "_run" / "ledger")
    before = _state(tmp_path / "out")
    second = run_job(config)
    assert (second.n_units_now, second.n_ok) == (0, first.n_ok)
    after = _state(tmp_path / "out")
    assert {p: content for p, (content, _) in after.items()} == {
        p: content for p, (content, _) in before.items()
    }


@pytest.mark.slow  # test_bad_input.py replays what is bad in more ways
@pytest.mark.parametrize(("suffix", "output_format"), [("jsonl", "jsonl"), ("parquet", "parquet")])
def test_replay(tmp_path, ner_model_dir, local_ray, monkeypatch, suffix, output_format):
    """A row that once could not be tagged is tagged; the input may be gone by then."""
    rows = [{"id": i, "text": text} for i, text in enumerate(["Ada", KILLER, None, "Bob"])]
    source = tmp_path / "in" / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(source, rows)
    else:
        write_parquet(source, pa.Table.from_pylist(rows))
    output = tmp_path / "out"
    config = _config(
        source, output, ner_model_dir, actors="1", columns="id", output_format=output_format
    )
    with monkeypatch.context() as patch:
        patch.setattr(run, "stream", partial(stream, tagger=RefusingTagger))
        report = run_job(config)
    assert (report.n_ok, report.n_dead, report.exit_code) == (2, 2, 4)
    source.unlink()
    for n in (1, 2):
        report = replay_job(str(output), {})
        assert (report.n_rows, report.n_ok, report.n_dead, report.n_units_now) == (4, 3, 1, 1)
        (letter,) = _letters(output)
        assert letter["source_row"] == 2
        kept = letter["row"] if suffix == "parquet" else json.loads(letter["line"])
        assert kept == rows[2]
        names = [f"a.{output_format}"]
        names += [f"a.replay-{i}.{output_format}" for i in range(1, n + 1)]
        assert [Path(path).name for path in result_files(str(output))] == names
    if output_format == "parquet":
        ids = [row["id"] for _, rows in _read_back(output) for row in rows]
        assert ids == [0, 3, 1]


# ---- faults -----------------------------------------------------------------------------------


def test_damaged_pages_do_not_stop_the_others(tmp_path, corpus, ner_model_dir, workers):
    """The footer is whole: nothing is seen before the work."""
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(60)]})
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / "in" / f"{name}.parquet", table, group_rows=20)
    damaged = tmp_path / "in" / "b.parquet"
    column = pq.read_metadata(damaged).row_group(1).column(0)
    start, size = column.dictionary_page_offset, column.total_compressed_size
    content = bytearray(damaged.read_bytes())
    content[start : start + size] = b"\xff" * size
    damaged.write_bytes(content)
    report = run_job(_config(tmp_path / "in", tmp_path / "out", ner_model_dir))
    assert (report.exit_code, report.n_ok, report.n_dead) == (4, 160, 20)
    assert [(name, len(rows)) for name, rows in _read_back(tmp_path / "out")] == [
        ("a.parquet", 60),
        ("b.parquet", 40),
        ("c.parquet", 60),
    ]
    (letter,) = _letters(tmp_path / "out")
    assert (letter["source_row"], letter["n_rows"]) == (20, 20)


def test_an_error_of_ours_costs_one_unit_for_now(
    tmp_path, ner_model_dir, local_ray, monkeypatch, caplog
):
    """The rest is done; the next run does what is missing. No text is told anywhere."""
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": "canary words"}])
    config = _config(tmp_path / "in", tmp_path / "out", ner_model_dir)
    monkeypatch.setattr(logging.getLogger("erniem_batch"), "propagate", True)
    receipts = []
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(run, "stream", partial(stream, tagger=RaisingTagger))
        report = run_job(config, on_receipt=receipts.append)
    assert (report.exit_code, report.n_missing, report.n_ok) == (3, 1, 2)
    (failed,) = report.failed_units
    assert failed.output == "b.parquet"
    assert failed.error.startswith("LookupError in fakes.py:")
    assert "unit failed output=b.parquet" in caplog.text
    assert "canary" not in caplog.text + report.as_line() + repr(receipts)
    assert not (tmp_path / "out" / "_manifest.json").exists()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert not [p for p in (tmp_path / "out" / "_run").rglob("*") if b"canary" in _content(p)]
    report = run_job(config)
    assert (report.exit_code, report.n_units_now, report.n_ok) == (0, 1, 3)
    assert _succeeded(tmp_path / "out")


def _content(path):
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.slow  # the drill kills actors; tests/unit has the search for the row
@pytest.mark.parametrize("n", [1, 3])
def test_a_row_that_kills_its_process(tmp_path, ner_model_dir, local_ray, monkeypatch, n):
    """It ends in the dead letters, and no row beside it, nor of the other unit in the process."""
    killers = [("b.parquet", 7), ("b.parquet", 21), ("c.parquet", 0)][:n]
    for name in ("a.parquet", "b.parquet", "c.parquet", "d.parquet"):
        texts = [KILLER if (name, i) in killers else f"Ada {i} in London" for i in range(40)]
        write_parquet(tmp_path / "in" / name, pa.table({"text": texts}))
    monkeypatch.setattr(run, "stream", partial(stream, tagger=DyingTagger))
    report = run_job(
        _config(tmp_path / "in", tmp_path / "out", ner_model_dir, actors="1", unit_bytes=1)
    )
    assert (report.n_ok, report.n_dead, report.exit_code) == (160 - n, n, 4)
    letters = _letters(tmp_path / "out")
    assert [(Path(x["source_file"]).name, x["source_row"]) for x in letters] == killers
    assert {x["error"] for x in letters} == {"ProcessDied"}
    assert {x["row"]["text"] for x in letters} == {KILLER}


def test_actors_that_never_fit_are_refused(tmp_path, corpus, ner_model_dir, local_ray):
    """Instead of waiting for them for ever."""
    config = _config(corpus / "jsonl", tmp_path / "out", ner_model_dir, num_cpus_per_actor=64)
    with pytest.raises(ConfigError, match="1 actors of 64 CPUs and 0 GPUs do not fit"):
        run_job(config)


def test_actors_that_cannot_start_end_the_job(
    tmp_path, corpus, ner_model_dir, local_ray, monkeypatch
):
    """The model goes away after the driver has looked at it: an error, and no waiting for ever."""
    model = shutil.copytree(ner_model_dir, tmp_path / "model")

    def connect_late(config):
        (model / "model.safetensors").unlink()
        return connect(config)

    monkeypatch.setattr(run, "connect", connect_late)
    with pytest.raises(JobError, match=r"the actors failed.*holds another model"):
        run_job(_config(corpus / "jsonl", tmp_path / "out", model))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_run"}


def test_command_line(tmp_path, ner_model_dir):
    """The script as a user starts it, with a Ray of its own."""
    source = tmp_path / "in" / "part-00042.jsonl"
    lines = [b'{"id": "0007", "doc": {"body": "Ada in London"}}', b"{hidden", b'{"doc": {}}']
    write_bytes(source, b"\r\n".join(lines))
    command = [sys.executable, "pipelines/ner.py", "--input", str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), "--model", str(ner_model_dir)]
    command += ["--text-column", "doc.body", "--output-format", "jsonl"]
    command += ["--actors", "2:2", "--num-cpus-per-actor", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 4, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["n_rows"], summary["n_ok"], summary["n_dead"]) == (3, 1, 2)
    assert "Traceback" not in done.stderr
    assert "hidden" not in done.stderr + done.stdout
    (row,) = map(json.loads, (tmp_path / "out" / "part-00042.jsonl").read_text().splitlines())
    assert (row["id"], row["doc"]) == ("0007", {"body": "Ada in London"})
    assert [(x["source_row"], x["stage"]) for x in _letters(tmp_path / "out")] == [
        (1, "read"),
        (2, "encode"),
    ]
    assert not (tmp_path / "home").exists()  # no token, no settings
