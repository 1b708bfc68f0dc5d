"""`pipeline(...)` gives the answers of transformers 4.40.2, but for what is named PARITY.

The reference is its own pipeline on the XLM-R copy of the same weights (see xlmr.py): as it is,
tokenizer and all, where both tokenizers give the same ids; behind the tokenizer, fed with ids and
offsets of ours, where they don't. Where ours gives the k best of something, the reference is asked
for more than k, since what we leave out of its list would shorten it.

Scores agree to 1e-5: fp32 on a CPU, where only the order of additions differs.
"""

import gzip
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import LABELS
from safetensors.torch import load_file, save_file

from erniem_batch import ErnieMTokenizer, pipeline
from erniem_batch.errors import ConfigError
from erniem_batch.options import demo_data
from erniem_batch.tasks.ner import is_unspaced
from erniem_batch.tasks.qa import whole_words

transformers = pytest.importorskip("transformers")
if transformers.__version__ != "4.40.2":
    pytest.skip("the reference is transformers 4.40.2", allow_module_level=True)

import xlmr  # noqa: E402  (needs that version)

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

ATOL = 1e-5
STRATEGIES = ("none", "simple", "first", "average", "max")
TOPICS = ("sport", "politics", "science", "culture", "travel")
MODELS: dict[str, tuple[str, Sequence[str], Mapping[str, Any]]] = {
    "qa": ("question-answering", (), {}),
    "ner": ("token-classification", LABELS, {}),
    "single": ("text-classification", TOPICS, {}),
    "multi": ("text-classification", TOPICS, {"problem_type": "multi_label_classification"}),
    "one": ("text-classification", ["spam"], {}),
    "number": ("text-classification", ["stars"], {"problem_type": "regression"}),
    "nli": ("zero-shot-classification", xlmr.NLI_LABELS, {}),
    "nli_reversed": ("zero-shot-classification", xlmr.NLI_LABELS[::-1], {}),
}
SENTENCES = [
    "Helen Marwick leads a survey of the River Tweed this spring.",
    "The old harbour town is known for boats, bread and quiet evenings.",
    "Nobody in Edinburgh had expected that the bridge would close so early.",
    "A committee of farmers asked the government for clearer rules, and waited.",
]
LONG = " ".join(SENTENCES[i % 4] for i in range(50))
QUESTION = "Who leads the survey of the river?"
# Our own normaliser makes spaces of these, too; nobody's `isspace` knows them.
INVISIBLE = re.compile("[\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]")


# ---- both sides -------------------------------------------------------------------------------


class Both:
    """One random model, as a pipeline of ours and as one of the reference.

    Attributes:
        theirs: the reference's, which passes over lone "▁" tokens.
    """

    def __init__(self, folder: Path, tokenizer: ErnieMTokenizer, name: str, **changes: Any) -> None:
        self.task, labels, more = MODELS[name]
        self.tokenizer = tokenizer
        head = xlmr.TASKS[self.task]
        self._ours = folder / "ours"
        self._theirs = folder / "theirs"
        xlmr.save_random_model(self._ours, tokenizer, head, labels, **{**more, **changes})
        xlmr.xlmr_copy(self._ours, self._theirs, head)
        self.theirs = xlmr.ignore_blanks(self.plain_reference())
        self._made: dict[str, Any] = {}

    def plain_reference(self) -> Any:
        """The reference's pipeline just as it is."""
        return xlmr.load_pipeline(self.task, self._theirs)

    def ours(self, **options: Any) -> Any:
        """Our pipeline, made with some options."""
        key = repr(sorted(options.items()))
        if key not in self._made:
            own = {"device": "cpu", "n_threads": 1, **options}
            self._made[key] = pipeline(self.task, model=str(self._ours), **own)
        return self._made[key]

    def tokens(self, text: str, exact: bool = True) -> xlmr.Tokens:
        """As our tokenizer cuts the text; `exact` as in `our_tokens`."""
        return xlmr.our_tokens(self.tokenizer, text, exact=exact)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def both(tokenizer: ErnieMTokenizer, tmp_path_factory: Any) -> Callable[[str], Both]:
    made: dict[str, Both] = {}

    def make(name: str) -> Both:
        if name not in made:
            made[name] = Both(tmp_path_factory.mktemp(name), tokenizer, name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def fast(tokenizer_dir: Path) -> Any:
    return xlmr.fast_tokenizer(tokenizer_dir)


@dataclass
class Tally:
    """What was compared, for the record.

    Attributes:
        tried: texts of which it was looked whether both tokenizers give them the same ids.
        same_ids: those that they do.
        compared: calls of both sides that were compared.
        scores: how many scores that were.
        worst: the largest difference of two scores.
    """

    tried: int = 0
    same_ids: int = 0
    compared: int = 0
    scores: int = 0
    worst: float = 0.0

    def score(self, ours: float, theirs: float) -> None:
        difference = abs(ours - theirs)
        self.scores += 1
        self.worst = max(self.worst, difference)
        assert difference <= ATOL


@pytest.fixture
def tally(request: Any, record_property: Any) -> Iterator[Tally]:
    found = Tally()
    yield found
    record_property("tally", str(found))
    print(f"{request.node.name}: {found}")


# ---- texts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Texts, or (question, context), or pairs, by whether both tokenizers cut them alike."""

    same: list[Any]
    other: list[Any]


def sorted_out(tokenizer: ErnieMTokenizer, fast: Any, rows: Sequence[Any], tally: Tally) -> Rows:
    """By whether the reference may use its own tokenizer.

    Letters with combining marks of their own have other offsets there: see the test of that.
    """
    rows = [row for row in rows if not INVISIBLE.search("".join(row))]
    equal = xlmr.same_ids(tokenizer, fast, rows)
    tally.tried += len(rows)
    tally.same_ids += sum(equal)
    found = Rows([], [])
    for row, is_same in zip(rows, equal, strict=True):
        usable = is_same and unicodedata.is_normalized("NFC", "".join(row))
        (found.same if usable else found.other).append(row)
    return found


def is_spaced(text: str) -> bool:
    """Whether the reference's words are ours: U+0020 between them, and a script that uses it."""
    whole = unicodedata.normalize("NFKC", text)
    return not any(is_unspaced(c) or (c.isspace() and c != " ") for c in text + whole)


def demo_rows(task: str) -> list[dict[str, Any]]:
    files = sorted(demo_data(task).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.open(encoding="utf-8")]


def read_gz(path: Path, n: int | None = None) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(n or 10**9), strict=False)]


