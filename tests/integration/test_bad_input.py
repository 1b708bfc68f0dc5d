"""Everything that can be wrong with input, in one corpus: nothing good is lost, nothing hides."""

import gzip
import json
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import bad_utf8_strings, write_jsonl, write_parquet
from faulty import HANGER, KILLER, LOCKER, POISON, FaultyTagger, count_passes, words

from erniem_batch import storage
from erniem_batch.job import JobConfig, replay_job, result_files, run, run_job
from erniem_batch.job.cluster import connect
from erniem_batch.job.stream import stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _faulty(monkeypatch, local_ray):
    monkeypatch.setattr(run, "stream", partial(stream, tagger=FaultyTagger))


def _rows(name, n, first=0):
    return [{"id": f"{name}-{i}", "text": words(i)} for i in range(first, first + n)]


class Corpus:
    """Files with good rows and bad ones, and what has to become of them."""

    def __init__(self, folder: Path, n_good: int, long_bytes: int) -> None:
        self.folder = folder
        self.good: set[str] = set()
        self.bad: Counter[tuple[str, str, int]] = Counter()  # file, error, rows
        folder.mkdir()
        each = n_good // 20
        for i in range(10):
            self._parquet(f"good-{i}", _rows(f"p{i}", each))
            self._jsonl(f"lines-{i}", _rows(f"j{i}", each))
        self._bad_rows()
        self._bad_files()
        self._jsonl("long", [{"id": "long", "text": "Ada in London " * (long_bytes // 14)}])
        poisonous = [
            {**row, "text": f"{row['text']} {POISON}"} if i in (3, 700, 1999) else row
            for i, row in enumerate(_rows("poison", 2000))
        ]
        self._parquet("poison", poisonous, bad=(3, 700, 1999))
        self._expect("poison.parquet", "RuntimeError", 3)

    def _parquet(self, name, rows, bad=(), **options):
        self.good |= {row["id"] for i, row in enumerate(rows) if i not in bad}
        table = pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("text", pa.string())]))
        return write_parquet(self.folder / f"{name}.parquet", table, **options)

    def _jsonl(self, name, rows):
        self.good |= {row["id"] for row in rows if isinstance(row.get("text"), str)}
        return write_jsonl(self.folder / f"{name}.jsonl", rows)

    def _expect(self, file, error, n_letters=1, n_rows=1):
        self.bad[(file, error, n_rows)] += n_letters

    def _bad_rows(self):
        rows = _rows("nulls", 30)
        rows[4]["text"] = rows[29]["text"] = None
        self._parquet("nulls", rows, bad=(4, 29))
        self._expect("nulls.parquet", "RecordError", 2)
        self._jsonl("types", [*_rows("types", 5), {"id": "t", "text": 5}, {"id": "u"}])
        self._expect("types.jsonl", "RecordError", 2)
        values = [row["text"].encode() for row in _rows("bytes", 20)]
        values[7] = b"caf\xe9"
        ids = [f"bytes-{i}" for i in range(20)]
        self.good |= set(ids) - {"bytes-7"}
        table = pa.table({"id": ids, "text": bad_utf8_strings(values)})
        write_parquet(self.folder / "bytes.parquet", table)
        self._expect("bytes.parquet", "RecordError")
        lines = [json.dumps(row).encode() for row in _rows("broken", 20)]
        lines[3], lines[9] = b'{"id": "x", "text": "caf\xe9"}', b'{"id": "broken-9", "tex'
        lines[12] = rb'{"id": "x", "text": "\ud800"}'
        self.good |= {f"broken-{i}" for i in range(20) if i not in (3, 9, 12)}
        (self.folder / "broken.jsonl").write_bytes(b"\n".join(lines))
        self._expect("broken.jsonl", "RecordError", 3)

    def _bad_files(self):
        rows = _rows("gzip", 400)
        data = gzip.compress("\n".join(map(json.dumps, rows)).encode())
        (self.folder / "gzip.jsonl.gz").write_bytes(data[: len(data) // 2])
        self._expect("gzip.jsonl.gz", "EOFError", n_rows=None)
        self.some_good = {row["id"] for row in rows}  # those before the break
        pages = self._parquet("pages", _rows("pages", 400), group_rows=100)
        self._damage_page(pages, 2)
        self.good -= {f"pages-{i}" for i in range(200, 300)}
        self._expect("pages.parquet", "OSError", n_rows=100)
        footer = self._parquet("footer", _rows("footer", 10))
        footer.write_bytes(footer.read_bytes()[:-30])
        self.good -= {f"footer-{i}" for i in range(10)}
        self._expect("footer.parquet", "ArrowInvalid", n_rows=None)
        (self.folder / "nothing.parquet").write_bytes(b"")
        self._expect("nothing.parquet", "ArrowInvalid", n_rows=None)
        (self.folder / "no-lines.jsonl").write_bytes(b"")
        self._parquet("norows", [])
        self._parquet("vanishes", _rows("vanishes", 12))
        self.good -= {f"vanishes-{i}" for i in range(12)}
        self._expect("vanishes.parquet", "FileNotFoundError", n_rows=12)
        other = pa.table({"id": ["other-0"], "body": ["no text here"]})
        write_parquet(self.folder / "other.parquet", other)
        self._expect("other.parquet", "ConfigError")
        more = pa.table({"id": ["more-0"], "text": ["Ada in London"], "n": [1]})
        write_parquet(self.folder / "more.parquet", more)
        self.good.add("more-0")

    @staticmethod
    def _damage_page(path, group):
        meta = pq.read_metadata(path).row_group(group).column(1)
        content = bytearray(path.read_bytes())
        start = meta.data_page_offset
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(content)


def _results(output):
    """Ids of all rows that a reader sees, and the dead letters."""
    ids, letters = [], []
    for path in result_files(str(output)):
        table = pq.read_table(pa.BufferReader(storage.read(path)))
        ids += table["id"].to_pylist() if "id" in table.column_names else []
    for info in storage.find(f"{output}/_dead_letters"):
        table = pq.read_table(pa.BufferReader(storage.read(info.path)))
        rows = table["row"] if "row" in table.column_names else pa.nulls(len(table))
        ids_dead = [row and row["id"] for row in _without_text(rows)]
        table = table.drop_columns([n for n in ("row",) if n in table.column_names])
        letters += [{**x, "id": i} for x, i in zip(table.to_pylist(), ids_dead, strict=True)]
    return ids, letters


def _without_text(rows):
    """Rows of dead letters; one of them has a text that is not UTF-8."""
    if not hasattr(rows, "chunks"):
        return rows.to_pylist()
    names = [field.name for field in rows.type if field.name != "text"]
    struct = rows.combine_chunks()
    columns = [struct.field(name) for name in names]
    return pa.StructArray.from_arrays(columns, names, mask=struct.is_null()).to_pylist()


def _config(work, model, output="out", **options):
    return JobConfig(
        input=[str(work / "in")], output=str(work / output), model=str(model),
        window_tokens=64, overlap_tokens=16, num_cpus_per_actor=1, actors="1",
        **{"unit_bytes": 100_000, **options},
    )  # fmt: skip


def _check_everything_bad(work, model, monkeypatch, n_good, long_bytes, unit_bytes):
    corpus = Corpus(work / "in", n_good, long_bytes)
    # One text is of 20 MB in the large corpus: a text may have a sixteenth of the largest row.
    options = {"unit_bytes": unit_bytes, "max_row_bytes": 1 << 29}
    config = _config(work, model, **options)
    vanishing = (corpus.folder / "vanishes.parquet").read_bytes()

    def connect_late(config):  # the plan is made
        (corpus.folder / "vanishes.parquet").unlink(missing_ok=True)
        return connect(config)

    monkeypatch.setattr(run, "connect", connect_late)
    harmless = run_job(config)
    n_passes = count_passes(work / "out")
    assert harmless.exit_code == 4

    (corpus.folder / "vanishes.parquet").write_bytes(vanishing)
    (work / "poisonous").touch()
    report = run_job(_config(work, model, "out2", **options))
    ids, letters = _results(work / "out2")
    found = Counter(ids)
    assert {i for i, n in found.items() if n > 1} == set()
    from_gzip = found.keys() & corpus.some_good
    assert 0 < len(from_gzip) < 400
    assert found.keys() - from_gzip == corpus.good
    assert (
        Counter((Path(x["source_file"]).name, x["error"], x["n_rows"]) for x in letters)
        == corpus.bad
    )
    n_dead = sum(1 if x["n_rows"] is None else x["n_rows"] for x in letters)
    assert (report.exit_code, report.n_missing) == (4, 0)
    assert (report.n_ok, report.n_dead, report.n_rows) == (len(ids), n_dead, len(ids) + n_dead)
    poison = [x for x in letters if x["error"] == "RuntimeError"]
    assert [(x["source_row"], x["id"]) for x in poison] == [
        (i, f"poison-{i}") for i in (3, 700, 1999)
    ]
    extra = len(count_passes(work / "out2")) - len(n_passes)
    assert 3 <= extra <= 3 * (math.ceil(math.log2(max(n_passes))) + 1)
    return report, extra, max(n_passes)


@pytest.mark.slow  # tests/unit has each of these rows, with one kind at a time
def test_everything_bad(tmp_path, ner_model_dir, monkeypatch):
    _check_everything_bad(tmp_path, ner_model_dir, monkeypatch, 2000, 100_000, 100_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_bad_among_100_000_good_rows(tmp_path, ner_model_dir, monkeypatch, capsys):
    report, extra, largest = _check_everything_bad(
        tmp_path, ner_model_dir, monkeypatch, 100_000, 20_000_000, 4 << 20
    )
    with capsys.disabled():
        print(
            f"\n{report.n_rows:,} rows in, {report.n_ok:,} out, {report.n_dead} dead letters; "
            f"{extra} extra passes for 3 poison rows, batches of up to {largest} windows"
        )


@pytest.mark.slow  # test_job.py has one that kills
def test_a_row_that_kills_or_hangs_ends_alone(tmp_path, ner_model_dir):
    """Each is tried together twice and alone twice; all other rows of its unit come out."""
    rows = _rows("a", 40)
    rows[7]["text"], rows[21]["text"], rows[22]["text"] = KILLER, HANGER, LOCKER
    write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    write_jsonl(tmp_path / "in" / "b.jsonl", _rows("b", 40))
    config = _config(tmp_path, ner_model_dir, unit_timeout=4.0, unit_bytes=3000)
    report = run_job(config)
    ids, letters = _results(tmp_path / "out")
    assert sorted(ids) == sorted(
        row["id"] for row in [*rows, *_rows("b", 40)] if row["text"] not in (KILLER, HANGER, LOCKER)
    )
    assert [(x["source_row"], x["error"], x["attempts"]) for x in letters] == [
        (7, "ProcessDied", 9), (21, "ProcessDied", 9), (22, "ProcessDied", 9)
    ]  # fmt: skip
    assert report.exit_code == 4
    assert not list(storage.find(str(tmp_path / "out" / "_run" / "attempts")))


def test_out_of_memory_loses_nothing(tmp_path, ner_model_dir, workers):
    write_jsonl(tmp_path / "in" / "a.jsonl", _rows("a", 300))
    config = _config(tmp_path, ner_model_dir)
    run_job(config)
    (tmp_path / "hungry").touch()
    report = run_job(_config(tmp_path, ner_model_dir, "out2"))
    assert report.exit_code == 0
    (a,), (b,) = (result_files(str(tmp_path / name)) for name in ("out", "out2"))
    for one, other in zip(pq.read_table(a).to_pylist(), pq.read_table(b).to_pylist(), strict=True):
        assert one["id"] == other["id"]
        spans = [
            [(e["start"], e["end"], e["label"]) for e in row["entities"]] for row in (one, other)
        ]
        assert spans[0] == spans[1]
        scores = [[e["score"] for e in row["entities"]] for row in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert len(count_passes(tmp_path / "out2")) > len(count_passes(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_replay(tmp_path, ner_model_dir, workers, kind):
    """What failed for a reason that is gone comes out; what is bad stays in the dead letters."""
    rows = _rows("a", 30)
    rows[5]["text"], rows[6]["text"] = None, f"{rows[6]['text']} {POISON}"
    write = {
        "parquet": lambda p, r: write_parquet(p, pa.Table.from_pylist(r)),
        "jsonl": write_jsonl,
    }
    write[kind](tmp_path / "in" / f"a.{kind}", rows)
    (tmp_path / "poisonous").touch()
    assert run_job(_config(tmp_path, ner_model_dir)).n_dead == 2
    before = {p: p.read_bytes() for p in map(Path, result_files(str(tmp_path / "out")))}
    (tmp_path / "poisonous").unlink()
    (tmp_path / "in" / f"a.{kind}").rename(tmp_path / "gone")  # the letters are enough
    report = replay_job(str(tmp_path / "out"), {})
    ids, letters = _results(tmp_path / "out")
    assert sorted(ids) == sorted(row["id"] for i, row in enumerate(rows) if i != 5)
    assert [(x["source_row"], x["error"]) for x in letters] == [(5, "RecordError")]
    assert (report.n_rows, report.n_ok, report.n_dead, report.n_units_now) == (30, 29, 1, 1)
    names = [Path(path).name for path in result_files(str(tmp_path / "out"))]
    assert names == ["a.parquet", "a.replay-1.parquet"]
    assert all(path.read_bytes() == data for path, data in before.items())
    again = replay_job(str(tmp_path / "out"), {"max_dead_letters": "1"})
    assert (again.n_dead, again.exit_code) == (1, 0)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert [x["source_row"] for x in _results(tmp_path / "out")[1]] == [5]


def test_replay_reads_again_what_could_not_be_reached(
    tmp_path, ner_model_dir, workers, monkeypatch
):
    """A page that was damaged only for the moment."""
    # As if the storage had given other bytes: a file that is written again is another file.
    monkeypatch.setattr(storage, "_local_version", lambda s: f"{s.st_mtime_ns}-{s.st_size}")
    rows = _rows("a", 40)
    path = write_parquet(tmp_path / "in" / "a.parquet", pa.Table.from_pylist(rows), group_rows=10)
    good = path.read_bytes()
    state = path.stat()
    Corpus._damage_page(path, 2)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    report = run_job(_config(tmp_path, ner_model_dir))
    assert (report.n_ok, report.n_dead) == (30, 10)
    path.write_bytes(good)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    report = replay_job(str(tmp_path / "out"), {})
    ids, letters = _results(tmp_path / "out")
    assert sorted(ids) == sorted(row["id"] for row in rows)
    assert (letters, report.n_dead, report.exit_code) == ([], 0, 0)
