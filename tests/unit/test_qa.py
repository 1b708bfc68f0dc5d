"""Question answering with a model that knows where answers stand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from erniem_batch import ErnieMConfig
from erniem_batch.config import PredictorConfig
from erniem_batch.options import QaOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Record
from erniem_batch.tasks.make import make_task
from erniem_batch.tasks.ner import is_unspaced
from erniem_batch.tasks.qa import Answers, WordEdges, best_first, whole_words
from erniem_batch.work import Work


class KnowingModel(nn.Module):
    """Start and end scores by token id; [CLS] has a score of its own."""

    def __init__(self, starts, ends, null=0.0):
        super().__init__()
        self.config = ErnieMConfig(vocab_size=9000)
        self.unused = nn.Parameter(torch.zeros(1))
        self.tables = torch.zeros(2, 9000)
        for table, scores in zip(self.tables, (starts, ends), strict=True):
            for token, score in scores.items():
                table[token] = score
            table[0] = null

    def rows(self, batch):
        return self.tables[:, batch.ids_T].T


@pytest.fixture
def make(tokenizer):
    """Makes a predictor; scores are given by word."""

    def ids(scores):
        tokens = {word: tokenizer.encode_batch([word]).ids.tolist() for word in scores}
        assert all(len(found) == 1 for found in tokens.values())
        return {tokens[word][0]: score for word, score in scores.items()}

    def predictor(starts, ends, null=0.0, window_tokens=32, overlap_tokens=8, **options):
        config = PredictorConfig(
            options=QaOptions(**options),
            window_tokens=window_tokens,
            overlap_tokens=overlap_tokens,
            max_batch_tokens=10 * window_tokens,
            device="cpu",
        )
        model = KnowingModel(ids(starts), ids(ends), null)
        return Predictor(config, tokenizer, model, make_task(config, tokenizer, model.config))

    return predictor


def ask(predictor, context, question="op?", **fields):
    (outcome,) = predictor.predict([Record("0", context, {"question": question, **fields})])
    return outcome


FILL = " ".join(["het", "in", "een"][i % 3] for i in range(60))


def test_the_best_span(make):
    context = "het voor de met in"
    outcome = ask(make({"voor": 9.0}, {"met": 9.0}), context)
    (answer,) = outcome.value.answers
    assert (answer.start, answer.end, answer.text) == (4, 15, "voor de met")
    assert context[answer.start : answer.end] == answer.text
    assert 0.9 < answer.score <= 1
    assert outcome.value.best == answer
    assert outcome.value.null_score is None


def test_an_answer_in_any_window_is_found_once(make):
    predictor = make({"voor": 9.0}, {"met": 9.0}, top_k=3)
    words = FILL.split()
    for place in range(0, 56):
        context = " ".join([*words[:place], "voor", "de", "met", *words[place:]])
        answers = ask(predictor, context).value.answers
        start = context.index("voor")
        assert (answers[0].start, answers[0].end) == (start, start + 11)
        spans = [(answer.start, answer.end) for answer in answers]
        assert len(spans) == len(set(spans)) == 3


def test_answers_are_no_longer_than_allowed(make):
    starts, ends = {"voor": 9.0}, {"met": 9.0}
    context = "voor het de in met"
    (answer,) = ask(make(starts, ends, max_answer_tokens=5), context).value.answers
    assert answer.text == context
    (answer,) = ask(make(starts, ends, max_answer_tokens=4), context).value.answers
    assert answer.text != context
    assert len(answer.text.split()) <= 4


def test_no_answer(make):
    """Its score competes with that of the best answer; null_threshold says how much it takes."""
    context = "het voor de met in"
    for null, threshold, impossible in (
        (20.0, 0.0, True),
        (20.0, 1.0, False),
        (-20.0, 0.0, False),
        (-20.0, -1.0, True),
    ):
        predictor = make({"voor": 9.0}, {"met": 9.0}, null, null_threshold=threshold)
        value = ask(predictor, context).value
        assert value.impossible == impossible
        assert (value.best is None) == impossible
        assert 0 <= value.null_score <= 1
        answer, _, null_score = predictor.task.columns([value])
        assert answer.to_pylist() == [None if impossible else "voor de met"]
        assert null_score.to_pylist() == [pytest.approx(value.null_score)]


def test_the_null_score_is_the_lowest_of_the_windows(make):
    """One window that holds the answer is enough to doubt that there is none."""
    predictor = make({"voor": 9.0}, {"met": 9.0}, null=3.0, null_threshold=0.0)
    near, far = ask(predictor, "voor met"), ask(predictor, FILL)
    both = ask(predictor, FILL + " voor met")
    assert near.value.null_score < 0.1 < far.value.null_score
    assert both.value.null_score < 0.1


@pytest.mark.parametrize(
    ("question", "context", "reason"),
    [
        (None, "a", "question must be a string, got null"),
        (5, "a", "question must be a string, got int"),
        (" ", "a", "question must not be empty"),
        ("a", "", "context must not be empty"),
        ("a", None, "context must be a string, got null"),
    ],
)
def test_questions_and_contexts_that_are_none(make, question, context, reason):
    outcome = ask(make({}, {}), context, question)
    assert isinstance(outcome, Failure)
    assert outcome.reason == reason


def test_a_question_is_never_cut(make):
    """Beside a long one the overlap shrinks; one that leaves no room is an error."""
    predictor = make({"voor": 9.0}, {"met": 9.0})
    outcome = ask(predictor, FILL + " voor met", " ".join(["op"] * 11))
    assert outcome.value.answers[0].text == "voor met"
    outcome = ask(predictor, FILL, " ".join(["op"] * 20))
    assert "the question and special tokens take 24 of 32 tokens" in outcome.reason
    assert not isinstance(ask(predictor, "voor met", " ".join(["op"] * 20)), Failure)


def test_thresholds(make):
    limits = {"de": {"*": 1.0}}
    predictor = make({"voor": 9.0}, {"met": 9.0}, min_score=limits)
    assert ask(predictor, "voor met in", language="de").value == Answers([])
    assert ask(predictor, "voor met in").value.answers


@pytest.mark.parametrize(
    ("unit", "expected"), [("codepoint", (2, 6)), ("utf16", (3, 7)), ("byte", (5, 9))]
)
def test_offset_units(make, unit, expected):
    (answer,) = ask(make({"voor": 9.0}, {"voor": 9.0}, offset_unit=unit), "😀 voor").value.answers
    assert (answer.text, (answer.start, answer.end)) == ("voor", expected)


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("in Paris, 2024", (4, 7), (3, 9)),
        ("Paris", (1, 2), (0, 5)),
        ("a b", (0, 1), (0, 1)),
        ("我住在北京市。", (3, 5), (3, 5)),
        ("東京 Tower", (4, 5), (3, 8)),
    ],
)
def test_whole_words(text, span, expected):
    assert whole_words(text, *span) == expected


def test_aligned_answers_are_merged(make):
    """Several spans of tokens become one span of words."""
    predictor = make({"voor": 3.0}, {"met": 3.0}, top_k=9, align_to_words=True)
    answers = ask(predictor, "voor, met. in").value.answers
    spans = [(answer.start, answer.end) for answer in answers]
    assert len(spans) == len(set(spans))
    assert answers[0].text == "voor, met."


def test_columns_of_no_rows(make):
    task = make({}, {}).task
    assert [column.type for column in task.columns([])] == list(task.schema.types)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.integers(1, 40))
def test_best_first(scores, k):
    """As a stable sort would give them."""
    scores = np.array(scores, np.float32)
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert best_first(scores, k).tolist() == expected


@given(st.text("ab ,京都\u0e01\n", min_size=1, max_size=40), st.data())
def test_words_are_widened_as_character_by_character(text, data):
    def go_together(left, right):
        return not (left.isspace() or right.isspace() or is_unspaced(left) or is_unspaced(right))

    words = WordEdges(text)
    for _ in range(8):
        start = data.draw(st.integers(0, len(text) - 1))
        end = data.draw(st.integers(start + 1, len(text)))
        first, last = start, end
        while first > 0 and go_together(text[first - 1], text[first]):
            first -= 1
        while last < len(text) and go_together(text[last - 1], text[last]):
            last += 1
        assert words(start, end) == (first, last)


def test_every_answer_of_a_long_word_is_bounded(make):
    """Each span of one word as long as the text was widened character by character."""
    predictor = make({}, {}, top_k=10_000, max_answer_tokens=10_000, align_to_words=True)
    work = Work(max_spans=20_000)
    (outcome,) = predictor.predict([Record("0", "x" * 20_000, {"question": "op?"}, work)])
    assert isinstance(outcome, Failure)
    assert "spans as candidates; at most 20000 a row" in outcome.reason
