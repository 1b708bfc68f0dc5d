"""Annotated rows: every form of every task, and every mistake, told without the text."""

import json

import pyarrow as pa
import pytest
from fakes import write_bytes, write_jsonl, write_parquet

from erniem_batch.errors import ConfigError
from erniem_batch.gold import READERS, Answer, Facts, annotated, read_annotated
from erniem_batch.labels import labels_to_spans, spans_to_labels

TEXT = "Ada Lovelace works in London."
TOKENS = ["Ada", "Lovelace", "works", "in", "London", "."]
BIO = ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
SPANS = [(0, 12, "PER"), (22, 28, "LOC")]
LISTS = [[0, 12, "PER"], [22, 28, "LOC"]]
ENTITIES = {"text": TEXT, "spans": LISTS}
CONTEXT = "Die Brücke wurde 2021 eröffnet, nicht 2020."
QUESTION = {"question": "Wann?", "context": CONTEXT}
CHOICES = {"premise": "It rained.", "choices": ["wet", "dry"]}
# Stands in the rows that follow and must not be in any message.
SECRET = "Geheimnis"


def _gold(task, **row):
    return annotated(task, row).gold


# ---- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans",
    [
        LISTS,
        [{"start": 0, "end": 12, "label": "PER"}, {"start": 22, "end": 28, "label": "LOC"}],
        [["0", "12", "PER"], ["22", "28", "LOC"]],  # a Parquet list has one type
        json.dumps(LISTS),  # as a batch job carries a list of mixed types
    ],
    ids=["lists", "mappings", "strings", "json"],
)
def test_spans(spans):
    row = annotated("ner", {"id": 7, "text": TEXT, "spans": spans, "lang": "en"})
    assert row.gold == SPANS
    assert (row.record.id, row.record.text, row.language) == ("7", TEXT, "en")
    assert row.record.fields == {"language": "en"}


@pytest.mark.parametrize(
    "tags",
    [
        "B-PER I-PER O O B-LOC O",  # BIO
        "I-PER I-PER O O I-LOC O",  # IOB1
        "B-PER E-PER O O S-LOC O",  # BIOES
        "B-PER L-PER O O U-LOC O",  # BILOU
    ],
    ids=["bio", "iob1", "bioes", "bilou"],
)
def test_tokens_and_tags(tags):
    """The text is rebuilt with spaces; one that is there is kept."""
    spaced = annotated("ner", {"tokens": TOKENS, "tags": tags.split()})
    assert spaced.record.text == "Ada Lovelace works in London ."
    assert spaced.gold == SPANS
    kept = annotated("ner", {"text": TEXT, "tokens": TOKENS, "ner_tags": tags.split()})
    assert (kept.record.text, kept.gold) == (TEXT, SPANS)
    assert _gold("extract", tokens=TOKENS, tags=tags.split()) == Facts(tuple(SPANS))


def test_neighbours_stay_two():
    """IOB1 marks them with B, BIO with every B, BIOES with S."""
    for tags in ("I-PER B-PER", "B-PER B-PER", "S-PER S-PER"):
        assert _gold("ner", tokens=["Ada", "Bob"], tags=tags.split()) == [
            (0, 3, "PER"),
            (4, 7, "PER"),
        ]


@pytest.mark.parametrize("language", ["zh", "ja", "zh-Hans", "th"])
def test_no_spaces_where_none_are_written(language):
    tokens, tags = list("林若溪在北京"), ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    row = annotated("ner", {"tokens": tokens, "tags": tags, "language": language})
    assert row.record.text == "林若溪在北京"
    assert row.gold == [(0, 3, "PER"), (4, 6, "LOC")]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"label": "sports"}, "sports"),
        ({"labels": "sports"}, "sports"),
        ({"label": None, "labels": ["sports"]}, ("sports",)),
        ({"label": ["sports", "news"]}, ("sports", "news")),
        ({"label": []}, ()),
        ({"label": 3}, 3.0),
        ({"label": -0.5}, -0.5),
    ],
)
def test_classify(row, gold):
    found = annotated("classify", {"text": "a", **row})
    assert (found.gold, type(found.gold)) == (gold, type(gold))
    assert found.record.fields == {}
    assert annotated("classify", {"text": "a", "text_pair": "b", **row}).record.fields == {
        "text_pair": "b"
    }


