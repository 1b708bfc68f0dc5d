"""Figures against other implementations: seqeval, scikit-learn, and literal ones in here."""

import collections
import random
import re
import string
import sys
import unicodedata

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn

from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.calibration import bins_of, expected_error, picture
from erniem_batch.evaluate.make import make_scorer
from erniem_batch.evaluate.ner import cut_tokens
from erniem_batch.evaluate.qa_text import compare, mlqa_normal, squad_normal
from erniem_batch.evaluate.values import (
    FoundAnswer,
    FoundChoice,
    FoundItem,
    FoundLabel,
    FoundSpan,
    value_of,
)
from erniem_batch.gold import annotated

KINDS = ("PER", "LOC", "ORG")


def gold_rows(task, rows):
    return [annotated(task, {"id": str(i), **row}) for i, row in enumerate(rows)]


def scorer_of(task, rows, values, names=None):
    return make_scorer(task, gold_rows(task, rows), values, names or {})


# ---- ner --------------------------------------------------------------------------------------


def words(rng):
    """A text, and the characters of each of its words."""
    tokens = ["ab"[: rng.randint(1, 2)] * rng.randint(1, 2) for _ in range(rng.randint(1, 12))]
    bounds, at = [], 0
    for token in tokens:
        bounds.append((at, at + len(token)))
        at += len(token) + 1
    return " ".join(tokens), bounds


def word_spans(rng, bounds):
    """Spans of whole words that do not overlap, and the same as IOB2 labels of the words."""
    spans, labels, i = [], ["O"] * len(bounds), 0
    while i < len(bounds):
        n = rng.randint(1, 3)
        if rng.random() < 0.5 and i + n <= len(bounds):
            kind = rng.choice(KINDS)
            spans.append((bounds[i][0], bounds[i + n - 1][1], kind))
            labels[i : i + n] = [f"B-{kind}", *[f"I-{kind}"] * (n - 1)]
        i += n
    return spans, labels


