import json
import math
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import LABELS, LookupModel, make_predictor, ner_config
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch import ErnieMConfig, ErnieMForTokenClassification, ErnieMModel, ErnieMTokenizer
from erniem_batch import pipeline as public_pipeline
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import CheckpointError, ConfigError, DeviceError, RecordError
from erniem_batch.options import NerOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Encoded, Failure, Prediction, Record

# One token each in the small vocabulary.
FIRST, SECOND, FILLER = "nicht", "zijn", "voor"

SENTENCES = [
    "Ada Lovelace lived in London.",
    "",
    "   \t ",
    "北京は大きい都市です。",
    "one " * 90,
    "Ünïcödé ﬁne №5 e\u0301 \u200b x",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family",
    "a",
]


def _records(texts):
    return [Record(f"id-{i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def word_ids(tokenizer):
    ids = {word: tokenizer.convert_tokens_to_ids("▁" + word) for word in (FIRST, SECOND, FILLER)}
    assert tokenizer.unk_token_id not in ids.values()
    return ids


@pytest.fixture(scope="module")
def labelled(word_ids):
    """FIRST opens a person, SECOND goes on with it."""
    return {word_ids[FIRST]: 1, word_ids[SECOND]: 2}


# ---- rows in, rows out ----------------------------------------------------------------------


def test_order_is_kept(predictor):
    outcomes = predictor.predict(_records(SENTENCES))
    assert [outcome.id for outcome in outcomes] == [f"id-{i}" for i in range(len(SENTENCES))]
    assert all(isinstance(outcome, Prediction) for outcome in outcomes)


def test_nothing_in_nothing_out(predictor):
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    ("bad", "came"),
    [
        (None, "null"),
        (7, "int"),
        (b"hidden words", "bytes"),
        (["hidden words"], "list"),
        (float("nan"), "float"),
        ({"text": "hidden words"}, "dict"),
    ],
)
def test_a_bad_row_fails_alone(predictor, bad, came):
    good = predictor.predict(_records(["Ada in London", "x", "Bob"]))
    outcomes = predictor.predict(_records(["Ada in London", bad, "Bob"]))
    assert outcomes[1] == Failure(
        "id-1", "encode", "RecordError", f"text must be a string, got {came}"
    )
    assert (outcomes[0], outcomes[2]) == (good[0], good[2])
    assert "hidden" not in repr(outcomes[1])


def test_all_rows_bad(predictor):
    assert all(isinstance(o, Failure) for o in predictor.predict(_records([None, 3])))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=120), st.none(), st.integers()), max_size=8))
def test_any_mix_gives_one_outcome_a_row(predictor, texts):
    outcomes = predictor.predict(_records(texts))
    assert [o.id for o in outcomes] == [f"id-{i}" for i in range(len(texts))]
    for text, outcome in zip(texts, outcomes, strict=True):
        assert isinstance(outcome, Prediction) == isinstance(text, str)
        for entity in getattr(outcome, "value", []):
            assert text[entity.start : entity.end] == entity.word != ""
            assert 0 < entity.score <= 1


def test_empty_text_has_no_tokens(predictor):
    assert predictor.predict(_records([""])) == [Prediction("id-0", [], 0, 0)]


def test_lone_surrogates_are_read_as_replacement_characters(predictor):
    (outcome,) = predictor.predict([Record("s", "Ada \ud800 London")])
    assert isinstance(outcome, Prediction)


# ---- numbers --------------------------------------------------------------------------------


def _windows(predictor, texts):
    return [w for e in predictor.encode(_records(texts)) for w in e.windows]


