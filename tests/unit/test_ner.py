import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.labels import spans_to_labels
from erniem_batch.records import Encoded, Failure, Record, Window
from erniem_batch.tasks.base import softmax
from erniem_batch.tasks.ner import Entity, LabelScheme, NerTask, word_starts

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
STRATEGIES = ("none", "simple", "first", "average", "max")


def encoded_by_hand(text, offsets, ids=None):
    """A record in one window, with tokens where we want them."""
    ids = np.array([10] * len(offsets) if ids is None else ids, dtype=np.int64)
    starts, ends = (np.array(column, dtype=np.int64) for column in zip(*offsets, strict=True))
    window = Window(np.concatenate([[0], ids, [2]]), 0, len(ids), offset=1)
    return Encoded(Record("x", text), ids, starts, ends, [window])


def decode(task, encoded, probs):
    """Entities from probabilities of the tokens."""
    logits = np.log(probs).astype(np.float32)
    edge = np.zeros((1, logits.shape[1]), np.float32)
    return task.decode(encoded, [np.concatenate([edge, logits, edge])])


def one_hot(labels, names):
    """Probabilities that give each token the label named."""
    probs = np.full((len(labels), len(names)), 0.01, np.float32)
    for row, label in zip(probs, labels, strict=True):
        row[names.index(label)] = 1.0
    return probs / probs.sum(1, keepdims=True)


# ---- labels ---------------------------------------------------------------------------------


def _groups(names, labels):
    return LabelScheme(names).group([names.index(label) for label in labels])


