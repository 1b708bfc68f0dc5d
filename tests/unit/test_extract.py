"""Extraction with a model that finds what it is told to: what Taskflow gets wrong, done right.

The faults are those of PaddleNLP 2.8.1, named at the tests.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from erniem_batch import ErnieMConfig
from erniem_batch.cache import ByteCache
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.options import ExtractOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Record
from erniem_batch.tasks.extract import Item, Places, stripped, taskflow_json, walk
from erniem_batch.tasks.make import make_task
from erniem_batch.tasks.pairing import (
    Candidate,
    count_pairs,
    join_windows,
    nearest,
    nested,
    pair,
)
from erniem_batch.text.schema import prompt_of

YES, NO = 4.0, -6.0


class FindingModel(nn.Module):
    """Finds phrases that are whole in the text of a window, and options in its prompt.

    Args:
        phrases: by prompt, what to find.
        tokenizer: to know the tokens of prompts and phrases.
    """

    def __init__(self, tokenizer, phrases):
        super().__init__()
        self.config = ErnieMConfig(vocab_size=9000)
        self.unused = nn.Parameter(torch.zeros(1))
        self.batches = []
        self.phrases = {
            self.ids(tokenizer, prompt): [self.ids(tokenizer, p) for p in found]
            for prompt, found in phrases.items()
        }

    @staticmethod
    def ids(tokenizer, text):
        return tuple(tokenizer.encode_batch([text]).ids.tolist())

    def rows(self, batch):
        self.batches.append(tuple(batch.lengths))
        scores_T2 = torch.full((len(batch.ids_T), 2), NO)
        for scores, part in zip(
            scores_T2.split(batch.lengths), batch.ids_T.split(batch.lengths), strict=True
        ):
            ids = part.tolist()
            end_of_prompt = ids.index(2)
            for phrase in self.phrases.get(tuple(ids[1:end_of_prompt]), []):
                for at in range(1, len(ids) - len(phrase) + 1):
                    if tuple(ids[at : at + len(phrase)]) == phrase:
                        scores[at, 0] = YES
                        scores[at + len(phrase) - 1, 1] = YES
        return scores_T2


@pytest.fixture
def extract(tokenizer):
    """Makes a predictor; `ask` gives Taskflow's JSON of each text."""

    def make(phrases, schema, *, window_tokens=48, overlap_tokens=12, **options):
        options.setdefault("schema_lang", "en")
        config = PredictorConfig(
            options=ExtractOptions(schema=schema, **options),
            window_tokens=window_tokens,
            overlap_tokens=overlap_tokens,
            max_batch_tokens=4 * window_tokens,
            device="cpu",
        )
        model = FindingModel(tokenizer, phrases)
        return Predictor(config, tokenizer, model, make_task(config, tokenizer, model.config))

    return make


def ask(predictor, *texts, **fields):
    outcomes = predictor.predict([Record(str(i), t, fields) for i, t in enumerate(texts)])
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert not failures
    return [taskflow_json(outcome.value) for outcome in outcomes]


def found(result, name):
    return [(item["text"], item.get("start"), item.get("end")) for item in result.get(name, [])]


FILLER = ["voor", "het", "in", "de", "een", "op", "met", "van", "te", "dat"]


def filler(n):
    return " ".join(FILLER[i % len(FILLER)] for i in range(n))


# ---- what Taskflow gets wrong -------------------------------------------------------------------


def test_a_long_prompt_costs_no_tail(extract):
    """There: the window is measured by the prompt that is last in the alphabet."""
    long = "a very very very long name of something " + "of some kind " * 2
    text = filler(80) + " Berlin"
    predictor = extract({long: ["Berlin"], "zzz": ["Berlin"]}, [long, "zzz"])
    (result,) = ask(predictor, text)
    at = (("Berlin", text.index("Berlin"), len(text)),)
    assert found(result, long) == found(result, "zzz") == list(at)


def test_documents_do_not_change_each_other(extract):
    """There: the prompts of all documents of a call share one measure."""
    phrases = {"City": ["Berlin"], "Mayor of Berlin": ["Anna"], "Mayor of Bonn": ["Otto"]}
    phrases["City"] = ["Berlin", "Bonn"]
    texts = [filler(60) + " Berlin Anna", "Bonn Otto", filler(31) + " Bonn " + filler(40) + " Otto"]
    predictor = extract(phrases, {"City": "Mayor"})
    together = ask(predictor, *texts)
    assert together == [ask(predictor, text)[0] for text in texts]
    assert together[::-1] == ask(predictor, *texts[::-1])
    assert all(result["City"][0]["relations"]["Mayor"] for result in together)