def test_batch_equals_single(predictor):
    """1e-5: sums over a row are taken in another order when the batch has another shape."""
    windows = _windows(predictor, SENTENCES)
    together = predictor.forward(windows)
    alone = [predictor.forward([window])[0] for window in windows]
    for a, b, window in zip(together, alone, windows, strict=True):
        assert a.shape == (len(window.ids), len(LABELS))
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_packed_equals_alone(predictor):
    windows = sorted(_windows(predictor, SENTENCES), key=lambda w: len(w.ids))
    short, long = windows[0], windows[-1]
    assert len(short.ids) < len(long.ids)
    packed = predictor.forward([short, long])[0]
    with torch.inference_mode():
        logits = predictor.model(torch.from_numpy(short.ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(packed, logits, atol=1e-5)


def test_predictions_do_not_depend_on_neighbours(predictor):
    together = predictor.predict(_records(SENTENCES))
    for i, text in enumerate(SENTENCES):
        (alone,) = predictor.predict([Record(f"id-{i}", text)])
        assert [(e.start, e.end, e.label) for e in alone.value] == [
            (e.start, e.end, e.label) for e in together[i].value
        ]


def test_batches_stay_in_the_budget(tokenizer, labelled):
    model = LookupModel(labelled)
    predictor = make_predictor(
        model, tokenizer, window_tokens=32, overlap_tokens=8, max_batch_tokens=70
    )
    words = ["voor", "het", "in", "de", "een", "op", "met", "van", "te", "dat"]
    texts = [
        " ".join(words[(7 * i * i + n) % len(words)] for i in range(n))
        for n in (1, 80, 3, 25, 26, 7, 200)
    ]
    predictor.predict(_records(texts))
    assert len(model.batches) > 3
    assert all(sum(lengths) <= 70 for lengths in model.batches)


def test_windows_padded_as_paddle_does_stay_in_the_budget(tokenizer, labelled):
    """Once, batches were planned by real lengths, and padding to window_tokens came on top."""
    model = LookupModel(labelled)
    model.config = replace(model.config, mask_mode="paddle_padded")
    predictor = make_predictor(
        model, tokenizer, window_tokens=32, overlap_tokens=8, max_batch_tokens=64
    )
    predictor.predict(_records(["voor" + " in" * i for i in range(20)]))
    assert {length for lengths in model.batches for length in lengths} == {32}
    assert all(sum(lengths) <= 64 for lengths in model.batches)


def test_counters(tokenizer, labelled):
    predictor = make_predictor(LookupModel(labelled), tokenizer, window_tokens=32, overlap_tokens=8)
    outcomes = predictor.predict(_records(["voor " * 50, None, "voor"]))
    counters = predictor.counters
    assert counters.records == 3
    assert [getattr(o, "n_tokens", None) for o in outcomes] == [50, None, 1]
    assert counters.tokens == 51
    assert counters.windows == 3  # two of 30 tokens, the second pushed back, and one of one
    assert counters.repeated_windows == 1  # those two are equal
    assert counters.real_tokens == 32 + 3
    assert counters.padded_tokens == 32 + 3
    assert all(seconds > 0 for seconds in counters.seconds.values())


# ---- long texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "overlap"), [(32, 8), (32, 0), (32, 29), (33, 7), (10, 4)])
def test_an_entity_at_any_place_of_a_long_text_is_found_once(tokenizer, labelled, window, overlap):
    """Every seam between windows is met at every offset."""
    predictor = make_predictor(
        LookupModel(labelled), tokenizer, window_tokens=window, overlap_tokens=overlap
    )
    texts, expected = [], []
    for place in range(100):
        words = [FILLER] * 100
        words[place : place + 2] = [FIRST, SECOND]
        start = place * (len(FILLER) + 1)
        texts.append(" ".join(words))
        expected.append([(start, start + len(FIRST) + 1 + len(SECOND), "PER")])
    outcomes = predictor.predict(_records(texts))
    assert outcomes[0].n_windows > 1
    found = [[(e.start, e.end, e.label) for e in o.value] for o in outcomes]
    assert found == expected


def test_what_a_window_cannot_see_at_its_edges_is_seen_by_its_neighbour(tokenizer, labelled):
    """The model is blind for 3 tokens at the edges; an overlap of 8 leaves 4 to the neighbour."""
    predictor = make_predictor(
        LookupModel(labelled, blind=3), tokenizer, window_tokens=32, overlap_tokens=8
    )
    texts = []
    for place in range(3, 96):  # the edges of the text itself stay unseen
        words = [FILLER] * 100
        words[place : place + 2] = [FIRST, SECOND]
        texts.append(" ".join(words))
    for place, outcome in enumerate(predictor.predict(_records(texts)), start=3):
        found = [(entity.word, entity.label) for entity in outcome.value]
        assert found == [(f"{FIRST} {SECOND}", "PER")], place


@pytest.mark.parametrize(("window", "overlap"), [(512, 128), (32, 8)])
def test_50_000_characters_are_read_in_full(tokenizer, labelled, window, overlap):
    predictor = make_predictor(
        LookupModel(labelled),
        tokenizer,
        window_tokens=window,
        overlap_tokens=overlap,
        aggregation_strategy="none",
    )
    n_words = 50_000 // (len(FIRST) + 1) + 1
    text = f"{FIRST} " * n_words
    assert len(text) >= 50_000
    (encoded,) = predictor.encode([Record("long", text)])
    seen = {i for w in encoded.windows for i in range(w.first, w.first + w.n_tokens)}
    assert seen == set(range(n_words))
    assert all(len(w.ids) <= window for w in encoded.windows)
    (outcome,) = predictor.predict([Record("long", text)])
    assert [e.index for e in outcome.value] == list(range(1, n_words + 1))
    assert [e.start for e in outcome.value] == list(range(0, n_words * 6, 6))
    assert outcome.n_tokens == n_words
    assert not outcome.truncated


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=400))
def test_windows_hold_the_tokens_between_special_ones(predictor, tokenizer, text):
    (encoded,) = predictor.encode([Record("x", text)])
    for window in encoded.windows:
        body = encoded.token_ids[window.first : window.first + window.n_tokens]
        assert window.ids.tolist() == [
            tokenizer.cls_token_id,
            *body.tolist(),
            tokenizer.sep_token_id,
        ]
        assert window.offset == 1


