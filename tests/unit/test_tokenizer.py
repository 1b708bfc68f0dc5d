import copy
import pickle
import random
import re
import shutil
import sys
import threading
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch import ErnieMTokenizer
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.text.pieces import PieceTable, split_piece
from erniem_batch.text.segments import SegmentEncoder, replace_surrogates
from erniem_batch.text.tokenizer import longest_first

TINY = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
HF = ErnieMTokenizer.from_pretrained(TINY)
VARIANTS = {
    "hf": HF,
    "paddle": ErnieMTokenizer.from_pretrained(TINY, lone_underline="paddle"),
    "lower": ErnieMTokenizer.from_pretrained(TINY, do_lower_case=True),
    "split": ErnieMTokenizer.from_pretrained(TINY, split_special_tokens=True),
}


def surfaces(text: str, tokenizer: ErnieMTokenizer = HF) -> list[tuple[str, str]]:
    """(token, the text it covers) of a text."""
    tokens = tokenizer.tokenize(text)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(tokens, encoding["offset_mapping"], strict=True)
    return [(token, text[start:end]) for token, (start, end) in pairs]


# ---- offsets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab c", [("▁ab", "ab"), ("▁c", "c")]),
        # one character that becomes several tokens is the surface of each
        ("㌔", [("キ", "㌔"), ("ロ", "㌔")]),
        ("½", [("1", "½"), ("⁄", "½"), ("2", "½")]),
        ("ﷺ", [(t, "ﷺ") for t in ["صل", "ى", "▁الله", "▁علي", "ه", "▁و", "س", "ل", "م"]]),
        ("wait…", [("▁w", "w"), ("ait", "ait"), (".", "…"), (".", "…"), (".", "…")]),
        # several characters that become one
        ("cafe\u0301", [("▁ca", "ca"), ("f", "f"), ("é", "e\u0301")]),
        ("ｶﾞｷﾞ", [("ガ", "ｶﾞ"), ("ギ", "ｷﾞ")]),
        ("\u1112\u1161\u11ab", [("한", "\u1112\u1161\u11ab")]),
        # emoji, joined with U+200D
        ("👨\u200d👩 a", [("👨", "👨"), ("\u200d", "\u200d"), ("👩", "👩"), ("▁a", "a")]),
        # right to left
        ("با بال", [("▁با", "با"), ("▁بال", "بال")]),
        # control characters vanish
        ("a\x01b\x02", [("▁ab", "a\x01b")]),
        ("a \x01b", [("▁a", "a"), ("▁b", "b")]),
        ("\ufeffabc", [("▁ab", "ab"), ("c", "c")]),
        # characters that act as a space
        ("a\u200bb", [("▁a", "a"), ("▁b", "b")]),
        ("a\u3000b\u00a0", [("▁a", "a"), ("▁b", "b")]),
        # what the second splitting cuts off
        ("北京 上海", [("北", "北"), ("京", "京"), ("▁", " "), ("上", "上"), ("海", "海")]),
        ("2月8日", [("2", "2"), ("月", "月"), ("8", "8"), ("日", "日")]),
        # nothing at all
        ("", []),
        (" ", []),
        ("\x01\x02", []),
        ("▁", []),
        ("▁▁ a ▁", [("▁a", "a")]),
    ],
)
def test_offsets(text, expected):
    got = surfaces(text)
    # The surface of a lone "▁" is the white space it stands for.
    assert got == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # "İ".lower() has two characters, at which the reference's offsets fail
        ("İab", ["İ", "İ", "a", "b"]),
        ("ABİC", ["A", "Bİ", "İ", "C"]),
        ("ΟΔΟΣ", ["Ο", "Δ", "Ο", "Σ"]),
    ],
)
def test_offsets_with_lower_case(text, expected):
    assert [surface for _, surface in surfaces(text, VARIANTS["lower"])] == expected


