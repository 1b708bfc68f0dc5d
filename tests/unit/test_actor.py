"""A unit's way through an actor, without Ray: only the handle that progress goes to is a fake."""

import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import (
    ADDED_SCHEMA,
    KILLER,
    RaisingTagger,
    RefusingTagger,
    bad_utf8_strings,
    letters_path,
    make_tagger,
    ner_config,
    write_bytes,
    write_jsonl,
    write_parquet,
)

from erniem_batch import storage
from erniem_batch.errors import CheckpointError, StorageError
from erniem_batch.job import actor
from erniem_batch.job.actor import SENT_SCHEMA, UnitTagger, receipt_of_file
from erniem_batch.job.attempts import ATTEMPTS, Attempt
from erniem_batch.job.config import JobConfig
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import files_of, find_files, plan_units, to_table
from erniem_batch.job.write import read_marks


@pytest.fixture
def tag(tmp_path, ner_model_dir):
    """Plans an input and tags all of its units; gives receipts, with the progress made."""

    def run(source, tagger=UnitTagger, **options):
        options = {"input": [str(source)], "output": str(tmp_path / "out"), **options}
        config = ner_config(JobConfig, model=str(ner_model_dir), **options)
        files = list(files_of(find_files(config.input)))
        schema = input_schema(files, config.text_column, config.carried_columns)
        units = plan_units(files, config.bytes_per_unit, config.text_column, config.limit)
        made = make_tagger(config, schema, tagger)
        receipts = made(to_table(units))
        assert receipts.schema == SENT_SCHEMA
        return receipts.to_pylist(), made._progress.made

    return run


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _output(tmp_path, name="a"):
    return pq.read_table(tmp_path / "out" / f"{name}.parquet")


def _letters(tmp_path, name="a", columns=None):
    return pq.read_table(letters_path(tmp_path / "out", name), columns=columns).to_pylist()


def test_receipt_and_progress(tmp_path, tag):
    rows = [{"id": f"000{i}", "text": f"Ada {i} in London"} for i in range(5)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    ((receipt,), progress) = tag(source)
    table = _output(tmp_path)
    assert table.column_names == ["id", "text", *ADDED_SCHEMA.names]
    assert table.select(["id", "text"]).to_pylist() == rows
    for row in table.to_pylist():
        assert row["entities"]
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]
    assert (receipt["n_rows"], receipt["n_ok"], receipt["n_dead"]) == (5, 5, 0)
    assert receipt["n_tokens"] == sum(table["n_tokens"].to_pylist())
    assert receipt["n_found"] == sum(map(len, table["entities"].to_pylist()))
    assert not (tmp_path / "out" / DEAD_LETTERS).exists()
    steps = [arguments[1:] for call, arguments in progress if call == "add"]
    unit, n_bytes = receipt["unit_id"], source.stat().st_size
    end = (unit, 5, receipt["n_tokens"], n_bytes)
    assert steps == [(unit, 0, 0, 0, False), (*end, False), (*end, True)]
    last, (_, figures) = progress[-1]
    assert last == "report"
    assert figures["real_tokens"] == figures["padded_tokens"] == receipt["n_tokens"] + 10
    for stage in ("read", "tokenize", "forward", "decode", "write"):
        assert figures[f"{stage}_seconds"] > 0


def test_dead_letters_tell_why_without_the_text(tmp_path, tag):
    source = write_bytes(
        tmp_path / "a.jsonl",
        b'{"text": "Ada"}\n{"text": 7, "secret": "hidden"}\n{hidden}\n{"text": null}\n'
        b'{"text": "hidden \\udc00"}\n{"text": "Bob"}\n',
    )
    ((receipt,), _) = tag(source)
    assert (receipt["n_rows"], receipt["n_ok"], receipt["n_dead"]) == (6, 2, 4)
    assert _output(tmp_path)["text"].to_pylist() == ["Ada", "Bob"]
    letters = _letters(tmp_path)
    assert [(x["source_row"], x["stage"]) for x in letters] == [
        (1, "encode"),
        (2, "read"),
        (3, "encode"),
        (4, "read"),
    ]
    assert {x["source_file"] for x in letters} == {str(source)}
    lines = source.read_bytes().splitlines(keepends=True)
    assert [x["line"] for x in letters] == lines[1:5]  # the row itself, in a column of its own
    rest = [{k: v for k, v in x.items() if k != "line"} for x in letters]
    assert "hidden" not in json.dumps(rest, default=str)
    assert {x["attempts"] for x in letters} == {1}