# ---- failures of the model --------------------------------------------------------------------


def test_a_guilty_window_fails_alone_and_is_found_in_few_passes(tokenizer, labelled, word_ids):
    """Of n windows at any place: at most ceil(log2(n)) + 1 passes besides the normal one."""
    reason = f"a kernel does not like token {word_ids[SECOND]}"
    for n_windows in (1, 2, 3, 9, 16):
        for guilty in range(n_windows):
            model = LookupModel(labelled, fails_on=word_ids[SECOND])
            texts = [f"{FIRST} voor"] * n_windows
            texts[guilty] = f"{FIRST} {SECOND} hidden words"
            outcomes = make_predictor(model, tokenizer).predict(_records(texts))
            assert outcomes.pop(guilty) == Failure(
                f"id-{guilty}", "forward", "RuntimeError", reason
            )
            assert all([e.word for e in o.value] == [FIRST] for o in outcomes)
            assert len(model.batches) <= 1 + math.ceil(math.log2(n_windows)) + 1


def test_a_long_reason_is_cut(tokenizer, labelled):
    class Wordy(LookupModel):
        def rows(self, batch):
            raise RuntimeError("x" * 1000 + "\nsecond line")

    (outcome,) = make_predictor(Wordy(labelled), tokenizer).predict(_records([FIRST]))
    assert outcome.reason == "x" * 300


def test_a_record_fails_with_one_of_its_windows(tokenizer, labelled, word_ids):
    model = LookupModel(labelled, fails_on=word_ids[SECOND])
    predictor = make_predictor(model, tokenizer, window_tokens=32, overlap_tokens=8)
    long = " ".join([FIRST, *[FILLER] * 70, SECOND, *[FILLER] * 70])
    before, failed, after = predictor.predict(_records([FIRST, long, FIRST]))
    assert isinstance(failed, Failure)
    assert failed.id == "id-1"
    assert isinstance(before, Prediction)
    assert isinstance(after, Prediction)


class Hungry(LookupModel):
    """Memory for so many tokens; so many passes go well before it runs short."""

    def __init__(self, label_ids, most, *, at_first=0, error=None, **options):
        super().__init__(label_ids, **options)
        self.most, self.at_first = most, at_first
        self.error = error or torch.OutOfMemoryError("fake")

    def rows(self, batch):
        if len(batch.ids_T) > self.most and len(self.batches) >= self.at_first:
            self.batches.append(tuple(batch.lengths))
            raise self.error
        return super().rows(batch)