def test_special_tokens_written_in_a_text():
    text = "a [SEP] b[MASK]c[CLS]"
    assert surfaces(text) == [
        ("▁a", "a"),
        ("[SEP]", "[SEP]"),
        ("▁b", "b"),
        ("[MASK]", "[MASK]"),
        ("▁c", "c"),
        ("[CLS]", "[CLS]"),
    ]
    assert HF.encode("[SEP]") == [0, 2, 2]
    assert HF.encode("[sep]")[1] != 2
    assert surfaces("[PAD][UNK][MASK]") == [(t, t) for t in ("[PAD]", "[UNK]", "[MASK]")]


def test_split_special_tokens_reads_them_as_plain_text():
    """Else a text that says "[SEP]" forges the border between question and context."""
    tokenizer = VARIANTS["split"]
    text = "a [SEP] b"
    assert not set(tokenizer.encode(text)[1:-1]) & {0, 1, 2, 8001}
    assert (
        "".join(surface for _, surface in surfaces(text, tokenizer)).replace(" ", "") == "a[SEP]b"
    )


def test_lower_case_leaves_special_tokens():
    assert VARIANTS["lower"].encode("A [SEP] B") == HF.encode("a [SEP] b")


def test_lone_surrogates_are_read_one_for_one_and_reported():
    text = "a\ud800b\udfff\udc00 c"
    encoding = HF(text, return_offsets_mapping=True)
    assert encoding.input_ids == HF.encode("a\ufffdb\ufffd\ufffd c")
    assert encoding.replaced_surrogates == [3]
    assert encoding.offset_mapping[-2] == (6, 7)
    assert HF(["a", "é"], ["b", "\ud800"]).replaced_surrogates == [0, 1]
    assert HF.tokenize(text) == HF.tokenize(replace_surrogates(text))


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_a_batch_do_not_touch_each_other(name):
    """Among them texts that normalise to nothing, before and after texts that are re-aligned."""
    tokenizer = VARIANTS[name]
    texts = ["", "\x01", "ｶﾞ", " ", "½½", "\x01\x02 ", "e\u0301", "[SEP]", "ab\x01", "", "…", "▁"]
    batch = tokenizer(texts, return_offsets_mapping=True)
    for i, text in enumerate(texts):
        alone = tokenizer(text, return_offsets_mapping=True)
        assert batch["input_ids"][i] == alone["input_ids"]
        assert batch["offset_mapping"][i] == alone["offset_mapping"], text


# ---- properties -------------------------------------------------------------------------------

_TRICKY = st.sampled_from(
    [
        *" \t\n\r\u00a0\u200b\u200d\u3000\ufeff\x00\x01\x7f▁",
        *"ﷺ㌔½…ﬁ㈱Ⅷ²①٣𝟏",
        *("e\u0301", "\u0301", "\u0308", "ｶﾞ", "ﾞ", "\u1112\u1161\u11ab", "กำ", "İ", "Σ", "ß", "ẞ"),
        *("👨\u200d👩\u200d👧", "❤\ufe0f", "1\ufe0f\u20e3", "🇨🇳", "\U000e0041"),
        *("[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]", "[sep]", "[SEP", "]"),
        *"北京2月8日a1.,;:?!，。《",
        *("\ud800", "\udfff", "\uffff", "\ufffd", "مرحبا", "the", "Hello ", " in 92000, "),
    ]
)
TEXTS = st.lists(_TRICKY | st.characters() | st.text(max_size=4), max_size=12).map("".join)


def check_offsets(tokenizer: ErnieMTokenizer, text: str) -> None:
    """What must hold for every text there is."""
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    tokens = tokenizer.tokenize(text)
    assert len(ids) == len(offsets) == len(tokens)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.convert_tokens_to_ids(tokens)
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    clean = replace_surrogates(text)
    for token, (start, end) in zip(tokens, offsets, strict=True):
        surface = clean[start:end]
        if tokenizer.do_lower_case and token not in tokenizer.all_special_tokens:
            surface = "".join(char.lower() for char in surface)
        assert _covers(tokenizer, token, surface), (token, surface)
        assert not any(_vanishes(tokenizer, char) for char in (surface[0], surface[-1]))
    for (_, end), (start, _) in pairwise(offsets):
        gap = clean[end:start]
        assert not _normalised(tokenizer, gap), gap  # nothing is left between two tokens


