"""`pipeline(...)` for tasks other than NER: the shapes that users of Hugging Face know.

That the numbers are those of transformers is shown in tests/parity/test_pipelines.py.
"""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes import save_tiny_models

from erniem_batch import ErnieMModel, ErnieMTokenizer, pipeline
from erniem_batch.errors import ConfigError, RecordError


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    return save_tiny_models(tmp_path_factory.mktemp("models"), tokenizer)


def make(models, task, name, **options):
    return Rounded(pipeline(task, str(models[name]), device="cpu", n_threads=1, **options))


def rounded(value):
    """Batches of other sizes change the last digits of scores."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


class Rounded:
    """A pipeline whose answers are rounded."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **options):
        return rounded(self.inner(*args, **options))


TEXTS = ["voor de stad", "in het land van de zon", "op"]


def test_shapes_of_text_classification(models):
    classify = make(models, "text-classification", "classify")
    best = classify(TEXTS[0])
    assert [set(label) for label in best] == [{"label", "score"}]
    assert classify(TEXTS) == [classify(text)[0] for text in TEXTS]
    assert len(classify(TEXTS[0], top_k=2)) == 2
    every = classify(TEXTS, top_k=None)
    assert [len(labels) for labels in every] == [3, 3, 3]
    assert all(
        sum(label["score"] for label in labels) == pytest.approx(1, abs=1e-3) for labels in every
    )
    assert classify({"text": TEXTS[0]}) == best[0]
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    assert classify([pair, TEXTS[0]]) == [classify(pair), best[0]]
    assert classify(pair) != best[0]
    assert classify(TEXTS[0], function_to_apply="none", top_k=None) != every[0]
    assert classify(TEXTS[0], top_k=None) == every[0]  # what was asked for then is forgotten
    json.dumps(every)
    with pytest.raises(RecordError, match="text 1: encode: text must be a string, got null"):
        classify(["a", None])


def test_shapes_of_zero_shot_classification(models):
    classify = make(models, "zero-shot-classification", "classify-entailment")
    answer = classify(TEXTS[0], "sports, politics")
    assert list(answer) == ["sequence", "labels", "scores"]
    assert answer["sequence"] == TEXTS[0]
    assert sorted(answer["labels"]) == ["politics", "sports"]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    assert sum(answer["scores"]) == pytest.approx(1, abs=1e-3)
    assert classify(TEXTS, ["sports", "politics"])[0] == answer
    several = classify(TEXTS[0], ["sports", "a, b"], multi_label=True)
    assert sorted(several["labels"]) == ["a, b", "sports"]
    for labels, template in (([], "{}"), ("a", "no place")):
        with pytest.raises(ConfigError):
            classify(TEXTS[0], labels, hypothesis_template=template)


def test_shapes_of_multiple_choice(models):
    choose = make(models, "multiple-choice", "choose")
    answer = choose(TEXTS[0], ["in", "op", "met"])
    assert list(answer) == ["choice", "scores"]
    assert answer["scores"][answer["choice"]] == max(answer["scores"])
    lists = [["in", "op", "met"], ["a"], ["b", "c"]]
    answers = choose(TEXTS, lists)
    assert answers[0] == answer
    assert [len(a["scores"]) for a in answers] == [3, 1, 2]
    assert choose(TEXTS[0], lists[0], question="cause") != answer
    assert choose(TEXTS, lists, question=["", "cause", "effect"])[0] == answer


def test_shapes_of_question_answering(models):
    ask = make(models, "question-answering", "qa", max_seq_len=64, doc_stride=16)
    context = "voor de stad in het land van de zon op met een " * 12
    answer = ask(question="in?", context=context)
    assert list(answer) == ["score", "start", "end", "answer"]
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    row = {"question": "in?", "context": context}
    assert ask(row) == ask("in?", context) == answer
    assert ask([row, row]) == ask(question=["in?"] * 2, context=context) == [answer] * 2
    three = ask(row, top_k=3)
    assert three[0] == answer
    assert len({(a["start"], a["end"]) for a in three}) == 3
    with_null = ask(row, top_k=100_000, handle_impossible_answer=True)
    assert [a for a in with_null if not a["answer"]] == [
        {"score": pytest.approx(0, abs=1), "start": 0, "end": 0, "answer": ""}
    ]
    assert len(ask(row, max_answer_len=1)["answer"].split()) == 1
    for question, contexts in (([], []), (["a", "b"], ["c"])):
        with pytest.raises(ValueError, match="questions and"):
            ask(question=question, context=contexts)