CPU_OUT_OF_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("most", [40, 100, 10_000])
def test_lanes_side_by_side(tokenizer, labelled, most):
    """Two passes at a time say what one says, also when memory runs out."""
    options = {"window_tokens": 32, "overlap_tokens": 8, "max_batch_tokens": 256}
    texts = [f"{FIRST} " * (1 + 7 * i % 60) for i in range(60)]
    calm = make_predictor(LookupModel(labelled), tokenizer, **options)
    hungry = make_predictor(Hungry(labelled, most), tokenizer, n_threads=2, **options)
    assert (calm.n_lanes, hungry.n_lanes) == (1, 2)
    assert hungry.predict(_records(texts)) == calm.predict(_records(texts))
    assert (hungry.counters.oom_halvings > 0) == (most < 256)
    assert hungry.counters.real_tokens == calm.counters.real_tokens
    hungry.close()


@pytest.mark.parametrize("error", [None, CPU_OUT_OF_MEMORY])
@pytest.mark.parametrize("at_first", [0, 1, 3])
@pytest.mark.parametrize("most", [32, 40, 100, 200])
def test_out_of_memory_makes_batches_smaller(tokenizer, labelled, most, at_first, error, caplog):
    options = {"window_tokens": 32, "overlap_tokens": 8, "max_batch_tokens": 256}
    texts = [f"{FIRST} " * (1 + 7 * i % 60) for i in range(60)]
    calm = make_predictor(LookupModel(labelled), tokenizer, **options)
    model = Hungry(labelled, most, at_first=at_first, error=error)
    hungry = make_predictor(model, tokenizer, **options)
    windows = _windows(calm, texts)
    for a, b in zip(hungry.forward(windows), calm.forward(windows), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert hungry.predict(_records(texts)) == calm.predict(_records(texts))

    n_halvings = hungry.counters.oom_halvings
    assert n_halvings == sum(sum(lengths) > most for lengths in model.batches[at_first:])
    assert hungry.max_batch_tokens == 256 >> n_halvings >= 32
    lines = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(lines) == n_halvings > 0
    assert lines[0] == "out of memory, batches halved max_batch_tokens=128 before=256"


@pytest.mark.parametrize("error", [None, CPU_OUT_OF_MEMORY])
def test_a_window_that_does_not_fit_alone_fails(tokenizer, labelled, error):
    predictor = make_predictor(Hungry(labelled, 20, error=error), tokenizer)
    texts = [FIRST, f"{FIRST} " * 30, f"{FIRST} voor"]
    short, long, middle = predictor.predict(_records(texts))
    assert (long.id, long.stage, long.error) == ("id-1", "forward", "OutOfMemoryError")
    assert [e.word for o in (short, middle) for e in o.value] == [FIRST] * 2


def test_out_of_memory_and_a_guilty_window_in_one_batch(tokenizer, labelled, word_ids):
    model = Hungry(labelled, 12, fails_on=word_ids[SECOND])
    texts = [FIRST] * 20
    texts[3] = texts[17] = SECOND
    outcomes = make_predictor(model, tokenizer).predict(_records(texts))
    assert [i for i, o in enumerate(outcomes) if isinstance(o, Failure)] == [3, 17]
    assert all([e.word for e in o.value] == [FIRST] for o in outcomes if isinstance(o, Prediction))


def test_memory_of_this_machine_that_runs_out(tokenizer, labelled):
    """What torch really raises; 2**60 bytes are more than any machine has."""

    class Greedy(LookupModel):
        def rows(self, batch):
            torch.empty(2**60, dtype=torch.uint8)

    (outcome,) = make_predictor(Greedy(labelled), tokenizer).predict(_records([FIRST]))
    assert outcome.error == "OutOfMemoryError"


def test_an_error_of_the_gpu_ends_the_work(tokenizer, labelled, monkeypatch):
    predictor = make_predictor(LookupModel(labelled), tokenizer)
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")

    def run(windows):
        raise error

    monkeypatch.setattr(predictor, "_run", run)
    monkeypatch.setattr(predictor, "device", torch.device("cuda"))
    with pytest.raises(DeviceError, match=r"cuda: CUDA error: an illegal.* encountered$") as caught:
        predictor.predict(_records([FIRST] * 3))
    assert caught.value.__cause__ is error


def test_out_of_memory_of_the_gpu_does_not_end_the_work(tokenizer, labelled, monkeypatch):
    predictor = make_predictor(Hungry(labelled, 12), tokenizer)
    run = predictor._run

    def on_cpu(windows):
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "device", torch.device("cpu"))
            return run(windows)

    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(sys.exc_info()))
    monkeypatch.setattr(predictor, "_run", on_cpu)
    monkeypatch.setattr(predictor, "device", torch.device("cuda"))
    outcomes = predictor.predict(_records([FIRST + f" {FILLER}" * i for i in range(9)]))
    assert all([e.word for e in o.value] == [FIRST] for o in outcomes)
    assert len(emptied) == predictor.counters.oom_halvings > 0
    assert set(emptied) == {(None, None, None)}, "the failed pass is still in memory"