def _normalised(tokenizer: ErnieMTokenizer, text: str) -> str:
    return tokenizer._processor.normalize(text).replace("▁", "")


def _vanishes(tokenizer: ErnieMTokenizer, char: str) -> bool:
    normalize = tokenizer._processor.normalize
    return bool(normalize(f"a{char}a") == normalize("aa"))


def _covers(tokenizer: ErnieMTokenizer, token: str, surface: str) -> bool:
    """Whether a token can come from a piece of text."""
    if token in tokenizer.all_special_tokens and surface == token:
        return True
    bare = token.replace("▁", "")
    if not bare:  # a lone "▁": white space, or part of a character that expands
        return not _normalised(tokenizer, surface) or len(surface) == 1
    # Composed, since the normaliser composes across the border of two characters.
    return unicodedata.normalize("NFC", bare) in unicodedata.normalize(
        "NFC", _normalised(tokenizer, surface)
    )


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_offsets_of_any_text(name, text):
    check_offsets(VARIANTS[name], text)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_batch_equals_single(texts):
    for tokenizer in (HF, VARIANTS["lower"]):
        batch = tokenizer(texts, return_offsets_mapping=True)
        singles = [tokenizer(text, return_offsets_mapping=True) for text in texts]
        assert batch["input_ids"] == [single["input_ids"] for single in singles]
        assert batch["offset_mapping"] == [single["offset_mapping"] for single in singles]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_encode_batch_without_offsets_gives_the_same_ids(texts):
    with_offsets, without = HF.encode_batch(texts), HF.encode_batch(texts, offsets=False)
    np.testing.assert_array_equal(with_offsets.ids, without.ids)
    np.testing.assert_array_equal(with_offsets.splits, without.splits)
    assert not without.starts.any()
    assert not without.ends.any()
    assert len(with_offsets.splits) == len(texts) + 1
    for i, text in enumerate(texts):
        assert with_offsets.of(i).ids.tolist() == HF.encode(text)[1:-1]


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS,
    pair=st.none() | TEXTS,
    limit=st.integers(0, 12),
    how=st.sampled_from(["longest_first", "only_first", "only_second"]),
    side=st.sampled_from(["left", "right"]),
)
def test_truncation(text, pair, limit, how, side):
    """Fits, or raises; what stays is one end of each text, with its offsets."""
    tokenizer = copy.copy(HF)
    tokenizer.truncation_side = side
    call = {"truncation": how, "max_length": limit, "return_offsets_mapping": True}
    whole = tokenizer(text, pair, return_offsets_mapping=True)
    try:
        cut = tokenizer(text, pair, **call)
    except ValueError:
        assert len(whole.input_ids) > limit
        assert limit < 4 or how != "longest_first"
        return
    assert len(cut.input_ids) == min(limit, len(whole.input_ids))
    remaining = list(zip(whole.input_ids, whole.offset_mapping, strict=True))
    for entry in zip(cut.input_ids, cut.offset_mapping, strict=True):
        remaining = remaining[remaining.index(entry) + 1 :]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["hf", "lower"])
def test_offsets_of_100_000_random_texts(name):
    rng = random.Random(20)
    ranges = [(0, 0x250), (0, 0x3000), (0x3000, 0x10000), (0x10000, 0x20000), (0, 0x110000)]
    for _ in range(100_000):
        low, high = rng.choice(ranges)
        text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(20)))
        check_offsets(VARIANTS[name], text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("▁ab12²½٣北月.,：~ 한"), max_size=10))