@pytest.mark.parametrize("n_words", range(36, 46))
def test_the_last_token_is_read(extract, n_words):
    """There: room for three special tokens is kept, and four are used."""
    text = filler(n_words) + " Berlin"
    (result,) = ask(extract({"City": ["Berlin"]}, "City"), text)
    assert found(result, "City") == [("Berlin", len(text) - 6, len(text))]


def test_characters_that_become_many_tokens(extract):
    """There: windows are counted in characters, and what overflows is cut off."""
    text = "½ ㈱ ﷺ " * 12 + "Berlin"
    predictor = extract({"City": ["Berlin"]}, "City")
    (outcome,) = predictor.predict([Record("0", text)])
    assert outcome.n_tokens > len(text)
    assert [(i.text, i.start, i.end) for i in outcome.value] == [
        ("Berlin", len(text) - 6, len(text))
    ]


def test_a_thing_on_any_seam_is_found_once(extract):
    """There: windows do not overlap, and what lies on a seam is lost."""
    predictor = extract({"City": ["New York City"]}, "City")
    texts = [f"{filler(n)} New York City {filler(90 - n)}" for n in range(90)]
    for text, result in zip(texts, ask(predictor, *texts), strict=True):
        start = text.index("New")
        assert found(result, "City") == [("New York City", start, start + 13)]


def test_relations_across_windows(extract):
    """There: a relation is looked for in all windows, but things on seams are not there to find."""
    text = f"Apple {filler(90)} Steve Jobs"
    phrases = {"Company": ["Apple"], "Founder of Apple": ["Steve Jobs"]}
    (result,) = ask(extract(phrases, {"Company": "Founder"}), text)
    (company,) = result["Company"]
    assert found(company["relations"], "Founder") == [("Steve Jobs", len(text) - 10, len(text))]


def test_offsets_with_split_sentence(extract):
    """There: line ends and spaces between sentences are lost, which shifts all that follows."""
    text = "Berlin。\n\n  Bonn？ \nBerlin\n"
    predictor = extract({"City": ["Berlin", "Bonn"]}, "City", split_sentence=True)
    (result,) = ask(predictor, text)
    spans = found(result, "City")
    assert [text[start:end] for _, start, end in spans] == ["Berlin", "Bonn", "Berlin"]
    assert [start for _, start, _ in spans] == [0, 11, 18]


MOOD = "Mood [good, bad, so so]"


def test_options_and_spans_in_one_call(extract):
    """There: the first answer of a stage makes all texts of the call classified, or none."""
    predictor = extract({MOOD: ["bad"], "City": ["Berlin"]}, [MOOD, "City"])
    results = ask(predictor, "fine", "Berlin", "bad Berlin")
    assert [found(r, MOOD) for r in results] == [[("bad", None, None)]] * 3
    assert [len(found(r, "City")) for r in results] == [0, 1, 1]


def test_several_options(extract):
    """There: only the first one."""
    (result,) = ask(extract({MOOD: ["bad", "so so"]}, MOOD), "x")
    assert sorted(text for text, _, _ in found(result, MOOD)) == ["bad", "so so"]


def test_options_are_whole(extract):
    """There: "1,0" or nothing at all can be the answer."""
    name = "Grade[1,0]"
    (result,) = ask(extract({name: ["1,0", ",", "0]"]}, name), "x")
    assert {text for text, _, _ in found(result, name)} <= {"1", "0"}


def test_spaces_behind_options(extract):
    """There: they shift the text of the option."""
    name = "Mood [good, bad, so so] "
    phrases = {name.strip(): ["bad"]}
    (result,) = ask(extract(phrases, name), "x")
    assert found(result, name) == [("bad", None, None)]


def test_options_of_a_long_text_from_any_window(extract):
    (result,) = ask(extract({MOOD: ["bad"]}, MOOD), filler(200))
    assert found(result, MOOD) == [("bad", None, None)]