@pytest.mark.parametrize(
    ("scheme", "labels", "expected"),
    [
        ("BIO", "B-X I-X O B-X B-X I-X", [(0, 2), (3, 4), (4, 6)]),
        ("BIO", "O I-X I-X O", [(1, 3)]),  # an I- without its B- opens one
        ("IOB1", "I-X I-X B-X I-X O I-X", [(0, 2), (2, 4), (5, 6)]),
        ("BIOES", "B-X I-X E-X S-X S-X O", [(0, 3), (3, 4), (4, 5)]),
        ("BIOES", "B-X E-X I-X E-X", [(0, 2), (2, 4)]),  # what follows an end is new
        ("BIOES", "S-X I-X", [(0, 1), (1, 2)]),
        ("BIOES", "O E-X", [(1, 2)]),
        ("BILOU", "B-X I-X L-X U-X U-X O", [(0, 3), (3, 4), (4, 5)]),
        ("BILOU", "B-X L-X B-X L-X", [(0, 2), (2, 4)]),
    ],
)
def test_schemes(scheme, labels, expected):
    prefixes = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BILOU": "BILU"}[scheme]
    names = ["O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in prefixes)]
    assert _groups(names, labels.split()) == [(a, b, "X") for a, b in expected]


def test_another_kind_is_another_entity():
    assert _groups(BIO, ["B-PER", "I-LOC", "I-PER"]) == [
        (0, 1, "PER"),
        (1, 2, "LOC"),
        (2, 3, "PER"),
    ]


def test_plain_names():
    names = ["O", "PER", "LOC"]
    assert _groups(names, ["PER", "PER", "O", "PER", "LOC"]) == [
        (0, 2, "PER"),
        (3, 4, "PER"),
        (4, 5, "LOC"),
    ]


def test_a_plain_name_may_look_like_a_prefix():
    names = ["O", "S-Bahn", "U-Bahn"]
    assert LabelScheme(names).kinds == names
    assert _groups(names, ["S-Bahn", "S-Bahn", "U-Bahn"]) == [(0, 2, "S-Bahn"), (2, 3, "U-Bahn")]


def test_kinds_may_hold_hyphens():
    names = ["O", "B-work-of-art", "I-work-of-art"]
    assert _groups(names, ["B-work-of-art", "I-work-of-art"]) == [(0, 2, "work-of-art")]


@given(st.lists(st.sampled_from(range(9)), max_size=30))
def test_groups_cover_what_is_not_outside_once(label_ids):
    names = ["O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in "BIES")]
    groups = LabelScheme(names).group(label_ids)
    covered = [i for a, b, _ in groups for i in range(a, b)]
    assert covered == [i for i, label in enumerate(label_ids) if label]
    for a, b, kind in groups:
        assert {names[label][2:] for label in label_ids[a:b]} == {kind}


def test_labels_without_outside(tokenizer):
    with pytest.raises(ConfigError, match="no 'O' label"):
        NerTask(tokenizer, ["LABEL_0", "LABEL_1"])


def test_outside_need_not_come_first(tokenizer):
    names = ["B-PER", "I-PER", "O"]
    encoded = encoded_by_hand("ab cd ef", [(0, 2), (3, 5), (6, 8)])
    for strategy in STRATEGIES[1:]:
        task = NerTask(tokenizer, names, aggregation_strategy=strategy)
        found = decode(task, encoded, one_hot(["B-PER", "I-PER", "O"], names))
        assert [(e.word, e.label) for e in found] == [("ab cd", "PER")]


# ---- spans <-> labels -------------------------------------------------------------------------


@st.composite
def _spans_on_tokens(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=25))
    ends = np.cumsum(np.array(lengths) + 1) - 1
    offsets = [(int(b) - n, int(b)) for b, n in zip(ends, lengths, strict=True)]
    spans, at = [], 0
    while at < len(offsets):
        n = draw(st.integers(0, 3))
        if n:
            last = min(at + n, len(offsets)) - 1
            kind = draw(st.sampled_from(["PER", "LOC"]))
            spans.append((offsets[at][0], offsets[last][1], kind))
        at += max(n, 1)
    return offsets, spans


@given(_spans_on_tokens())
def test_spans_to_labels_and_back(case):
    offsets, spans = case
    labels = spans_to_labels(spans, offsets)
    groups = _groups(BIO, labels)
    assert [(offsets[a][0], offsets[b - 1][1], kind) for a, b, kind in groups] == spans


@given(_spans_on_tokens())
def test_spans_to_labels_to_entities(tokenizer, case):
    offsets, spans = case
    text = "".join(" " if not any(a <= i < b for a, b in offsets) else "x" for i in range(200))
    for strategy in STRATEGIES[1:]:
        task = NerTask(tokenizer, BIO, aggregation_strategy=strategy)
        probs = one_hot(spans_to_labels(spans, offsets), BIO)
        found = decode(task, encoded_by_hand(text, offsets), probs)
        assert [(e.start, e.end, e.label) for e in found] == spans


def test_a_token_belongs_to_a_span_it_overlaps():
    assert spans_to_labels([(2, 5, "LOC")], [(0, 2), (1, 3), (4, 9), (9, 10)]) == [
        "O",
        "B-LOC",
        "I-LOC",
        "O",
    ]


def test_neighbouring_spans_of_one_kind_stay_two():
    assert spans_to_labels([(0, 2, "A"), (2, 4, "A")], [(0, 2), (2, 4)]) == ["B-A", "B-A"]


# ---- strategies against transformers ------------------------------------------------------------


class _Tokenizer:
    """What TokenClassificationPipeline asks of a tokenizer."""

    unk_token_id = 3

    def convert_ids_to_tokens(self, token_id):
        return f"t{token_id}"

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)


class _Config:
    def __init__(self, names):
        self.id2label = dict(enumerate(names))


class _Model:
    def __init__(self, names):
        self.config = _Config(names)


def reference_entities(text, offsets, ids, probs, strategy, names):
    """Entities by the functions of transformers 4.40.2."""
    reference = pytest.importorskip("transformers.pipelines.token_classification")
    pipeline = reference.TokenClassificationPipeline.__new__(reference.TokenClassificationPipeline)
    pipeline.tokenizer, pipeline.model, pipeline.framework = _Tokenizer(), _Model(names), "pt"
    chosen = reference.AggregationStrategy(strategy)
    no_special = np.zeros(len(ids), dtype=int)
    before = pipeline.gather_pre_entities(text, ids, probs, offsets, no_special, chosen)
    found = pipeline.aggregate(before, chosen)
    return [e for e in found if "O" not in (e.get("entity"), e.get("entity_group"))]


