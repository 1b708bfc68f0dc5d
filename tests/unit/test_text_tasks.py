"""Tasks that look at whole texts: classify, zero-shot, choose, embed; with a model that adds up.

`AddingModel` gives each window the sum of what its tokens are worth, so that every score can be
worked out by hand from the windows.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from erniem_batch import ErnieMConfig, ErnieMModel
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.model.heads import ErnieMForEmbedding
from erniem_batch.options import ChooseOptions, ClassifyOptions, EmbedOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Record, Window
from erniem_batch.tasks.base import pool_windows, sigmoid, softmax
from erniem_batch.tasks.classify import LabelScore, default_function
from erniem_batch.tasks.make import make_task

LABELS = ["sports", "politics", "travel"]
NLI = ["contradiction", "neutral", "entailment"]


class AddingModel(nn.Module):
    def __init__(self, config, n_columns):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(0.3 * torch.randn(9000, n_columns, generator=generator))

    def rows(self, batch):
        return torch.stack([part.sum(0) for part in self.table[batch.ids_T].split(batch.lengths)])


@pytest.fixture
def make(tokenizer):
    """Makes a predictor with windows of 32 tokens."""

    def predictor(options, labels=LABELS, n_columns=None, **changes):
        config = PredictorConfig(
            options=options,
            window_tokens=32,
            overlap_tokens=8,
            max_batch_tokens=320,
            device="cpu",
        )
        model_config = replace(ErnieMConfig(vocab_size=9000).with_labels(labels), **changes)
        model = AddingModel(model_config, n_columns or len(labels))
        return Predictor(config, tokenizer, model, make_task(config, tokenizer, model_config))

    return predictor


def one(predictor, text, **fields):
    (outcome,) = predictor.predict([Record("0", text, fields)])
    return outcome


def logits_of(predictor, text, **fields):
    """(windows, columns), and the windows."""
    (encoded,) = predictor.encode([Record("0", text, fields)])
    return np.concatenate(predictor.forward(encoded.windows)), encoded.windows


LONG = " ".join(["voor", "het", "in", "de", "een", "op", "met"][(i * i) % 7] for i in range(70))


# ---- classify -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem_type", "n_labels", "expected"),
    [
        (None, 3, "softmax"),
        (None, 1, "sigmoid"),
        ("single_label_classification", 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "none"),
        ("regression", 3, "none"),
    ],
)
def test_function_by_problem_type(make, problem_type, n_labels, expected):
    assert default_function(problem_type, n_labels) == expected
    labels = LABELS[:n_labels]
    predictor = make(ClassifyOptions(all_scores=True), labels, problem_type=problem_type)
    (logits,), _ = logits_of(predictor, "voor de")
    scores = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda x: x}[expected](logits)
    found = one(predictor, "voor de").value
    assert [s.label for s in found] == [labels[i] for i in np.argsort(-scores)]
    assert [s.score for s in found] == sorted(scores.tolist(), reverse=True)


def test_what_is_asked_for_wins(make):
    predictor = make(ClassifyOptions(function_to_apply="sigmoid", all_scores=True))
    assert sum(s.score for s in one(predictor, "voor de").value) != pytest.approx(1.0)


def test_numbers_may_be_negative(make):
    predictor = make(ClassifyOptions(), ["LABEL_0"], problem_type="regression")
    values = [one(predictor, word).value[0].score for word in ("voor", "de", "het", "op", "met")]
    assert min(values) < 0 < max(values)


def test_top_k_and_thresholds(make):
    every = one(make(ClassifyOptions(all_scores=True)), "voor de").value
    assert one(make(ClassifyOptions(top_k=2)), "voor de").value == every[:2]
    limits = {"*": 0.0, every[0].label: 1.0, "de": {every[1].label: 1.0, every[0].label: 0.0}}
    some = make(ClassifyOptions(all_scores=True, min_score=limits))
    assert one(some, "voor de").value == every[1:]
    assert one(some, "voor de", language="de").value == [every[0], every[2]]
    assert one(some, "voor de", language=None).value == every[1:]


@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
def test_windows_of_long_texts_are_pooled(make, pooling):
    predictor = make(ClassifyOptions(all_scores=True, pooling=pooling))
    logits, windows = logits_of(predictor, LONG)
    outcome = one(predictor, LONG)
    assert outcome.n_windows == len(windows)
    assert outcome.truncated == (pooling == "first")
    assert (len(windows) > 1) == (pooling != "first")
    expected = {
        "mean": np.average(softmax(logits), axis=0, weights=[w.n_tokens for w in windows]),
        "max": softmax(logits).max(0),
        "first": softmax(logits)[0],
    }[pooling]
    found = {s.label: s.score for s in outcome.value}
    np.testing.assert_allclose([found[label] for label in LABELS], expected, rtol=1e-5)
    assert not one(predictor, "voor de").truncated


def test_pairs(make, tokenizer):
    predictor = make(ClassifyOptions())
    (encoded,) = predictor.encode([Record("0", "voor de", {"text_pair": "het"})])
    expected = tokenizer("voor de", "het")["input_ids"]
    assert encoded.windows[0].ids.tolist() == expected
    assert one(predictor, "voor de", text_pair="het").n_tokens == 3


@pytest.mark.parametrize(("a", "b"), [(LONG, "het op"), ("het op", LONG)])
def test_the_longer_text_of_a_pair_is_read_in_windows(make, tokenizer, a, b):
    predictor = make(ClassifyOptions())
    (encoded,) = predictor.encode([Record("0", a, {"text_pair": b})])
    short = tokenizer("het op", add_special_tokens=False)["input_ids"]
    assert len(encoded.windows) > 1
    for window in encoded.windows:
        assert len(window.ids) <= 32
        inside = " ".join(map(str, window.ids.tolist()))
        assert " ".join(map(str, short)) in inside
    covered = {w.first + i for w in encoded.windows for i in range(w.n_tokens)}
    assert covered == set(range(max(len(encoded.token_ids), encoded.n_other_tokens)))


def test_a_pair_of_two_long_texts_is_an_error(make):
    outcome = one(make(ClassifyOptions()), LONG, text_pair=LONG)
    assert isinstance(outcome, Failure)
    assert "the second text and special tokens take" in outcome.reason
    assert isinstance(one(make(ClassifyOptions()), "a", text_pair=None), Failure)


def test_label_columns(make):
    task = make(ClassifyOptions()).task
    label, score, every = task.columns([[LabelScore("a", 0.5), LabelScore("b", 0.25)], []])
    assert (label.to_pylist(), score.to_pylist()) == (["a", None], [0.5, None])
    expected = [{"label": "a", "score": 0.5}, {"label": "b", "score": 0.25}]
    assert every.to_pylist() == [expected, []]
    assert [c.type for c in task.columns([])] == list(task.schema.types)


# ---- zero-shot ----------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_by_hand(make, tokenizer, multi_label):
    options = ClassifyOptions(candidate_labels="a,b , c", all_scores=True, multi_label=multi_label)
    predictor = make(options, NLI)
    logits, _ = logits_of(predictor, "voor de")
    pairs = [tokenizer("voor de", f"This example is {label}.")["input_ids"] for label in "abc"]
    (encoded,) = predictor.encode([Record("0", "voor de")])
    assert [window.ids.tolist() for window in encoded.windows] == pairs
    expected = softmax(logits[:, [0, 2]])[:, 1] if multi_label else softmax(logits[:, 2])
    found = {s.label: s.score for s in one(predictor, "voor de").value}
    np.testing.assert_allclose([found[label] for label in "abc"], expected, rtol=1e-5)


def test_zero_shot_needs_entailment(make):
    with pytest.raises(ConfigError, match="trained for entailment; the labels of this one are spo"):
        make(ClassifyOptions(candidate_labels="a"))


def test_zero_shot_with_entailment_first(make):
    """Then the contradiction is the last label."""
    options = ClassifyOptions(candidate_labels="a")
    predictor = make(options, ["ENTAILMENT", "neutral", "contradiction"])
    logits, _ = logits_of(predictor, "voor")
    (score,) = one(predictor, "voor").value
    assert score.score == pytest.approx(softmax(logits[:, [2, 0]])[0, 1])


def test_a_long_premise_is_read_in_windows_beside_each_claim(make):
    options = ClassifyOptions(candidate_labels="a, b", all_scores=True)
    outcome = one(make(options, NLI), LONG)
    assert outcome.n_windows > 2
    assert sum(s.score for s in outcome.value) == pytest.approx(1.0)


# ---- choose -------------------------------------------------------------------------------------


def test_choices_by_hand(make, tokenizer):
    predictor = make(ChooseOptions(), n_columns=1)
    choices = ["het", "de op", "met"]
    outcome = one(predictor, "voor", choices=choices)
    ids = [tokenizer("voor", choice)["input_ids"] for choice in choices]
    table = predictor.model.table.detach().numpy()
    expected = softmax(np.array([table[row].sum() for row in ids], np.float32))
    np.testing.assert_allclose(outcome.value.scores, expected, rtol=1e-5)
    assert outcome.value.best == int(np.argmax(expected))
    assert outcome.n_tokens == sum(len(row) - 4 for row in ids) - 2  # the premise once


def test_rows_with_different_numbers_of_choices(make):
    predictor = make(ChooseOptions(), n_columns=1)
    lists = [["a"], ["a", "b", "c", "d"], ["a", "b"]]
    records = [Record(str(i), "voor", {"choices": c}) for i, c in enumerate(lists)]
    outcomes = predictor.predict(records)
    assert [len(o.value.scores) for o in outcomes] == [1, 4, 2]
    assert [o.value for o in outcomes] == [predictor.predict([r])[0].value for r in records]


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (None, "choices must be a list of strings, got null"),
        ("ab", "choices must be a list of strings, got str"),
        ([], "choices must have at least one, got an empty list"),
        (["a", None], r"choices[1] must be a string, got null"),
        (["a", 5], r"choices[1] must be a string, got int"),
    ],
)
def test_choices_that_are_none(make, choices, reason):
    outcome = one(make(ChooseOptions(), n_columns=1), "voor", choices=choices)
    assert (outcome.stage, outcome.reason) == ("encode", reason)
    assert one(make(ChooseOptions(), n_columns=1), None, choices=["a"]).reason == (
        "premise must be a string, got null"
    )


def test_questions_become_text(make, tokenizer):
    templates = ("why=Because {premise}",)
    predictor = make(ChooseOptions(question_template=templates), n_columns=1)
    for question, text in (
        ("cause", "P. What was the cause of this?"),
        ("effect", "P. What happened as a result?"),
        ("Who?", "P. Who?"),
        ("why", "Because P."),
        ("", "P."),
        (None, "P."),
    ):
        record = Record("0", "P.", {"choices": ["c"], "question": question})
        (encoded,) = predictor.encode([record])
        assert encoded.windows[0].ids.tolist() == tokenizer(text, "c")["input_ids"]


def test_no_best_choice_below_the_threshold(make):
    limits = {"de": {"*": 1.0}}
    predictor = make(ChooseOptions(min_score=limits), n_columns=1)
    assert one(predictor, "voor", choices=["a", "b"], language="de").value.best is None
    assert one(predictor, "voor", choices=["a", "b"], language="fr").value.best is not None


def test_a_long_premise_with_choices(make):
    for pooling, truncated in (("mean", False), ("max", False), ("first", True)):
        predictor = make(ChooseOptions(pooling=pooling), n_columns=1)
        outcome = one(predictor, LONG, choices=["a", "b"])
        assert outcome.truncated == truncated
        assert outcome.n_windows == (2 if truncated else 8)
        assert sum(outcome.value.scores) == pytest.approx(1.0)


# ---- embed --------------------------------------------------------------------------------------


def test_vectors_by_hand(make):
    predictor = make(EmbedOptions(normalize=False), n_columns=768)
    vectors, windows = logits_of(predictor, LONG)
    weights = [window.n_tokens for window in windows]
    expected = np.average(vectors, axis=0, weights=weights)
    np.testing.assert_allclose(one(predictor, LONG).value, expected, atol=1e-5)
    unit = one(make(EmbedOptions(), n_columns=768), LONG).value
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), atol=1e-6)


def test_dimensions_and_types(make):
    full = one(make(EmbedOptions(normalize=False), n_columns=768), "voor").value
    cut = one(make(EmbedOptions(dimensions=16), n_columns=768), "voor").value
    np.testing.assert_allclose(cut, full[:16] / np.linalg.norm(full[:16]), atol=1e-6)
    for dtype in ("float32", "float16", "int8"):
        predictor = make(EmbedOptions(dimensions=16, output_dtype=dtype), n_columns=768)
        values = [one(predictor, text).value for text in ("voor", "de", "")]
        (column,) = predictor.task.columns(values)
        assert column.type == pa.list_(pa.type_for_alias(dtype.replace("float16", "halffloat")), 16)
        assert predictor.task.columns([])[0].type == column.type
        scale = 127 if dtype == "int8" else 1
        np.testing.assert_allclose(np.array(column[0].as_py()) / scale, cut, atol=0.005)


def test_prefix_stands_before_every_window(make, tokenizer):
    predictor = make(EmbedOptions(prefix="voor de: "), n_columns=768)
    prefix = tokenizer("voor de: ", add_special_tokens=False)["input_ids"]
    (short,) = predictor.encode([Record("0", "het op")])
    assert short.windows[0].ids.tolist() == tokenizer("voor de: het op")["input_ids"]
    (long,) = predictor.encode([Record("0", LONG)])
    assert len(long.windows) > 2
    assert all(w.ids[1 : 1 + len(prefix)].tolist() == prefix for w in long.windows)
    assert all(len(w.ids) <= 32 for w in long.windows)


def test_impossible_options(make):
    with pytest.raises(ConfigError, match="dimensions=800 is more than the 768 of the model"):
        make(EmbedOptions(dimensions=800), n_columns=768)
    with pytest.raises(ConfigError, match="int8 needs normalize"):
        EmbedOptions(output_dtype="int8", normalize=False)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "pooler", "none"])
def test_pooling_heeds_no_padding(random_model, tiny_config, pooling):
    model = random_model(ErnieMForEmbedding, pooling=pooling)
    encoder = ErnieMModel(tiny_config, add_pooling_layer=pooling == "pooler").eval()
    encoder.load_state_dict(model.ernie_m.state_dict())
    ids = torch.tensor([[0, 5, 9, 2, 1, 1], [0, 5, 9, 7, 8, 2]])
    hidden = encoder(ids[:1, :4]).last_hidden_state[0]
    expected = {
        "mean": hidden.mean(0),
        "max": hidden.amax(0),
        "cls": hidden[0],
        "pooler": encoder(ids[:1, :4]).pooler_output[0] if pooling == "pooler" else None,
        "none": hidden,
    }[pooling]
    found = model(ids).logits[0]
    found = found[:4] if pooling == "none" else found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---- scores -------------------------------------------------------------------------------------


def test_sigmoid_of_large_numbers():
    values = sigmoid(np.array([-1e4, -1.0, 0.0, 1.0, 1e4], np.float32))
    np.testing.assert_allclose(values, [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], rtol=1e-6)


def test_pooling_of_empty_texts():
    empty = Window(np.array([0, 2]), first=0, n_tokens=0, offset=1)
    rows = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert pool_windows(rows, [empty, empty], "mean").tolist() == [2.0, 3.0]


def test_characters_without_width_are_blank(make, tokenizer):
    """To the tokenizer U+200B and the like are spaces; `isspace` does not know them."""
    predictor = make(ClassifyOptions())
    (encoded,) = predictor.encode([Record("0", "北\u200b京 é")])
    tokens = tokenizer.convert_ids_to_tokens(encoded.token_ids)
    blank = predictor.task.is_blank(encoded)
    assert "▁" in tokens
    assert blank.tolist() == [token == "▁" for token in tokens]