def test_choose():
    row = annotated("choose", {**CHOICES, "label": 1, "question": "effect"})
    assert (row.gold, row.record.text) == (1, "It rained.")
    assert row.record.fields == {"choices": ["wet", "dry"], "question": "effect"}
    assert "question" not in annotated("choose", {**CHOICES, "label": 0}).record.fields


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "2021", "start": 17}, {"text": "2020", "start": 38}],
        [{"text": "2021", "answer_start": 17}, {"text": "2020", "answer_start": 38}],
        {"text": ["2021", "2020"], "answer_start": [17, 38]},  # Hugging Face's SQuAD
        {"text": ["2021", "2020"], "start": [17, 38]},
        json.dumps({"text": ["2021", "2020"], "answer_start": [17, 38]}),
    ],
    ids=["start", "answer_start", "squad", "columns", "json"],
)
def test_qa(answers):
    row = annotated("qa", {**QUESTION, "answers": answers})
    assert row.gold == (Answer(17, "2021"), Answer(38, "2020"))
    assert row.gold[0].end == 21
    assert (row.record.text, row.record.fields) == (CONTEXT, {"question": "Wann?"})


@pytest.mark.parametrize("answers", [[], {"text": [], "answer_start": []}])
def test_no_answer(answers):
    assert _gold("qa", **QUESTION, answers=answers) == ()


@pytest.mark.parametrize(
    "relations", [[[0, "works in", 1]], [["0", "works in", "1"]], '[[0, "works in", 1]]']
)
def test_relations(relations):
    facts = _gold("extract", **ENTITIES, relations=relations)
    assert facts == Facts(tuple(SPANS), ((SPANS[0], "works in", SPANS[1]),))
    assert _gold("extract", **ENTITIES, relations=None) == Facts(tuple(SPANS))


@pytest.mark.parametrize("column", ["content", "text"])
def test_prompts_of_paddlenlp(column):
    found = [{"text": "London", "start": 22, "end": 28}]
    row = annotated("extract", {column: TEXT, "prompt": "Ort", "result_list": found})
    assert row.gold == Facts(((22, 28, "Ort"),), prompt="Ort")
    assert (row.record.text, row.record.fields) == (TEXT, {"prompt": "Ort"})
    for empty in ([], None):
        facts = _gold("extract", **{column: TEXT}, prompt="Ort", result_list=empty)
        assert facts == Facts((), prompt="Ort")


def test_embed():
    assert annotated("embed", {"text": "a", "detected_language": "de"}).language == "de"
    assert _gold("embed", text="a") is None


# ---- mistakes ---------------------------------------------------------------------------------


def _spans(spans, text=SECRET):
    return {"text": text, "spans": spans}


