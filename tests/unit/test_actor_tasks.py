"""Units of every task in an actor, without Ray: columns, dead letters, options."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import (
    KILLER,
    RefusingTagger,
    letters_path,
    make_tagger,
    save_tiny_models,
    tag_files,
    write_jsonl,
    write_parquet,
)

from erniem_batch import ErnieMTokenizer
from erniem_batch.errors import ConfigError
from erniem_batch.job import jsonl, rowgroups
from erniem_batch.job.actor import UnitTagger
from erniem_batch.job.config import JobConfig
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import Unit, files_of, find_files
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    Options,
    QaOptions,
)

FORMATS = ("jsonl", "parquet")
SECRET = "hidden"
LONG = "Ada Lovelace lived in London for long, 北京は大きい都市です。 " * 8
TEXTS = [
    "Ada Lovelace lived in London.",
    "北京は大きい都市です。",
    LONG,
    "Сергей живёт в Москве 😀 und",
    "👩‍👧 ﬁne é in Zürich",
]
COUNTED = [("n_tokens", pa.int32()), ("n_windows", pa.int32()), ("truncated", pa.bool_())]
ITEM = pa.struct(
    [
        ("id", pa.int32()),
        ("parent", pa.int32()),
        ("name", pa.string()),
        ("text", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("probability", pa.float32()),
    ]
)
LABELS = [
    ("predicted_label", pa.string()),
    ("predicted_score", pa.float32()),
    ("label_scores", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))),
]

Row = dict[str, Any]
Bad = tuple[Row, str]


@dataclass(frozen=True)
class Case:
    """A task with some of its options, and rows for it.

    Attributes:
        columns: of the input, beside the id.
        added: what the task adds, as documented.
        good: rows that come through.
        bad: rows that do not, with what their dead letters say.
        bad_json: more of them, whose values no Parquet column of this type holds.
    """

    options: Options
    columns: list[tuple[str, pa.DataType]]
    added: list[tuple[str, pa.DataType]]
    good: list[Row]
    bad: list[Bad]
    bad_json: list[Bad]
    text_column: str = "text"
    fields: dict[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def schema(self) -> pa.Schema:
        """What is added in all, in order."""
        return pa.schema([*self.added, *COUNTED])


ENTITIES = pa.list_(
    pa.struct(
        [
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("label", pa.string()),
            ("text", pa.string()),
            ("score", pa.float32()),
        ]
    )
)
ANSWERS = pa.list_(
    pa.struct(
        [("start", pa.int32()), ("end", pa.int32()), ("text", pa.string()), ("score", pa.float32())]
    )
)
TEXT_ROWS = [{"text": text} for text in [*TEXTS, ""]]
BAD_TEXT = [({"text": None}, "text must be a string, got null")]
BAD_TEXT_JSON = [
    ({"text": 7}, "text must be a string, got int"),
    ({"text": [SECRET]}, "text must be a string, got list"),
    ({}, "text must be a string, got null"),
]

CASES = {
    "ner": Case(
        NerOptions(),
        [("text", pa.string())],
        [("entities", ENTITIES)],
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "classify": Case(
        ClassifyOptions(all_scores=True),
        [("text", pa.string())],
        LABELS,
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "classify pairs": Case(
        ClassifyOptions(),
        [("text", pa.string()), ("other", pa.string())],
        LABELS,
        [{"text": text, "other": "a second text"} for text in TEXTS]
        + [{"text": "", "other": ""}, {"text": "short", "other": LONG}],
        [
            ({"text": SECRET, "other": None}, "text_pair must be a string, got null"),
            ({"text": None, "other": SECRET}, "text must be a string, got null"),
        ],
        [
            ({"text": SECRET, "other": 7}, "text_pair must be a string, got int"),
            ({"text": SECRET, "other": {"a": SECRET}}, "text_pair must be a string, got dict"),
            ({"text": SECRET}, "text_pair must be a string, got null"),
        ],
        fields={"text_pair": "other"},
    ),
    "zero-shot": Case(
        ClassifyOptions(candidate_labels="sports, art, soup", all_scores=True),
        [("text", pa.string())],
        LABELS,
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
        model="classify-entailment",
    ),
    "choose": Case(
        ChooseOptions(),
        [
            ("premise", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("q", pa.string()),
        ],
        [("predicted_choice", pa.int32()), ("choice_scores", pa.list_(pa.float32()))],
        [
            {"premise": text, "choices": ["it rained", "sun", text[:9]][: 2 + i % 2], "q": "cause"}
            for i, text in enumerate([*TEXTS, ""])
        ]
        + [{"premise": "short", "choices": [LONG, ""], "q": "why, of all things?"}]
        + [{"premise": "nothing is asked", "choices": ["a", "b", "c d e", "f"], "q": None}],
        [
            ({"premise": SECRET, "choices": None, "q": ""}, "choices must be a list .* got null"),
            ({"premise": SECRET, "choices": [], "q": ""}, "choices must have at least one, got an"),
            (
                {"premise": SECRET, "choices": [SECRET, None], "q": ""},
                r"choices\[1\] must be a string, got null",
            ),
            ({"premise": None, "choices": [SECRET], "q": ""}, "premise must be a .* got null"),
        ],
        [
            ({"premise": SECRET, "choices": SECRET, "q": ""}, "choices must be a list .* got str"),
            (
                {"premise": SECRET, "choices": {SECRET: 1}, "q": ""},
                "choices must be a list .* got dict",
            ),
            (
                {"premise": SECRET, "choices": [SECRET, 7], "q": ""},
                r"choices\[1\] must be a string, got int",
            ),
            ({"premise": 7, "choices": [SECRET], "q": ""}, "premise must be a string, got int"),
            ({"premise": SECRET, "choices": [SECRET], "q": 7}, "question must be a string, got"),
        ],
        text_column="premise",
        fields={"choices": "choices", "question": "q"},
    ),
    "qa": Case(
        QaOptions(top_k=3, null_threshold=0.0),
        [("context", pa.string()), ("question", pa.string())],
        [
            ("predicted_answer", pa.string()),
            ("predicted_answers", ANSWERS),
            ("null_score", pa.float32()),
        ],
        [{"context": text, "question": "Who lived where?"} for text in TEXTS],
        [
            ({"context": SECRET, "question": None}, "question must be a string, got null"),
            ({"context": SECRET, "question": ""}, "question must not be empty"),
            ({"context": SECRET, "question": " \t"}, "question must not be empty"),
            ({"context": None, "question": SECRET}, "context must be a string, got null"),
            ({"context": "", "question": SECRET}, "context must not be empty"),
            (
                {"context": f"{SECRET} " * 60, "question": f"{SECRET} " * 60},
                "the question and special tokens take .* of 64 tokens .* which leaves no room",
            ),
        ],
        [
            ({"context": SECRET, "question": 7}, "question must be a string, got int"),
            ({"context": SECRET}, "question must be a string, got null"),
            ({"context": {SECRET: 1}, "question": SECRET}, "context must be a string, got dict"),
        ],
        text_column="context",
        fields={"question": "question"},
    ),
    "embed": Case(
        EmbedOptions(),
        [("text", pa.string())],
        [("embedding", pa.list_(pa.float32(), 32))],
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "embed int8": Case(
        EmbedOptions(output_dtype="int8", dimensions=8, prefix="query: "),
        [("text", pa.string())],
        [("embedding", pa.list_(pa.int8(), 8))],
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "embed float16": Case(
        EmbedOptions(output_dtype="float16", pooling="cls"),
        [("text", pa.string())],
        [("embedding", pa.list_(pa.float16(), 32))],
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "extract": Case(
        ExtractOptions(
            schema='{"Person": ["City"], "Mood [good, bad]": null}',
            schema_lang="en",
            output_json=True,
        ),
        [("text", pa.string())],
        [("extracted", pa.list_(ITEM)), ("extracted_json", pa.string())],
        TEXT_ROWS,
        BAD_TEXT,
        BAD_TEXT_JSON,
    ),
    "extract by row": Case(
        ExtractOptions(),
        [("text", pa.string()), ("wanted", pa.string())],
        [("extracted", pa.list_(ITEM))],
        [{"text": text, "wanted": '{"人物": ["城市"]}'} for text in TEXTS]
        + [{"text": "Ada in London", "wanted": "City, Person"}],
        [
            (
                {"text": SECRET, "wanted": f"[{SECRET}: "},
                "the schema is no JSON or YAML: neither JSON nor YAML at line 1, column",
            ),
            ({"text": SECRET, "wanted": "[7]"}, r"schema\[0\] must be a name, .* got int"),
            ({"text": SECRET, "wanted": None}, "there is no schema: the schema column is null"),
            ({"text": None, "wanted": SECRET}, "text must be a string, got null"),
        ],
        [
            ({"text": SECRET, "wanted": 7}, "schema must be a name, .* got int"),
            ({"text": SECRET, "wanted": [SECRET, None]}, r"schema\[1\] must be .* got null"),
        ],
        fields={"schema": "wanted"},
    ),
}

every_case = pytest.mark.parametrize("name", CASES)
every_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> dict[str, Path]:
    """A tiny random model for each task."""
    return save_tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture
def job(tmp_path, models):
    """Settings of a job into a new folder; short windows, so that short texts need several."""

    def make(case: Case, source: Path, output: str = "out", **changes: Any) -> JobConfig:
        values = {
            "input": [str(source)],
            "output": str(tmp_path / output),
            "model": str(models[case.model or case.options.task]),
            "options": case.options.resolved(),
            "text_column": case.text_column,
            "fields": case.fields,
            "window_tokens": 64,
            "overlap_tokens": 16,
        }
        return JobConfig(**{**values, **changes})

    return make


def write(path: Path, case: Case, rows: list[Row], kind: str, columns: Any = None) -> Path:
    """Rows with ids as one file of either format."""
    numbered = [{"id": f"{i:04}", **row} for i, row in enumerate(rows)]
    if kind == "jsonl":
        return write_jsonl(path.with_suffix(".jsonl"), numbered)
    schema = pa.schema([("id", pa.string()), *(columns or case.columns)])
    return write_parquet(path.with_suffix(".parquet"), pa.Table.from_pylist(numbered, schema))


def tagged(config: JobConfig, tagger: type[UnitTagger] = UnitTagger) -> Row:
    """The receipt of the only unit."""
    ((receipt,), _) = tag_files(config, tagger)
    assert receipt["error"] == ""
    assert receipt["n_rows"] == receipt["n_ok"] + receipt["n_dead"]
    return receipt


def output_of(config: JobConfig, name: str = "a") -> pa.Table:
    table = pq.read_table(Path(config.output) / f"{name}.parquet")
    return table.replace_schema_metadata(None)


def letters_of(config: JobConfig, name: str = "a") -> list[Row]:
    return pq.read_table(letters_path(config.output, name)).to_pylist()


def bad_rows(case: Case, kind: str) -> list[Bad]:
    return case.bad + (case.bad_json if kind == "jsonl" else [])


def whole(letter: Row) -> Row:
    """The row that a dead letter keeps."""
    return letter["row"] if letter["line"] is None else json.loads(letter["line"])


# ---- columns ------------------------------------------------------------------------------------


@every_case
@every_format
def test_columns_and_counts(tmp_path, job, name, kind):
    """Input columns untouched, then exactly the documented ones; receipts count what is there."""
    case = CASES[name]
    config = job(case, write(tmp_path / "a", case, case.good, kind))
    receipt = tagged(config)
    table = output_of(config)
    assert table.schema == pa.schema([("id", pa.string()), *case.columns, *case.schema])
    assert table["id"].to_pylist() == [f"{i:04}" for i in range(len(case.good))]
    carried = table.select([column for column, _ in case.columns]).to_pylist()
    assert carried == case.good
    for column in ("n_tokens", "n_windows"):
        assert receipt[column] == sum(table[column].to_pylist())
    assert (receipt["n_dead"], receipt["n_truncated"]) == (0, 0)
    assert receipt["n_found"] > 0
    assert max(table["n_windows"].to_pylist()) > 2
    assert not any(table["truncated"].to_pylist())
    assert not (tmp_path / "out" / DEAD_LETTERS).exists()


@every_case
def test_both_formats_give_the_same(tmp_path, job, name):
    case = CASES[name]
    rows = []
    for kind in FORMATS:
        config = job(case, write(tmp_path / "a", case, case.good, kind), kind)
        tagged(config)
        rows.append(output_of(config).to_pylist())
    assert rows[0] == rows[1]


@every_case
@every_format
def test_columns_of_a_unit_that_has_only_failures(tmp_path, job, name, kind):
    case = CASES[name]
    bad = bad_rows(case, kind)
    config = job(case, write(tmp_path / "a", case, [row for row, _ in bad], kind))
    receipt = tagged(config)
    assert (receipt["n_ok"], receipt["n_dead"]) == (0, len(bad))
    table = output_of(config)
    assert len(table) == 0
    assert pa.schema(list(table.schema)[-len(case.schema) :]) == case.schema
    if kind == "parquet":
        assert table.schema == pa.schema([("id", pa.string()), *case.columns, *case.schema])


@every_case
@every_format
def test_columns_of_an_empty_unit(tmp_path, job, name, kind):
    case = CASES[name]
    config = job(case, write(tmp_path / "a", case, [], kind))
    assert tagged(config)["n_rows"] == 0
    expected = [] if kind == "jsonl" else [("id", pa.string()), *case.columns]
    assert output_of(config).schema == pa.schema([*expected, *case.schema])


@every_case
@every_format
def test_columns_do_not_depend_on_the_rows_of_a_chunk(tmp_path, job, name, kind, monkeypatch):
    """Chunks that are good, bad and mixed are written into one file, in one schema."""
    case = CASES[name]
    for module in (jsonl, rowgroups):
        monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    bad = [row for row, _ in bad_rows(case, kind)]
    rows = [*(bad * 3)[:3], *case.good, *bad, *case.good[:2]]
    config = job(case, write(tmp_path / "a", case, rows, kind))
    receipt = tagged(config)
    assert (receipt["n_ok"], receipt["n_dead"]) == (len(case.good) + 2, len(bad) + 3)
    assert output_of(config).schema == pa.schema([("id", pa.string()), *case.columns, *case.schema])
    ids = output_of(config)["id"].to_pylist() + [whole(x)["id"] for x in letters_of(config)]
    assert sorted(ids) == [f"{i:04}" for i in range(len(rows))]


@every_case
def test_jsonl_out_says_the_same(tmp_path, job, name):
    """The values of the other output format, to the last digit that a float32 has."""
    case = CASES[name]
    source = write(tmp_path / "a", case, case.good, "parquet")
    config = job(case, source)
    tagged(config)
    other = job(case, source, "json", output_format="jsonl")
    tagged(other)
    lines = (tmp_path / "json" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == output_of(config).to_pylist()


# ---- dead letters -------------------------------------------------------------------------------


@every_case
@every_format
def test_bad_rows_are_dead_letters_that_name_the_field(tmp_path, job, name, kind):
    """They say which field and what came, never what is in it; and they harm no other row."""
    case = CASES[name]
    bad = bad_rows(case, kind)
    rows = [case.good[0], *(row for row, _ in bad), case.good[1]]
    source = write(tmp_path / "a", case, rows, kind)
    config = job(case, source)
    receipt = tagged(config)
    assert (receipt["n_ok"], receipt["n_dead"]) == (2, len(bad))
    table = output_of(config)
    assert table.schema == pa.schema([("id", pa.string()), *case.columns, *case.schema])
    assert table["id"].to_pylist() == ["0000", f"{len(rows) - 1:04}"]
    letters = letters_of(config)
    assert [letter["source_row"] for letter in letters] == list(range(1, len(bad) + 1))
    for letter, (row, reason) in zip(letters, bad, strict=True):
        assert (letter["stage"], letter["error"]) == ("encode", "RecordError")
        assert re.search(reason, letter["reason"]), letter["reason"]
        assert whole(letter) == {"id": f"{letter['source_row']:04}", **row}
        told = {key: value for key, value in letter.items() if key not in ("row", "line")}
        assert SECRET not in json.dumps(told, default=str)


@every_case
@every_format
def test_replay(tmp_path, job, name, kind):
    """What failed for a while gives what it would have given; what is bad stays, whole."""
    case = CASES[name]
    once = {**case.good[0], case.text_column: KILLER}
    bad = [row for row, _ in bad_rows(case, kind)]
    rows = [case.good[0], *bad, once, case.good[1]]
    config = job(case, write(tmp_path / "a", case, rows, kind), columns="id")
    receipt = tagged(config, RefusingTagger)
    assert (receipt["n_ok"], receipt["n_dead"]) == (2, len(bad) + 1)
    straight = job(case, write(tmp_path / "b", case, [once], kind), "straight", columns="id")
    tagged(straight)
    for source in (tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"):
        source.unlink()  # the letters must do

    first = letters_of(config)
    unit = Unit(
        id="r1",
        path=str(tmp_path / f"a.{kind}"),
        format=kind,
        output="a.replay-1",
        letters=f"{DEAD_LETTERS}/{letters_path(config.output).name}",
    )
    again = make_tagger(config, pa.schema([("id", pa.string())])).tag(unit)
    assert (again.error, again.n_rows, again.n_ok) == ("", len(bad) + 1, 1)
    (found,) = output_of(config, "a.replay-1").drop_columns("id").to_pylist()
    (expected,) = output_of(straight, "b").drop_columns("id").to_pylist()
    assert found == expected
    left = letters_of(config, "a.replay-1")
    assert [whole(x) for x in left] == [whole(x) for x in first[:-1]]
    assert [x["reason"] for x in left] == [x["reason"] for x in first[:-1]]
    assert [x["source_row"] for x in left] == list(range(1, len(bad) + 1))


def test_columns_of_another_type_in_parquet(tmp_path, job):
    """A file whose columns hold something else loses its rows, each with the type that came."""
    choose, qa = CASES["choose"], CASES["qa"]
    for case, changes, reason in (
        (choose, {"choices": pa.string()}, "choices must be a list of strings, got str"),
        (choose, {"choices": pa.list_(pa.int8())}, "choices[0] must be a string, got int"),
        (qa, {"question": pa.int16()}, "question must be a string, got int"),
        (qa, {"question": pa.binary()}, "question must be a string, got bytes"),
    ):
        columns = [(name, changes.get(name, type_)) for name, type_ in case.columns]
        values = {pa.string(): SECRET, pa.list_(pa.int8()): [1], pa.int16(): 7}
        values[pa.binary()] = SECRET.encode()
        rows = [{**case.good[0], **{name: values[t] for name, t in changes.items()}}]
        name = f"{case.options.task}-{next(iter(changes.values()))}"
        config = job(case, write(tmp_path / "a", case, rows, "parquet", columns), name)
        assert tagged(config)["n_dead"] == 1
        (letter,) = letters_of(config)
        assert letter["reason"] == reason


# ---- columns to read ----------------------------------------------------------------------------


@every_format
def test_nested_columns(tmp_path, job, kind):
    """A dot goes into structs, for every field; where the outer value is null, so is the inner."""
    case = CASES["qa"]
    rows = [
        {"d": {"body": row["context"]}, "q": {"text": row["question"], "n": i}}
        for i, row in enumerate(case.good)
    ]
    flat = job(case, write(tmp_path / "b", case, case.good, kind), "flat")
    tagged(flat)
    columns = [
        ("d", pa.struct([("body", pa.string())])),
        ("q", pa.struct([("text", pa.string()), ("n", pa.int64())])),
    ]
    source = write(tmp_path / "a", case, [*rows, {"d": rows[0]["d"], "q": None}], kind, columns)
    config = job(case, source, text_column="d.body", fields={"question": "q.text"})
    assert tagged(config)["n_dead"] == 1
    table = output_of(config)
    added = case.schema.names
    assert table.select(added).to_pylist() == output_of(flat, "b").select(added).to_pylist()
    assert table.select(["d", "q"]).to_pylist() == rows
    (letter,) = letters_of(config)
    assert letter["reason"] == "question must be a string, got null"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qa", {"text_column": "body"}, "no column 'body' in .* choose with --context-column"),
        ("qa", {"fields": {"question": "q"}}, "no column 'q' in .* with --question-column"),
        ("choose", {"text_column": "p"}, "no column 'p' in .* choose with --premise-column"),
        ("choose", {"fields": {"choices": "c"}}, "no column 'c' in .* with --choices-column"),
        ("classify", {"fields": {"text_pair": "b"}}, "'b' in .* with --text-pair-column"),
        ("extract", {"fields": {"schema": "s.t"}}, "'s.t' in .* choose with --schema-column"),
        ("ner", {"fields": {"language": "lang"}}, "'lang' in .* choose with --language-column"),
        ("embed", {"text_column": "body"}, "no column 'body' in .* choose with --text-column"),
    ],
)
@every_format
def test_columns_that_are_not_there(tmp_path, job, name, changes, message, kind):
    """Before any work, and the flag of this very task is named."""
    case = CASES[name]
    config = job(case, write(tmp_path / "a", case, case.good, kind), **changes)
    with pytest.raises(ConfigError, match=message):
        tag_files(config)


def test_text_column_of_another_type(tmp_path, job):
    case = CASES["qa"]
    config = job(case, write(tmp_path / "a", case, case.good, "parquet"), text_column="n")
    table = pa.table({"n": [1], "question": ["who?"]})
    write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ConfigError, match="--context-column n must hold strings, but is int64"):
        tag_files(config)


@every_format
def test_bad_rows_have_no_say_in_the_types_of_columns(tmp_path, job, kind):
    """Once, one row whose choices were no list made the choices of all rows JSON text."""
    case = CASES["choose"]
    bad = [row for row, _ in bad_rows(case, kind)]
    config = job(case, write(tmp_path / "a", case, [*bad, *case.good], kind))
    files = list(files_of(find_files(config.input)))
    schema = input_schema(files, "premise", None, fields=case.fields, added=config.added_columns)
    assert schema.remove_metadata() == pa.schema([("id", pa.string()), *case.columns])


# ---- languages and thresholds -------------------------------------------------------------------


def labels_of(row: Row) -> list[str]:
    """What was found in a row of any task that has thresholds."""
    if "entities" in row:
        return [entity["label"] for entity in row["entities"]]
    if "label_scores" in row:
        return [score["label"] for score in row["label_scores"]]
    if "predicted_choice" in row:
        return [] if row["predicted_choice"] is None else ["*"]
    if "predicted_answers" in row:
        return ["*"] * len(row["predicted_answers"])
    return [item["name"] for item in row["extracted"]]


WITH_SCORES = ["ner", "classify", "zero-shot", "choose", "qa", "extract"]


@pytest.fixture
def by_language(tmp_path, job):
    """What is found in each row of a task, whose languages are de, en and unknown in turn."""

    def run(name: str, thresholds: Any, kind: str) -> list[tuple[str | None, list[str]]]:
        case = CASES[name]
        rows = [{**row, "lang": lang} for row in case.good for lang in ("de", "en", None)]
        columns = [*case.columns, ("lang", pa.string())]
        source = write(tmp_path / "in" / "a", case, rows, kind, columns)
        path = tmp_path / "thresholds.yaml"
        path.write_text(json.dumps(thresholds), encoding="utf-8")  # which is YAML too
        fields = {**case.fields, "language": "lang"}
        options = replace(case.options, min_score=str(path))
        output = f"out{len(list(tmp_path.glob('out*')))}"
        config = job(case, source, output, fields=fields, options=options.resolved())
        tagged(config)
        table = output_of(config)
        return [(row["lang"], labels_of(row)) for row in table.to_pylist()]

    return run


@pytest.mark.parametrize("name", WITH_SCORES)
@every_format
def test_thresholds_by_language(by_language, name, kind):
    """Those of a language count for its rows and for no others."""
    free = by_language(name, {"*": 0.0}, kind)
    for lang in ("de", "en", None):
        assert any(labels for found, labels in free if found == lang)
    strict = by_language(name, {"*": 0.0, "de": {"*": 1.0}}, kind)
    assert strict == [(lang, [] if lang == "de" else labels) for lang, labels in free]


@pytest.mark.parametrize("name", ["ner", "classify", "zero-shot"])
def test_thresholds_by_label(by_language, name):
    """A label's own goes before "*", and a language's own before both."""
    free = by_language(name, {"*": 0.0}, "jsonl")
    kinds = sorted({label for _, labels in free for label in labels})
    assert len(kinds) > 1
    one = kinds[0]
    without = by_language(name, {"*": 0.0, one: 1.0, "de": {one: 0.0}}, "jsonl")
    assert without == [
        (lang, labels if lang == "de" else [label for label in labels if label != one])
        for lang, labels in free
    ]
    only = by_language(name, {"*": 1.0, one: 0.0}, "jsonl")
    assert only == [(lang, [label for label in labels if label == one]) for lang, labels in free]


def test_thresholds_by_name_of_a_schema(by_language):
    """What is not found is not asked about either."""
    names = {label for _, labels in by_language("extract", {"*": 0.0}, "jsonl") for label in labels}
    assert {"Person", "City"} <= names
    without = by_language("extract", {"*": 0.0, "Person": 1.0}, "jsonl")
    assert not {label for _, labels in without for label in labels} & {"Person", "City"}
    without = by_language("extract", {"*": 0.0, "en": {"City": 1.0}}, "jsonl")
    assert not {label for lang, labels in without for label in labels if lang == "en"} & {"City"}
    assert {label for lang, labels in without for label in labels if lang == "de"} >= {"City"}


GERMAN = "Die Kinder gingen am Morgen mit ihrer Lehrerin in den Wald und sammelten dort Pilze."
ENGLISH = "The children went to the forest with their teacher in the morning to pick mushrooms."


@pytest.mark.parametrize("name", [*WITH_SCORES, "embed"])
@every_format
def test_detected_language(tmp_path, job, name, kind):
    """A column before the counts; given languages go before detected ones; no text, no language."""
    pytest.importorskip("py3langid")
    case = CASES[name]
    template = case.good[0]
    rows = [
        {**template, case.text_column: GERMAN, "lang": None},
        {**template, case.text_column: ENGLISH, "lang": None},
        {**template, case.text_column: ENGLISH, "lang": "fr"},
    ]
    if name != "qa":
        rows.append({**template, case.text_column: " ", "lang": None})
    columns = [*case.columns, ("lang", pa.string())]
    source = write(tmp_path / "a", case, [*rows, bad_rows(case, kind)[0][0]], kind, columns)
    fields = {**case.fields, "language": "lang"}
    options = case.options
    if name != "embed":
        options = replace(options, min_score={"*": 0.0, "de": {"*": 1.0}})
    config = job(case, source, fields=fields, options=options, detect_language=True)
    assert tagged(config)["n_dead"] == 1
    table = output_of(config)
    added = [*case.added, ("detected_language", pa.string()), *COUNTED]
    assert pa.schema(list(table.schema)[-len(added) :]) == pa.schema(added)
    assert table["detected_language"].to_pylist() == ["de", "en", "fr", None][: len(rows)]
    if name != "embed":
        assert labels_of(table.to_pylist()[0]) == []


def test_detected_language_of_no_rows(tmp_path, job):
    pytest.importorskip("py3langid")
    case = CASES["ner"]
    config = job(case, write(tmp_path / "a", case, [], "parquet"), detect_language=True)
    tagged(config)
    assert output_of(config).column_names[-4:] == [
        "detected_language",
        "n_tokens",
        "n_windows",
        "truncated",
    ]


# ---- offsets ------------------------------------------------------------------------------------

MIXED = [
    "😀 Ada 👩‍👧 Lovelace 𝒳 in Zürich 😀 and more",
    "𠮷野家で北京は大きい都市です。😀東京",
    "plain words of London",
    "é Ünïcödé № ５ 😀😀😀 " * 9,
]
SLICES = {
    "codepoint": lambda text, a, b: text[a:b],
    "utf16": lambda text, a, b: text.encode("utf-16-le")[2 * a : 2 * b].decode("utf-16-le"),
    "byte": lambda text, a, b: text.encode()[a:b].decode(),
}
SPANS = {"ner": "entities", "qa": "predicted_answers", "extract": "extracted"}


@pytest.mark.parametrize("name", SPANS)
@every_format
def test_offset_units(tmp_path, job, name, kind):
    """In each unit, the encoded text cut at the offsets is the text of the span; the same spans."""
    case = CASES[name]
    rows = [{**case.good[0], case.text_column: text} for text in MIXED]
    source = write(tmp_path / "a", case, rows, kind)
    texts = {}
    for unit, cut in SLICES.items():
        options = replace(case.options, offset_unit=unit)
        config = job(case, source, unit, options=options.resolved())
        tagged(config)
        texts[unit] = []
        shifted = False
        for row in output_of(config).to_pylist():
            for span in row[SPANS[name]]:
                if span["start"] is None:  # an option
                    continue
                text = row[case.text_column]
                assert cut(text, span["start"], span["end"]) == span["text"]
                texts[unit].append(span["text"])
                shifted |= text[span["start"] : span["end"]] != span["text"]
        assert shifted == (unit != "codepoint")
    assert texts["codepoint"] == texts["utf16"] == texts["byte"]


# ---- schemas ------------------------------------------------------------------------------------


def extracted(config: JobConfig) -> list[Any]:
    tagged(config)
    return output_of(config)["extracted"].to_pylist()


@pytest.mark.parametrize(
    ("type_", "value", "same"),
    [
        (pa.string(), '{"Person": ["City"]}', '{"Person": ["City"]}'),
        (pa.string(), "Person:\n- City\n", '{"Person": ["City"]}'),
        (pa.string(), "Person, City", '["Person", "City"]'),
        (pa.list_(pa.string()), ["Person", "City"], '["Person", "City"]'),
        (pa.large_list(pa.string()), ["Person"], '["Person"]'),
        (
            pa.struct([("Person", pa.list_(pa.string())), ("Time", pa.string())]),
            {"Person": ["City"], "Time": None},
            '{"Person": ["City"]}',
        ),
        (
            pa.struct(
                [("Person", pa.struct([("City", pa.string()), ("Boss", pa.list_(pa.string()))]))]
            ),
            {"Person": {"City": "Person", "Boss": None}},
            '{"Person": {"City": "Person"}}',
        ),
        (
            pa.list_(pa.struct([("Person", pa.string()), ("City", pa.string())])),
            [{"Person": "City", "City": None}],
            '[{"Person": "City"}]',
        ),
        (
            pa.map_(pa.string(), pa.list_(pa.string())),
            [("Person", ["City"])],
            '{"Person": ["City"]}',
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_schema_column_of_parquet(tmp_path, job, type_, value, same):
    """Text, lists, structs and maps mean what the same schema means as an option.

    Once, a map was taken for a list of names; and fields that a struct has only for the sake of
    other rows were asked for in all rows, unless they stood at the top.
    """
    case = CASES["extract"]
    rows = [{"text": text, "wanted": value} for text in TEXTS]
    columns = [("text", pa.string()), ("wanted", type_)]
    source = write(tmp_path / "a", case, rows, "parquet", columns)
    options = ExtractOptions(schema_lang="en")
    mine = extracted(job(case, source, fields={"schema": "wanted"}, options=options))
    options = replace(options, schema=same).resolved()
    assert mine == extracted(job(case, source, "same", options=options))
    assert any(mine)


@every_format
def test_schema_option_where_the_column_is_null(tmp_path, job, kind):
    case = CASES["extract"]
    rows = [{"text": TEXTS[0], "wanted": wanted} for wanted in (None, "City", None, "Person")]
    columns = [("text", pa.string()), ("wanted", pa.string())]
    source = write(tmp_path / "a", case, rows, kind, columns)
    options = ExtractOptions(schema="Person", schema_lang="en", position_prob=0.01)
    a, city, b, person = extracted(job(case, source, fields={"schema": "wanted"}, options=options))
    assert a == b == person
    assert {item["name"] for item in a} == {"Person"}
    assert {item["name"] for item in city} == {"City"}


def test_extracted_items_are_a_tree(tmp_path, job):
    """Parents are other items of the row, stand before their relations; as in the nested JSON."""
    case = CASES["extract"]
    config = job(case, write(tmp_path / "a", case, case.good, "jsonl"))
    tagged(config)
    n_relations = 0
    for row in output_of(config).to_pylist():
        items = row["extracted"]
        assert [item["id"] for item in items] == list(range(len(items)))
        nested: dict[str, Any] = {}
        values: list[Row] = []
        for item in items:
            value = {"text": item["text"]}
            if item["start"] is not None:
                value |= {"start": item["start"], "end": item["end"]}
                assert row["text"][item["start"] : item["end"]] == item["text"]
            value["probability"] = pytest.approx(item["probability"], abs=1e-6)
            target = nested
            if item["parent"] is not None:
                assert item["parent"] < item["id"]
                n_relations += 1
                target = values[item["parent"]].setdefault("relations", {})
            target.setdefault(item["name"], []).append(value)
            values.append(value)
        assert json.loads(row["extracted_json"]) == nested
    assert n_relations > 0


# ---- settings that do not go together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [(NerOptions(), "question"), (QaOptions(), "choices"), (EmbedOptions(), "text_pair")],
)
def test_fields_that_a_task_does_not_read(options, name):
    """Rows without a string there would be taken for bad ones while they are read."""
    with pytest.raises(ConfigError, match=f"{options.task} reads no field '{name}'; there are .*"):
        JobConfig(options=options, fields={name: "other"})


def test_zero_shot_reads_no_second_text():
    """Once, the flag was ignored without a word."""
    options = ClassifyOptions(candidate_labels="a,b")
    with pytest.raises(ConfigError, match="--text-pair-column does not go with --candidate-labels"):
        JobConfig(options=options, fields={"text_pair": "other"})
