"""`compact`: a second dataset of the same rows, in few files and Hive's layout."""

import json

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fakes import Killed, write_jsonl, write_parquet

from erniem_batch import storage
from erniem_batch.cli import main
from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job import compact as module
from erniem_batch.job import lease, result_files
from erniem_batch.job.compact import compact
from erniem_batch.job.lease import Lease
from erniem_batch.job.status import status

LANGUAGES = ["de", "fr", None, "a/b=c %", ""]


def corpus(tmp_path, n_files=4, n_rows=40):
    for i in range(n_files):
        rows = [
            {
                "id": f"{i}-{j}",
                "text": f"Ada {i} {j}",
                "lang": LANGUAGES[(i + j) % 5],
                "year": j % 2,
            }
            for j in range(n_rows)
        ]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", rows)


def source_rows(tmp_path):
    found = []
    for path in result_files(str(tmp_path / "out")):
        found += pq.read_table(path).to_pylist()
    return found


def ids(rows):
    return sorted(row["id"] for row in rows)


def by_id(rows):
    return sorted(rows, key=lambda row: row["id"])


def target_rows(folder, columns=("lang",)):
    """Rows as Hive's layout gives them."""
    kinds = {"lang": pa.string(), "year": pa.int64()}
    hive = ds.partitioning(pa.schema([(c, kinds[c]) for c in columns]), flavor="hive")
    names = [
        entry["name"] for entry in json.loads((folder / "_manifest.json").read_text())["files"]
    ]
    paths = [str(folder / name) for name in names]
    table = ds.dataset(paths, format="parquet", partitioning=hive, partition_base_dir=str(folder))
    return table.to_table().to_pylist()


@pytest.mark.parametrize("columns", [(), ("lang",), ("lang", "year")])
def test_all_rows_once(tmp_path, job, columns):
    corpus(tmp_path)
    job(unit_bytes=1000)
    report = compact(str(tmp_path / "out"), str(tmp_path / "big"), columns)
    before = source_rows(tmp_path)
    expected = [
        {**row, "lang": row["lang"] or None if "lang" in columns else row["lang"]} for row in before
    ]
    found = target_rows(tmp_path / "big", columns)
    names = sorted(expected[0])
    assert [{n: row[n] for n in names} for row in by_id(found)] == [
        {n: row[n] for n in names} for row in by_id(expected)
    ]
    assert report.n_rows == len(before) == 160
    # Null and the empty string share a folder, as Hive has it.
    assert report.n_files == {0: 1, 1: 4, 2: 8}[len(columns)]
    assert report.n_files_before > 4


def test_rows_keep_their_order_within_a_partition(tmp_path, job):
    corpus(tmp_path)
    job()
    compact(str(tmp_path / "out"), str(tmp_path / "big"), ["year"])
    expected = [row["id"] for row in source_rows(tmp_path) if row["year"] == 1]
    (path,) = (tmp_path / "big" / "year=1").iterdir()
    table = pq.read_table(path, partitioning=None)
    assert table["id"].to_pylist() == expected
    assert "year" not in table.column_names