@pytest.mark.parametrize("seed", range(300))
def test_the_same_span_figures_as_seqeval(seed):
    """The labels that seqeval sees here are made word by word, not by `cut_tokens`."""
    rng = random.Random(seed)
    rows, values, true, found = [], [], [], []
    for _ in range(rng.randint(1, 8)):
        text, bounds = words(rng)
        spans, labels = word_spans(rng, bounds)
        other, other_labels = (spans, labels) if rng.random() < 0.4 else word_spans(rng, bounds)
        rows.append({"text": text, "spans": [list(s) for s in spans]})
        values.append([FoundSpan(*span, 0.9) for span in other])
        true.append(labels)
        found.append(other_labels)
    figures = scorer_of("ner", rows, values).all_figures()
    options = {"average": "micro", "mode": "strict", "scheme": IOB2, "zero_division": 0}
    scores = (precision_score, recall_score, f1_score)
    if any(label != "O" for labels in (*true, *found) for label in labels):
        strict = [float(score(true, found, **options)) for score in scores]
        plain = [float(s(true, found, average="micro", zero_division=0)) for s in scores]
        macro = float(f1_score(true, found, **{**options, "average": "macro"}))
    else:
        strict = plain = [0.0] * 3
        macro = 0.0
    names = ("precision", "recall", "f1")
    assert [figures[name] for name in names] == pytest.approx(strict, abs=1e-9)
    assert [figures[f"seqeval_strict_{n}"] for n in names] == pytest.approx(strict, abs=1e-9)
    assert [figures[f"seqeval_default_{n}"] for n in names] == pytest.approx(plain, abs=1e-9)
    assert figures["macro_f1_labels"] == pytest.approx(macro, abs=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_tokens_are_cut_at_every_border(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab 北\u2003.") for _ in range(30))
    spans = [tuple(sorted(rng.sample(range(31), 2))) for _ in range(4)]
    tokens = cut_tokens(text, [(*span, "X") for span in spans])
    assert [text[a:b] for a, b in tokens if text[a:b].split() != [text[a:b]]] == []
    assert "".join(text[a:b] for a, b in tokens) == "".join(text.split())
    for a, b in tokens:
        assert not any(a < place < b for span in spans for place in span)


def test_figures_by_language_and_label():
    rows = [
        {"text": "Ada in Rom", "spans": [[0, 3, "PER"], [7, 10, "LOC"]], "lang": "de"},
        {"text": "Bob", "spans": [[0, 3, "PER"]], "lang": "en"},
        {"text": "no one", "spans": [], "lang": "en"},
    ]
    values = [
        [FoundSpan(0, 3, "Person", 0.9), FoundSpan(7, 10, "LOC", 0.9)],
        [FoundSpan(0, 2, "Person", 0.9)],
        None,
    ]
    scorer = scorer_of("ner", rows, values, {"Person": "PER"})
    assert list(scorer.languages) == ["de", "en"]
    assert scorer.figures_of_language("de")["f1"] == 1.0
    assert scorer.figures_of_language("en")["f1"] == 0.0
    figures = scorer.all_figures()
    assert figures["macro_f1_languages"] == 0.5
    assert figures["f1"] == pytest.approx(2 / 3)
    assert scorer.by_label()["PER"] == {
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "n_gold": 2,
        "n_predicted": 2,
    }
    assert scorer.detail(1) == {"right": False, "missed": [(0, 3, "PER")], "wrong": [(0, 2, "PER")]}


def test_offsets_in_other_units_are_converted():
    row = {"entities": [{"start": 3, "end": 6, "label": "PER", "score": 0.5, "text": "Ada"}]}
    assert value_of("ner", row, "😀 Ada", "utf16") == [(2, 5, "PER", 0.5)]


# ---- question answering -----------------------------------------------------------------------


def squad_literal(text):
    """SQuAD v1.1's definition, step by step."""

    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punctuation(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(text.lower())).split())


PUNCTUATION = {
    chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")
} | set(string.punctuation)
MLQA_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",
}


def mlqa_literal(text, language):
    """MLQA's definition, step by step."""
    text = "".join(ch for ch in text.lower() if ch not in PUNCTUATION)
    if language in MLQA_ARTICLES:
        text = re.sub(MLQA_ARTICLES[language], " ", text)
    if language != "zh":
        return " ".join(text.split())
    pieces, current = [], ""
    for ch in text:
        if re.search(r"[\u4e00-\u9fa5]", ch) or ch in PUNCTUATION:
            pieces += current.split()
            pieces.append(ch)
            current = ""
        else:
            current += ch
    pieces += current.split()
    return " ".join(piece for piece in pieces if piece.strip())


def literal_f1(predicted, right):
    predicted, right = predicted.split(), right.split()
    common = collections.Counter(predicted) & collections.Counter(right)
    same = sum(common.values())
    if same == 0:
        return 0
    precision, recall = same / len(predicted), same / len(right)
    return 2 * precision * recall / (precision + recall)


TRICKY = [
    *(
        "",
        " ",
        "the",
        "The.",
        "a an the",
        "theatre",
        "the-a",
        "$1,000",
        "1.000 €",
        "it's",
        "“quoted”",
    ),
    *(
        "die Katze",
        "einer",
        "eine-r",
        "los Andes",
        "la, la",
        "của tôi",
        "الكتاب",
        "في الكتاب ال",
        "ال",
    ),
    *(
        "北京，中国",
        "北京 abc 2024年",
        "「東京」",
        "हिन्दी। भाषा",
        "naïve  café",
        "İstanbul",
        "ſtraße",
        "\u00a0x\u2003y",
    ),
    *("a an the lo los la las el él un una unos unas une", "der die das den dem des dessen eins"),
    *("ein eine einen einem eines einer einerlei", "của là cái chiếc những cá"),
    *("A\u0301n", "an\u200bthe", "一二ｶﾅ", "el\nel", "a…b", "x^y", "das `Das`"),
]
ALPHABET = "aAnthe dielasunوال北京年. ,;-’$\u3000\u00a0ß1"