def spread(rows: Sequence[Any], n: int) -> list[Any]:
    """So many of them, from everywhere."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(n, len(rows)))]


def topic_texts(shared_dir: Path, n_each: int) -> list[str]:
    """Sentences of all 22 languages."""
    files = sorted((shared_dir / "data/topic").glob("*.dev.jsonl.gz"))
    return [row["text"] for file in files for row in spread(read_gz(file), n_each)]


def long_contexts(texts: Sequence[str], n_texts: int) -> list[tuple[str, str]]:
    """(first words of a text as a question, that text and those behind it)."""
    rows = []
    for i, text in enumerate(texts[: len(texts) - n_texts]):
        rows.append((text[:30].strip(), " ".join(texts[i : i + n_texts])))
    return rows


# ---- comparing --------------------------------------------------------------------------------


def same_ranking(
    ours: Sequence[tuple[Any, float]], theirs: Mapping[Any, float], k: int, tally: Tally
) -> None:
    """Ours are the k best of theirs, with their scores; equal scores may come in any order."""
    tally.compared += 1
    assert len({key for key, _ in ours}) == len(ours) == min(k, len(theirs))
    best = sorted(theirs.values(), reverse=True)
    for (key, score), place in zip(ours, best, strict=False):
        tally.score(score, theirs[key])
        tally.score(score, place)


def as_list(answers: Any) -> list[Any]:
    return [answers] if isinstance(answers, Mapping) else answers


def distinct(answers: Any, context: str, widen: bool = False) -> dict[tuple[int, int], float]:
    """Answers of the reference without what ours never gives.

    That is what scores 0, what begins or ends with a lone "▁", and what was given before.

    Args:
        widen: words that a window cuts in two are whole words.
    """
    found: dict[tuple[int, int], float] = {}
    for answer in as_list(answers):
        start, end = answer["start"], answer["end"]
        if answer["score"] == 0 or start == xlmr.NOWHERE:
            continue
        assert answer["answer"] == context[start:end]
        if widen and end:
            start, end = whole_words(context, start, end)
        found[start, end] = max(answer["score"], found.get((start, end), 0.0))
    return found


def as_ranking(answers: Any) -> list[tuple[tuple[int, int], float]]:
    return [((answer["start"], answer["end"]), answer["score"]) for answer in as_list(answers)]


# ---- question answering -----------------------------------------------------------------------


ANSWER_OPTIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 10, "handle_impossible_answer": True},
    {"top_k": 5, "align_to_words": True},
    {"top_k": 20, "max_answer_len": 60},
    {"top_k": 3, "max_answer_len": 1, "handle_impossible_answer": True},
    {"top_k": 10, "max_answer_len": 8, "align_to_words": True, "handle_impossible_answer": True},
]


def windows_of(
    both: Both,
    question: str,
    context: str,
    max_seq_len: int,
    doc_stride: int,
    align_to_words: bool = False,
) -> tuple[Sequence[int], list[xlmr.Tokens]]:
    """Ids of the question, and the windows that the reference makes of our tokens.

    Args:
        align_to_words: a word begins where it begins, not with its lone "▁" on the space before.
    """
    ids = both.tokens(question).ids
    tokens = both.tokens(context, exact=not align_to_words)
    return ids, xlmr.cut(tokens, max_seq_len - 4 - len(ids), doc_stride)


def leaves_room(both: Both, question: str, max_seq_len: int, doc_stride: int) -> bool:
    """Whether our windows overlap as they are told to; see the test of long questions."""
    return doc_stride <= 3 * (max_seq_len - 4 - len(both.tokens(question).ids)) // 4


def same_answers(
    both: Both,
    rows: Sequence[tuple[str, str]],
    sizes: Mapping[str, int],
    options: Mapping[str, Any],
    tally: Tally,
    fed: bool = False,
) -> None:
    """Our k best answers are the reference's.

    Args:
        rows: (question, context).
        fed: the reference gets our ids and offsets instead of using its tokenizer.
    """
    rows = [row for row in rows if leaves_room(both, row[0], **sizes)]
    inputs = [{"question": question, "context": context} for question, context in rows]
    found = both.ours(**sizes)(inputs, **options)
    # Many spans can be the same words.
    n_more = (100 if "align_to_words" in options else 8) * options["top_k"] + 40
    more = {"align_to_words": False, **options, "top_k": n_more}
    for (question, context), ours in zip(rows, found, strict=True):
        aligned = more["align_to_words"]
        ids, windows = windows_of(both, question, context, **sizes, align_to_words=aligned)
        if fed:
            theirs = xlmr.answer(both.theirs, context, ids, windows, **more)
        else:
            theirs = both.theirs(question=question, context=context, **sizes, **more)
        expected = distinct(theirs, context, widen=aligned and len(windows) > 1)
        same_ranking(as_ranking(ours), expected, options["top_k"], tally)
        for span, score in as_ranking(ours):  # small ones have to agree all the better
            assert score == pytest.approx(expected[span], rel=1e-3, abs=1e-7)


def each_with_some_options(
    both: Both, rows: list[Any], sizes: Mapping[str, int], tally: Tally, fed: bool = False
) -> None:
    """Every row once, all kinds of options in turn; words only where there are spaces."""
    for i, options in enumerate(ANSWER_OPTIONS):
        mine = rows[i :: len(ANSWER_OPTIONS)]
        if "align_to_words" in options:
            mine = [row for row in mine if is_spaced(row[1])]
        same_answers(both, mine, sizes, options, tally, fed)


@pytest.fixture
def demo_questions(tokenizer, fast, tally) -> Rows:
    """The package's sample questions, with contexts so long that they take several windows."""
    rows = demo_rows("qa")
    contexts = [row["context"] for row in rows]
    long = [
        (row["question"], " ".join([*contexts[i:], *contexts[:i]][:4]))
        for i, row in enumerate(rows)
    ]
    kept = [(xlmr.plain(question), xlmr.plain(context)) for question, context in long]
    return sorted_out(tokenizer, fast, [*long, *kept, (QUESTION, LONG)], tally)


