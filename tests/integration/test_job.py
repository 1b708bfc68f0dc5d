"""The batch job from end to end. Each run costs seconds, so each proves several things."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import DyingTagger, RaisingTagger, write_bytes, write_jsonl, write_parquet

from erniem_batch import pipeline
from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job import JobConfig, run, run_job
from erniem_batch.job.cluster import connect
from erniem_batch.job.write import ADDED_SCHEMA, DEAD_LETTERS

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
    paths = sorted(p for p in output.rglob("*.parquet") if DEAD_LETTERS not in p.parts)
    return [(p.relative_to(output).as_posix(), pq.read_table(p).to_pylist()) for p in paths]


def _letters(output):
    letters = []
    for path in sorted((output / DEAD_LETTERS).rglob("*.jsonl")):
        letters += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return letters


def _config(source, output, model, **options):
    defaults = {"window_tokens": 64, "overlap_tokens": 16, "num_cpus_per_actor": 1}
    return JobConfig(
        input=[str(source)], output=str(output), model=str(model), **{**defaults, **options}
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
    assert report.n_entities == sum(len(row["entities"]) for row in found) > 0
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
        assert pq.read_schema(output / name).equals(pa.schema([*own, *ADDED_SCHEMA]))


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
    leftovers = [p for p in output.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]
    assert leftovers == []


def test_second_run_into_the_same_folder_is_refused(parquet_run, corpus, ner_model_dir):
    output = parquet_run[2]
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    with pytest.raises(ConfigError, match="holds results already"):
        run_job(_config(corpus / "parquet", output, ner_model_dir, unit_bytes=100))
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_a_unit_that_cannot_be_read_does_not_stop_the_others(
    tmp_path, corpus, ner_model_dir, local_ray
):
    """Its pages are damaged, its footer isn't: nothing is seen before the work."""
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(3000)]})
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / "in" / f"{name}.parquet", table.slice(0, 20))
    damaged = write_parquet(tmp_path / "in" / "b.parquet", table)
    content = bytearray(damaged.read_bytes())
    content[200:4000] = b"\xff" * 3800
    damaged.write_bytes(content)
    report = run_job(_config(tmp_path / "in", tmp_path / "out", ner_model_dir))
    assert report.exit_code == 3
    (failed,) = report.failed_units
    assert failed.output.endswith("b.parquet")
    assert failed.error
    assert [(name, len(rows)) for name, rows in _read_back(tmp_path / "out")] == [
        ("a.parquet", 20),
        ("c.parquet", 20),
    ]
    assert not list((tmp_path / "out").rglob("*.tmp"))


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
    with pytest.raises(JobError, match=r"the actors failed.*model\.safetensors"):
        run_job(_config(corpus / "jsonl", tmp_path / "out", model))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("tagger", "reason"),
    [(RaisingTagger, "LookupError: nobody expects this"), (DyingTagger, "died")],
)
def test_a_unit_that_kills_its_actor_ends_the_job(
    tmp_path, ner_model_dir, local_ray, monkeypatch, tagger, reason
):
    """With Ray Data's own settings it would be tried for ever. Finished units stay."""
    for name in ("a", "b"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": "Ada in London"}])
    monkeypatch.setattr(run, "UnitTagger", tagger)
    config = _config(tmp_path / "in", tmp_path / "out", ner_model_dir, actors="1")
    with pytest.raises(JobError, match=f"the actors failed.*{reason}"):
        run_job(config)
    assert "b.parquet" not in [name for name, _ in _read_back(tmp_path / "out")]


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