def test_a_prompt_that_leaves_no_room_is_an_error(extract):
    """There: nothing is found in any text, and nobody is told."""
    long = filler(40)
    predictor = extract({"City": ["Berlin"]}, ["City", long])
    short, failed = predictor.predict([Record("a", "Bonn"), Record("b", filler(30) + " Berlin")])
    assert not isinstance(short, Failure)  # fits, long as the prompt is
    assert (failed.stage, failed.error) == ("encode", "RecordError")
    assert "the prompt and special tokens take 44 of 48 tokens" in failed.reason


def test_a_name_that_stands_twice(extract):
    """There: results are doubled, and relations go to the first of them."""
    phrases = {"City": ["Berlin", "Bonn"], "Mayor of Bonn": ["Otto"], "River of Bonn": ["Rhein"]}
    schema = [{"City": "Mayor"}, {"City": ["River", "Mayor"]}]
    (result,) = ask(extract(phrases, schema), "Berlin Bonn Otto Rhein")
    berlin, bonn = result["City"]
    assert "relations" not in berlin
    assert {name: len(items) for name, items in bonn["relations"].items()} == {
        "Mayor": 1,
        "River": 1,
    }


def test_nested_mappings(extract):
    """There: refused."""
    phrases = {"A": ["Berlin"], "B of Berlin": ["Bonn"], "C of Bonn": ["Otto"]}
    phrases["D of Otto"] = ["Rhein"]
    (result,) = ask(extract(phrases, {"A": {"B": {"C": "D"}}}), "Berlin Bonn Otto Rhein")
    inner = result["A"][0]["relations"]["B"][0]["relations"]["C"][0]["relations"]
    assert found(inner, "D") == [("Rhein", 17, 22)]


def test_threads_with_schemas_of_their_own(extract):
    """There: the schema is kept in the object, and threads get each other's answers."""
    predictor = extract({"City": ["Berlin"], "River": ["Rhein"]}, "City")

    def call(name):
        return ask(predictor, "Berlin Rhein", schema=name)[0]

    names = ["City", "River"] * 20
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, names))
    assert [list(result) for result in results] == [[name] for name in names]


# ---- the schedule -------------------------------------------------------------------------------


def test_one_stream_a_level_and_each_text_tokenized_once(extract, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenizer, "prompts", ByteCache(1 << 20))
    names = [f"Name {n}" for n in "abcdefgh"]
    predictor = extract({name: ["Berlin"] for name in names}, [{n: "Mayor"} for n in names])
    streams, texts = [], []
    forward, encode = predictor.forward, tokenizer.encode_batch
    monkeypatch.setattr(predictor, "forward", lambda w: streams.append(len(w)) or forward(w))
    monkeypatch.setattr(tokenizer, "encode_batch", lambda t, **o: texts.extend(t) or encode(t, **o))
    rows = [f"{word} Berlin" for word in FILLER]
    ask(predictor, *rows)
    assert streams == [len(names) * len(rows)] * 2  # the second: Mayor of Berlin, for each name
    assert all(texts.count(row) == 1 for row in rows)
    # "Mayor of Berlin" is asked once a text, though eight names found Berlin.
    assert predictor.counters.repeated_windows == (len(names) - 1) * len(rows)
    assert texts.count("Mayor of Berlin") == 1


def test_equal_texts_are_computed_once(extract):
    predictor = extract({"City": ["Berlin"]}, "City")
    results = ask(predictor, *["in Berlin"] * 50)
    assert results == results[:1] * 50
    assert predictor.model.batches == [
        (len(predictor.encode([Record("", "in Berlin")])[0].windows[0].ids),)
    ]


# ---- options ------------------------------------------------------------------------------------


def test_a_schema_for_each_row(extract):
    predictor = extract({"City": ["Berlin"], "River": ["Rhein"]}, None)
    rows = [
        ("City", ["City"]),
        ('["City", "River"]', ["City", "River"]),
        (["River"], ["River"]),
        ({"River": None}, ["River"]),
        ("- City\n- River: Length\n", ["City", "River"]),
    ]
    records = [Record("", "Berlin Rhein", {"schema": schema}) for schema, _ in rows]
    outcomes = predictor.predict(records)
    assert [list(taskflow_json(o.value)) for o in outcomes] == [names for _, names in rows]
    bad = predictor.predict([Record("", "x", {"schema": s}) for s in (None, 5, "[1, 2", {"a": 1})])
    assert [outcome.stage for outcome in bad] == ["encode"] * 4
    assert "there is no schema" in bad[0].reason
    assert "schema.a must be a name, a list of names or a mapping, got int" in bad[3].reason


