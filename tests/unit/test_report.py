import json
from dataclasses import asdict

import pyarrow as pa
import pytest

from erniem_batch.errors import JobError
from erniem_batch.job.actor import RECEIPT_SCHEMA, Receipt
from erniem_batch.job.config import JobConfig
from erniem_batch.job.details import Comparison
from erniem_batch.job.letters import letters_name
from erniem_batch.job.report import RunReport, manifest_of, totals, verify
from erniem_batch.job.run import Work, make_report
from erniem_batch.job.rundir import RunInfo, State
from erniem_batch.job.units import UNIT_SCHEMA

INFO = RunInfo(
    generation=2, fingerprint="f1", settings={"output-format": "parquet"}, schema="", job={}
)
DONE_SCHEMA = pa.schema(
    [
        *RECEIPT_SCHEMA,
        ("max_rows", pa.int64()),
        ("retires", pa.string()),
        ("letters", pa.string()),
        ("planned_rows", pa.int64()),
    ]
)


def done(output, n_ok, n_dead=0, **changes):
    """A finished unit with what the plan says of it."""
    receipt = Receipt(
        output, f"{output}.parquet", n_rows=n_ok + n_dead, n_ok=n_ok, n_dead=n_dead,
        n_found=2 * n_ok, n_tokens=5 * n_ok, output_bytes=100,
    )  # fmt: skip
    plan = {"max_rows": None, "retires": "", "letters": "", "planned_rows": None}
    return {**asdict(receipt), **plan, **changes}


def replay(output, retires, n_ok, n_dead=0):
    return done(output, n_ok, n_dead, retires=retires, letters=letters_name(retires))


def state(*rows, todo=0):
    units = pa.Table.from_pylist([dict.fromkeys(UNIT_SCHEMA.names)] * todo, UNIT_SCHEMA)
    return State(pa.Table.from_pylist(rows, DONE_SCHEMA), units)


def report(made, max_dead_letters="0", receipts=()):
    config = JobConfig(input=["in"], output="out", max_dead_letters=max_dead_letters)
    figures = {"padded_tokens": 40, "real_tokens": 30}
    work = Work(list(receipts), seconds=2.0, figures=figures)
    return make_report(config, INFO, "out", made, work, [], Comparison(config), 0.0)


# ---- rows in are rows out ---------------------------------------------------------------------


def test_what_adds_up_is_fine():
    verify(state())
    verify(
        state(
            done("a", 5),
            done("b", 5, 2, planned_rows=7),
            done("c", 3, planned_rows=9, max_rows=3),
            done("d", 0, 1),
            done("e", 0),
            replay("b.replay-1", "b", 1, 1),
        )
    )


@pytest.mark.parametrize(
    "wrong",
    [
        done("b", 5, n_rows=6),
        done("b", 5, n_dead=1, n_rows=5),
        done("b", 5, planned_rows=6),
        done("b", 5, 1, planned_rows=5),
        done("b", 5, planned_rows=9, max_rows=4),
        done("b", 0, planned_rows=1),
        {**replay("b.replay-1", "b", 3), "n_rows": 4},
    ],
)
def test_a_wrong_count_is_caught(wrong):
    with pytest.raises(JobError, match=r"rows in and rows out differ in 1 units \(b.*\.parquet\)"):
        verify(state(done("a", 5), wrong, done("c", 5)))


# ---- sums ---------------------------------------------------------------------------------------


def test_totals():
    assert totals(state(done("a", 5, 1), done("b", 3)).done) == {
        "n_rows": 9, "n_ok": 8, "n_dead": 1, "n_found": 16, "n_tokens": 40,
        "n_windows": 0, "n_truncated": 0,
    }  # fmt: skip
    assert set(totals(state().done).values()) == {0}


def test_dead_letters_that_were_replayed_count_once():
    first = [done("a", 5, 4), done("b", 5, 1)]
    sums = totals(state(*first, replay("a.replay-1", "a", 3, 1)).done)
    assert (sums["n_rows"], sums["n_ok"], sums["n_dead"]) == (15, 13, 2)
    again = [replay("a.replay-1", "a", 3, 1), replay("a.replay-2", "a.replay-1", 1)]
    sums = totals(state(*first, *again).done)
    assert (sums["n_rows"], sums["n_ok"], sums["n_dead"]) == (15, 14, 1)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_manifest_names_what_counts(suffix):
    rows = [
        done("sub/b.2", 5, 4),
        done("a", 5, 1),
        done("c", 2),
        replay("sub/b.2.replay-1", "sub/b.2", 3, 1),
    ]
    for row in rows:
        row["output"] = row["output"].replace("parquet", suffix)
    made = manifest_of(state(*rows), INFO)
    assert (made.generation, made.fingerprint) == (2, "f1")
    assert [(e.name, e.n_rows, e.n_bytes) for e in made.files] == [
        (f"sub/b.2.{suffix}", 5, 100),
        (f"a.{suffix}", 5, 100),
        (f"c.{suffix}", 2, 100),
        (f"sub/b.2.replay-1.{suffix}", 3, 100),
    ]
    assert [(e.name, e.n_rows) for e in made.dead_letters] == [
        ("_dead_letters/a.parquet", 1),
        ("_dead_letters/sub/b.2.replay-1.parquet", 1),
    ]


# ---- the outcome --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_dead", "allowed", "code"),
    [
        (0, "0", 0),
        (1, "0", 4),
        (5, "5", 0),
        (6, "5", 4),
        (5, "5%", 0),
        (6, "5%", 4),
        (1, "0.9%", 4),
        (100, "100%", 0),
        (0, "0%", 0),
        (1, "0%", 4),
    ],
)
def test_how_many_dead_letters_are_allowed(n_dead, allowed, code):
    """A share is one of all rows of the output folder."""
    made = report(state(done("a", 100 - n_dead, n_dead)), allowed)
    assert (made.n_rows, made.exit_code) == (100, code)


def test_what_is_missing_weighs_more():
    made = report(state(done("a", 1, 7), todo=2))
    assert (made.n_units, made.n_missing, made.exit_code) == (3, 2, 3)


def test_this_run_and_the_folder():
    receipts = [
        Receipt("b", "b.parquet", n_rows=5, n_ok=5, n_tokens=25, n_bytes=1000),
        Receipt("c", "c.parquet", error="gone"),
    ]
    made = report(state(done("a", 10), done("b", 5), todo=1), receipts=receipts)
    assert (made.n_units, made.n_units_now, made.n_rows, made.n_tokens) == (3, 2, 15, 75)
    assert (made.n_tokens_now, made.n_bytes_read, made.tokens_per_s) == (25, 1000, 12.5)
    assert [receipt.output for receipt in made.failed_units] == ["c.parquet"]


def test_the_line_for_machines():
    made = report(state(done("a", 1), todo=1), receipts=[Receipt("b", "b", error="gone")])
    line = made.as_line()
    assert "\n" not in line
    values = json.loads(line)
    assert (values["exit_code"], values["failed_units"], values["n_ok"]) == (3, 1, 1)
    assert {"fingerprint", "versions", "seconds", "tokens_per_s"} <= values.keys()


def test_nothing_to_do():
    made = RunReport(output="out", n_units=0, n_units_now=0)
    assert (made.exit_code, made.tokens_per_s) == (0, 0.0)