SIZES = [
    {"max_seq_len": 384, "doc_stride": 128},
    {"max_seq_len": 128, "doc_stride": 32},
    {"max_seq_len": 80, "doc_stride": 0},
]


@pytest.mark.parametrize("options", ANSWER_OPTIONS, ids=str)
def test_answers(both, demo_questions, options, tally):
    """The same answers as the reference's pipeline, in one window and in many."""
    rows = [row for row in demo_questions.same if is_spaced(row[1])]
    assert len(rows) > 8
    for sizes in SIZES:
        same_answers(both("qa"), spread(rows, 2), sizes, options, tally)


def test_answers_fed_with_our_ids(both, demo_questions, tally):
    rows = spread(demo_questions.other, 18)
    assert len(rows) == 18
    for sizes in SIZES[:2]:
        each_with_some_options(both("qa"), rows, sizes, tally, fed=True)


def test_the_best_answer_alone_comes_in_the_same_form(both):
    b, call = both("qa"), {"question": QUESTION, "context": SENTENCES[0]}
    ours, theirs = b.ours()(**call), b.theirs(**call, align_to_words=False)
    assert theirs["start"] != xlmr.NOWHERE
    assert ours == {**theirs, "score": pytest.approx(theirs["score"], abs=ATOL)}
    several = [b.ours()([call, call], top_k=2), b.theirs([call, call], top_k=2)]
    assert [[type(row), len(row)] for row in several[0]] == [[list, 2]] * 2
    assert [[type(row), len(row)] for row in several[1]] == [[list, 2]] * 2


@pytest.mark.slow
def test_answers_to_many_questions(shared_dir, both, tokenizer, fast, tally):
    """XQuAD, whole contexts, a third of them longer than 400 tokens."""
    rows = []
    for language in ("en", "de", "tr", "ru", "ar", "es"):
        prepare = xlmr.plain if language == "es" else str
        read = spread(read_gz(shared_dir / f"data/qa/{language}.jsonl.gz"), 300)
        pairs = [(prepare(row["question"]), prepare(row["context"])) for row in read]
        same = sorted_out(tokenizer, fast, pairs, tally).same
        same.sort(key=lambda pair: -len(pair[1]))
        rows += [*same[:20], *spread(same[20:], 40)]
    assert len(rows) >= 300
    assert sum(len(xlmr.our_tokens(tokenizer, context).ids) > 400 for _, context in rows) > 100
    for sizes in (*SIZES[:2], {"max_seq_len": 512, "doc_stride": 128}):
        each_with_some_options(both("qa"), rows, sizes, tally)
        rows = [*rows[1:], rows[0]]  # other options for each


@pytest.mark.slow
def test_answers_to_many_questions_fed_with_our_ids(shared_dir, both, tokenizer, fast, tally):
    """All languages of XQuAD, and contexts made of sentences in those that it lacks."""
    rows = []
    for file in sorted((shared_dir / "data/qa").glob("*.jsonl.gz")):
        pairs = [(row["question"], row["context"]) for row in spread(read_gz(file), 250)]
        rows += sorted_out(tokenizer, fast, pairs, tally).other[:30]
    for language in ("ja", "th", "ko", "fa", "bn", "zh"):
        texts = [row["text"] for row in read_gz(shared_dir / f"data/topic/{language}.dev.jsonl.gz")]
        rows += sorted_out(tokenizer, fast, long_contexts(texts, 8), tally).other[:20]
    assert len(rows) >= 200
    for sizes in SIZES[:2]:
        each_with_some_options(both("qa"), rows, sizes, tally, fed=True)
        rows = [*rows[1:], rows[0]]


# ---- question answering: what is deliberately different ---------------------------------------