def test_files_have_about_the_size_asked_for(tmp_path, job, monkeypatch):
    corpus(tmp_path, 6, 200)
    job()
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 10_000)
    writer = module._Writer

    def small(target, schema, partition_by, file_bytes):
        return writer(target, schema, partition_by, file_bytes // 400)

    monkeypatch.setattr(module, "_Writer", small)
    report = compact(str(tmp_path / "out"), str(tmp_path / "big"), target_mb=2)
    sizes = [p.stat().st_size for p in (tmp_path / "big").glob("*.parquet")]
    assert report.n_files == len(sizes) > 2
    assert all(5_000 < size < 15_000 for size in sorted(sizes)[1:])
    assert by_id(target_rows(tmp_path / "big", ())) == by_id(source_rows(tmp_path))


def test_many_partitions_do_not_need_memory_for_each(tmp_path, job, monkeypatch):
    corpus(tmp_path, 4, 100)
    job()
    monkeypatch.setattr(module, "HELD_BYTES", 5_000)
    compact(str(tmp_path / "out"), str(tmp_path / "big"), ["lang"])
    found = by_id(target_rows(tmp_path / "big"))
    assert [row["id"] for row in found] == sorted(row["id"] for row in source_rows(tmp_path))


def test_the_next_night(tmp_path, job):
    corpus(tmp_path)
    job()
    target = tmp_path / "big"
    compact(str(tmp_path / "out"), str(target), ["lang"])
    first = {p for p in target.rglob("part-*")}
    write_jsonl(
        tmp_path / "in" / "9.jsonl", [{"id": "new", "text": "Bob", "lang": "de", "year": 1}]
    )
    job()
    compact(str(tmp_path / "out"), str(target), ["year"])
    assert not {p for p in target.rglob("part-*")} & first
    assert by_id(target_rows(target, ("year",))) == by_id(source_rows(tmp_path))
    assert (target / "_SUCCESS").exists()


@pytest.mark.parametrize("moment", ["new_file", "publish", "remove", "mark_success"])
def test_killed_at_any_moment(tmp_path, job, monkeypatch, moment):
    """Readers of the manifest see the old rows or the new ones, never half of them."""
    corpus(tmp_path)
    job()
    target = tmp_path / "big"
    compact(str(tmp_path / "out"), str(target), ["lang"])
    old = ids(target_rows(target))
    write_jsonl(
        tmp_path / "in" / "9.jsonl", [{"id": "new", "text": "Bob", "lang": "de", "year": 1}]
    )
    job()
    owner = storage if moment in ("new_file", "remove") else module
    real, killed = getattr(owner, moment), []

    def kill(*arguments, **options):
        early = {"new_file": "lease.json", "remove": "_SUCCESS"}.get(moment)
        if early is not None and early in str(arguments[0]):
            return real(*arguments, **options)
        killed.append(arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, kill)
        with pytest.raises(Killed):
            compact(str(tmp_path / "out"), str(target), ["lang"])
    assert killed
    is_new = moment in ("remove", "mark_success")
    assert ids(target_rows(target)) == (sorted([*old, "new"]) if is_new else old)
    assert not (is_new and (target / "_SUCCESS").exists())
    compact(str(tmp_path / "out"), str(target), ["lang"])
    assert ids(target_rows(target)) == sorted([*old, "new"])
    named = {e["name"] for e in json.loads((target / "_manifest.json").read_text())["files"]}
    there = {p.relative_to(target).as_posix() for p in target.rglob("part-*")}
    assert there == named


def test_files_with_other_columns(tmp_path, job):
    write_parquet(
        tmp_path / "in" / "a.parquet", pa.table({"text": ["Ada"], "n": pa.array([1], pa.int32())})
    )
    write_parquet(
        tmp_path / "in" / "b.parquet", pa.table({"text": ["Bob"], "n": [1 << 40], "m": ["x"]})
    )
    job()
    compact(str(tmp_path / "out"), str(tmp_path / "big"))
    table = pq.read_table(next((tmp_path / "big").glob("*.parquet")))
    assert table.select(["text", "n", "m"]).to_pylist() == [
        {"text": "Ada", "n": 1, "m": None}, {"text": "Bob", "n": 1 << 40, "m": "x"},
    ]  # fmt: skip


def test_types_that_do_not_go_together(tmp_path, job):
    write_parquet(tmp_path / "in" / "a.parquet", pa.table({"text": ["Ada"], "n": [1]}))
    write_parquet(tmp_path / "in" / "b.parquet", pa.table({"text": ["Bob"], "n": ["x"]}))
    job()
    with pytest.raises(ConfigError, match=r"columns of b\.parquet have types that do not go"):
        compact(str(tmp_path / "out"), str(tmp_path / "big"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition_by": ["lng"]}, "there is no such column; there are id, text, lang, year"),
        ({"partition_by": ["entities"]}, "too many values for folders"),
        ({"to": "out"}, "must be another folder"),
        ({"to": "out/inside"}, "must be another folder"),
        ({"to": "in"}, "holds 4 files that no compaction made"),
        ({"target_mb": 0}, "--target-mb must be at least 1"),
    ],
)
def test_mistakes(tmp_path, job, options, words):
    corpus(tmp_path)
    job()
    options = {"to": "big", **options}
    options["to"] = str(tmp_path / options["to"])
    with pytest.raises(ConfigError, match=words):
        compact(str(tmp_path / "out"), **options)


def test_only_complete_runs(tmp_path, job):
    corpus(tmp_path)
    with pytest.raises(Killed):
        job(units=1)
    with pytest.raises(ConfigError, match="no complete run"):
        compact(str(tmp_path / "out"))
    job()
    held = Lease(str(tmp_path / "out")).acquire()
    try:
        with pytest.raises(ConfigError, match="another run is writing"):
            compact(str(tmp_path / "out"))
    finally:
        held.release("ended")


def test_jsonl_is_refused(tmp_path, job):
    corpus(tmp_path)
    job(output_format="jsonl")
    with pytest.raises(ConfigError, match="only Parquet"):
        compact(str(tmp_path / "out"))


def test_the_command(tmp_path, job, capsys):
    corpus(tmp_path)
    job()
    arguments = ["--partition-by", "lang", "year", "--target-mb", "8"]
    assert main(["compact", str(tmp_path / "out"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_partitions"], report["n_files"]) == (8, 8)
    assert report["output"] == f"{tmp_path / 'out'}-compact"
    assert len(target_rows(tmp_path / "out-compact", ("lang", "year"))) == 160


def test_a_column_that_others_lack_may_be_null(tmp_path, job):
    schema = pa.schema([pa.field("text", pa.string()), pa.field("n", pa.int64(), nullable=False)])
    write_parquet(tmp_path / "in" / "a.parquet", pa.table({"text": ["Ada"], "n": [1]}, schema))
    write_parquet(tmp_path / "in" / "b.parquet", pa.table({"text": ["Bob"]}))
    job()
    compact(str(tmp_path / "out"), str(tmp_path / "big"))
    table = pq.read_table(next((tmp_path / "big").glob("*.parquet")))
    assert table["n"].to_pylist() == [1, None]


def test_a_run_without_rows(tmp_path, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": None, "lang": "de"}])
    job(max_dead_letters="100%")
    report = compact(str(tmp_path / "out"), partition_by=["lang"])
    assert (report.n_rows, report.n_files) == (0, 0)
    assert result_files(f"{tmp_path / 'out'}-compact") == []


def test_a_mistake_leaves_no_trace(tmp_path, job):
    corpus(tmp_path)
    job()
    for source, target in (("nowhere", "big"), ("out", "in")):
        with pytest.raises(ConfigError):
            compact(str(tmp_path / source), str(tmp_path / target))
    with pytest.raises(ConfigError, match="no such column"):
        compact(str(tmp_path / "out"), str(tmp_path / "big"), ["lng"])
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "in" / "_run").exists()
    assert status(str(tmp_path / "out")).state == "ended", "how the run ended, not the compaction"


def test_one_that_another_has_overtaken_publishes_nothing(tmp_path, job, monkeypatch):
    """It stood still for so long that another one has taken over, and removed its files."""
    corpus(tmp_path)
    job()
    target = str(tmp_path / "big")
    real = module._Writer.close

    def close(writer):
        entries = real(writer)
        monkeypatch.setattr(module._Writer, "close", real)
        for folder in (tmp_path / "out", tmp_path / "big"):
            path = folder / "_run" / "lease.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"released": "ended"}))
        compact(str(tmp_path / "out"), target)
        monkeypatch.setattr(lease, "BEAT_S", 0.0)  # its last sign of life was long ago
        return entries

    monkeypatch.setattr(module._Writer, "close", close)
    with pytest.raises(JobError, match="another run has taken over"):
        compact(str(tmp_path / "out"), target)
    assert ids(target_rows(tmp_path / "big", ())) == ids(source_rows(tmp_path))