@pytest.mark.parametrize("columns", [None, "text", ""])
def test_every_row_bad(tmp_path, tag, columns):
    """Once, the unit was lost: an empty list of rows has no type that Arrow can take."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": 5}])
    ((receipt,), _) = tag(source, columns=columns)
    assert (receipt["error"], receipt["n_dead"]) == ("", 2)
    assert len(_output(tmp_path)) == 0
    assert len(_letters(tmp_path)) == 2


def test_no_line_can_be_read(tmp_path, tag):
    ((receipt,), _) = tag(write_bytes(tmp_path / "a.jsonl", b"{\n[]\n"))
    assert (receipt["error"], receipt["n_ok"], receipt["n_dead"]) == ("", 0, 2)
    assert _output(tmp_path).schema.remove_metadata() == ADDED_SCHEMA


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_no_columns_carried(tmp_path, tag, suffix, output_format):
    """Once, a table without columns forgot how many rows it has."""
    rows = [{"text": "Ada"}, {"text": None}, {"text": "in London"}]
    if suffix == "jsonl":
        source = write_jsonl(tmp_path / "a.jsonl", rows)
    else:
        source = write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows))
    ((receipt,), _) = tag(source, columns="", output_format=output_format)
    assert (receipt["error"], receipt["n_ok"], receipt["n_dead"]) == ("", 2, 1)
    if output_format == "parquet":
        assert _output(tmp_path).schema.remove_metadata() == ADDED_SCHEMA
        assert len(_output(tmp_path)) == 2
    else:
        lines = (tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8").splitlines()
        assert [list(json.loads(line)) for line in lines] == [ADDED_SCHEMA.names] * 2


def test_empty_inputs_make_empty_files(tmp_path, tag):
    write_bytes(tmp_path / "in" / "j.jsonl", b"")
    schema = pa.schema([("text", pa.string()), ("n", pa.int16())])
    write_parquet(tmp_path / "in" / "p.parquet", schema.empty_table())
    receipts, _ = tag(tmp_path / "in")
    assert [receipt["error"] for receipt in receipts] == ["", ""]
    expected = pa.schema([*schema, *ADDED_SCHEMA])
    assert _output(tmp_path, "p").schema.remove_metadata() == expected
    assert _output(tmp_path, "j").column_names[-4:] == ADDED_SCHEMA.names


def test_text_that_is_not_utf8_is_one_dead_letter(tmp_path, tag):
    column = bad_utf8_strings([b"Ada", b"\xffhidden", "Zoë".encode()])
    source = write_parquet(tmp_path / "a.parquet", pa.table({"text": column, "n": [1, 2, 3]}))
    ((receipt,), _) = tag(source)
    assert (receipt["error"], receipt["n_dead"]) == ("", 1)
    assert _output(tmp_path).select(["text", "n"]).to_pylist() == [
        {"text": "Ada", "n": 1},
        {"text": "Zoë", "n": 3},
    ]
    (letter,) = _letters(tmp_path, columns=["source_row", "reason"])
    assert (letter["source_row"], letter["reason"]) == (1, "text is not UTF-8 at byte 0")


def test_a_string_that_json_cannot_hold_is_one_dead_letter(tmp_path, tag):
    """Once, the whole unit was lost with it, for ever."""
    other = bad_utf8_strings([b"ok", b"a\xff", b"ok"])
    nested = pa.StructArray.from_arrays([bad_utf8_strings([b"\xfe", b"ok", b"ok"])], ["a"])
    table = pa.table({"text": ["Ada", "Bob", "Eva"], "other": other, "nested": nested})
    source = write_parquet(tmp_path / "a.parquet", table)
    ((receipt,), _) = tag(source, output_format="jsonl")
    assert (receipt["error"], receipt["n_ok"], receipt["n_dead"]) == ("", 1, 2)
    (line,) = (tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == "Eva"
    letters = _letters(tmp_path, columns=["source_row", "stage", "reason"])
    assert [(x["source_row"], x["stage"], x["reason"]) for x in letters] == [
        (0, "write", "column 'nested' is not UTF-8 at byte 0"),
        (1, "write", "column 'other' is not UTF-8 at byte 1"),
    ]
    rows = pq.read_table(letters_path(tmp_path / "out"))["row"].combine_chunks()
    assert rows.field("other").cast(pa.binary()).to_pylist() == [b"ok", b"a\xff"]


def test_damaged_pages_are_a_dead_letter_beside_the_readable_rows(tmp_path, tag):
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(50)]})
    source = write_parquet(tmp_path / "a.parquet", table, 10)
    column = pq.read_metadata(source).row_group(2).column(0)
    content = bytearray(source.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    source.write_bytes(content)
    ((receipt,), _) = tag(source)
    assert (receipt["error"], receipt["n_rows"], receipt["n_ok"], receipt["n_dead"]) == (
        *("", 50, 40, 10),
    )
    assert _output(tmp_path)["text"].to_pylist() == [
        f"Ada {i * 7919}" for i in range(50) if i // 10 != 2
    ]
    (letter,) = _letters(tmp_path)
    assert (letter["source_row"], letter["n_rows"], letter["stage"]) == (20, 10, "read")
    assert json.loads(letter["rest"])["row_groups"] == [2]


def test_a_deflate_stream_that_is_cut_is_a_dead_letter(tmp_path, tag):
    """Once, zlib's error ended the whole job; past the first megabyte it is met in the actor."""
    rows = [{"text": f"{i * 7919 % 10007}", "ballast": "x" * 4000} for i in range(400)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    source.write_bytes(source.read_bytes()[:-700])
    ((receipt,), _) = tag(source)
    assert (receipt["error"], receipt["n_dead"]) == ("", 1)
    n_ok = receipt["n_ok"]
    assert 0 < n_ok < 400
    assert _output(tmp_path)["text"].to_pylist() == [row["text"] for row in rows[:n_ok]]
    (letter,) = _letters(tmp_path)
    assert (letter["source_row"], letter["n_rows"]) == (n_ok, None)


def test_types_of_parquet_columns_are_kept(tmp_path, tag):
    import datetime
    import decimal

    table = pa.table(
        {
            "text": ["Ada", None, "Bob"],
            "small": pa.array([1, 2, None], pa.int8()),
            "when": pa.array([datetime.datetime(2024, 1, 1)] * 3, pa.timestamp("us", "UTC")),
            "money": pa.array([decimal.Decimal("1.10")] * 3, pa.decimal128(9, 2)),
            "blob": [b"\xff", b"", None],
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "nested": pa.array([[{"k": 1}], [], None], pa.list_(pa.struct([("k", pa.int32())]))),
        }
    )
    ((receipt,), _) = tag(write_parquet(tmp_path / "a.parquet", table))
    assert (receipt["n_ok"], receipt["n_dead"]) == (2, 1)
    found = _output(tmp_path).select(table.column_names)
    assert found.schema.remove_metadata().equals(table.schema)
    assert found.to_pylist() == [table.to_pylist()[0], table.to_pylist()[2]]


def test_limit_and_slices(tmp_path, tag):
    rows = [{"text": f"Ada {i}"} for i in range(30)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    receipts, _ = tag(source, limit=11, unit_bytes=100)
    assert sum(receipt["n_rows"] for receipt in receipts) == 11
    found = []
    for receipt in receipts:
        found += pq.read_table(tmp_path / "out" / receipt["output"])["text"].to_pylist()
    assert found == [row["text"] for row in rows[:11]]


def test_strategy_none_gives_tokens(tmp_path, tag):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada in London"}])
    tag(source, aggregation_strategy="none")
    (row,) = _output(tmp_path).to_pylist()
    assert {entity["label"][:2] for entity in row["entities"]} <= {"B-", "I-"}


# ---- done or not done -------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_a_unit_that_is_done_is_not_done_again(tmp_path, tag, output_format):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada"}, {"text": None}])
    ((first,), _) = tag(source, output_format=output_format)
    name = f"a.{output_format}"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    ((second,), progress) = tag(source, output_format=output_format)
    assert second["found"]
    counts = ("unit_id", "output", "n_rows", "n_ok", "n_dead", "n_tokens", "output_bytes")
    assert [second[n] for n in counts] == [first[n] for n in counts]
    assert [call for call, _ in progress] == ["report"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert receipt_of_file(str(tmp_path / "out"), name, first["unit_id"], "f2") is None
    assert receipt_of_file(str(tmp_path / "out"), name, "another", "f1") is None
    assert receipt_of_file(str(tmp_path / "out"), "absent.parquet", "x", "f1") is None


def test_marks_say_what_the_receipt_says(tmp_path, tag):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada in London"}, {"text": None}])
    ((receipt,), _) = tag(source)
    marks = read_marks(str(tmp_path / "out"), "a.parquet")
    assert marks is not None
    assert (marks.unit, marks.fingerprint) == (receipt["unit_id"], "f1")
    assert marks.counts == {name: receipt[name] for name in actor.COUNTS}
    assert marks.source["path"] == str(source)


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_two_runs_write_the_same_bytes(tmp_path, tag, output_format):
    rows = [{"text": f"Ada {i} in London", "n": i} for i in range(9)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    for folder in ("one", "two"):
        tag(source, output=str(tmp_path / folder), output_format=output_format)
    files = _files(tmp_path / "one")
    assert files == _files(tmp_path / "two")
    assert f"a.{output_format}" in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_dead_letters_come_before_the_data(tmp_path, tag, monkeypatch):
    """If the data is there, so are they."""
    seen = []
    new_file = storage.new_file

    def noting(path, **options):
        seen.append(path)
        return new_file(path, **options)

    def visible(*arguments):
        letters.append((tmp_path / "out" / "a.parquet").exists())
        return write_letters(*arguments)

    letters = []
    write_letters = actor.write_letters
    monkeypatch.setattr(actor, "write_letters", visible)
    monkeypatch.setattr(storage, "new_file", noting)
    tag(write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada"}, {"text": None}]))
    assert letters == [False]
    assert any(DEAD_LETTERS in path for path in seen)


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_dead_letters_that_cannot_be_written_keep_the_data_back(
    tmp_path, tag, monkeypatch, output_format
):
    def full(*_):
        raise StorageError("out: the disk is full")

    monkeypatch.setattr(actor, "write_letters", full)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada"}, {"text": None}])
    ((receipt,), _) = tag(source, output_format=output_format)
    assert receipt["error"] == "out: the disk is full"
    assert _files(tmp_path / "out") == []


# ---- faults -----------------------------------------------------------------------------------


def test_an_error_of_ours_costs_one_unit_and_tells_no_text(tmp_path, tag):
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": "hidden words"}])
    receipts, _ = tag(tmp_path / "in", RaisingTagger)
    errors = {receipt["output"]: receipt["error"] for receipt in receipts}
    assert errors["a.parquet"] == errors["c.parquet"] == ""
    assert errors["b.parquet"].startswith("LookupError in fakes.py:")
    assert "hidden" not in json.dumps(receipts)
    assert _files(tmp_path / "out") == ["a.parquet", "c.parquet"]


def test_errors_are_no_deaths(tmp_path, tag):
    """Once, a unit whose storage failed three times was taken for one that kills its process."""
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": "Ada"}] * 3)
    for _ in range(7):
        ((receipt,), _) = tag(tmp_path / "in", RaisingTagger)
        assert receipt["error"]
    assert not list((tmp_path / "out" / ATTEMPTS).glob("*.json"))
    ((receipt,), _) = tag(tmp_path / "in")
    assert (receipt["n_ok"], receipt["n_dead"]) == (3, 0)


def test_a_unit_on_trial_is_alone():
    """Once, a row of the unit beside it was convicted when the process died."""
    turns = actor._Turns()
    inside, seen = [], []

    def work(name, alone):
        with turns.taken(alone):
            inside.append(name)
            time.sleep(0.02)
            seen.append(tuple(inside))
            inside.remove(name)

    threads = [
        threading.Thread(target=work, args=(f"{'alone' if i % 3 == 0 else 'side'}{i}", i % 3 == 0))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 12
    assert any(len(names) > 1 for names in seen)
    for names in seen:
        assert len(names) == 1 or not any(name.startswith("alone") for name in names)


def test_a_unit_that_died_before_any_row_is_given_up(tmp_path, tag):
    """Its rows are one dead letter; with a limit, as many as it was to read."""
    source = write_parquet(tmp_path / "a.parquet", pa.table({"text": ["Ada"] * 9}))
    (unit,) = plan_units(files_of(find_files([str(source)])), 1 << 20, "text", 7)
    for _ in range(6):
        Attempt.next(str(tmp_path / "out"), unit.id).begin()
    ((receipt,), _) = tag(source, limit=7)
    assert (receipt["error"], receipt["n_rows"], receipt["n_dead"]) == ("", 7, 7)
    (letter,) = _letters(tmp_path)
    assert (letter["error"], letter["n_rows"], letter["stage"]) == ("ProcessDied", 7, "read")
    assert "6 times" in letter["reason"]


def test_a_convicted_row_is_a_dead_letter(tmp_path, tag):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Ada {i}"} for i in range(9)])
    (unit,) = plan_units(files_of(find_files([str(source)])), 1 << 20, "text")
    for death in range(4):
        attempt = Attempt.next(str(tmp_path / "out"), unit.id)
        attempt.begin()
        if death >= 2:
            attempt.works_on(5)
    ((receipt,), _) = tag(source)
    assert (receipt["n_ok"], receipt["n_dead"]) == (8, 1)
    (letter,) = _letters(tmp_path)
    assert (letter["source_row"], letter["error"], letter["attempts"]) == (5, "ProcessDied", 5)
    assert not list((tmp_path / "out" / ATTEMPTS).glob("*.json"))


def test_a_file_that_changed_since_it_was_planned(tmp_path, ner_model_dir):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada"}])
    config = ner_config(
        JobConfig, input=[str(source)], output=str(tmp_path / "out"), model=str(ner_model_dir)
    )
    (unit,) = plan_units(files_of(find_files(config.input)), 1 << 20, "text")
    write_jsonl(source, [{"text": "Bob"}] * 2)
    receipt = make_tagger(config, pa.schema([("text", pa.string())])).tag(unit)
    assert "changed since this run was planned" in receipt.error
    assert _files(tmp_path / "out") == []


def test_another_model_than_the_one_that_was_planned_with(tmp_path, ner_model_dir):
    config = ner_config(
        JobConfig, input=["in"], output=str(tmp_path / "out"), model=str(ner_model_dir)
    )
    with pytest.raises(CheckpointError, match="on this node holds another model"):
        make_tagger(config, pa.schema([]), model_digest="0" * 64)


def test_a_row_that_the_model_refuses_is_a_dead_letter(tmp_path, tag):
    """Its whole row is kept, with the columns that are not carried too."""
    table = pa.table({"text": ["Ada", KILLER, "Bob"], "n": [1, 2, 3]})
    source = write_parquet(tmp_path / "a.parquet", table)
    ((receipt,), _) = tag(source, RefusingTagger, columns="text")
    assert (receipt["n_ok"], receipt["n_dead"]) == (2, 1)
    (letter,) = _letters(tmp_path)
    assert letter["row"] == {"text": KILLER, "n": 2}
    assert (letter["stage"], letter["line"]) == ("forward", None)
    assert letter["reason"] == "no kernel for this"


def test_a_receipt_of_a_unit_with_too_many_rows_is_an_error(tmp_path, tag, monkeypatch):
    """Rows written are counted by the writer, rows predicted by the tally: they must agree."""
    add = actor.add_predictions
    monkeypatch.setattr(
        actor, "add_predictions", lambda *args, **options: add(*args, **options).slice(1)
    )
    ((receipt,), _) = tag(write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada"}] * 3))
    assert receipt["error"].startswith("AssertionError")


# ---- late attempts ------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [True, False])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_an_attempt_that_slept_before_its_work_removes_nothing_new(
    tmp_path, ner_model_dir, monkeypatch, suffix, junk
):
    """It saw no output that counts, stood still, and another attempt wrote one meanwhile.

    Seen in the drill on S3: the late attempt removed it, and the manifest named a missing file.
    """
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"Ada {i}"} for i in range(3)])
    config = ner_config(
        JobConfig,
        model=str(ner_model_dir),
        input=[str(source)],
        output=str(tmp_path / "out"),
        output_format=suffix,
    )
    files = list(files_of(find_files(config.input)))
    schema = input_schema(files, config.text_column, config.carried_columns)
    (unit,) = plan_units(files, config.bytes_per_unit, config.text_column)
    first, second = make_tagger(config, schema), make_tagger(config, schema)
    output = tmp_path / "out" / f"a.{suffix}"
    if junk:  # of an attempt that died, and counts for nothing
        write_bytes(output, b"junk")
    begin, seen = Attempt.begin, {}

    def late(self):
        monkeypatch.setattr(Attempt, "begin", begin)
        assert not second.tag(unit).error
        seen.update({path: path.read_bytes() for path in (tmp_path / "out").rglob("*")
                     if path.is_file() and "attempts" not in path.parts})  # fmt: skip
        begin(self)

    monkeypatch.setattr(Attempt, "begin", late)
    receipt = first.tag(unit)
    assert (receipt.error, receipt.found, receipt.n_ok) == ("", True, 3)
    assert output in seen
    assert {path: path.read_bytes() for path in seen} == seen
    assert read_marks(str(tmp_path / "out"), output.name) is not None


@pytest.mark.parametrize("at", range(1, 6))
def test_a_file_that_came_after_the_look_is_not_removed(tmp_path, monkeypatch, at):
    """Another process replaces the file before any of the system calls."""
    path = write_bytes(tmp_path / "a", b"old")
    listed = storage.stat(str(path))
    calls = []

    def counting(name, original):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == at:
                path.unlink(missing_ok=True)
                path.write_bytes(b"new, and larger")
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("stat", "rename"):
            patch.setattr(storage.os, name, counting(name, getattr(storage.os, name)))
        storage.remove([listed])
    if len(calls) >= at:
        assert path.read_bytes() == b"new, and larger"
    else:
        assert not path.exists()