def test_a_programming_error_is_not_a_failure_of_a_row(tokenizer, labelled):
    class Broken(LookupModel):
        def rows(self, batch):
            raise TypeError("not the fault of a row")

    with pytest.raises(TypeError, match="not the fault"):
        make_predictor(Broken(labelled), tokenizer).predict(_records([FIRST]))


def test_scores_that_are_no_numbers_fail_the_row(tokenizer, labelled, word_ids):
    model = LookupModel(labelled)
    with torch.no_grad():
        model.table[word_ids[SECOND]] = float("nan")
    good, bad = make_predictor(model, tokenizer).predict(_records([FIRST, SECOND]))
    assert isinstance(good, Prediction)
    assert isinstance(bad, Failure)
    assert (bad.stage, bad.error) == ("decode", "RecordError")
    assert "--dtype float32" in bad.reason


# ---- threads ----------------------------------------------------------------------------------


def test_two_threads_may_encode_at_once(tokenizer_dir):
    """Once, two threads added new pieces to the table at the same time and got foreign ids."""
    texts = [[f"wort{t}x{i} zahl {i * 7919 + t}" for i in range(400)] for t in range(2)]
    expected = [ErnieMTokenizer.from_pretrained(tokenizer_dir).encode_batch(t) for t in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(8):
            fresh = ErnieMTokenizer.from_pretrained(tokenizer_dir)
            barrier = threading.Barrier(2)

            def work(mine, fresh=fresh, barrier=barrier):
                barrier.wait()
                return [fresh.encode_batch(mine[i : i + 5]) for i in range(0, len(mine), 5)]

            with ThreadPoolExecutor(2) as threads:
                results = list(threads.map(work, texts))
            for parts, whole in zip(results, expected, strict=True):
                for name in ("ids", "starts", "ends"):
                    joined = np.concatenate([getattr(part, name) for part in parts])
                    np.testing.assert_array_equal(joined, getattr(whole, name))
    finally:
        sys.setswitchinterval(interval)


def test_threads_share_a_predictor(ner_model_dir):
    config = PredictorConfig(model=str(ner_model_dir), device="cpu", n_threads=1)
    predictor = Predictor.load(config)
    chunks = [_records([f"{text} {n}" for text in SENTENCES]) for n in range(6)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(predictor.predict, chunks))
    assert predictor.counters.records == 6 * len(SENTENCES)
    assert together == [predictor.predict(chunk) for chunk in chunks]


# ---- loading ----------------------------------------------------------------------------------


def test_window_longer_than_the_model(ner_model_dir):
    with pytest.raises(ConfigError, match="at most 512"):
        Predictor.load(PredictorConfig(model=str(ner_model_dir), window_tokens=513))


def test_tokenizer_of_another_model(tmp_path, tokenizer):
    config = ErnieMConfig(
        vocab_size=len(tokenizer) - 1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    ).with_labels(LABELS)
    ErnieMForTokenClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="do not belong together"):
        Predictor.load(PredictorConfig(model=str(tmp_path)))


def test_model_without_outside_label(tmp_path, tokenizer, ner_model_dir):
    config = ErnieMConfig.from_pretrained(ner_model_dir).with_labels(["A", "B", "C", "D", "E"])
    ErnieMForTokenClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="fine-tuned"):
        Predictor.load(PredictorConfig(model=str(tmp_path)))


