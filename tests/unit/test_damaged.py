"""Damaged and foreign files of a run folder: made again, ignored, or refused by name."""

import json
import logging
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import Alone, Killed, quick_jobs, write_jsonl

from erniem_batch.errors import ConfigError, DamagedFile
from erniem_batch.evaluate import read as evaluate_read
from erniem_batch.job import result_files
from erniem_batch.job.attempts import Attempt, n_repeated
from erniem_batch.job.compact import compact
from erniem_batch.job.details import previous_findings
from erniem_batch.job.documents import parse_document, with_checksum
from erniem_batch.job.manifest import MANIFEST, Entry, Manifest, publish, read_manifest
from erniem_batch.job.rundir import PLAN_SCHEMA, RunFolder
from erniem_batch.job.segments import NAME, read_segment, write_segment
from erniem_batch.job.status import status
from erniem_batch.job.write import Marks, sidecar
from erniem_batch.serve import parity


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_jobs(monkeypatch)


@pytest.fixture
def night(tmp_path, job):
    """Two nights: a plan of two segments, with a changed file."""
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [{"text": f"Ada {i} {j}"} for j in range(2)])
    job()
    write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": "new"}])
    job()
    return tmp_path / "out"


def content(output):
    """All rows, and what the manifest says of files."""
    rows = [row for path in result_files(str(output)) for row in pq.read_table(path).to_pylist()]
    manifest = read_manifest(str(output))
    return rows, manifest.files, manifest.dead_letters


def segments_of(output, kind):
    return sorted((output / "_run" / kind).glob("*.parquet"))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(bytes(data))


HOW = pytest.mark.parametrize("how", [truncated, emptied, flipped])