def test_parity_an_answer_of_two_windows_is_given_once(both):
    b, call = both("qa"), {"question": QUESTION, "context": LONG, **SIZES[1]}
    theirs = as_ranking(b.theirs(**call, top_k=40, align_to_words=False))
    assert len({span for span, _ in theirs}) < len(theirs)
    ours = as_ranking(b.ours(**SIZES[1])(QUESTION, LONG, top_k=40))
    assert len({span for span, _ in ours}) == len(ours) == 40


def test_parity_every_answer_is_a_span_of_the_context(both):
    """A large top_k gives all spans there are, where the reference adds some that score 0."""
    b, context = both("qa"), SENTENCES[0]
    call = {"question": QUESTION, "context": context, "top_k": 5000, "max_answer_len": 4}
    theirs, ours = b.theirs(**call, align_to_words=False), b.ours()(**call)
    assert {"score": 0.0, "start": 0, "end": 0, "answer": ""} in theirs
    assert all(answer["score"] > 0 and answer["answer"] for answer in ours)
    same_ranking(as_ranking(ours), distinct(theirs, context), 5000, Tally())


def test_parity_no_answer_begins_or_ends_with_a_space(both):
    b, context = both("qa"), "Ein jó nap, ein szép őszi nap."
    ids, windows = windows_of(b, QUESTION, context, 384, 128)
    plain, options = b.plain_reference(), {"top_k": 1000, "align_to_words": False}
    theirs = xlmr.answer(plain, context, ids, windows, **options)
    assert any(answer["answer"].startswith(" ") for answer in theirs)
    assert any(answer["answer"].endswith(" ") for answer in theirs)
    ours = b.ours()(QUESTION, context, top_k=1000)
    assert ours
    assert all(answer["answer"] == answer["answer"].strip() for answer in ours)


def test_parity_words_are_whole_only_if_asked_for(both):
    b, call = both("qa"), {"question": QUESTION, "context": SENTENCES[1], "top_k": 30}
    default, reference = b.ours()(**call), b.plain_reference()(**call)
    assert any(not is_whole(answer, SENTENCES[1]) for answer in default)
    assert all(is_whole(answer, SENTENCES[1]) for answer in reference)
    assert all(is_whole(answer, SENTENCES[1]) for answer in b.ours()(**call, align_to_words=True))


def is_whole(answer: Mapping[str, Any], context: str) -> bool:
    """Whether it stands between spaces."""
    before, after = context[: answer["start"]][-1:], context[answer["end"] :][:1]
    return before in ("", " ") and after in ("", " ")


def test_parity_words_of_unspaced_scripts_stay_parts(both):
    """Where the reference's word is the whole sentence."""
    b, context = both("qa"), "東日本旅客鉄道は仙台と盛岡を結ぶ列車を五月の連休に運行する。"
    options = {"top_k": 8, "align_to_words": True, "max_answer_len": 4}
    ids, windows = windows_of(b, QUESTION, context, 384, 128)
    theirs = xlmr.answer(b.theirs, context, ids, windows, **options)
    assert {answer["answer"] for answer in theirs} - {""} == {context}
    ours = b.ours()(QUESTION, context, **options)
    assert all(len(answer["answer"]) < len(context) / 2 for answer in ours)


def test_parity_a_word_that_a_window_cuts_stays_whole(both):
    context = " ".join(["internationalisation"] * 60)
    b, options = both("qa"), {"top_k": 30, "align_to_words": True}
    sizes = {"max_seq_len": 64, "doc_stride": 16}
    theirs = b.theirs(question=QUESTION, context=context, **sizes, **{**options, "top_k": 3000})
    spans = [a for a in theirs if a["score"] > 0 and a["start"] != xlmr.NOWHERE]
    assert any(not is_whole(answer, context) for answer in spans)
    ours = b.ours(**sizes)(QUESTION, context, **options)
    assert all(is_whole(answer, context) for answer in ours)


def test_as_many_answers_as_asked_for_when_words_are_whole(both):
    """There once were fewer: what became the same word counted towards top_k."""
    b, call = both("qa"), {"question": QUESTION, "context": LONG, "top_k": 20}
    assert len({span for span, _ in as_ranking(b.theirs(**call))}) < 20
    ours = as_ranking(b.ours()(**call, align_to_words=True))
    assert len({span for span, _ in ours}) == 20


def test_parity_windows_have_512_tokens_by_default(both):
    b = both("qa")
    context = LONG[: LONG.index(" ", 1100)]
    assert 400 < len(b.tokens(context).ids) < 480
    call = {"question": QUESTION, "context": context}
    ours = as_ranking(b.ours()(**call, top_k=5))
    theirs, wide = (
        distinct(b.theirs(**call, **size, top_k=500, align_to_words=False), context)
        for size in ({}, {"max_seq_len": 512})
    )
    same_ranking(ours, wide, 5, Tally())
    assert any(abs(theirs.get(span, 0.0) - score) > ATOL for span, score in ours)


