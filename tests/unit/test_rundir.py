"""The run folder: what was planned, what is done, and how that is known."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from fakes import Alone

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job import rundir as module
from erniem_batch.job.actor import Receipt
from erniem_batch.job.letters import letters_name
from erniem_batch.job.rundir import (
    LedgerWriter,
    RunFolder,
    RunInfo,
    changed_files,
    current_units,
    encode_schema,
    removed_files,
)
from erniem_batch.job.units import FILE_SCHEMA, Unit, from_table, to_table
from erniem_batch.job.write import Marks, write_tables

SCHEMA = pa.schema([("text", pa.string())])
INFO = RunInfo(
    generation=1,
    fingerprint="f1",
    settings={"output-format": "parquet"},
    schema=encode_schema(SCHEMA),
    job={},
)
COUNTS = dict.fromkeys(
    ("n_rows", "n_ok", "n_dead", "n_found", "n_tokens", "n_windows", "n_truncated"), 0
)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "out"))


def unit(name, version="v1", output=None, **changes):
    output = output or name
    return Unit(f"{output}-{version}", f"in/{name}", "jsonl", output, version, **changes)


def replay(of, output):
    return replace(
        of, id=f"{of.id}>{output}", output=output, letters=letters_name(of.output),
        retires=of.output,
    )  # fmt: skip


def planned(folder, *editions):
    for number, units in enumerate(editions, start=1):
        folder.add_to_plan(1, number, to_table(units))
    return folder.read_plan(1)


def write(folder, made, n=2, fingerprint="f1", suffix="parquet"):
    """The unit's data file; gives its receipt."""
    name = f"{made.output}.{suffix}"
    counts = {**COUNTS, "n_rows": n, "n_ok": n}
    _, n_bytes, digest = write_tables(
        folder.output, name, [pa.table({"text": ["a"] * n})],
        lambda: Marks(made.id, fingerprint, {}, counts),
    )  # fmt: skip
    return Receipt(made.id, name, **counts, output_bytes=n_bytes, sha256=digest)