@st.composite
def _spaced_text(draw):
    """Words of one or more tokens between single spaces, and probabilities with near ties."""
    words = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=12))
    offsets, at = [], 0
    for tokens in words:
        for length in tokens:
            offsets.append((at, at + length))
            at += length
        at += 1
    covered = {i for a, b in offsets for i in range(a, b)}
    text = "".join("aBcéд"[i % 5] if i in covered else " " for i in range(at))
    ids = draw(
        st.lists(st.sampled_from([3, 10, 11, 12]), min_size=len(offsets), max_size=len(offsets))
    )
    seed = draw(st.integers(0, 2**32 - 1))
    sharpness = draw(st.sampled_from([0.5, 2.0, 8.0]))
    logits = np.random.default_rng(seed).normal(size=(len(offsets), 5)) * sharpness
    return text, offsets, ids, logits.astype(np.float32)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("names", [BIO, ["O", "PER", "LOC", "ORG", "MISC"]], ids=["BIO", "plain"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(case=_spaced_text())
def test_strategies_are_those_of_transformers(tokenizer, strategy, names, case):
    """Scores within 1e-6: both average in float32, in different orders."""
    text, offsets, ids, logits = case
    if not offsets:
        return
    expected = reference_entities(text, offsets, np.array(ids), softmax(logits), strategy, names)
    task = NerTask(tokenizer, names, aggregation_strategy=strategy)
    edge = np.zeros((1, 5), np.float32)
    found = task.decode(encoded_by_hand(text, offsets, ids), [np.concatenate([edge, logits, edge])])
    kind = "entity" if strategy == "none" else "entity_group"
    assert [(e.start, e.end, e.label) for e in found] == [
        (e["start"], e["end"], e[kind]) for e in expected
    ]
    assert [e.score for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-6)
    if strategy == "none":  # transformers counts its special token, so [CLS] is 0
        assert [e.index - 1 for e in found] == [e["index"] for e in expected]


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "北京大学",
        "これはペン",
        "ภาษาไทย",
        "ພາສາລາວ",
        "ភាសាខ្មែរ",
        "မြန်မာဘာသာ",
        "𠮷野家",
    ],
    ids=["Han", "kana", "Thai", "Lao", "Khmer", "Myanmar", "Han beyond the BMP"],
)
def test_scripts_without_spaces_have_words_of_one_token(tokenizer, text):
    starts = np.arange(len(text))
    assert word_starts(text, starts, np.zeros(len(text), dtype=bool)).all()


@pytest.mark.parametrize(
    ("text", "starts", "expected"),
    [
        ("micro soft", [0, 2, 6, 8], [1, 0, 1, 0]),
        ("a\u3000b\tc\nd\u00a0e", [0, 2, 4, 6, 8], [1, 1, 1, 1, 1]),
        ("don't", [0, 3, 4], [1, 0, 0]),
        ("Moskauer서울", [0, 4, 8, 9], [1, 0, 0, 0]),  # Hangul is written with spaces
        ("in北京NOW", [0, 2, 3, 4, 6], [1, 1, 1, 1, 0]),
        ("ＡＢＣ", [0, 1, 2], [1, 0, 0]),
    ],
)
def test_word_starts(text, starts, expected):
    found = word_starts(text, np.array(starts), np.zeros(len(starts), dtype=bool))
    assert found.tolist() == [bool(x) for x in expected]


def test_an_unknown_token_is_a_word():
    assert word_starts("abc", np.arange(3), np.array([0, 1, 0], dtype=bool)).tolist() == [
        True,
        True,
        False,
    ]


