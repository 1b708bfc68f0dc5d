"""Work is counted before it is done, for requests and for rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.cache import ByteCache
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import (
    ConfigError,
    RecordError,
    RequestTooLargeError,
    WorkCancelledError,
)
from erniem_batch.options import ClassifyOptions, EmbedOptions, ExtractOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Prediction, Record
from erniem_batch.text.windows import PAIR_SPECIALS, WindowMaker
from erniem_batch.work import RequestWork, Work

SIZES = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 256, "n_threads": 1}


# ---- counting -----------------------------------------------------------------------------------


def total(windows):
    return sum(len(window.ids) for window in windows), len(windows)


@given(
    st.integers(0, 300),
    st.integers(0, 60),
    st.integers(40, 80),
    st.integers(0, 30),
    st.booleans(),
)
def test_windows_are_counted_as_they_are_built(n_text, n_prompt, size, overlap, last_is_full):
    """Tokens and windows are right without one window being built."""
    maker = WindowMaker(0, 2, size, overlap)
    text, prompt = np.arange(n_text), np.arange(n_prompt)
    try:
        built = maker.behind(prompt, text, what="it", last_is_full=last_is_full)
    except RecordError:
        with pytest.raises(RecordError, match="shorten it"):
            maker.count(n_prompt + PAIR_SPECIALS, [n_text], what="it", last_is_full=last_is_full)
        return
    counted = maker.count(n_prompt + PAIR_SPECIALS, [n_text], what="it", last_is_full=last_is_full)
    assert counted == total(built)
    assert maker.count_single(n_text) == total(maker.single(text))
    if last_is_full:
        assert counted == total(maker.before(text, prompt, what="it"))
    try:
        pair = maker.pair(text, prompt, what="it")
    except RecordError:
        return
    assert maker.count_pair(n_text, n_prompt, what="it") == total(pair)
    firsts = maker.pair(text, prompt, what="it", only_first=True)
    assert [w.ids.tolist() for w in firsts] == [w.ids.tolist() for w in pair if w.first == 0]


@given(st.lists(st.integers(0, 120), min_size=1, max_size=9), st.integers(0, 20))
def test_slices_are_counted_as_they_are_built(lengths, n_prompt):
    maker = WindowMaker(0, 2, 48, 12)
    ends = np.cumsum(lengths).tolist()
    slices = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    built = maker.behind(np.arange(n_prompt), np.arange(ends[-1]), what="it", slices=slices)
    assert maker.count(n_prompt + PAIR_SPECIALS, lengths, what="it") == total(built)


def test_a_request_is_refused_and_a_row_fails_with_the_numbers():
    row = Work(max_tokens=100)
    row.charge(60, 2)
    with pytest.raises(RecordError, match="at least 101 tokens in windows; at most 100 a row"):
        row.charge(41, 1)
    row.charge(40, 1)
    request = RequestWork(max_tokens=100, max_windows=3)
    with pytest.raises(RequestTooLargeError, match="at least 4 windows; at most 3 a request"):
        request.charge(50, 4)
    with pytest.raises(RequestTooLargeError, match="1601 characters of prompts; at most 1600"):
        request.require_room_for_text(1601)
    request.charge_spans(request.max_spans)
    with pytest.raises(RequestTooLargeError, match="spans as candidates"):
        request.charge_spans(1)
    request.cancel()
    for step in (request.check, lambda: request.charge(0, 0), lambda: request.charge_spans(0)):
        with pytest.raises(WorkCancelledError):
            step()


# ---- rows of a batch run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tmp_path_factory, tokenizer):
    from fakes import save_tiny_models

    folders = save_tiny_models(tmp_path_factory.mktemp("models"), tokenizer)

    def load(name, options, **settings):
        config = PredictorConfig(
            model=str(folders[name]), options=options, device="cpu", **{**SIZES, **settings}
        )
        return Predictor.load(config)

    return load


def small(record_id, text, max_tokens=2000, **fields):
    """A row with a small limit, since one that reaches the real one takes long to read."""
    return Record(record_id, text, fields, Work(max_tokens=max_tokens))


@pytest.mark.parametrize("compat", [False, True])
def test_a_bomb_row_becomes_a_dead_letter_and_others_do_not(load, compat):
    """2,000 names by a long text, as a schema column may bring them."""
    options = ExtractOptions(schema_lang="en", taskflow_compat=compat)
    predictor = load("extract", options, overlap_tokens=8)
    names = [f"name {i}" for i in range(2000)]
    bomb = small("bomb", "in Berlin " * 40, schema=names)
    fine = [small(f"fine {i}", "in Berlin", schema="City") for i in range(2)]
    first, failed, last = predictor.predict([fine[0], bomb, fine[1]])
    assert isinstance(first, Prediction)
    assert isinstance(last, Prediction)
    assert isinstance(failed, Failure)
    assert (failed.stage, failed.error) == ("encode", "RecordError")
    assert "at most 2000 a row" in failed.reason
    assert bomb.work.n_windows < 2000, "nothing was built for it"


def test_the_real_limit_of_a_row_is_checked_before_memory_is_asked_for(load):
    """300,000 names by 1,000 tokens are more than 16 million, and take no time to refuse."""
    predictor = load("extract", ExtractOptions(schema=[f"n{i}" for i in range(20_000)]))
    (failed,) = predictor.predict([Record("bomb", "in Berlin " * 500)])
    assert isinstance(failed, Failure)
    assert "at most 16777216 a row" in failed.reason


def test_a_row_may_be_read_again_and_again(load):
    predictor = load("extract", ExtractOptions(schema="a", schema_lang="en"))
    record = small("0", "in Berlin und London", 50)
    outcomes = [predictor.predict([record])[0] for _ in range(10)]
    assert all(isinstance(outcome, Prediction) for outcome in outcomes)


def test_follow_up_questions_are_charged_before_they_are_put_together(load):
    options = ExtractOptions(
        schema={"a": {"b": {"c": {"d": "e"}}}}, position_prob=0, schema_lang="en"
    )
    predictor = load("extract", options)
    record = small("0", "in Berlin und London, a b c d e f g h", 5000)
    (failed,) = predictor.predict([record])
    assert isinstance(failed, Failure)
    assert failed.stage == "decode"
    assert "at most 5000 a row" in failed.reason


def test_follow_up_questions_with_long_names_are_charged_by_characters(load):
    children = [f"{'x' * 20_000}{i}" for i in range(20)]
    options = ExtractOptions(schema={"a": children}, position_prob=0, schema_lang="en")
    (failed,) = load("extract", options).predict([small("0", "a b c d e f g h", 50_000)])
    assert isinstance(failed, Failure)
    assert "characters of prompts; at most 800000 a row" in failed.reason


def test_every_span_of_a_window_is_counted_before_it_is_paired(load):
    options = ExtractOptions(schema="a", position_prob=0, span_pairing="all")
    predictor = load("extract", options, window_tokens=256, max_batch_tokens=256)
    fine, failed = predictor.predict([Record("0", "a b " * 20), Record("1", "a b " * 200)])
    assert isinstance(fine, Prediction)
    assert isinstance(failed, Failure)
    assert "spans in one window; at most 8192: raise position_prob" in failed.reason


def test_labels_and_prefixes_are_measured_before_they_are_put_together(load):
    labels = tuple(f"{i:04}" + "a" * 996 for i in range(1100))
    options = ClassifyOptions(candidate_labels=labels, hypothesis_template="b" * 998 + "{}")
    with pytest.raises(ConfigError, match=r"\d{7} characters; at most 1048576"):
        load("classify-entailment", options)
    with pytest.raises(ConfigError, match=r"prefix has 5000 characters; at most 1024"):
        load("embed", EmbedOptions(prefix="x" * 5000))


def test_groups_of_records_give_the_same_results(load, monkeypatch):
    """What is computed together is bounded, whatever the number of rows of a call."""
    predictor = load("extract", ExtractOptions(schema={"a": "b"}, schema_lang="en"))
    records = [Record(str(i), "in Berlin und London " * (i % 5)) for i in range(40)]
    passes = []
    forward = predictor.forward
    monkeypatch.setattr(predictor, "forward", lambda w: passes.append(len(w)) or forward(w))
    together = predictor.predict(records)
    n_rounds = len(passes)
    monkeypatch.setattr("erniem_batch.predictor.GROUP_WINDOWS", 8)
    passes.clear()
    apart = predictor.predict([Record(r.id, r.text) for r in records])
    assert len(passes) > n_rounds
    assert passes[0] <= 8 + 2
    assert [outcome.id for outcome in apart] == [outcome.id for outcome in together]
    for one, other in zip(apart, together, strict=True):
        assert len(one.value) == len(other.value)
        for a, b in zip(one.value, other.value, strict=True):
            assert (a.name, a.start, a.end) == (b.name, b.start, b.end)


# ---- caches -------------------------------------------------------------------------------------


def test_a_cache_keeps_to_its_bytes():
    cache: ByteCache[str, str] = ByteCache(1000)
    for i in range(1000):
        cache.put(str(i), "x", 100)
        cache.put(f"large {i}", "x", 126)  # above an eighth
        assert cache.n_bytes <= 1000
    assert len(cache) == 10
    assert cache.get("999") == "x"
    assert cache.get("0") is None
    cache.get("990")
    cache.put("new", "y", 100)
    assert cache.get("990") == "x", "what was used last stays"
    cache.put("new", "z", 50)
    assert (cache.get("new"), cache.n_bytes) == ("z", 950)


def test_pieces_are_forgotten_by_their_length(tokenizer, monkeypatch):
    """One unknown piece may be as long as its text."""
    monkeypatch.setattr("erniem_batch.text.pieces.MAX_REMEMBERED_CHARACTERS", 50_000)
    expected = tokenizer.encode_batch(["in Berlin"]).ids.tolist()
    for i in range(20):
        tokenizer.encode_batch([chr(0x10400 + i) * 10_000])
        table = tokenizer._segments._table  # begun anew when it is full
        assert table._n_characters <= 50_000 + 10_100
    assert tokenizer.encode_batch(["in Berlin"]).ids.tolist() == expected