def test_thresholds_by_name_and_language(extract):
    phrases = {"City": ["Berlin"], "River": ["Rhein"]}
    limits = {"City": 0.99, "de": {"City": 0.1}}
    predictor = extract(phrases, ["City", "River"], min_score=limits)
    assert list(ask(predictor, "Berlin Rhein")[0]) == ["River"]
    assert list(ask(predictor, "Berlin Rhein", language="de")[0]) == ["City", "River"]


def test_nothing_is_asked_about_what_scores_too_low(extract):
    predictor = extract({"City": ["Berlin"]}, {"City": "Mayor"}, min_score=0.99)
    (outcome,) = predictor.predict([Record("", "Berlin")])
    assert (outcome.value, outcome.n_windows) == ([], 1)


def test_position_prob_is_exceeded_not_met(extract):
    logit = torch.sigmoid(torch.tensor(YES)).item()
    assert ask(extract({"City": ["Berlin"]}, "City", position_prob=logit), "Berlin") == [{}]


@pytest.mark.parametrize(
    ("unit", "expected"), [("codepoint", (2, 8)), ("utf16", (3, 9)), ("byte", (5, 11))]
)
def test_offset_units(extract, unit, expected):
    predictor = extract({"City": ["Berlin"]}, "City", offset_unit=unit)
    (result,) = ask(predictor, "😀 Berlin")
    assert found(result, "City") == [("Berlin", *expected)]


def test_chinese_prompts():
    assert prompt_of("公司　名", "张三", "zh") == "张三的公司 名"
    assert prompt_of("情感倾向［正向，负向］", None, "ch") == "情感倾向[正向,负向]"


def test_empty_texts_have_nothing(extract):
    predictor = extract({"City": ["Berlin"]}, "City")
    outcomes = predictor.predict([Record("", ""), Record("", "  \n"), Record("", None)])
    assert [getattr(outcome, "value", None) for outcome in outcomes] == [[], [], None]


def test_compat_refuses_what_taskflow_cannot():
    with pytest.raises(ConfigError, match="span_pairing=nearest only"):
        ExtractOptions(schema="a", taskflow_compat=True, span_pairing="all")
    with pytest.raises(ConfigError, match="no min_score"):
        ExtractOptions(schema="a", taskflow_compat=True, min_score=0.5)


# ---- spans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([1], [3, 5], [(1, 3)]),
        ([1, 2], [3], [(2, 3)]),
        ([1, 4], [3, 5], [(1, 3), (4, 5)]),
        ([1, 2], [2, 5], [(2, 2)]),
        ([5], [3], []),
    ],
)
def test_nearest_pairs_as_taskflow_does(starts, ends, expected):
    assert nearest(starts, ends) == expected


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([1, 2], [3, 5], [(2, 3), (1, 5)]),
        ([0], [1, 3], [(0, 1), (0, 3)]),
        ([0, 2], [3], [(2, 3), (0, 3)]),
        ([0, 4], [1, 5], [(0, 1), (4, 5)]),
        ([4], [1], []),
    ],
)
def test_nested_pairs_as_brackets(starts, ends, expected):
    assert nested(starts, ends) == expected


def test_all_pairs():
    assert pair([1, 9], [9, 17], "all") == [(1, 9), (1, 17), (9, 9), (9, 17)]


def spans_of(*candidates, apart):
    kept = join_windows([Candidate(*c) for c in candidates], apart=apart)
    return [(c.start, c.end, c.probability) for c in kept]


@pytest.mark.parametrize("apart", [False, True])
def test_windows_are_put_together(apart):
    """Merged if equal; a part at an edge gives way to the whole; the order is that of the text."""
    assert spans_of((5, 8, 0.5), (0, 3, 0.6), (5, 8, 0.7), apart=apart) == [
        (0, 3, 0.6),
        (5, 8, 0.7),
    ]
    assert spans_of((0, 3, 0.9, True), (0, 8, 0.6), apart=apart) == [(0, 8, 0.6)]
    assert spans_of((0, 3, 0.9, True), (0, 3, 0.8), apart=apart) == [(0, 3, 0.9)]
    assert spans_of((0, 3, 0.9, True), apart=apart) == [(0, 3, 0.9)]  # nobody saw more of it