def said(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


# ---- what is made again ---------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("kind", ["ledger", "findings"])
def test_ledger_and_findings_come_from_the_data_files(night, job, caplog, how, kind):
    before = content(night)
    report = json.loads((night / "_run" / "report.json").read_bytes())
    for path in segments_of(night, kind):
        how(path)
    assert status(str(night)).units == 3
    again, done = job()
    assert (again.exit_code, done, content(night)) == (0, [], before)
    assert "is damaged" in said(caplog)
    aside = sorted(path.name for path in (night / "_run" / "damaged").iterdir())
    assert len(aside) == 2
    assert all(name.startswith(f"{kind}-001-") for name in aside)
    now = json.loads((night / "_run" / "report.json").read_bytes())
    assert sorted(now["findings"]) == sorted(report["findings"])
    assert now["n_found"] == report["n_found"]
    caplog.clear()
    assert job()[1] == []
    assert "damaged" not in said(caplog), "only once"


@HOW
@pytest.mark.parametrize("which", [0, 1])
def test_a_segment_of_the_plan_is_planned_again(night, job, caplog, how, which):
    before = content(night)
    path = segments_of(night, "plan")[which]
    how(path)
    with pytest.raises(DamagedFile, match=re.escape(str(path))):
        status(str(night))
    with pytest.raises(DamagedFile, match="run the same command again"):
        job(replay=True)
    report, done = job()
    assert (report.exit_code, done) == (0, [])
    texts, known = ([row["text"] for row in rows] for rows in (content(night)[0], before[0]))
    assert sorted(texts) == sorted(known), "files may stand in another order"
    assert "moved to" in said(caplog)
    assert status(str(night)).units_done == 3


@pytest.mark.parametrize("gone", [False, True])
def test_a_plan_that_the_input_does_not_bring_back(night, job, tmp_path, gone):
    """To go on would delete the results of an input that is no longer there."""
    before = content(night)
    (tmp_path / "in" / "2.jsonl").unlink()
    path = segments_of(night, "plan")[0]
    path.unlink() if gone else truncated(path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"lacks 1 of the 3 files .* \(such as 2.parquet\)"):
            job()
        assert content(night) == before
    report, _ = job(overwrite=True)
    assert (report.exit_code, report.n_ok) == (0, 3)
    assert len(list(night.glob("*.parquet"))) == 2, "nothing of the old generation is left"


def test_plan_and_manifest_are_damaged(night, job):
    """Nothing could prove that a new plan has all that counts."""
    truncated(segments_of(night, "plan")[0])
    truncated(night / MANIFEST)
    with pytest.raises(DamagedFile, match=f"{MANIFEST} is damaged"):
        job()


def test_a_limited_plan_is_not_guessed(tmp_path, job):
    """How many rows are left of --limit is in the plan alone."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"Ada {j}"} for j in range(5)])
    job(limit=2)
    truncated(segments_of(tmp_path / "out", "plan")[0])
    with pytest.raises(DamagedFile, match="restore the file from a backup or start anew"):
        job(limit=2)


@HOW
def test_run_json_comes_from_its_copy(night, job, caplog, how):
    path = night / "_run" / "run.json"
    data, before = path.read_bytes(), content(night)
    how(path)
    assert status(str(night)).units_done == 3
    assert "read from its copy in the plan" in said(caplog)
    report, done = job()
    assert (report.exit_code, done, content(night)) == (0, [], before)
    assert path.read_bytes() == data
    path.unlink()
    assert job(replay=True)[0].exit_code == 0
    assert path.read_bytes() == data


def test_run_json_without_a_copy(night, job):
    """As in a folder of an older release."""
    for path in segments_of(night, "plan"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    before = content(night)
    path = night / "_run" / "run.json"
    path.write_bytes(b'{"generation": 1')
    remedy = "are not JSON.*restore it from a backup, or start anew with --overwrite"
    for command in (job, lambda: status(str(night)), lambda: job(replay=True)):
        with pytest.raises(DamagedFile, match=remedy):
            command()
    path.unlink()
    with pytest.raises(DamagedFile, match="it is missing, but there is a plan"):
        job()
    assert content(night) == before
    report, done = job(overwrite=True, min_score=0.5)
    assert (report.exit_code, len(done)) == (0, 3)
    assert read_manifest(str(night)).generation == 2


def test_run_json_before_anything_was_planned(tmp_path, job, caplog):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}])
    (tmp_path / "out" / "_run").mkdir(parents=True)
    (tmp_path / "out" / "_run" / "run.json").write_bytes(b"")
    assert job()[0].exit_code == 0
    assert "ignored, since nothing was planned yet" in said(caplog)


def test_a_manifest_is_written_anew(night, job, caplog):
    before = content(night)
    truncated(night / MANIFEST)
    for read in (evaluate_read.read_run, parity.read_run, compact):
        with pytest.raises(DamagedFile, match=f"{MANIFEST} is damaged"):
            read(str(night))
    with pytest.raises(DamagedFile, match="delete it and run the same command again"):
        job(replay=True)
    assert job()[0].exit_code == 0
    assert content(night) == before


# ---- what is ignored ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"exit_code": "x"}', b"[" * 9999])
@pytest.mark.parametrize("name", ["report.json", "forecast.json"])
def test_reports_and_forecasts(night, job, caplog, name, data):
    before = content(night)
    (night / "_run" / name).write_bytes(data)
    assert status(str(night)).exit_code in (0, None)
    assert job(replay=True)[0].exit_code == 0
    assert job()[0].exit_code == 0
    assert content(night) == before
    if name == "report.json":
        assert f"{name} is damaged" in said(caplog)
        assert len(previous_findings(str(night))) > 0


def test_a_report_that_was_changed_is_not_compared_with(night):
    path = night / "_run" / "report.json"
    path.write_text(path.read_text().replace('"exit_code": 0', '"exit_code": 4'))
    with pytest.raises(ConfigError, match=r"no readable _run/report\.json"):
        previous_findings(str(night))
    values = json.loads(path.read_bytes())
    del values["checksum"]
    path.write_text(json.dumps({**values, "findings": [["label"]]}))
    with pytest.raises(ConfigError, match=r"report\.json is damaged"):
        previous_findings(str(night))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"number": "2"}', b'{"number": 3, "killers": [[]]}']
)
def test_records_of_attempts_are_forgotten(tmp_path, caplog, data):
    output = str(tmp_path)
    path = tmp_path / "_run" / "attempts" / "u1.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert n_repeated(output) == 0
    assert Attempt.next(output, "u1") == Attempt(str(path))
    assert "the deaths that it counts are forgotten" in said(caplog)


def test_a_flipped_record_convicts_no_row(tmp_path):
    """The row is another one now: nothing is believed."""
    attempt = Attempt.next(str(tmp_path), "u1")
    attempt.number, attempt.suspect = 3, 4
    attempt.works_on(4)
    path = tmp_path / "_run" / "attempts" / "u1.json"
    assert Attempt.next(str(tmp_path), "u1").killers == [4]
    path.write_text(path.read_text().replace('"row": 4', '"row": 5'))
    assert Attempt.next(str(tmp_path), "u1").number == 1


def test_foreign_files(night, job, caplog):
    before = content(night)
    pq.write_table(pa.table({"x": [1]}), night / "_run" / "plan" / "notes.parquet")
    for name in ("plan/abc-def.parquet", "ledger/001-x.parquet", "findings/a", "attempts/y.txt"):
        path = night / "_run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"hello")
    (night / "_run" / "ledger" / "001-00000000000000000009-0123abcd.parquet").mkdir()
    assert status(str(night)).units_done == 3
    assert (job()[1], content(night)) == ([], before)
    assert "are not of this package and are ignored, such as" in said(caplog)


def test_a_copy_of_a_segment_does_not_count_twice(night, job):
    before = content(night)
    first = segments_of(night, "plan")[0]
    shutil.copy(first, first.with_name("001-00007.parquet"))
    assert (job()[1], content(night)) == ([], before)
    assert status(str(night)).units == 3


def test_unknown_fields_of_a_newer_release(night, job):
    before = content(night)
    for path in (night / "_run" / "run.json", night / MANIFEST, night / "_run" / "report.json"):
        values = json.loads(path.read_bytes())
        for entry in values.get("files", []):
            entry["newer"] = [1]
        path.write_text(json.dumps({**values, "newer": {"a": 1}}))
    assert read_manifest(str(night)).names == {"0.parquet", "1.2.parquet", "2.parquet"}
    assert status(str(night)).exit_code == 0
    assert evaluate_read.read_run(str(night)).settings["task"] == "ner"
    assert (job()[1], content(night)) == ([], before)
    for path in segments_of(night, "ledger"):
        table = pq.read_table(path)
        write_segment(str(path), table.append_column("newer", pa.array([1] * len(table))))
    assert (job()[1], content(night)) == ([], before)


def test_the_ledger_of_an_older_release(night, job):
    """It has no checksums of the data files; they are done all the same."""
    for path in segments_of(night, "ledger"):
        pq.write_table(pq.read_table(path).drop_columns("sha256"), path)
    report, done = job()
    assert (report.exit_code, done) == (0, [])
    assert [entry.sha256 for entry in read_manifest(str(night)).files] == ["", "", ""]


# ---- what is refused ------------------------------------------------------------------------


def test_a_folder_in_the_place_of_a_file(night, job):
    for name in ("_run/run.json", "_run/report.json", MANIFEST):
        path = night / name
        data = path.read_bytes()
        path.unlink()
        path.mkdir()
        with pytest.raises(ConfigError, match=f"{path.name}: .* a folder stands where a file"):
            job()
        path.rmdir()
        path.write_bytes(data)
    assert job()[1] == []


def test_a_file_in_the_place_of_a_folder(tmp_path, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}])
    (tmp_path / "out" / "_run").mkdir(parents=True)
    (tmp_path / "out" / "_run" / "plan").write_bytes(b"")
    with pytest.raises(ConfigError, match="a file stands where a folder is expected, move it away"):
        job()


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a//b", "a\0b", "."])
def test_a_manifest_names_only_what_is_inside(tmp_path, name):
    publish(str(tmp_path), Manifest(1, "f1", [Entry(name, 1)], []), Alone())
    with pytest.raises(DamagedFile, match="it names a file outside its folder"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    "entry", [1, {}, {"name": "a"}, {"name": "a", "n_rows": "1"}, {"name": "a", "n_rows": True}]
)
def test_entries_of_a_manifest(tmp_path, entry):
    values = {"generation": 1, "fingerprint": "f", "files": [entry], "dead_letters": []}
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DamagedFile, match="an entry"):
        read_manifest(str(tmp_path))


# ---- documents, segments and marks ----------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" ", "it is empty"),
        (b'{"a": 1', "its 7 bytes are not JSON"),
        (b"\xff\xff", "are not JSON"),
        (b"[1]", "a JSON object is expected, not list"),
        (b"{}", "the field 'a' is missing"),
        (b'{"a": "1"}', "the field 'a' should be int and is str"),
        (b'{"a": true}', "the field 'a' should be int and is bool"),
        (b'{"a": 1, "checksum": "0"}', "its checksum does not fit its content"),
    ],
)
def test_a_document_that_is_damaged(data, message):
    with pytest.raises(DamagedFile, match=f"^x.json is damaged .*{message}.*: do this$"):
        parse_document(data, "x.json", {"a": int}, "do this", ["a"])


def test_a_document_with_more_fields():
    made = with_checksum({"a": 1, "b": [None, 0.1, "é"]}, ["a", "b"])
    data = json.dumps({**made, "newer": 1}).encode()
    assert parse_document(data, "x", {"a": int}, "", ["a", "b"])["b"] == [None, 0.1, "é"]


def test_every_flipped_bit_of_a_segment_is_found(tmp_path):
    """Parquet itself would take some of them for other values."""
    path = str(tmp_path / "001-00001.parquet")
    row = {"path": "p", "output": "o", "row_groups": [1], "edition": 1}
    table = pa.Table.from_pylist([{**row, "id": i} for i in "12"], PLAN_SCHEMA)
    write_segment(path, table, {b"note": b"x"})
    assert read_segment(path, PLAN_SCHEMA, (), "") == table
    data = (tmp_path / "001-00001.parquet").read_bytes()
    wrong = 0
    for place in range(0, len(data), 11):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "001-00001.parquet").write_bytes(bytes(changed))
        try:
            wrong += read_segment(path, PLAN_SCHEMA, (), "") != table
        except DamagedFile:
            continue
    assert wrong == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("001-00001.parquet", True),
        ("1000-100000.parquet", True),
        ("001-01790000000000000000-0123abcd.parquet", True),
        ("001-x.parquet", False),
        ("1-1.parquet", False),
        ("x001-00001.parquet", False),
        ("001-00001-00001.parquet", False),
        (".001-00001.parquet", False),
    ],
)
def test_names_of_segments(name, expected):
    assert bool(NAME.search(f"out/_run/plan/{name}")) is expected


def test_marks_that_were_changed(tmp_path, job, caplog):
    """JSONL: what the sidecar counts is not believed, and the unit is made again."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": "Eva"}])
    with pytest.raises(Killed):
        job(output_format="jsonl", units=1)
    shutil.rmtree(tmp_path / "out" / "_run" / "ledger", ignore_errors=True)
    path = sidecar(str(tmp_path / "out"), "a.jsonl")
    with open(path) as file:
        text = file.read()
    assert Marks.decode(text.encode(), path).counts["n_ok"] == 1
    with open(path, "w") as file:
        file.write(text.replace('"n_tokens": ', '"n_tokens": 1'))
    report, done = job(output_format="jsonl")
    assert (report.exit_code, [r.output for r in done]) == (0, ["a.jsonl", "b.jsonl"])
    assert "so the unit is made again" in said(caplog)