MISTAKES = [
    ("ner", {"text": SECRET}, r"spans: expected a list .*, got null or no such column"),
    ("ner", {"spans": LISTS}, r"text: expected a string, got null or no such column"),
    ("ner", {"text": 3, "spans": []}, r"text: expected a string, got int"),
    ("ner", _spans(SECRET), r"spans: expected a list of .*, got str"),
    ("ner", _spans([[0, 2]]), r"spans\[0\]: expected \[start, end, label\], got list"),
    ("ner", _spans([[0, 2, "A"], 7]), r"spans\[1\]: expected .*, got int"),
    ("ner", _spans([[0, 10, "A"]]), r"spans\[0\]: expected .* <= 9 characters .*, got 0 to 10"),
    ("ner", _spans([[2, 2, "A"]]), r"spans\[0\]: expected .*, got 2 to 2"),
    ("ner", _spans([[-1, 2, "A"]]), r"spans\[0\]: expected .*, got -1 to 2"),
    ("ner", _spans([["a", 2, "A"]]), r"spans\[0\]: expected .*, got str, int"),
    ("ner", _spans([["²", 2, "A"]]), r"spans\[0\]: expected .*, got str, int"),
    ("ner", _spans([[False, 2, "A"]]), r"spans\[0\]: expected .*, got NoneType, int"),
    ("ner", _spans([[0.0, 2, "A"]]), r"spans\[0\]: expected .*, got float, int"),
    ("ner", _spans([[0, 2, ""]]), r"spans\[0\] label: expected a name, got str"),
    ("ner", _spans([[0, 2, 5]]), r"spans\[0\] label: expected a name, got int"),
    ("ner", {"tokens": [SECRET, 1], "tags": ["O", "O"]}, r"tokens: expected .* strings, got list"),
    ("ner", {"tokens": [SECRET], "tags": [0]}, r"tags: expected a list of strings, got list"),
    ("ner", {"tokens": [SECRET]}, r"tags: expected .*, got null or no such column"),
    ("ner", {"tokens": [SECRET], "tags": ["O", "O"]}, r"1 tokens but 2 tags"),
    ("ner", {"tokens": [SECRET], "tags": ["PER"]}, r"tags\[0\]: expected O, or a name behind"),
    ("ner", {"tokens": [SECRET, "a"], "tags": ["O", "X-PER"]}, r"tags\[1\]: expected O, or a name"),
    (
        "ner",
        {"text": SECRET, "tokens": [SECRET, "nis"], "tags": ["O", "O"]},
        r"tokens\[1\] does not stand in the text behind the one before it",
    ),
    ("classify", {"text": SECRET}, r"label: expected a name, .*, got null or no such column"),
    ("classify", {"text": SECRET, "label": True}, r"label: expected .*, got bool"),
    ("classify", {"text": SECRET, "label": ["a", 1]}, r"label: expected .*, got list"),
    ("classify", {"text": SECRET, "label": float("nan")}, r"label: expected .*, got float"),
    ("classify", {"text": SECRET, "label": 10**400}, r"label: expected .*, got int"),
    ("classify", {"label": "a"}, r"text: expected a string"),
    (
        "classify",
        {"text": SECRET, "text_pair": 1, "label": "a"},
        r"text_pair: expected .*, got int",
    ),
    ("choose", {"premise": SECRET, "label": 0}, r"choices: expected a list of strings"),
    ("choose", {**CHOICES, "label": 2}, r"label: expected an index from 0 to 1, got int"),
    ("choose", {**CHOICES, "label": -1}, r"label: expected an index from 0 to 1, got int"),
    ("choose", {**CHOICES, "label": True}, r"label: expected an index from 0 to 1, got bool"),
    ("choose", {"premise": 1, "choices": [SECRET], "label": 0}, r"premise: expected a string"),
    ("choose", {**CHOICES, "label": 0, "question": 5}, r"question: expected a string, got int"),
    ("qa", {"question": "?", "context": SECRET}, r"answers: expected a list .*, got null"),
    ("qa", {"context": SECRET, "answers": []}, r"question: expected a string"),
    ("qa", {"question": SECRET, "answers": []}, r"context: expected a string"),
    ("qa", {**QUESTION, "answers": ["2021"]}, r"answers\[0\]: expected \{text, start\}, got str"),
    ("qa", {**QUESTION, "answers": [{"text": "2021"}]}, r"answers\[0\]: expected .*, got dict"),
    (
        "qa",
        {**QUESTION, "answers": [{"text": "2021", "start": 17}, {"text": "2020", "start": 17}]},
        r"answers\[1\]: its text does not stand at 17 of the context, which has 43 characters",
    ),
    ("qa", {**QUESTION, "answers": [{"text": "", "start": 3}]}, r"answers\[0\]: its text does not"),
    ("qa", {**QUESTION, "answers": [{"text": "2020.", "start": -5}]}, r"answers\[0\]: its text"),
    ("qa", {**QUESTION, "answers": [{"text": "i", "start": True}]}, r"answers\[0\]: expected"),
    (
        "qa",
        {**QUESTION, "answers": {"text": ["2021", "2020"], "answer_start": [17]}},
        r"answers: expected lists text and answer_start of the same length, got dict",
    ),
    ("qa", {**QUESTION, "answers": {"text": "2021", "answer_start": [17]}}, r"answers: expected"),
    ("qa", {**QUESTION, "answers": {"text": None, "answer_start": None}}, r"answers: expected"),
    ("extract", {"text": SECRET}, r"spans: expected a list"),
    ("extract", {**ENTITIES, "relations": 5}, r"relations: expected a list of .*, got int"),
    ("extract", {**ENTITIES, "relations": [[0, 1]]}, r"relations\[0\]: expected .*, got list"),
    ("extract", {**ENTITIES, "relations": [7]}, r"relations\[0\]: expected .*, got int"),
    (
        "extract",
        {**ENTITIES, "relations": [[0, "in", 1], [0, "in", 2]]},
        r"relations\[1\]: expected indices of the 2 spans",
    ),
    ("extract", {**ENTITIES, "relations": [[True, "in", 1]]}, r"relations\[0\]: expected indices"),
    ("extract", {"content": SECRET, "result_list": []}, r"prompt: expected a string"),
    ("extract", {"prompt": "Ort", "result_list": []}, r"content: expected a string"),
    (
        "extract",
        {"content": SECRET, "prompt": "Ort", "result_list": SECRET},
        r"result_list: expected a list of \{text, start, end\}, got str",
    ),
    (
        "extract",
        {"content": SECRET, "prompt": "Ort", "result_list": [{"text": SECRET}]},
        r"result_list\[0\]: expected .*, got NoneType, NoneType",
    ),
    (
        "extract",
        {"content": SECRET, "prompt": "Ort", "result_list": [{"text": "x", "start": 0, "end": 3}]},
        r"result_list\[0\]: its text does not stand at 0 to 3",
    ),
    ("embed", {"text": [SECRET]}, r"text: expected a string, got list"),
]
GOOD = {
    "ner": ENTITIES,
    "classify": {"text": TEXT, "label": "a"},
    "choose": {**CHOICES, "label": 0},
    "qa": {**QUESTION, "answers": []},
    "extract": ENTITIES,
    "embed": {"text": TEXT},
}