def random_text(rng):
    if rng.random() < 0.3:
        return " ".join(rng.choice(TRICKY) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 14)))


@pytest.mark.parametrize("language", ["squad", "en", "es", "hi", "vi", "de", "ar", "zh"])
def test_answers_are_compared_as_defined(language):
    rng = random.Random(f"qa {language}")

    def ours(text):
        return squad_normal(text) if language == "squad" else mlqa_normal(text, language)

    def literal(text):
        return squad_literal(text) if language == "squad" else mlqa_literal(text, language)

    texts = [*TRICKY, *(random_text(rng) for _ in range(1500))]
    assert [ours(text) for text in texts] == [literal(text) for text in texts]
    for predicted in texts:
        answers = [rng.choice([*texts, predicted]) for _ in range(rng.randint(1, 3))]
        exact, f1 = compare(predicted, answers, ours)
        assert exact == max(literal(predicted) == literal(a) for a in answers)
        expected = max(literal_f1(literal(predicted), literal(a)) for a in answers)
        assert f1 == pytest.approx(expected, abs=1e-9)


def test_questions_with_and_without_answers():
    answer = {"text": "The Sea", "start": 0}
    rows = [
        {"context": "The Sea is.", "question": "q", "answers": [answer], "lang": "en"},
        {"context": "The Sea is.", "question": "q", "answers": [], "lang": "en"},
        {"context": "The Sea is.", "question": "q", "answers": [], "lang": "en"},
        {"context": "The Sea is.", "question": "q", "answers": [answer], "lang": "en"},
    ]
    values = [FoundAnswer("sea!", 0.5), FoundAnswer(None, 0.0), FoundAnswer("Sea", 0.5), None]
    scorer = scorer_of("qa", rows, values)
    assert scorer.scores[:, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert scorer.all_figures()["exact_match"] == 0.5
    assert scorer.by_label()["no answer"]["f1"] == 0.5
    assert "sea" not in str(scorer.detail(0)).lower()


def test_languages_with_a_script_or_country_are_known():
    assert mlqa_normal("北京", "zh-Hans") == "北 京"
    assert mlqa_normal("The End", "en_GB") == "end"


# ---- classify and choose ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_labels_as_scikit_learn_counts_them(seed):
    rng = random.Random(seed)
    true = [rng.choice("abc") for _ in range(40)]
    found = [rng.choice("abcd") for _ in true]
    values = [[FoundLabel(label, rng.random())] for label in found]
    scorer = scorer_of("classify", [{"text": "t", "label": t} for t in true], values)
    figures = scorer.all_figures()
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(true, found))
    for average in ("macro", "micro"):
        expected = sklearn.f1_score(true, found, average=average, zero_division=0)
        assert figures[f"{average}_f1"] == pytest.approx(expected)
        # What is resampled is the same figure.
        assert scorer.measures[f"{average}_f1"].value == pytest.approx(expected)