def test_model_without_head(tmp_path, tokenizer, ner_model_dir):
    config = ErnieMConfig.from_pretrained(ner_model_dir)
    ErnieMModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        Predictor.load(PredictorConfig(model=str(tmp_path)))


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        Predictor.load(PredictorConfig(model=str(tmp_path / "absent")))


def test_bfloat16_runs(ner_model_dir):
    config = PredictorConfig(model=str(ner_model_dir), dtype="bfloat16", device="cpu")
    predictor = Predictor.load(config)
    (encoded,) = predictor.encode([Record("x", SENTENCES[0])])
    assert isinstance(encoded, Encoded)
    (rows,) = predictor.forward(encoded.windows)
    assert rows.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation_strategy": "best"}, "aggregation_strategy must be one of none, simple"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"min_score": 1.1}, "min_score must be from 0 to 1, got 1.1"),
        ({"min_score": float("nan")}, "min_score must be from 0 to 1"),
        ({"window_tokens": 2}, "no room for text"),
        ({"overlap_tokens": -1}, "overlap_tokens=-1 must be from 0 to 509"),
        ({"window_tokens": 32, "overlap_tokens": 30}, "must be from 0 to 29"),
        ({"max_batch_tokens": 511}, "raise max_batch_tokens to at least 512"),
        ({"n_threads": 0}, "n_threads must be at least 1"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        ner_config(PredictorConfig, **options)


# ---- pipeline ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ner(ner_model_dir: Path):
    return public_pipeline("ner", str(ner_model_dir), device="cpu")


def test_pipeline_gives_the_form_of_hugging_face(ner):
    text = "Ada Lovelace lived in London with 北京."
    entities = ner(text)
    assert entities
    for entity in entities:
        assert list(entity) == ["entity_group", "score", "word", "start", "end"]
        assert text[entity["start"] : entity["end"]] == entity["word"]
        assert type(entity["score"]) is float
        assert type(entity["start"]) is int
    assert ner([text, ""]) == [entities, []]
    assert ner([]) == []


def test_pipeline_without_aggregation(ner_model_dir, tokenizer):
    ner = public_pipeline("token-classification", ner_model_dir, aggregation_strategy="none")
    text = "Ada Lovelace lived in London."
    tokens = tokenizer.tokenize(text)
    for entity in ner(text):
        assert list(entity) == ["entity", "score", "index", "word", "start", "end"]
        assert tokens[entity["index"] - 1] == entity["word"]


def test_pipeline_names_the_place_of_a_bad_text(ner):
    with pytest.raises(RecordError, match="text 1: encode: text must be a string, got null"):
        ner(["hidden words", None])


def test_pipeline_of_an_unknown_task():
    with pytest.raises(ConfigError, match="task must be one of ner, token-classification"):
        public_pipeline("summarization")


def test_pipeline_with_an_unknown_option(ner_model_dir):
    with pytest.raises(ConfigError, match="ner has no option 'agregation'; there are aggregation"):
        public_pipeline("ner", str(ner_model_dir), agregation="simple")


def test_min_score_defaults_to_what_the_model_recommends(tmp_path, ner_model_dir):
    folder = tmp_path / "model"
    shutil.copytree(ner_model_dir, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    record = [Record("0", "Anna Nowak lives in Berlin. " * 20)]

    def config_of(**options):
        return PredictorConfig(model=str(folder), options=NerOptions(**options))

    def scores(**options):
        (outcome,) = Predictor.load(config_of(**options)).predict(record)
        return [entity.score for entity in outcome.value]

    every = scores()
    threshold = sorted(every)[len(every) // 2]
    config["task_specific_params"] = {"ner": {"min_score": threshold}}
    path.write_text(json.dumps(config))
    assert scores() == [score for score in every if score >= threshold]
    assert scores(min_score=0.0) == every
    config["task_specific_params"] = {"ner": {"min_score": "high"}}
    path.write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"task_specific_params.ner in config.json: min_score must be from 0 to 1"
    ):
        scores()
