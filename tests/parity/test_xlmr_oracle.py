"""The oracle of the pipelines proved itself: see xlmr.py.

atol=1e-5: fp32 on a CPU, where only the order of additions differs.
"""

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from erniem_batch import ErnieMTokenizer
from erniem_batch.model.heads import HEADS

transformers = pytest.importorskip("transformers")
if transformers.__version__ != "4.40.2":
    pytest.skip("the reference is transformers 4.40.2", allow_module_level=True)

import xlmr  # noqa: E402  (needs that version)

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

LABELS_OF_TASK = {
    "token-classification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "text-classification": ("sport", "politics", "science", "culture"),
    "zero-shot-classification": xlmr.NLI_LABELS,
    "question-answering": (),
}
SENTENCES = [
    "Helen Marwick leads a survey of the River Tweed this spring.",
    "The old harbour town is known for boats, bread and quiet evenings.",
    "Nobody in Edinburgh had expected that the bridge would close so early",
    "A committee of farmers asked the government for clearer rules, and waited.",
    "internationalisation of small companies",
]
LONG = " ".join(SENTENCES[i % len(SENTENCES)] for i in range(60))
QUESTIONS = ["Who leads the survey of the river?", "What did the farmers ask for"]
# The tokenizers differ here: ErnieM cuts off digits, CJK and some punctuation.
DIFFERENT = "Im Jahr 1996 kam sie (mit 12,5 % Zinsen) nach 北京大学, Gleis 3a."


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def pipe(tokenizer: ErnieMTokenizer, tmp_path_factory: Any) -> Callable[[str], Any]:
    """The reference's pipeline of a task, on a random model."""
    made: dict[str, Any] = {}

    def load(task: str) -> Any:
        if task not in made:
            folder, head = tmp_path_factory.mktemp(task), xlmr.TASKS[task]
            xlmr.save_random_model(folder / "ours", tokenizer, head, LABELS_OF_TASK[task])
            xlmr.xlmr_copy(folder / "ours", folder / "theirs", head)
            made[task] = xlmr.load_pipeline(task, folder / "theirs")
        return made[task]

    return load


@pytest.fixture(scope="module")
def fast(tokenizer_dir: Path) -> Any:
    return xlmr.fast_tokenizer(tokenizer_dir)