def test_a_text_without_prediction_is_wrong():
    rows = [{"text": "t", "label": "a"}, {"text": "t", "label": "a"}]
    figures = scorer_of("classify", rows, [None, [FoundLabel("a", 0.9)]]).all_figures()
    assert figures["accuracy"] == 0.5
    assert figures["micro_f1"] == figures["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_several_labels_a_text(seed):
    rng = random.Random(seed)
    true = [sorted(rng.sample("abcd", rng.randint(0, 3))) for _ in range(30)]
    found = [sorted(rng.sample("abcd", rng.randint(0, 3))) for _ in true]
    values = [[FoundLabel(label, 0.9) for label in labels] for labels in found]
    scorer = scorer_of("classify", [{"text": "t", "label": t} for t in true], values)
    figures = scorer.all_figures()
    assert figures["subset_accuracy"] == np.mean([t == f for t, f in zip(true, found, strict=True)])
    right = sum(len({*t} & {*f}) for t, f in zip(true, found, strict=True))
    assert figures["micro_f1"] == pytest.approx(2 * right / sum(map(len, true + found)))
    for name in ("micro_f1", "macro_f1", "subset_accuracy"):
        assert scorer.measures[name].value == pytest.approx(figures[name])


def test_numbers():
    rng = np.random.default_rng(1)
    true = 1000 + rng.random(50)
    found = true + rng.normal(0, 0.2, 50)
    values = [[FoundLabel("LABEL_0", float(x))] for x in found]
    rows = [{"text": "t", "label": float(x)} for x in true]
    figures = scorer_of("classify", [*rows, rows[0]], [*values, None]).all_figures()
    assert figures["n_gold"] == 50
    assert figures["mse"] == pytest.approx(np.mean((true - found) ** 2))
    assert figures["mae"] == pytest.approx(np.abs(true - found).mean())
    assert figures["pearson"] == pytest.approx(stats.pearsonr(true, found).statistic)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(true, found).statistic)


def test_numbers_that_do_not_vary_have_no_correlation():
    rows = [{"text": "t", "label": 1.0}] * 3
    figures = scorer_of("classify", rows, [[FoundLabel("x", 2.0)]] * 3).all_figures()
    assert (figures["pearson"], figures["spearman"], figures["mse"]) == (None, None, 1.0)


def test_numbers_beside_labels_are_refused():
    with pytest.raises(ConfigError, match="1 of 2 gold rows have a number"):
        scorer_of("classify", [{"text": "t", "label": 1}, {"text": "t", "label": "a"}], [None] * 2)