def test_split_piece(piece):
    spans = split_piece(piece)
    assert all(0 <= start < end <= len(piece) for start, end in spans)
    assert spans == sorted(spans)
    covered = {i for start, end in spans for i in range(start, end)}
    assert all(piece[i] == "▁" for i in set(range(len(piece))) - covered)
    for start, end in spans:
        assert end - start == 1 or not re.search("[北月.,：~]", piece[start:end])


@pytest.mark.parametrize("n_a", range(7))
@pytest.mark.parametrize("n_b", range(7))
def test_longest_first_takes_one_at_a_time_from_the_longer(n_a, n_b):
    for excess in range(n_a + n_b + 1):
        a, b = n_a, n_b
        for _ in range(excess):
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert longest_first(n_a, n_b, excess) == (a, b)


def test_piece_table_forgets_when_it_is_full(monkeypatch):
    monkeypatch.setattr("erniem_batch.text.pieces.MAX_REMEMBERED_PIECES", 3)
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    texts = ["the cat sat", "an old man", "北京 2月8日", "", "the cat sat"]
    for text in texts:
        assert tokenizer.encode(text) == HF.encode(text)
    assert tokenizer(texts)["input_ids"] == HF(texts)["input_ids"]


def test_piece_table_of_unseen_pieces():
    table = PieceTable(len)
    index = table.indices(["▁a1", "▁", "▁a1", "b"])
    assert index.tolist() == [0, 1, 0, 2]
    assert table.n_tokens[index].tolist() == [2, 1, 2, 1]
    assert table.ids[:4].tolist() == [2, 1, 1, 1]
    assert table.indices([]).tolist() == []


def test_groups_of_texts_change_nothing(monkeypatch):
    """Texts are encoded in groups of some characters, also when one is longer than a group."""
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    texts = ["the cat sat", "", "北京 2月8日 😀", "x" * 50, "an old man", "", "ﷺ it is"]
    whole = tokenizer.encode_batch(texts)
    for size in (1, 5, 12, 20):
        monkeypatch.setattr("erniem_batch.text.segments.GROUP_CHARACTERS", size)
        for one, other in zip(tokenizer.encode_batch(texts), whole, strict=True):
            assert one.tolist() == other.tolist()
    assert tokenizer.encode_batch([]).splits.tolist() == [0]


def test_a_table_of_long_pieces_is_full_by_characters(monkeypatch):
    monkeypatch.setattr("erniem_batch.text.pieces.MAX_REMEMBERED_CHARACTERS", 5000)
    table = PieceTable(len)
    for i in range(4):
        table.indices([f"{i}" * 1500])
    assert table.is_full
    assert not table.empty().is_full
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    for letter in "ᠠᠡᠢᠣ":  # unknown pieces are as long as their texts
        text = letter * 3000
        assert tokenizer.encode(text) == HF.encode(text)


def test_a_long_text_does_not_hold_up_a_short_one(monkeypatch):
    """While one thread encodes, another takes the table: the lock is held for new pieces only."""
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    tokenizer.encode("the cat sat")
    inside, go_on = threading.Event(), threading.Event()
    cut = SegmentEncoder._cut

    def slow(self, texts, **form):
        if "slow" in texts:
            inside.set()
            assert go_on.wait(30)
        return cut(self, texts, **form)

    monkeypatch.setattr(SegmentEncoder, "_cut", slow)
    thread = threading.Thread(target=tokenizer.encode_batch, args=(["slow"],))
    thread.start()
    assert inside.wait(30)
    short = threading.Thread(target=tokenizer.encode_batch, args=(["an old man"],))
    short.start()
    short.join(10)
    alive = short.is_alive()
    go_on.set()
    thread.join()
    short.join()
    assert not alive