def test_nothing_is_logged_of_a_sound_folder(night, job, caplog):
    caplog.set_level(logging.WARNING)
    assert job()[1] == []
    assert status(str(night)).units_done == 3
    assert RunFolder(str(night)).read_report()["exit_code"] == 0
    assert caplog.records == []


@pytest.mark.parametrize("rest", ["kept", "gone"])
@pytest.mark.parametrize("how", [truncated, emptied, flipped, Path.unlink])
def test_files_of_a_lost_plan_keep_their_names(tmp_path, job, how, rest):
    """A second night is killed, and the segment of its plan is lost, or also its ledger."""
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [{"text": f"Ada {i}"}])
    job()
    write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": "new"}])
    write_jsonl(tmp_path / "in" / "5.jsonl", [{"text": "five"}])
    with pytest.raises(Killed):
        job(units=1)
    night = tmp_path / "out"
    assert (night / "1.2.parquet").exists()
    newest = segments_of(night, "plan")[-1]
    assert newest.name == "001-00002.parquet"
    how(newest)
    if rest == "gone":
        for path in segments_of(night, "ledger")[1:]:
            path.unlink()
    report, done = job()
    assert (report.exit_code, [receipt.output for receipt in done]) == (0, ["5.parquet"])
    names = {entry.name for entry in read_manifest(str(night)).files}
    assert names == {"0.parquet", "1.2.parquet", "2.parquet", "5.parquet"}
    assert {path.name for path in night.glob("*.parquet")} == names, "nothing is left unnamed"


def test_a_plan_that_was_mended_meanwhile_is_not_set_aside(night, job, monkeypatch):
    """The run stood still after it had seen the damage; another one has planned anew since."""
    newest = segments_of(night, "plan")[-1]
    before, sound = content(night), newest.read_bytes()
    truncated(newest)
    set_aside = RunFolder.set_aside

    def late(self, lost):
        if lost:
            newest.unlink()
            newest.write_bytes(sound)
        set_aside(self, lost)

    monkeypatch.setattr(RunFolder, "set_aside", late)
    report, done = job()
    assert (report.exit_code, done, content(night)) == (0, [], before)
    assert newest.read_bytes() == sound