# ---- model and tokenizer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "labels", "changes"),
    [
        ("TokenClassification", ["O", "B-Ort·", "人"], {}),
        ("TokenClassification", ["O"], {"layer_norm_eps": 1e-2, "hidden_act": "gelu_new"}),
        ("SequenceClassification", xlmr.NLI_LABELS, {}),
        (
            "SequenceClassification",
            ["a", "b"],
            {"problem_type": "multi_label_classification", "layer_norm_eps": 1e-2},
        ),
        ("SequenceClassification", ["a number"], {"problem_type": "regression"}),
        ("QuestionAnswering", [], {"max_position_embeddings": 40}),
    ],
)
@torch.no_grad()
def test_copy_gives_the_same_logits(tokenizer, tmp_path, head, labels, changes):
    folder = xlmr.save_random_model(tmp_path / "ours", tokenizer, head, labels, **changes)
    xlmr.xlmr_copy(folder, tmp_path / "theirs", head)
    ours = HEADS[f"ErnieMFor{head}"].from_pretrained(folder).eval()
    auto = getattr(transformers, f"AutoModelFor{head}")
    theirs = auto.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs).__name__ == f"XLMRobertaFor{head}"
    assert [theirs.config.id2label[i] for i in range(len(ours.config.labels))] == list(
        ours.config.labels
    )
    assert theirs.config.problem_type == ours.config.problem_type

    ids = torch.ones(4, 30, dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for row, length in enumerate((30, 17, 3, 2)):
        ids[row, :length] = torch.randint(3, len(tokenizer), (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 0, 2
    mask = (ids != 1).long()
    a, b = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
    for name in ("start_logits", "end_logits") if head == "QuestionAnswering" else ("logits",):
        mine, other = getattr(a, name), getattr(b, name)
        if head != "SequenceClassification":  # what padding gives is nobody's business
            mine, other = mine[mask == 1], other[mask == 1]
        assert mine.std() > 0.2
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_fast_tokenizer_gives_the_same_ids(tokenizer, fast):
    assert len(fast) == len(tokenizer)
    assert set(fast.all_special_ids) == set(tokenizer.all_special_ids)
    texts = [*SENTENCES, *QUESTIONS, LONG, "", "two  spaces\tand\nlines ", " a [SEP] b [UNK] c"]
    assert xlmr.same_ids(tokenizer, fast, texts) == [True] * len(texts)
    assert xlmr.same_ids(tokenizer, fast, [DIFFERENT, SENTENCES[0]]) == [False, True]
    pairs = [(QUESTIONS[0], LONG), (DIFFERENT, LONG), (LONG, DIFFERENT)]
    assert xlmr.same_ids(tokenizer, fast, pairs) == [True, False, False]
    for pair in (SENTENCES[:1], SENTENCES[:2]):
        assert fast(*pair)["input_ids"] == tokenizer(*pair)["input_ids"]
    call = {"truncation": "only_first", "max_length": 40}
    assert (
        fast(LONG, SENTENCES[0], **call)["input_ids"]
        == (tokenizer(LONG, SENTENCES[0], **call)["input_ids"])
    )


def test_fast_tokenizer_is_sentencepiece_itself(tokenizer, fast):
    """So whatever differs from ErnieM is ErnieM's own doing."""
    texts = [DIFFERENT, "¿Qué 3,5% (½)?", "今天 2024年", "ﷺ ㌔ e\u0301 👨‍👩‍👧 مرحبا", *SENTENCES]
    _assert_sentencepiece(tokenizer, fast, texts)
    assert sum(xlmr.same_ids(tokenizer, fast, texts)) == len(SENTENCES)
    assert xlmr.same_ids(tokenizer, fast, ["a ｶﾞ"]) == [False]  # the one known exception


def test_fast_tokenizer_is_sentencepiece_itself_on_a_corpus(shared_dir, tokenizer, fast):
    with gzip.open(shared_dir / "data/corpus/sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 3000)]
    _assert_sentencepiece(tokenizer, fast, texts)
    assert sum(xlmr.same_ids(tokenizer, fast, texts)) > 2000


def _assert_sentencepiece(tokenizer, fast, texts):
    processor = SentencePieceProcessor(model_proto=tokenizer.sentencepiece_model)
    vocab, ids = tokenizer.get_vocab(), fast(texts, add_special_tokens=False)["input_ids"]
    for pieces, actual in zip(processor.encode(texts, out_type=str), ids, strict=True):
        assert [vocab.get(piece, fast.unk_token_id) for piece in pieces] == actual


@pytest.mark.parametrize(
    "text", [*SENTENCES, LONG, "Ein jó  szép\u200bőszi nap ähnlich\u3000wíe", " tab\there\n"]
)
def test_our_tokens_are_those_of_the_reference(tokenizer, fast, text):
    """Offsets and words too, lone "▁" tokens included."""
    (theirs,) = fast([text], add_special_tokens=False).encodings
    ours = xlmr.our_tokens(tokenizer, text)
    assert list(ours.ids) == theirs.ids
    assert list(ours.offsets) == theirs.offsets
    assert list(ours.words) == theirs.words


def test_exact_offsets_keep_a_lone_underline_on_its_space(tokenizer):
    text = "Ein jó"
    lone = tokenizer.convert_tokens_to_ids("▁")
    near, exact = (xlmr.our_tokens(tokenizer, text, exact=exact) for exact in (False, True))
    place = near.ids.index(lone)
    assert near.offsets[place] == (4, 5)
    assert exact.offsets[place] == (3, 4)
    assert near.words == exact.words


@pytest.mark.parametrize(
    ("n_tokens", "size", "overlap"),
    [(50, 20, 5), (50, 20, 0), (50, 20, 19), (50, 49, 1), (50, 50, 7), (35, 20, 5), (36, 20, 5)],
)
def test_cut_is_that_of_the_reference(tokenizer, fast, n_tokens, size, overlap):
    tokens = xlmr.our_tokens(tokenizer, LONG)[:n_tokens]
    text = LONG[: tokens.offsets[-1][1]]
    call = {"truncation": "only_second", "stride": overlap, "return_overflowing_tokens": True}
    theirs = fast("A", text, max_length=size + 4 + len(tokenizer("A").input_ids) - 2, **call)
    n_before = len(tokenizer("A").input_ids) + 1
    windows = [ids[n_before:-1] for ids in theirs["input_ids"]]
    assert [list(window.ids) for window in xlmr.cut(tokens, size, overlap)] == windows


# ---- pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("ignored", [["O"], []], ids=str)
def test_tag(pipe, tokenizer, strategy, ignored):
    p = pipe("token-classification")
    options = {"aggregation_strategy": strategy, "ignore_labels": ignored}
    found = 0
    for text in SENTENCES:
        tokens = xlmr.our_tokens(tokenizer, text)
        expected = p(text, **options)
        assert xlmr.tag(p, text, [tokens], **options) == expected
        found += len(expected)
    assert found > 20
    tokens = xlmr.our_tokens(tokenizer, DIFFERENT)
    ends = [entity["end"] for entity in xlmr.tag(p, DIFFERENT, [tokens], **options)]
    assert max(ends) > 50


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
@pytest.mark.parametrize("stride", [0, 30, 200])
def test_tag_long_text(pipe, tokenizer, strategy, stride):
    p = pipe("token-classification")
    windows = xlmr.cut(xlmr.our_tokens(tokenizer, LONG), p.tokenizer.model_max_length - 2, stride)
    assert len(windows) > 1
    expected = p(LONG, aggregation_strategy=strategy, stride=stride)
    # The reference gives the shorter last window its padding too, which changes the last digits.
    actual = xlmr.tag(p, LONG, windows, aggregation_strategy=strategy)
    assert _near(actual) == _near(expected)


def _near(entities):
    return [{**e, "score": pytest.approx(float(e["score"]), abs=1e-5)} for e in entities]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": None},
        {"top_k": 2},
        {"top_k": 1},
        {"top_k": None, "function_to_apply": "sigmoid"},
        {"top_k": None, "function_to_apply": "none"},
        {"return_all_scores": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.return_all_scores. is now deprecated")
def test_classify(pipe, tokenizer, options):
    p = pipe("text-classification")
    ids = [xlmr.our_tokens(tokenizer, text).ids for text in SENTENCES]
    assert [xlmr.classify(p, i, **options) for i in ids] == p(SENTENCES, **options)
    pair = {"text": SENTENCES[0], "text_pair": SENTENCES[1]}
    assert xlmr.classify(p, ids[0], ids[1], **options) == p(pair, **options)
    assert xlmr.classify(p, xlmr.our_tokens(tokenizer, DIFFERENT).ids, top_k=None)


CANDIDATES = ["sport", "a river", "the weather of today"]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("n_labels", [1, 3])
def test_zero_shot(pipe, tokenizer, multi_label, n_labels):
    """The last text is too long: it is cut so that the hypothesis fits, for each label anew."""
    p = pipe("zero-shot-classification")
    labels, template, texts = CANDIDATES[:n_labels], "This text is about {}", [*SENTENCES, LONG]
    hypotheses = {label: xlmr.our_tokens(tokenizer, template.format(label)).ids for label in labels}
    assert n_labels == 1 or len({*map(len, hypotheses.values())}) > 1
    expected = p(texts, labels, hypothesis_template=template, multi_label=multi_label)
    for text, output in zip(texts, expected, strict=True):
        ids = xlmr.our_tokens(tokenizer, text).ids
        pairs = {label: (ids[: 508 - len(h)], h) for label, h in hypotheses.items()}
        assert xlmr.zero_shot(p, text, pairs, multi_label=multi_label) == output


QUESTION_OPTIONS = [
    {},
    {"align_to_words": False},
    {"top_k": 5},
    {"top_k": 20, "align_to_words": False},
    {"top_k": 5, "handle_impossible_answer": True},
    {"max_answer_len": 1, "top_k": 3},
    {"max_answer_len": 60, "handle_impossible_answer": True},
]
SIZES = [{}, {"max_seq_len": 100}, {"max_seq_len": 64, "doc_stride": 16}, {"doc_stride": 0}]


@pytest.mark.parametrize("options", QUESTION_OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_answer(pipe, tokenizer, options, sizes):
    p = pipe("question-answering")
    for question in QUESTIONS:
        for context in (SENTENCES[0], LONG):
            expected = p(question=question, context=context, **sizes, **options)
            assert _answer(p, tokenizer, question, context, sizes, options) == expected
        assert _answer(p, tokenizer, question, DIFFERENT, sizes, options)


def _answer(p, tokenizer, question, context, sizes, options):
    question_ids = xlmr.our_tokens(tokenizer, question).ids
    size = sizes.get("max_seq_len", min(p.tokenizer.model_max_length, 384))
    overlap = sizes.get("doc_stride", min(size // 2, 128))
    tokens = xlmr.our_tokens(tokenizer, context)
    windows = xlmr.cut(tokens, size - 4 - len(question_ids), overlap)
    return xlmr.answer(p, context, question_ids, windows, **options)


@pytest.mark.parametrize(
    ("language", "prepare"), [("en", str), ("de", str), ("tr", str), ("es", xlmr.plain)]
)
def test_answer_real_questions(shared_dir, pipe, tokenizer, fast, language, prepare):
    """XQuAD: texts that both tokenizers cut alike, many of them longer than a window."""
    with gzip.open(shared_dir / f"data/qa/{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(prepare(row["question"]), prepare(row["context"])) for row in rows]
    pairs.sort(key=lambda pair: -len(pair[1]))
    equal = xlmr.same_ids(tokenizer, fast, pairs)
    same = [pair for pair, is_same in zip(pairs, equal, strict=True) if is_same]
    assert len(same) > 300
    assert sum(len(xlmr.our_tokens(tokenizer, context).ids) > 400 for _, context in same) > 100
    p, options = pipe("question-answering"), {"top_k": 3, "handle_impossible_answer": True}
    for question, context in same[:: len(same) // 10]:
        for sizes in ({}, {"max_seq_len": 128}):
            expected = p(question=question, context=context, **sizes, **options)
            assert _answer(p, tokenizer, question, context, sizes, options) == expected