def test_threads_may_share_a_tokenizer(monkeypatch):
    """Serve answers requests on several threads, which add to one table of pieces."""
    monkeypatch.setattr("erniem_batch.text.pieces.MAX_REMEMBERED_PIECES", 300)
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    rng = random.Random(1)
    letters = [chr(i) for i in range(0x10A0, 0x1F00)]
    texts = [" ".join("".join(rng.choices(letters, k=5)) for _ in range(8)) for _ in range(200)]
    expected = HF(texts)["input_ids"]
    failures: list[object] = []

    def work(step: int) -> None:
        try:
            for i in range(0, len(texts), 4):
                j = (i * step) % len(texts)
                if tokenizer(texts[j : j + 4])["input_ids"] != expected[j : j + 4]:
                    failures.append(j)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(step,)) for step in (1, 3, 7, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


# ---- calls ------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_not_given():
    assert list(HF("a")) == ["input_ids"]
    everything = HF(
        "a",
        "b",
        return_attention_mask=True,
        return_token_type_ids=True,
        return_special_tokens_mask=True,
        return_offsets_mapping=True,
    )
    assert everything.input_ids == [0, *HF.encode("a")[1:-1], 2, 2, *HF.encode("b")[1:-1], 2]
    assert everything.attention_mask == [1] * 6
    assert everything.token_type_ids == [0, 0, 1, 1, 1, 1]
    assert everything.special_tokens_mask == [1, 0, 1, 1, 0, 1]
    assert everything.offset_mapping == [(0, 0), (0, 1), (0, 0), (0, 0), (0, 1), (0, 0)]
    with pytest.raises(AttributeError, match="there are: input_ids"):
        _ = HF("a").attention_mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, padding_side=side)
    asked = {"return_attention_mask": True, "return_offsets_mapping": True}
    short, long = HF.encode("a"), HF.encode("a b c")
    batch = tokenizer(["a", "a b c"], padding=True, **asked)
    fill = [1] * (len(long) - len(short))
    padded = [*short, *fill] if side == "right" else [*fill, *short]
    assert batch["input_ids"] == [padded, long]
    assert batch["attention_mask"][0] == [int(i != 1) for i in padded]
    assert batch["offset_mapping"][0].count((0, 0)) == 2 + len(fill)
    assert len(tokenizer("a", padding="max_length", max_length=7).input_ids) == 7
    assert len(tokenizer("a", padding="max_length").input_ids) == 512
    assert len(tokenizer(["a"], padding=True, pad_to_multiple_of=8).input_ids[0]) == 8
    assert tokenizer(["a", "a b c"], padding=False)["input_ids"] == [short, long]
    assert tokenizer([], padding=True)["input_ids"] == []


def test_tensors():
    tensors = HF(["a b", "c"], padding=True, return_tensors="pt", return_offsets_mapping=True)
    assert tensors.input_ids.dtype == torch.int64
    assert tensors.input_ids.shape == (2, 4)
    assert tensors.offset_mapping.shape == (2, 4, 2)
    assert HF("a", return_tensors="np")["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="padding=True"):
        HF(["a b", "c"], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors"):
        HF("a", return_tensors="tf")
    assert HF([], return_tensors="pt")["input_ids"].shape[0] == 0


def test_an_empty_list_gives_an_empty_list():
    """The reference raises."""
    assert HF([])["input_ids"] == []
    assert HF([], [])["input_ids"] == []
    assert HF.encode_batch([]).splits.tolist() == [0]


def test_truncation_goes_to_the_model_limit_by_default():
    text = "a b " * 600
    assert len(HF(text, truncation=True).input_ids) == 512
    assert len(HF(text).input_ids) > 1000


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        (("a b c",), {"max_length": 2, "truncation": True}),
        (("a b c",), {"max_length": 0, "truncation": True}),
        (("a b c",), {"max_length": 4, "truncation": "only_second"}),
        (("a b c", "d"), {"max_length": 6, "truncation": "only_second"}),
        (("a", "b c d"), {"max_length": 5, "truncation": "only_first"}),
        (("a", "b"), {"max_length": 3, "truncation": True}),
        (("", ""), {"max_length": 3, "truncation": True}),
    ],
)
def test_impossible_truncation_is_refused(arguments, how):
    """The reference only logs an error and returns too many tokens."""
    with pytest.raises(ValueError, match="raise max_length"):
        HF(*arguments, **how)


