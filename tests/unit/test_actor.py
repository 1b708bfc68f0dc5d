"""A unit's way through an actor, without Ray: only the handle that progress goes to is a fake."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import bad_utf8_strings, write_bytes, write_jsonl, write_parquet

from erniem_batch.job.actor import RECEIPT_SCHEMA, UnitTagger
from erniem_batch.job.config import JobConfig
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import find_files, plan_units
from erniem_batch.job.write import ADDED_SCHEMA, DEAD_LETTERS


class Calls:
    """Stands for an actor handle: notes what is called."""

    def __init__(self):
        self.made = []

    def __getattr__(self, name):
        class Method:
            remote = staticmethod(lambda *values: self.made.append((name, values)))

        return Method


@pytest.fixture
def tag(tmp_path, ner_model_dir):
    """Plans an input and tags all of its units; gives receipts, with the progress made."""

    def run(source, **options):
        config = JobConfig(
            input=[str(source)], output=str(tmp_path / "out"), model=str(ner_model_dir), **options
        )
        files = find_files(config.input)
        schema = input_schema(files, config.text_column, config.carried_columns)
        units = plan_units(files, config.bytes_per_unit, config.text_column, config.limit)
        progress = Calls()
        tagger = UnitTagger(config, schema, config.output, 1, progress)
        receipts = tagger(pa.Table.from_pylist([unit.to_row() for unit in units]))
        assert receipts.schema == RECEIPT_SCHEMA
        return receipts.to_pylist(), progress.made

    return run


def _output(tmp_path, name="a"):
    return pq.read_table(tmp_path / "out" / f"{name}.parquet")


def _letters(tmp_path, name="a"):
    path = tmp_path / "out" / DEAD_LETTERS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert receipt["n_entities"] == sum(map(len, table["entities"].to_pylist()))
    assert not (tmp_path / "out" / DEAD_LETTERS).exists()
    assert progress[0][0] == "add"
    assert progress[0][1][1:] == (5, receipt["n_tokens"], 1.0)
    assert progress[-1][0] == "add_padding"


def test_dead_letters_hold_no_text(tmp_path, tag):
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
    assert "hidden" not in json.dumps(letters)


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
    assert _output(tmp_path).schema == ADDED_SCHEMA


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
        assert _output(tmp_path).schema == ADDED_SCHEMA
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
    assert _output(tmp_path, "p").schema == pa.schema([*schema, *ADDED_SCHEMA])
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
    (letter,) = _letters(tmp_path)
    assert (letter["source_row"], letter["reason"]) == (1, "text must be a string, got bytes")


def test_carried_bytes_that_json_cannot_hold_lose_the_unit_not_the_job(tmp_path, tag):
    column = bad_utf8_strings([b"\xff"])
    source = write_parquet(tmp_path / "a.parquet", pa.table({"text": ["Ada"], "other": column}))
    ((receipt,), _) = tag(source, output_format="jsonl")
    assert receipt["error"].startswith("UnicodeDecodeError")
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_damaged_pages_lose_the_unit_and_leave_nothing(tmp_path, tag):
    table = pa.table({"text": [f"Ada {i * 7919}" for i in range(5000)]})
    source = write_parquet(tmp_path / "a.parquet", table, 1000)
    content = bytearray(source.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    source.write_bytes(content)
    ((receipt,), _) = tag(source)
    assert receipt["error"]
    assert receipt["n_rows"] == receipt["n_ok"] == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_damaged_deflate_stream_loses_the_unit(tmp_path, tag, ner_model_dir):
    """Once, zlib's error ended the whole job; past the first megabyte it is met in the actor."""
    rows = [{"text": f"{i * 7919 % 10007}", "ballast": "x" * 400} for i in range(4000)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", rows)
    content = bytearray(source.read_bytes())
    content[-3000:-2000] = b"\xff" * 1000
    source.write_bytes(content)
    ((receipt,), _) = tag(source)
    assert receipt["error"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


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
    assert found.schema.equals(table.schema)
    assert found.to_pylist() == [table.to_pylist()[0], table.to_pylist()[2]]


def test_limit_and_slices(tmp_path, tag):
    rows = [{"text": f"Ada {i}"} for i in range(30)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    receipts, _ = tag(source, limit=11, unit_bytes=100)
    assert sum(receipt["n_rows"] for receipt in receipts) == 11
    found = []
    for receipt in receipts:
        found += pq.read_table(receipt["output"])["text"].to_pylist()
    assert found == [row["text"] for row in rows[:11]]


def test_strategy_none_gives_tokens(tmp_path, tag):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada in London"}])
    tag(source, aggregation_strategy="none")
    (row,) = _output(tmp_path).to_pylist()
    assert {entity["label"][:2] for entity in row["entities"]} <= {"B-", "I-"}