@pytest.mark.parametrize("seed", range(20))
def test_calibration_error_as_by_a_loop(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.random(200)
    confidence[:6] = [0.0, 1.0, 1 / 15, 2 / 15, 0.2, 0.6]
    right = rng.random(200) < confidence
    total = 0.0
    for k in range(15):
        inside = [
            i
            for i, c in enumerate(confidence)
            if int(np.ceil(c * 15)) == k + 1 or (c == 0 and k == 0)
        ]
        if inside:
            gap = abs(np.mean(confidence[inside]) - np.mean(right[inside]))
            total += len(inside) / 200 * gap
    assert expected_error(confidence, right) == pytest.approx(total, abs=1e-12)


def test_nothing_predicted_has_no_calibration():
    assert np.isnan(expected_error(np.array([np.nan]), np.array([False])))
    assert picture(bins_of(np.array([0.5, np.nan]), np.array([True, False])))[1:4] == b"PNG"


def test_choices_by_type_of_question():
    rows = [
        {"premise": "p", "choices": ["a", "b"], "label": i % 2, "question": q, "lang": "en"}
        for i, q in enumerate(["cause", "cause", "effect", "What did she do then?"])
    ]
    values = [FoundChoice(0, 0.9), FoundChoice(None, 0.4), FoundChoice(0, 0.9), None]
    scorer = scorer_of("choose", rows, values)
    assert scorer.all_figures() == {"accuracy": 0.5, "n_gold": 4, "n_predicted": 2}
    accuracy = {name: figures["accuracy"] for name, figures in scorer.by_label().items()}
    assert accuracy == {"cause": 0.5, "effect": 1.0, "other": 0.0}


# ---- extract ----------------------------------------------------------------------------------


def item(id_, parent, name, start, end, text="x", score=0.9):
    return FoundItem(id_, parent, name, text, start, end, score)


def test_entities_and_relations():
    row = {
        "text": "Ada of ACME and Bob",
        "spans": [[0, 3, "PER"], [7, 11, "ORG"], [16, 19, "PER"]],
        "relations": [[1, "founder", 0], [1, "founder", 2]],
    }
    value = [
        item(0, None, "Person", 0, 3),
        item(1, None, "ORG", 7, 11),
        item(2, 1, "founder", 0, 3),
        item(3, 1, "founder", 4, 6),
        item(4, None, "Mood [good, bad]", None, None),
        item(5, 4, "founder", 0, 3),
    ]
    scorer = scorer_of("extract", [row], [value], {"Person": "PER"})
    figures = scorer.all_figures()
    assert (figures["n_gold"], figures["n_predicted"], figures["precision"]) == (3, 2, 1.0)
    assert (figures["relation_precision"], figures["relation_recall"]) == (0.5, 0.5)
    assert scorer.by_label()["founder (relation)"]["f1"] == 0.5
    assert scorer.detail(0)["missed"] == [(16, 19, "PER"), ((7, 11), "founder", (16, 19))]


def test_only_the_prompt_of_a_row_counts():
    rows = [
        {"content": "Ada, 36", "prompt": "Person", "result_list": [{"start": 0, "end": 3}]},
        {"content": "Ada, 36", "prompt": "Age of Ada", "result_list": [{"start": 5, "end": 7}]},
        {"content": "阿达36岁", "prompt": "阿达的年龄", "result_list": [{"start": 2, "end": 4}]},
    ]
    value = [item(0, None, "Person", 0, 3, "Ada"), item(1, 0, "Age", 5, 7, "36")]
    chinese = [item(0, None, "人", 0, 2, "阿达"), item(1, 0, "年龄", 2, 4, "36")]
    figures = scorer_of("extract", rows, [value, value, chinese]).all_figures()
    assert (figures["f1"], figures["n_gold"], figures["n_predicted"]) == (1.0, 3, 3)
    assert "relation_f1" not in figures


# ---- embed ------------------------------------------------------------------------------------


def test_translations_that_find_each_other():
    vectors = {"de": [[1, 0], [0, 1], [1, 1]], "en": [[2, 0], [0, 3], [0.1, 1]]}
    rows, values = [], []
    for language, items in vectors.items():
        for id_, vector in zip("xyz", items, strict=True):
            rows.append({"id": id_, "text": "t", "lang": language})
            values.append(np.array(vector, np.float32))
    scorer = make_scorer("embed", [annotated("embed", row) for row in rows], values, {})
    # de z (1, 1) is nearest to en z (0.1, 1); en z to de y (0, 1).
    assert scorer.by_label()["de-en"]["accuracy"] == 1.0
    assert scorer.by_label()["en-de"]["accuracy"] == pytest.approx(2 / 3)
    assert scorer.all_figures()["accuracy"] == pytest.approx(5 / 6)
    assert scorer.figures_of_language("en")["accuracy"] == pytest.approx(2 / 3)
    assert scorer.detail(5) == {"right": False, "wrong": ["de"]}


def test_a_text_without_vector_is_not_found():
    rows = [{"id": i, "text": "t", "lang": lang} for lang in ("de", "en") for i in "xy"]
    gold = [annotated("embed", row) for row in rows]
    values = [np.array(v) for v in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])] + [None]
    scorer = make_scorer("embed", gold, values, {})
    assert scorer.by_label()["de-en"]["accuracy"] == 0.5
    assert scorer.by_label()["en-de"]["accuracy"] == 0.5


def test_a_tie_is_not_found():
    rows = [{"id": i, "text": "t", "lang": lang} for lang in ("de", "en") for i in "xy"]
    values = [np.array([1.0, 0.0])] * 4
    scorer = make_scorer("embed", [annotated("embed", row) for row in rows], values, {})
    assert scorer.all_figures()["accuracy"] == 0.0


def test_texts_without_translations_are_refused():
    rows = [{"id": f"{lang}-{i}", "text": "t", "lang": lang} for lang in ("a", "b") for i in "xy"]
    with pytest.raises(ConfigError, match="no two of the languages a, b share"):
        make_scorer("embed", [annotated("embed", row) for row in rows], [None] * 4, {})