@torch.no_grad()
def test_features_are_those_of_the_encoder(models):
    features = make(models, "feature-extraction", "embed")
    model = ErnieMModel.from_pretrained(models["embed"], allow_new_head=True)
    tokenizer = ErnieMTokenizer.from_pretrained(models["embed"])
    for text in TEXTS:
        expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state
        torch.testing.assert_close(torch.tensor(features(text)), expected, atol=1e-4, rtol=1e-4)
    assert features(TEXTS) == [features(text) for text in TEXTS]
    vector = make(models, "feature-extraction", "embed", pooling="mean")(TEXTS[0])
    assert len(vector) == 32
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-2)


def test_features_of_a_long_text(models):
    """One vector a token, whatever the number of windows."""
    features = make(models, "feature-extraction", "embed", window_tokens=32, overlap_tokens=8)
    text = "voor de stad " * 40
    ((vectors),) = features(text)
    tokenizer = ErnieMTokenizer.from_pretrained(models["embed"])
    assert len(vectors) == len(tokenizer(text)["input_ids"])


def test_shapes_of_extraction(models):
    find = make(models, "extract", "extract", schema="voor", schema_lang="en", position_prob=0.1)
    (result,) = find(TEXTS[0])
    assert find(TEXTS)[0] == find({"text": TEXTS[0]})[0] == find([{"text": TEXTS[0]}])[0] == result
    assert find([]) == []
    assert list(find(TEXTS[0], schema=["zon"])[0]) in ([], ["zon"])
    assert find(TEXTS[0]) == [result]  # the schema of a call is forgotten with it
    compat = make(models, "extract", "extract", schema="voor", taskflow_compat=True)
    assert len(compat(TEXTS)) == 3
    assert compat([]) == []
    json.dumps(find(TEXTS))


def test_options_that_cannot_be(models):
    for task, name, options, message in (
        ("extract", "extract", {"schem": "a"}, "extract has no option 'schem'; there are schema, "),
        ("text-classification", "classify", {"topk": 1}, "has no option 'topk'"),
        ("question-answering", "qa", {"max_seq_len": 900}, "more than the model holds"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(models, task, name, **options)
    with pytest.raises(ConfigError, match="no demo model for zero-shot"):
        pipeline("zero-shot-classification")
    features = make(models, "feature-extraction", "embed", pooling="mean")
    with pytest.raises(ConfigError, match="pooling: choose when the model is loaded"):
        features.inner.predictor.with_options(pooling="cls")


class Frame:
    """Iterates over the names of its columns, as the tables of pandas do."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)


NO_LISTS = [{"text": "Ada"}, Frame(), pa.table({"text": ["Ada"]}), None, 5, b"Ada", {"Ada"}]


@pytest.mark.parametrize("given", NO_LISTS, ids=lambda given: type(given).__name__)
def test_what_is_no_list_of_texts_is_refused(models, given):
    """Once, the names of columns and keys were taken for texts, and nothing was found in them."""
    kind = type(given).__name__
    ner = make(models, "ner", "ner")
    with pytest.raises(TypeError, match=f"texts must be a list of strings, got {kind}"):
        ner(given)
    embed = make(models, "feature-extraction", "embed")
    with pytest.raises(TypeError, match=f"inputs must be a list of strings, got {kind}"):
        embed(given)
    choose = make(models, "multiple-choice", "choose")
    with pytest.raises(TypeError, match=f"premise must be a list of strings, got {kind}"):
        choose(given, [["a"]])
    zero_shot = make(models, "zero-shot-classification", "classify-entailment")
    with pytest.raises(TypeError, match=f"sequences must be a list of strings, got {kind}"):
        zero_shot(given, "a, b")
    if not isinstance(given, dict):
        for task, name in (("text-classification", "classify"), ("extract", "extract")):
            options = {"schema": "Person"} if name == "extract" else {}
            with pytest.raises(TypeError, match=f"inputs must be a list of .*, got {kind}"):
                make(models, task, name, **options)(given)
    if given is not None:
        ask = make(models, "question-answering", "qa")
        with pytest.raises((TypeError, ValueError), match=r"inputs must be "):
            ask(given)


def test_lists_of_other_kinds(models):
    ner = make(models, "ner", "ner")
    assert ner(iter(TEXTS)) == ner(tuple(TEXTS)) == ner(np.array(TEXTS)) == ner(TEXTS)
    choose = make(models, "multiple-choice", "choose")
    with pytest.raises(TypeError, match="choices must be a list of strings, got str"):
        choose(TEXTS[0], "in op")
    ask = make(models, "question-answering", "qa")
    with pytest.raises(ValueError, match="there is no 'context'"):
        ask({"question": "in?"})
    with pytest.raises(TypeError, match="got str"):
        ask([TEXTS[0]])