def test_windows_that_disagree():
    """Spans that must not overlap: the likelier one; else both."""
    two = ((0, 6, 0.6), (4, 9, 0.7))
    assert spans_of(*two, apart=True) == [(4, 9, 0.7)]
    assert spans_of(*two, apart=False) == list(two)


def test_spans_within_spans(extract):
    phrases = {"Place": ["Berlin", "New Berlin City"]}
    text = "New Berlin City"
    for how, expected in (
        ("nearest", ["Berlin"]),
        ("nested", ["New Berlin City", "Berlin"]),
        ("all", ["New Berlin", "New Berlin City", "Berlin", "Berlin City"]),
    ):
        (result,) = ask(extract(phrases, "Place", span_pairing=how), text)
        assert [words for words, _, _ in found(result, "Place")] == expected


# ---- columns ------------------------------------------------------------------------------------


def test_columns_hold_a_tree(extract):
    predictor = extract({"City": ["Berlin"]}, "City", output_json=True)
    inner = Item("B", "b", 2, 3, 0.5, [Item("C", "c", None, None, 0.25)])
    values = [[Item("A", "a", 0, 1, 1.0, [inner]), Item("A", "z", 4, 5, 0.75)], []]
    extracted, as_json = predictor.task.columns(values)
    rows = extracted.to_pylist()
    assert [(row["id"], row["parent"], row["name"]) for row in rows[0]] == [
        (0, None, "A"),
        (1, 0, "B"),
        (2, 1, "C"),
        (3, None, "A"),
    ]
    assert rows[0][2]["start"] is None
    assert rows[1] == []
    assert json.loads(as_json[0].as_py()) == taskflow_json(values[0])
    empty = predictor.task.columns([])
    assert [column.type for column in empty] == list(predictor.task.schema.types)
    assert isinstance(extracted, pa.ListArray)
    assert predictor.task.count(values[0]) == len(list(walk(values[0]))) == 4


def test_scores_that_are_no_numbers_fail_the_row(extract):
    predictor = extract({"City": ["Berlin"]}, "City")
    (encoded,) = predictor.encode([Record("x", "Berlin")])
    rows = np.full((len(encoded.windows[0].ids), 2), np.nan, np.float32)
    outcome = predictor.decode(encoded, [rows])
    assert (outcome.stage, outcome.error) == ("decode", "RecordError")


# ---- spans, in time that grows with their number alone -------------------------------------------


def joined_slowly(candidates, apart):
    """`join_windows` as it was, by comparing each span with each other."""
    best = {}
    for new in candidates:
        old = best.get((new.start, new.end), new)
        probability = max(old.probability, new.probability)
        best[new.start, new.end] = Candidate(new.start, new.end, probability, old.cut and new.cut)
    ordered = [best[key] for key in sorted(best)]
    if not apart:
        return [
            c
            for c in ordered
            if not c.cut
            or not any(o.start <= c.start and c.end <= o.end for o in ordered if o is not c)
        ]
    chosen = []
    for c in sorted(ordered, key=lambda c: (c.cut, -c.probability, c.start, c.end)):
        if all(c.end <= other.start or other.end <= c.start for other in chosen):
            chosen.append(c)
    return sorted(chosen, key=lambda c: c.start)


SPANS = st.builds(
    lambda start, length, probability, cut: Candidate(start, start + length, probability, cut),
    st.integers(0, 30),
    st.integers(1, 12),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.booleans(),
)


@given(st.lists(SPANS, max_size=25))
def test_joining_windows_is_what_comparing_each_with_each_gives(candidates):
    for apart in (False, True):
        assert join_windows(candidates, apart=apart) == joined_slowly(candidates, apart)


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_pairs_are_counted_as_they_are_made(starts, ends):
    starts, ends = sorted(starts), sorted(ends)
    assert count_pairs(starts, ends) == len(pair(starts, ends, "all"))
    assert len(pair(starts, ends, "nested")) <= len(starts) + len(ends)


@given(st.text(" a\u3000b\n", max_size=30), st.data())
def test_edges_without_white_space(text, data):
    places = Places(text, "codepoint")
    for _ in range(8):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, len(text)))
        a, b = places.stripped(start, end)
        assert text[a:b] == text[start:end].strip()
        assert a == b or (a, b) == stripped(text, start, end)