@pytest.mark.parametrize(("task", "row", "message"), MISTAKES)
def test_mistakes_are_told(tmp_path, task, row, message):
    """File, number of the row, what was expected and what came: never what the row says."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD[task], row, GOOD[task]])
    with pytest.raises(ConfigError, match=message) as told:
        read_annotated(task, [str(path)])
    assert f"1 of 3 rows are not annotated for {task}" in str(told.value)
    assert f"{path} row 1: " in str(told.value)
    for text in (SECRET, "Brücke", "London", "rained"):
        assert text not in str(told.value)


def test_every_task_has_mistakes():
    assert {task for task, _, _ in MISTAKES} == set(GOOD) == set(READERS)


def test_all_mistakes_in_one_error(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": 1}] * 4)
    two = write_bytes(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text\n[]\n\xff\n')
    with pytest.raises(ConfigError, match="7 of 8 rows are not annotated for embed") as told:
        read_annotated("embed", [str(tmp_path)])
    assert str(told.value).count(" row ") == 5
    assert f"{one} row 3: " in str(told.value)
    assert f"{two} row 1: not JSON" in str(told.value)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_a_damaged_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(f'{{"text": "{SECRET}"}}\n'.encode() * 3)
    with pytest.raises(ConfigError, match=r"rows\.[a-z.]+: cannot be read: ") as told:
        read_annotated("embed", [str(path)])
    assert SECRET not in str(told.value)


def test_no_rows(tmp_path):
    with pytest.raises(ConfigError, match="there are no rows"):
        read_annotated("embed", [str(write_bytes(tmp_path / "a.jsonl", b"\n\n"))])
    with pytest.raises(ConfigError, match="no file matches"):
        read_annotated("embed", [str(tmp_path / "none.jsonl")])


# ---- files ------------------------------------------------------------------------------------

ROWS = {
    "ner": [
        {"id": "1", "text": TEXT, "spans": LISTS, "lang": "en"},
        {"id": "2", "tokens": TOKENS, "tags": BIO, "lang": "en"},
    ],
    "classify": [{"text": TEXT, "label": "a"}, {"text": "b", "text_pair": "c", "label": "b"}],
    "choose": [{**CHOICES, "label": 1}, {**CHOICES, "label": 0, "question": "cause"}],
    "qa": [
        {"id": "1", **QUESTION, "answers": [{"text": "2021", "start": 17}]},
        {"id": "2", **QUESTION, "answers": []},
    ],
    "extract": [
        {"text": TEXT, "spans": LISTS, "relations": [[0, "works in", 1]]},
        {"text": TEXT, "spans": []},
        {
            "content": TEXT,
            "prompt": "Ort",
            "result_list": [{"text": "London", "start": 22, "end": 28}, {"start": 0, "end": 3}],
        },
        {"content": TEXT, "prompt": "Datum"},
    ],
    "embed": [{"text": TEXT}, {"text": "b", "language": "de"}],
}
AS_JSON = {"spans", "relations"}  # no type of Arrow holds [0, 3, "PER"]


@pytest.mark.parametrize("task", ROWS)
def test_parquet_and_jsonl_are_the_same(tmp_path, task):
    rows = [
        {name: json.dumps(v) if name in AS_JSON else v for name, v in row.items()}
        for row in ROWS[task]
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    parquet = write_parquet(tmp_path / "parquet" / "rows.parquet", table, group_rows=1)
    jsonl = write_jsonl(tmp_path / "jsonl" / "rows.jsonl.gz", ROWS[task])
    ours, theirs = (read_annotated(task, [str(path)]) for path in (jsonl, parquet))
    assert [(row.record, row.language, row.gold) for row in ours] == [
        (row.record, row.language, row.gold) for row in theirs
    ]
    if "id" not in rows[0]:
        assert [row.record.id for row in ours] == [f"rows:{i}" for i in range(len(rows))]


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    rows = read_annotated("embed", [str(tmp_path)])
    assert [row.record.text for row in rows] == ["a", "b", "c"]
    rows = read_annotated("embed", [str(tmp_path / "[bc].jsonl"), str(tmp_path / "a.jsonl")])
    assert [row.record.text for row in rows] == ["a", "b", "c"]


# ---- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans",
    [
        [],
        SPANS,
        [(0, 3, "A"), (4, 12, "A"), (13, 18, "B")],  # neighbours of one kind
        [(0, 28, "A")],
        [(28, 29, "A")],
    ],
)
def test_spans_to_labels_and_back(spans):
    offsets = [(0, 3), (4, 12), (13, 18), (19, 21), (22, 28), (28, 29)]
    labels = spans_to_labels(spans, offsets)
    assert labels_to_spans(labels, offsets) == spans
    bioes = [
        {"B": "S", "I": "E"}[label[0]] + label[1:] if label != "O" and after[:1] != "I" else label
        for label, after in zip(labels, [*labels[1:], "O"], strict=True)
    ]
    assert labels_to_spans(bioes, offsets) == spans


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("O I-A I-A", [(1, 3, "A")]),  # I after O begins one
        ("B-A I-B O", [(0, 1, "A"), (1, 2, "B")]),
        ("E-A E-A O", [(0, 1, "A"), (1, 2, "A")]),
        ("S-A I-A O", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A-1 I-A-1 O", [(0, 2, "A-1")]),
    ],
)
def test_labels_that_break_the_rules(labels, spans):
    assert labels_to_spans(labels.split(), [(0, 1), (1, 2), (2, 3)]) == spans


def test_labels_and_tokens_are_as_many():
    with pytest.raises(ValueError, match="longer"):
        labels_to_spans(["O"], [(0, 1), (1, 2)])