def note(folder, *receipts):
    ledger = LedgerWriter(folder, 1)
    for receipt in receipts:
        ledger.add(receipt)
    ledger.flush()


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were looked into."""
    names = []
    look = module.receipt_of_file

    def noting(output, name, *arguments):
        names.append(name)
        return look(output, name, *arguments)

    monkeypatch.setattr(module, "receipt_of_file", noting)
    return names


def assess(folder, plan):
    state = folder.assess(current_units(plan), INFO)
    return state.done["output"].to_pylist(), [made.output for made in from_table(state.todo)]


# ---- run.json and plan ----------------------------------------------------------------------


def test_run_json_comes_back(folder):
    assert folder.read_info() is None
    folder.write_info(INFO, Alone())
    assert folder.read_info() == INFO
    assert folder.read_info().arrow_schema == SCHEMA


def test_the_plan_keeps_its_order_and_its_editions(folder):
    assert folder.next_edition() == 1
    assert len(folder.read_plan(1)) == 0
    plan = planned(folder, [unit("b"), unit("a")], [unit("c", n_rows=7, row_groups=(1, 2))])
    assert plan["output"].to_pylist() == ["b", "a", "c"]
    assert plan["edition"].to_pylist() == [1, 1, 2]
    assert list(from_table(plan))[2] == unit("c", n_rows=7, row_groups=(1, 2))
    assert folder.next_edition() == 3
    assert len(folder.read_plan(2)) == 0
    folder.add_to_plan(2, 3, to_table([unit("a", output="a.3")]))
    assert len(folder.read_plan(1)) == 3
    assert folder.next_edition() == 4


def test_a_plan_of_another_release(folder):
    plan = pa.table({"id": ["u"]})
    storage.write_table(f"{folder.output}/_run/plan/001-00001.parquet", plan)
    with pytest.raises(ConfigError, match="written by another version of this package"):
        folder.read_plan(1)


# ---- what is done ---------------------------------------------------------------------------


def test_a_file_that_the_ledger_knows_is_not_opened(folder, opened):
    units = [unit("a"), unit("sub/b"), unit("c")]
    plan = planned(folder, units)
    note(folder, *(write(folder, made) for made in units[:2]))
    state = folder.assess(current_units(plan), INFO)
    assert state.done["output"].to_pylist() == ["a.parquet", "sub/b.parquet"]
    assert list(from_table(state.todo)) == units[2:]
    assert opened == []
    assert state.done["unit_id"].to_pylist() == [made.id for made in units[:2]]


def test_a_file_that_the_ledger_does_not_know_says_what_it_is(folder, opened):
    plan = planned(folder, [unit("a"), unit("b")])
    receipt = write(folder, unit("b"))
    assert assess(folder, plan) == (["b.parquet"], ["a"])
    assert opened == ["b.parquet"]
    assert assess(folder, plan) == (["b.parquet"], ["a"])
    assert opened == ["b.parquet"], "the second time the ledger knows it"
    (row,) = folder.read_ledger(1).to_pylist()
    assert Receipt(**row) == replace(receipt, found=True)


def test_a_file_that_is_gone_is_made_again(folder, opened):
    plan = planned(folder, [unit("a"), unit("b")])
    note(folder, *(write(folder, made) for made in (unit("a"), unit("b"))))
    storage.delete([f"{folder.output}/a.parquet"])
    assert assess(folder, plan) == (["b.parquet"], ["a"])
    assert opened == []


def test_a_file_of_another_size_is_looked_into(folder, opened):
    plan = planned(folder, [unit("a"), unit("b")])
    receipts = [write(folder, made) for made in (unit("a"), unit("b"))]
    note(folder, *(replace(receipt, output_bytes=7) for receipt in receipts))
    storage.write(f"{folder.output}/b.parquet", b"PAR1 damaged")
    assert assess(folder, plan) == (["a.parquet"], ["b"])
    assert sorted(opened) == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("fingerprint", ["f1", "f2"])
def test_a_file_of_something_else_is_not_taken_for_the_unit(folder, opened, fingerprint):
    """Of another unit, of other settings, of somebody else."""
    plan = planned(folder, [unit("a", "v2"), unit("b")])
    write(folder, unit("a", "v1"), fingerprint=fingerprint)
    storage.write(f"{folder.output}/b.parquet", b"not even Parquet")
    assert assess(folder, plan) == ([], ["a", "b"])


def test_a_jsonl_file_without_its_sidecar_is_not_done(folder):
    info = replace(INFO, settings={"output-format": "jsonl"})
    plan = planned(folder, [unit("a"), unit("b")])
    for made in (unit("a"), unit("b")):
        write(folder, made, suffix="jsonl")
    storage.delete([f"{folder.output}/_run/sidecars/b.jsonl.json"])
    state = folder.assess(current_units(plan), info)
    assert state.done["output"].to_pylist() == ["a.jsonl"]
    assert [made.output for made in from_table(state.todo)] == ["b"]


def test_files_that_are_not_data_are_not_listed(folder):
    for name in ("a.parquet", "sub/b.parquet", "_manifest.json", "_dead_letters/a.parquet",
                 "_run/plan/x.parquet", ".a.parquet.tmp", "sub/.b.tmp"):  # fmt: skip
        storage.write(f"{folder.output}/{name}", b"12345")
    found = folder.listing().to_pylist()
    assert sorted((row["file"], row["size"]) for row in found) == [
        ("a.parquet", 5),
        ("sub/b.parquet", 5),
    ]


def test_nothing_planned(folder):
    state = folder.assess(folder.read_plan(1), INFO)
    assert (len(state.done), len(state.todo)) == (0, 0)


# ---- which units count ----------------------------------------------------------------------


def files(**versions):
    rows = [
        {"path": f"in/{name}", "name": name, "format": "jsonl", "size": 1, "version": version}
        for name, version in versions.items()
    ]
    return pa.Table.from_pylist(rows, FILE_SCHEMA)


def outputs(plan):
    return [made.output for made in from_table(current_units(plan))]


def changed(folder, **versions):
    found = changed_files(files(**versions), current_units(folder.read_plan(1)))
    return found["path"].to_pylist()


def test_new_and_changed_files(folder):
    assert changed(folder, a="v1", b="v1") == ["in/a", "in/b"]
    planned(folder, [unit("a"), unit("b")])
    assert changed(folder, a="v1", b="v1") == []
    assert changed(folder, a="v1", b="v2", c="v1") == ["in/b", "in/c"]
    assert changed(folder, b="v1") == []


def test_a_file_that_goes_back_to_what_it_was(folder):
    plan = planned(folder, [unit("a"), unit("b")], [unit("a", "v2", "a.2")])
    assert outputs(plan) == ["b", "a.2"]
    assert changed(folder, a="v1", b="v1") == ["in/a"]
    folder.add_to_plan(1, 3, to_table([unit("a", "v1", "a.3")]))
    assert outputs(folder.read_plan(1)) == ["b", "a.3"]
    assert changed(folder, a="v1", b="v1") == []


def test_all_slices_of_the_last_version_count(folder):
    first = [unit("a", "v1", f"a-{i:05}") for i in range(5)]
    second = [unit("a", "v2", f"a-{i:05}.2") for i in range(2)]
    assert outputs(planned(folder, first, second)) == ["a-00000.2", "a-00001.2"]


def test_replays_belong_to_what_they_retire(folder):
    one = replay(unit("a"), "a.replay-1")
    two = replay(one, "a.replay-2")
    other = replay(unit("b"), "b.replay-1")
    plan = planned(folder, [unit("a"), unit("b")], [one, other], [two])
    assert outputs(plan) == ["a", "b", "a.replay-1", "b.replay-1", "a.replay-2"]
    assert changed(folder, a="v1", b="v1") == []
    folder.add_to_plan(1, 4, to_table([unit("a", "v2", "a.4")]))
    assert outputs(folder.read_plan(1)) == ["b", "b.replay-1", "a.4"]


def test_files_that_are_no_longer_there(folder):
    plan = planned(folder, [unit("a"), unit("b")], [unit("a", "v2", "a.2")])
    assert removed_files(files(a="v2"), plan) == ["in/b"]
    assert removed_files(files(a="v2", b="v1", c="v1"), plan) == []


# ---- ledger -----------------------------------------------------------------------------------


def test_the_last_receipt_of_an_output_counts(folder):
    note(folder, Receipt("u1", "a.parquet", n_ok=1), Receipt("u2", "b.parquet", n_ok=2))
    note(folder, Receipt("u3", "a.parquet", n_ok=3))
    found = {row["output"]: row["unit_id"] for row in folder.read_ledger(1).to_pylist()}
    assert found == {"a.parquet": "u3", "b.parquet": "u2"}
    assert len(folder.read_ledger(2)) == 0


def test_two_writers_never_meet(folder, monkeypatch):
    monkeypatch.setattr(module.time, "time_ns", lambda: 7)
    writers = [LedgerWriter(folder, 1) for _ in range(2)]
    for i in range(10):
        writers[i % 2].add(Receipt(f"u{i}", f"{i}.parquet"))
        writers[i % 2].flush()
    assert len(folder.read_ledger(1)) == 10


def _segments(folder):
    return list(storage.find(f"{folder.output}/_run/ledger"))


def test_receipts_are_written_in_bunches(folder, monkeypatch):
    monkeypatch.setattr(module, "LEDGER_ROWS", 10)
    ledger = LedgerWriter(folder, 1)
    for i in range(25):
        ledger.add(Receipt(f"u{i}", f"{i}.parquet"))
    assert len(_segments(folder)) == 2
    ledger.flush()
    ledger.flush()
    assert len(_segments(folder)) == 3
    monkeypatch.setattr(module, "LEDGER_S", 0.0)
    ledger.add(Receipt("u", "late.parquet"))
    assert len(_segments(folder)) == 4
    assert len(folder.read_ledger(1)) == 26


def test_many_segments_become_one(folder, monkeypatch):
    monkeypatch.setattr(module, "LEDGER_SEGMENTS", 5)
    for i in range(9):
        note(folder, Receipt(f"u{i}", f"{i % 4}.parquet", n_ok=i))
    before = folder.read_ledger(1).sort_by("output").to_pylist()
    assert len(_segments(folder)) == 9, "who only looks leaves all as it is"
    assert folder.read_ledger(1, tidy=True).sort_by("output").to_pylist() == before
    assert len(_segments(folder)) == 1
    assert folder.read_ledger(1).sort_by("output").to_pylist() == before
    assert [row["n_ok"] for row in before] == [8, 5, 6, 7]
    note(folder, Receipt("new", "0.parquet"))
    assert "new" in folder.read_ledger(1)["unit_id"].to_pylist()


def test_segments_that_go_while_they_are_read(folder, monkeypatch):
    """`status` looks while the run puts its segments together."""
    monkeypatch.setattr(module, "LEDGER_SEGMENTS", 5)
    for i in range(9):
        note(folder, Receipt(f"u{i}", f"{i}.parquet"))
    real = RunFolder._read_all

    def slow(self, kind, paths):
        if len(paths) == 9:
            monkeypatch.setattr(RunFolder, "_read_all", real)
            RunFolder(folder.output).read_ledger(1, tidy=True)
        return real(self, kind, paths)

    monkeypatch.setattr(RunFolder, "_read_all", slow)
    assert len(folder.read_ledger(1)) == 9
    assert len(_segments(folder)) == 1


def test_a_segment_that_was_never_finished_is_not_read(folder):
    note(folder, Receipt("u1", "a.parquet"))
    storage.write(f"{folder.output}/_run/ledger/.001-9.parquet.tmp", b"half")
    storage.write(f"{folder.output}/_run/ledger/.001-9.parquet", b"half")
    assert len(folder.read_ledger(1)) == 1


def test_reports_and_forecasts(folder):
    assert folder.read_report() is folder.read_forecast() is None
    report = {"exit_code": 4, "a": 1}
    folder.write_report(report, "<p>", Alone())
    values = {"fingerprint": "f1", "units": 1, "rows": 2, "tokens": 3, "seconds": None}
    folder.write_forecast(values)
    assert folder.read_forecast() == values
    assert folder.read_report() == {**report, "checksum": folder.read_report()["checksum"]}
    assert json.loads(storage.read(f"{folder.output}/_run/report.json")) == folder.read_report()
    assert storage.read(f"{folder.output}/_run/report.html") == b"<p>"