@pytest.mark.parametrize("bad", [None, 5, b"x", ["a"], 2.5])
def test_texts_must_be_strings(bad):
    with pytest.raises(TypeError, match=f"text 1 must be a string, got {type(bad).__name__}"):
        HF(["a", bad])
    with pytest.raises(TypeError):
        HF(["a", "b"], ["c", bad])
    with pytest.raises(TypeError):
        HF.encode_batch(["a", bad])
    if not isinstance(bad, list):
        with pytest.raises(TypeError):
            HF(bad)


def test_a_single_string_is_no_batch():
    """It once passed as a batch of its characters."""
    with pytest.raises(TypeError, match="got one string"):
        HF.encode_batch("abc")


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="2 texts but 1 text pairs"):
        HF(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="truncation must be"):
        HF("a", truncation="middle")
    with pytest.raises(ValueError, match="padding must be"):
        HF("a", padding="left")
    with pytest.raises(TypeError):
        HF("a", stride=5)
    for option in ("padding_side", "truncation_side", "lone_underline"):
        with pytest.raises(ConfigError, match=option):
            ErnieMTokenizer.from_pretrained(TINY, **{option: "middle"})


# ---- saving and moving ------------------------------------------------------------------------


def test_pickles_by_value(tmp_path):
    """The reference reads its files again from a path that another machine may not have."""
    shutil.copytree(TINY, tmp_path / "model")
    tokenizer = ErnieMTokenizer.from_pretrained(tmp_path / "model", do_lower_case=True)
    tokenizer.truncation_side = "left"
    expected = tokenizer("Some Text ½", return_offsets_mapping=True)
    stored = pickle.dumps(tokenizer)
    shutil.rmtree(tmp_path / "model")
    for again in (pickle.loads(stored), copy.deepcopy(tokenizer)):
        assert again("Some Text ½", return_offsets_mapping=True) == expected
        assert again.truncation_side == "left"
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.decode(expected.input_ids) == tokenizer.decode(expected.input_ids)
    again = pickle.loads(stored)
    again.save_pretrained(tmp_path / "again")
    assert ErnieMTokenizer.from_pretrained(tmp_path / "again")("Some Text ½") == again(
        "Some Text ½"
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": True, "lone_underline": "paddle"},
        {"split_special_tokens": True, "padding_side": "left", "truncation_side": "left"},
        {"model_max_length": 100},
        {"sp_model_kwargs": {"enable_sampling": False}},
        {"added_tokens": {"<e>": 8002, "</e>": 8003}},
    ],
    ids=str,
)
def test_save_and_load(tmp_path, options):
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, **options)
    tokenizer.save_pretrained(tmp_path)
    again = ErnieMTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    for name in ("do_lower_case", "lone_underline", "split_special_tokens", "padding_side"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.truncation_side == tokenizer.truncation_side
    assert again.model_max_length == tokenizer.model_max_length
    text = "A <e>b</e> [SEP] 北京 上海"
    assert again(text) == tokenizer(text)
    for file in ("vocab.txt", "sentencepiece.bpe.model"):
        assert (tmp_path / file).read_bytes() == (TINY / file).read_bytes()


def test_save_vocabulary_with_a_prefix(tmp_path):
    names = [Path(path).name for path in HF.save_vocabulary(tmp_path, "x")]
    assert names == ["x-vocab.txt", "x-sentencepiece.bpe.model"]
    assert all((tmp_path / name).is_file() for name in names)


def test_paddle_folder_drops_lone_underlines(tmp_path, data_dir):
    for file in ("vocab.txt", "sentencepiece.bpe.model"):
        shutil.copy(TINY / file, tmp_path)
    assert ErnieMTokenizer.from_pretrained(tmp_path).lone_underline == "hf"
    shutil.copy(data_dir / "uiem_paddle" / "config.json", tmp_path)
    assert ErnieMTokenizer.from_pretrained(tmp_path).lone_underline == "paddle"
    hf = ErnieMTokenizer.from_pretrained(tmp_path, lone_underline="hf")
    assert "▁" in hf.tokenize("北京 上海")
    assert "▁" not in ErnieMTokenizer.from_pretrained(tmp_path).tokenize("北京 上海")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model"):
        ErnieMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="SentencePiece"):
        ErnieMTokenizer.from_pretrained(tmp_path)
    shutil.copy(TINY / "sentencepiece.bpe.model", tmp_path)
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            ErnieMTokenizer.from_pretrained(tmp_path)