def test_parity_the_overlap_shrinks_beside_a_long_question(both):
    """To three quarters of the room; the reference panics where the overlap is all of the room."""
    b, sizes = both("qa"), {"max_seq_len": 128, "doc_stride": 100}
    question = " ".join(SENTENCES[:3])
    ids = b.tokens(question).ids
    room = 128 - 4 - len(ids)
    assert 16 <= room <= 100
    with pytest.raises(BaseException, match="stride") as caught:
        b.theirs(question=question, context=LONG, **sizes)
    assert caught.type.__name__ == "PanicException"
    windows = xlmr.cut(b.tokens(LONG), room, 3 * room // 4)
    theirs = xlmr.answer(b.theirs, LONG, ids, windows, top_k=500, align_to_words=False)
    ours = b.ours(**sizes)(question, LONG, top_k=5)
    same_ranking(as_ranking(ours), distinct(theirs, LONG), 5, Tally())


def test_no_answer_competes_with_its_lowest_score_of_all_windows(both):
    """In both; and takes its place in the list wherever that puts it."""
    b, context, every = both("qa"), LONG[:600], 10**5
    call = {"handle_impossible_answer": True, "top_k": every}
    ids, windows = windows_of(b, QUESTION, context, **SIZES[1])
    options = {**call, "align_to_words": False}
    of_each = [null_score(xlmr.answer(b.theirs, context, ids, [w], **options)) for w in windows]
    assert max(of_each) > 2 * min(of_each)
    theirs = null_score(b.theirs(question=QUESTION, context=context, **SIZES[1], **options))
    ours = b.ours(**SIZES[1])(QUESTION, context, **call)
    assert null_score(ours) == pytest.approx(theirs, rel=1e-4)
    assert null_score(ours) == pytest.approx(min(of_each), rel=1e-4)
    scores = [answer["score"] for answer in ours]
    assert scores == sorted(scores, reverse=True)


def null_score(answers: Sequence[Mapping[str, Any]]) -> float:
    """The score of the answer that there is none."""
    return max(a["score"] for a in answers if (a["start"], a["end"]) == (0, 0))


# ---- text classification ----------------------------------------------------------------------


LABEL_MODELS = ("single", "multi", "one", "number")
FUNCTIONS = (None, "softmax", "sigmoid", "none")
Item = str | tuple[str, str]


def as_input(item: Item) -> Any:
    return item if isinstance(item, str) else {"text": item[0], "text_pair": item[1]}


def same_labels(
    both: Both, items: Sequence[Item], function: str | None, tally: Tally, fed: bool = False
) -> None:
    """All labels, the best two and the best one have the reference's scores."""
    options = {} if function is None else {"function_to_apply": function}
    inputs = [as_input(item) for item in items]
    every = both.ours()(inputs, top_k=None, **options)
    two = both.ours()(inputs, top_k=2, **options)
    best = both.ours()(inputs, **options)
    for item, *ours in zip(items, every, two, best, strict=True):
        if fed:
            texts = [item] if isinstance(item, str) else item
            ids = [both.tokens(text).ids for text in texts]
            theirs = xlmr.classify(both.theirs, *ids, top_k=None, **options)
        else:
            theirs = both.theirs(as_input(item), top_k=None, **options)
        expected = {label["label"]: label["score"] for label in theirs}
        for k, found in zip((len(expected), 2, 1), ours, strict=True):
            ranking = [(label["label"], label["score"]) for label in as_list(found)]
            same_ranking(ranking, expected, k, tally)


def with_pairs(texts: Sequence[str]) -> list[Item]:
    """Texts, and every third one with the next as its pair."""
    return [*texts, *zip(texts[::3], texts[1::3], strict=False)]


def functions_of(name: str) -> Sequence[str | None]:
    """Regression without being told what to apply differs: see below."""
    return FUNCTIONS[1:] if name == "number" else FUNCTIONS


@pytest.fixture
def demo_texts(tokenizer, fast, tally) -> Rows:
    """The package's sample sentences, 20 languages and more, and pairs of them."""
    texts = [row["text"] for task in ("classify", "ner") for row in demo_rows(task)]
    texts = [text for text in texts if len(text) < 300]  # what one window holds
    return sorted_out(tokenizer, fast, with_pairs(texts), tally)


@pytest.mark.parametrize("name", LABEL_MODELS)
def test_labels(both, demo_texts, name, tally):
    """Of texts and of pairs, for every kind of model and function."""
    assert {type(item) for item in demo_texts.same} == {str, tuple}
    for function in functions_of(name):
        same_labels(both(name), spread(demo_texts.same, 5), function, tally)
        same_labels(both(name), spread(demo_texts.other, 5), function, tally, fed=True)


@pytest.mark.parametrize("more", [{}, {"top_k": 1}, {"top_k": 3}, {"top_k": None}], ids=str)
@pytest.mark.parametrize(
    "inputs",
    [
        SENTENCES[0],
        SENTENCES[:1],
        SENTENCES,
        {"text": SENTENCES[0], "text_pair": SENTENCES[1]},
        [{"text": SENTENCES[0], "text_pair": SENTENCES[1]}],
        [{"text": SENTENCES[0]}],
    ],
    ids=["text", "list of one", "list", "pair", "list of one pair", "a mapping without a pair"],
)
def test_labels_come_in_the_same_form(both, inputs, more):
    ours, theirs = both("single").ours()(inputs, **more), both("single").theirs(inputs, **more)
    assert rounded(ours) == rounded(theirs)


def rounded(answer: Any) -> Any:
    """Nested answers with scores that compare as equal within ATOL."""
    if isinstance(answer, Mapping):
        return {key: rounded(value) for key, value in answer.items()}
    if isinstance(answer, list):
        return [rounded(value) for value in answer]
    return round(answer, 4) if isinstance(answer, float) else answer


def topic_items(shared_dir, tokenizer, fast, tally) -> Rows:
    return sorted_out(tokenizer, fast, with_pairs(topic_texts(shared_dir, 33)), tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", LABEL_MODELS)
def test_labels_of_many_texts(shared_dir, both, tokenizer, fast, name, tally):
    """Sentences of 22 languages, and pairs of them."""
    rows = topic_items(shared_dir, tokenizer, fast, tally)
    same, other = spread(rows.same, 400), spread(rows.other, 250)
    assert len(same) >= 300
    assert len(other) >= 200
    for function in functions_of(name):
        same_labels(both(name), same, function, tally)
        same_labels(both(name), other, function, tally, fed=True)


# ---- text classification: what is deliberately different --------------------------------------


def test_parity_long_texts_are_read_to_their_end(both):
    """In windows; the reference fails, or cuts them if told to, which pooling "first" does too."""
    b = both("single")
    with pytest.raises(RuntimeError, match="size of the tensor"):
        b.theirs(LONG)
    for text in (LONG, LONG[: len(LONG) // 2]):
        cut = b.theirs(text, truncation=True)[0]
        first = b.ours(pooling="first")(text)[0]
        assert first["label"] == cut["label"]
        assert first["score"] == pytest.approx(cut["score"], abs=ATOL)
    tail = LONG[:-30] + " but nothing of this holds for sport."
    assert b.ours(pooling="first")(tail) == b.ours(pooling="first")(LONG)
    assert b.ours()(tail) != b.ours()(LONG)


def test_parity_regression_gives_the_number_itself(both):
    """Where the reference puts it through a sigmoid."""
    b = both("number")
    for text in SENTENCES:
        (ours,), (theirs,) = b.ours()(text), b.theirs(text)
        (number,) = b.theirs(text, function_to_apply="none")
        assert ours == {"label": "stars", "score": pytest.approx(number["score"], abs=ATOL)}
        assert theirs["score"] == pytest.approx(1 / (1 + np.exp(-number["score"])), abs=ATOL)


def test_parity_huge_logits_are_no_trouble(tokenizer, tmp_path):
    """exp overflows in the reference's zero-shot pipeline: all scores are nan."""
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    b = Both(tmp_path, tokenizer, "nli")
    change_weights(folders[0], 500.0, "classifier.")
    xlmr.xlmr_copy(*folders, "SequenceClassification")
    call = {"sequences": SENTENCES[0], "candidate_labels": ["sport", "a river"]}
    with np.errstate(all="ignore"):
        theirs = b.plain_reference()(**call)
    assert np.isnan(theirs["scores"]).any()
    assert sum(b.ours()(**call)["scores"]) == pytest.approx(1.0)


def change_weights(folder: Path, factor: float, *names: str) -> None:
    """Multiplies what has one of these in its name in a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if any(part in name for part in names):
            weights[name] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- zero-shot --------------------------------------------------------------------------------


CANDIDATES = ["sport", "a river", "the weather of today", "Wissenschaft", "büyük şehir"]
TEMPLATES = ("This example is {}.", "It is about {}, is it", "{}")
ZERO_SHOT: list[tuple[int, str, bool]] = [
    (5, TEMPLATES[0], False),
    (5, TEMPLATES[1], True),
    (3, TEMPLATES[2], True),
    (1, TEMPLATES[0], False),
    (1, TEMPLATES[1], True),
    (2, TEMPLATES[1], False),
]


def same_candidates(
    both: Both, texts: Sequence[str], case: tuple[int, str, bool], tally: Tally, fed: bool = False
) -> None:
    """The candidate labels of each text have the reference's scores, best first."""
    n_labels, template, multi_label = case
    labels = CANDIDATES[:n_labels]
    call = {"hypothesis_template": template, "multi_label": multi_label}
    claims = {label: both.tokens(template.format(label)).ids for label in labels}
    found = both.ours()(list(texts), labels, **call)
    for text, ours in zip(texts, found, strict=True):
        if fed:
            ids = both.tokens(text).ids
            pairs = {label: (ids, claim) for label, claim in claims.items()}
            theirs = xlmr.zero_shot(both.theirs, text, pairs, multi_label=multi_label)
        else:
            theirs = both.theirs(text, labels, **call)
        assert ours["sequence"] == theirs["sequence"] == text
        ranking = list(zip(ours["labels"], ours["scores"], strict=True))
        expected = dict(zip(theirs["labels"], theirs["scores"], strict=True))
        same_ranking(ranking, expected, n_labels, tally)


def only_texts(rows: Rows) -> Rows:
    same, other = ([row for row in r if isinstance(row, str)] for r in (rows.same, rows.other))
    return Rows(same, other)


@pytest.mark.parametrize("case", ZERO_SHOT, ids=str)
@pytest.mark.parametrize("name", ["nli", "nli_reversed"])
def test_candidates(both, demo_texts, name, case, tally):
    """Against each other and one by one, whichever label of the model is entailment."""
    rows = only_texts(demo_texts)
    same_candidates(both(name), spread(rows.same, 4), case, tally)
    same_candidates(both(name), spread(rows.other, 4), case, tally, fed=True)


def test_candidates_are_given_in_the_same_ways(both):
    b = both("nli")
    for labels in ("sport, a river", ["sport", "a river"], "sport"):
        for sequences in (SENTENCES[0], SENTENCES[:2]):
            ours, theirs = b.ours()(sequences, labels), b.theirs(sequences, labels)
            assert rounded(ours) == rounded(theirs)
    for wrong in ([], ""):
        with pytest.raises(ConfigError):
            b.ours()(SENTENCES[0], wrong)
        with pytest.raises(ValueError, match="at least one label"):
            b.theirs(SENTENCES[0], wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nli", "nli_reversed"])
def test_candidates_of_many_texts(shared_dir, both, tokenizer, fast, name, tally):
    """Sentences of 22 languages."""
    rows = only_texts(topic_items(shared_dir, tokenizer, fast, tally))
    same, other = spread(rows.same, 350), spread(rows.other, 220)
    assert len(same) >= 300
    assert len(other) >= 200
    for case in ZERO_SHOT:
        same_candidates(both(name), same, case, tally)
        same_candidates(both(name), other, case, tally, fed=True)


def test_parity_long_texts_beside_labels_are_read_to_their_end(both):
    """The reference cuts them silently, as pooling "first" does."""
    b, labels = both("nli"), CANDIDATES[:3]
    theirs = b.theirs(LONG, labels)
    first = b.ours(pooling="first")(LONG, labels)
    expected = dict(zip(theirs["labels"], theirs["scores"], strict=True))
    same_ranking(list(zip(first["labels"], first["scores"], strict=True)), expected, 3, Tally())
    assert rounded(b.ours()(LONG, labels)["scores"]) != rounded(theirs["scores"])
    assert b.theirs(LONG + " And more.", labels)["scores"] == theirs["scores"]


def test_parity_zero_shot_needs_an_entailment_label(tokenizer, tmp_path, monkeypatch):
    """The reference takes the last label there is."""
    monkeypatch.setitem(MODELS, "topics", ("zero-shot-classification", TOPICS, {}))
    b = Both(tmp_path, tokenizer, "topics")
    assert b.theirs.entailment_id == -1
    assert b.theirs(SENTENCES[0], ["sport", "a river"])["scores"]
    with pytest.raises(ConfigError, match="entailment"):
        b.ours()(SENTENCES[0], ["sport", "a river"])


def test_parity_a_candidate_that_is_given_twice_counts_once(both):
    """In the reference it takes its share twice."""
    b, call = both("nli"), {"sequences": SENTENCES[0]}
    ours, once, twice = (
        b.ours()(**call, candidate_labels=["sport", "a river", "sport"]),
        b.theirs(**call, candidate_labels=["sport", "a river"]),
        b.theirs(**call, candidate_labels=["sport", "a river", "sport"]),
    )
    assert rounded(ours) == rounded(once)
    assert len(twice["labels"]) == 3


# ---- token classification ---------------------------------------------------------------------


def same_entities(
    both: Both, texts: Sequence[str], strategy: str, tally: Tally, fed: bool = False
) -> int:
    """Entities of each text are the reference's; gives their number."""
    n_found = 0
    label = "entity" if strategy == "none" else "entity_group"
    found = both.ours()(list(texts), aggregation_strategy=strategy)
    for text, ours in zip(texts, found, strict=True):
        if fed:
            windows = [both.tokens(text)]
            theirs = xlmr.tag(both.theirs, text, windows, aggregation_strategy=strategy)
        else:
            theirs = both.theirs(text, aggregation_strategy=strategy)
        names = (label, "start", "end", *(["index"] if strategy == "none" else []))
        assert places(ours, names) == places(theirs, names)
        for mine, other in zip(ours, theirs, strict=True):
            tally.score(mine["score"], float(other["score"]))
            if strategy == "none" and mine["word"] != "[UNK]":
                assert mine["word"] == other["word"]
        tally.compared += 1
        n_found += len(ours)
    return n_found


def places(entities: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[Any]]:
    return [[entity[name] for name in names] for entity in entities]


def fitting(texts: Sequence[str], strategy: str) -> list[str]:
    """Those whose words are the same in both, if words matter."""
    if strategy in ("none", "simple"):
        return list(texts)
    return [text for text in texts if is_spaced(text)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities(both, demo_texts, strategy, tally):
    """The same entities, however tokens become entities."""
    rows = only_texts(demo_texts)
    same, other = fitting(rows.same, strategy), fitting(rows.other, strategy)
    assert same_entities(both("ner"), spread(same, 20), strategy, tally) > 100
    assert same_entities(both("ner"), spread(other, 20), strategy, tally, fed=True) > 100


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_of_many_texts(shared_dir, both, tokenizer, fast, strategy, tally):
    """Common Voice, 97 languages, and longer sentences of 22."""
    lines = read_gz(shared_dir / "data/corpus/sample.jsonl.gz", 1500)
    texts = [*(line["text"] for line in lines), *topic_texts(shared_dir, 40)]
    rows = sorted_out(tokenizer, fast, texts, tally)
    same, other = fitting(rows.same, strategy), fitting(rows.other, strategy)
    assert len(same) >= 300
    assert len(other) >= 200
    assert same_entities(both("ner"), spread(same, 1500), strategy, tally) > 1000
    assert same_entities(both("ner"), spread(other, 800), strategy, tally, fed=True) > 1000


def test_entities_come_in_the_same_form(both):
    b = both("ner")
    for texts in (SENTENCES[0], SENTENCES[:1], SENTENCES):
        for strategy in ("none", "simple"):
            call = {"aggregation_strategy": strategy}
            ours, theirs = b.ours()(texts, **call), b.theirs(texts, **call)
            assert len(ours) == len(theirs)
            if isinstance(texts, list):
                ours, theirs = ours[0], theirs[0]
            assert [set(entity) for entity in ours] == [set(entity) for entity in theirs]


# ---- token classification: what is deliberately different -------------------------------------


def spans(entities: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return [(entity["start"], entity["end"]) for entity in entities]


def test_parity_white_space_has_no_label(both):
    """The reference takes a lone "▁" for an entity as soon as the model says so."""
    b, text = both("ner"), "Ein jó nap, ein szép őszi nap, wie jó."
    call = {"aggregation_strategy": "none"}
    theirs, ours = b.plain_reference()(text, **call), b.ours()(text, **call)
    assert "▁" in [entity["word"] for entity in theirs]
    assert "▁" not in [entity["word"] for entity in ours]
    assert places(ours, ["index"]) == places([e for e in theirs if e["word"] != "▁"], ["index"])


def test_parity_words_are_the_text_itself(both, demo_texts):
    """Where the reference puts tokens together, which are normalised: "，" becomes ","."""
    b, n_other = both("ner"), 0
    for text in spread(only_texts(demo_texts).other, 40):
        theirs = xlmr.tag(b.theirs, text, [b.tokens(text)], aggregation_strategy="simple")
        for ours, other in zip(b.ours()(text), theirs, strict=True):
            assert ours["word"] == text[ours["start"] : ours["end"]]
            n_other += "".join(other["word"].split()) != "".join(ours["word"].split())
    assert n_other


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
def test_parity_any_white_space_ends_a_word(both, strategy):
    """Without U+0020, the whole text is one word to the reference."""
    b, call = both("ner"), {"aggregation_strategy": strategy}
    text = " ".join(SENTENCES)
    tabs = text.replace(" ", "\t")
    assert len(b.theirs(tabs, **call)) <= 1 < len(b.theirs(text, **call))
    assert spans(b.ours()(tabs, **call)) == spans(b.ours()(text, **call))
    assert spans(b.ours()(tabs, **call)) == spans(b.theirs(text, **call))


def test_parity_tokens_of_unspaced_scripts_are_words(both):
    b, text = both("ner"), "東日本旅客鉄道は仙台と盛岡を結ぶ列車を五月の連休に運行する。"
    tokens = b.tokens(text)
    theirs = xlmr.tag(b.theirs, text, [tokens], aggregation_strategy="first")
    simple, first = (b.ours()(text, aggregation_strategy=s) for s in ("simple", "first"))
    assert len(theirs) < len(first)
    assert first == simple


def test_parity_bioes_labels_are_understood(tokenizer, tmp_path, monkeypatch):
    """To the reference, the end of an entity is another kind of entity."""
    labels = ["O", "B-PER", "I-PER", "E-PER", "S-PER"]
    monkeypatch.setitem(MODELS, "bioes", ("token-classification", labels, {}))
    b, text = Both(tmp_path, tokenizer, "bioes"), " ".join(SENTENCES)
    tokens = {entity["index"]: entity for entity in b.ours()(text, aggregation_strategy="none")}
    both_ends = [
        (entity["start"], tokens[index + 1]["end"])
        for index, entity in tokens.items()
        if entity["entity"] == "B-PER" and tokens.get(index + 1, {}).get("entity") == "E-PER"
    ]
    assert both_ends
    assert set(both_ends) <= set(spans(b.ours()(text)))
    assert not set(both_ends) & set(spans(b.theirs(text, aggregation_strategy="simple")))


def test_parity_windows_leave_no_trace(tokenizer, tmp_path, monkeypatch):
    """If each token is labelled by itself, windows can't matter; in the reference they do."""
    monkeypatch.setitem(MODELS, "runs", ("token-classification", ["O", "I-PER"], {}))
    b = Both(tmp_path, tokenizer, "runs")
    change_weights(tmp_path / "ours", 0.0, "position_embeddings", "self_attn.out_proj")
    xlmr.xlmr_copy(tmp_path / "ours", tmp_path / "theirs", "TokenClassification")
    theirs, call = xlmr.ignore_blanks(b.plain_reference()), {"aggregation_strategy": "simple"}
    text = LONG[:1200]
    whole = spans(theirs(text, **call))
    assert spans(b.ours()(text)) == whole
    assert spans(b.ours(window_tokens=34, overlap_tokens=2)(text)) == whole
    theirs.tokenizer.model_max_length = 34
    assert spans(theirs(text, **call, stride=2)) != whole


def test_parity_marks_belong_to_their_letter(both):
    """The reference's tokens end before a combining mark that SentencePiece composed."""
    b, call = both("ner"), {"aggregation_strategy": "none"}
    text = unicodedata.normalize("NFD", "Hélène Lefébure va à Orléans, été à Genève.")
    ours, theirs = b.ours()(text, **call), b.theirs(text, **call)
    assert places(ours, ["index", "entity", "start"]) == places(
        theirs, ["index", "entity", "start"]
    )
    assert spans(ours) != spans(theirs)
    assert not any(unicodedata.combining(c) for e in ours for c in text[e["end"] :][:1])
    assert any(unicodedata.combining(c) for e in theirs for c in text[e["end"] :][:1])


def test_parity_an_unknown_token_is_shown_as_such(both):
    """Strategy `none`; the reference shows the text there."""
    b, call = both("ner"), {"aggregation_strategy": "none"}
    text = "Ꙗ ꙋ ꙗ Ꙟ ꙟ ꙑ and ꙃ for Ꙁ or Ꙅ"
    theirs = xlmr.tag(b.theirs, text, [b.tokens(text)], **call)
    words = {e["index"]: e["word"] for e in b.ours()(text, **call)}
    assert words.keys() == {e["index"] for e in theirs}
    unknown = {e["index"]: e["word"] for e in theirs if words[e["index"]] == "[UNK]"}
    assert unknown
    assert "[UNK]" not in unknown.values()