def test_words_get_one_label_by_strategy(tokenizer):
    """The example of transformers: micro|soft com|pany."""
    encoded = encoded_by_hand("microsoft company", [(0, 5), (5, 9), (10, 13), (13, 17)])
    names = ["O", "B-ENT", "I-ENT", "I-NAME"]
    probs = one_hot(["B-ENT", "I-NAME", "I-ENT", "I-ENT"], names)
    found = {}
    for strategy in STRATEGIES[1:]:
        task = NerTask(tokenizer, names, aggregation_strategy=strategy)
        found[strategy] = [(e.word, e.label) for e in decode(task, encoded, probs)]
    assert found["simple"] == [("micro", "ENT"), ("soft", "NAME"), ("company", "ENT")]
    assert found["first"] == [("microsoft company", "ENT")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_white_space_has_no_label(tokenizer, strategy):
    """A lone "▁" token is skipped: it neither is an entity nor parts one."""
    encoded = encoded_by_hand("ab  cd", [(0, 2), (2, 3), (4, 6)])
    task = NerTask(tokenizer, BIO, aggregation_strategy=strategy)
    found = decode(task, encoded, one_hot(["B-PER", "B-LOC", "I-PER"], BIO))
    assert "LOC" not in {e.label[-3:] for e in found}
    if strategy == "none":
        assert [e.index for e in found] == [1, 3]
    else:
        assert [(e.word, e.label) for e in found] == [("ab  cd", "PER")]
    only_space = encoded_by_hand("   ", [(0, 1)])
    assert decode(task, only_space, one_hot(["B-PER"], BIO)) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_min_score(tokenizer, strategy):
    encoded = encoded_by_hand("ab cd ef", [(0, 2), (3, 5), (6, 8)])
    probs = np.array([[0.1, 0.9, 0, 0, 0], [0.9, 0.1, 0, 0, 0], [0.4, 0.6, 0, 0, 0]]) + 1e-9
    counts = {}
    for min_score in (0.0, 0.7, 0.95):
        task = NerTask(tokenizer, BIO, aggregation_strategy=strategy, min_score=min_score)
        counts[min_score] = [e.start for e in decode(task, encoded, probs)]
    assert counts == {0.0: [0, 6], 0.7: [0], 0.95: []}


def test_scores_that_are_no_numbers(tokenizer):
    encoded = encoded_by_hand("ab", [(0, 2)])
    for value in (np.nan, np.inf):
        with pytest.raises(RecordError, match="--dtype float32"):
            NerTask(tokenizer, BIO).decode(encoded, [np.full((3, 5), value, np.float32)])


# ---- text[start:end] == word -----------------------------------------------------------------

ODD = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from(
            "  \u00a0\u3000\u200b\u200d\ufeff\u0301\u0e33ﬁ№½㎏…﷽İßŉ\U0001f469\U000e0001"
        ),
        st.sampled_from("abcXYZ019北京สวัသូ,.?!\ud800"),
    ),
    max_size=60,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(text=ODD, seed=st.integers(0, 1000))
def test_words_are_slices_of_the_text(tokenizer, strategy, text, seed):
    task = NerTask(
        tokenizer, BIO, aggregation_strategy=strategy, window_tokens=12, overlap_tokens=4
    )
    (encoded,) = task.encode([Record("x", text)])
    assert not isinstance(encoded, Failure)
    generator = np.random.default_rng(seed)
    outputs = [
        (generator.normal(size=(len(w.ids), 5)) * 3).astype(np.float32) for w in encoded.windows
    ]
    entities = task.decode(encoded, outputs)
    for entity in entities:
        assert 0 <= entity.start < entity.end <= len(text)
        if strategy == "none":
            assert entity.word == tokenizer.convert_ids_to_tokens(
                int(encoded.token_ids[entity.index - 1])
            )
        else:
            assert text[entity.start : entity.end] == entity.word
    order = [(e.start, e.end) for e in entities]
    assert order == sorted(order)


def test_entity_text_has_no_white_space_around_it(tokenizer):
    text = "  Ada \n Lovelace\u3000, 北京  "
    task = NerTask(tokenizer, BIO)
    (encoded,) = task.encode([Record("x", text)])
    rows = np.zeros((len(encoded.windows[0].ids), 5), np.float32)
    rows[:, 1] = 9.0
    words = [e.word for e in task.decode(encoded, [rows])]
    assert words == [word.strip() for word in words]
    assert re.sub(r"\s", "", "".join(words)) == re.sub(r"\s", "", text)


def test_softmax_of_large_numbers():
    rows = softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32))
    np.testing.assert_allclose(rows, [[1, 0], [0.5, 0.5]])


def test_no_tokens_no_entities(tokenizer):
    task = NerTask(tokenizer, BIO)
    (encoded,) = task.encode([Record("x", "")])
    assert task.decode(encoded, []) == []


def test_entity_is_plain():
    entity = Entity(0, 1, "PER", "A", 0.5)
    assert entity.index is None