SAMPLING = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}


@pytest.mark.parametrize("lone_underline", ["hf", "paddle"])
@pytest.mark.parametrize("way", ["as it is", "pickled", "saved"])
def test_sampling_survives_pickling_and_saving(tmp_path, way, lone_underline):
    tokenizer = ErnieMTokenizer.from_pretrained(
        TINY, sp_model_kwargs=SAMPLING, lone_underline=lone_underline
    )
    if way == "pickled":
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
    elif way == "saved":
        tokenizer.save_pretrained(tmp_path)
        tokenizer = ErnieMTokenizer.from_pretrained(tmp_path)
    assert tokenizer.sp_model_kwargs == SAMPLING
    assert len({tuple(tokenizer.encode("internationalisation")) for _ in range(40)}) > 1
    certain = ErnieMTokenizer.from_pretrained(
        TINY, sp_model_kwargs={**SAMPLING, "enable_sampling": False}
    )
    assert len({tuple(certain.encode("internationalisation")) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "kwargs", [SAMPLING, {"enable_sampling": True}, {**SAMPLING, "nbest_size": 8, "alpha": 0.5}]
)
def test_offsets_of_samples_are_exact(kwargs):
    """Tokens in order, each over the characters it stands for, all of the text covered."""
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, sp_model_kwargs=kwargs)
    texts = [
        "internationalisation of everything, 2024!",
        "北京 上海 2月8日",
        "Москва — столица [SEP] России",
        "  two  spaces\tand ＷＩＤＥ ofﬁces ",
        "cafe\u0301 한국어",
    ]
    for _ in range(20):
        batch = tokenizer(texts, return_offsets_mapping=True)
        for text, ids, offsets in zip(
            texts, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            assert len(ids) == len(offsets)
            covered, at, last = set(), 0, (0, 0)
            for start, end in offsets[1:-1]:
                assert 0 <= start <= end <= len(text)
                assert start >= at or (start, end) == last, (text, offsets)
                at, last = start, (start, end)
                covered.update(range(start, end))
            missed = [text[i] for i in range(len(text)) if i not in covered]
            assert "".join(missed).strip() == "", (text, missed)


def test_pieces_of_a_sample_stand_for_their_characters():
    """Where nothing is normalised, a token that is known is the text it covers."""
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, sp_model_kwargs=SAMPLING)
    text = "internationalisation of everything in Москва"
    for _ in range(30):
        tokens = tokenizer.encode_batch([text])
        for index, start, end in zip(tokens.ids, tokens.starts, tokens.ends, strict=True):
            token = tokenizer.convert_ids_to_tokens(int(index))
            if token != "[UNK]":
                assert token.removeprefix("▁") == text[start:end].strip()


def test_sampling_varies_the_pieces_but_not_the_text():
    kwargs = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, sp_model_kwargs=kwargs)
    text = "internationalisation of everything"
    seen = {tuple(tokenizer.encode(text)) for _ in range(20)}
    assert len(seen) > 1
    for _ in range(5):
        tokens = tokenizer.encode_batch([text])
        joined = "".join(text[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True))
        assert joined.replace(" ", "") == text.replace(" ", "")
