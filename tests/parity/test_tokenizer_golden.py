"""Token ids of the references' own runs: transformers 4.40.2 and PaddleNLP 2.8.1."""

import json
from pathlib import Path
from typing import Any

import pytest

from erniem_batch import ErnieMTokenizer

Line = dict[str, Any]


def _read(path: Path) -> list[Line]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(params=["copy", "shared"])
def golden(request: pytest.FixtureRequest, data_dir: Path) -> list[Line]:
    """A part that is kept here, and all of it where the reference data are."""
    if request.param == "copy":
        return _read(data_dir / "tokenizer_golden.jsonl")
    return _read(request.getfixturevalue("shared_dir") / "golden" / "tokenizer.jsonl")


@pytest.fixture(params=["copy", "shared"])
def paddle_golden(request: pytest.FixtureRequest, data_dir: Path) -> list[Line]:
    if request.param == "copy":
        return _read(data_dir / "uiem_tokens.jsonl")
    return _read(request.getfixturevalue("shared_dir") / "golden" / "uiem_raw_tokens.jsonl")


@pytest.fixture(scope="module")
def lower(tokenizer_dir: Path) -> ErnieMTokenizer:
    return ErnieMTokenizer.from_pretrained(tokenizer_dir, do_lower_case=True)


def test_ids(tokenizer, golden):
    lines = [line for line in golden if isinstance(line.get("ids"), list)]
    assert len(lines) >= 170
    for line in lines:
        assert tokenizer(line["text"])["input_ids"] == line["ids"], line["text"]
    batch = tokenizer([line["text"] for line in lines])
    assert batch["input_ids"] == [line["ids"] for line in lines]


def test_tokens(tokenizer, golden):
    lines = [line for line in golden if isinstance(line.get("tokens"), list)]
    assert len(lines) >= 85
    for line in lines:
        assert tokenizer.tokenize(line["text"]) == line["tokens"]


def test_lower_case(lower, golden):
    lines = [line for line in golden if isinstance(line.get("lower_ids"), list)]
    assert any(line["lower_ids"] != line["ids"] for line in lines)
    for line in lines:
        assert lower(line["text"])["input_ids"] == line["lower_ids"], line["text"]


def test_pairs_and_truncation(tokenizer, golden):
    """Where the reference logs an error and returns too long a sequence, ours raises."""
    lines = [line for line in golden if "pair" in line]
    impossible = 0
    for line in lines:
        call = {
            "text": line["text"],
            "text_pair": line["pair"],
            "max_length": line["max_length"],
            "truncation": line["truncation"],
            "return_token_type_ids": True,
            "return_special_tokens_mask": True,
        }
        expected = dict(line["out"])
        if expected.pop("note", None):
            assert len(expected["input_ids"]) > line["max_length"]
            impossible += 1
            with pytest.raises(ValueError, match=f"max_length={line['max_length']}"):
                tokenizer(**call)
            continue
        encoding = tokenizer(**call, return_offsets_mapping=True)
        offsets = encoding.pop("offset_mapping")
        assert dict(encoding) == expected
        assert len(offsets) == len(expected["input_ids"])
    assert 0 < impossible < len(lines)


def test_texts_at_which_the_reference_raises(tokenizer, golden):
    """Lone surrogates: they end its whole batch; here they are read as U+FFFD."""
    texts = [line["text"] for line in golden if "raises" in line.get("ids", ())]
    assert texts
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert (
            ids
            == tokenizer(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))[
                "input_ids"
            ]
        )
        assert len(ids) > 2
        assert tokenizer.tokenize(text)


def test_a_lone_surrogate_leaves_its_neighbours_alone(tokenizer):
    batch = tokenizer(["fine", "a\ud800b", "also fine"])
    assert batch["input_ids"][0] == tokenizer.encode("fine")
    assert batch["input_ids"][1] == tokenizer.encode("a\ufffdb")
    assert batch.replaced_surrogates == [0, 1, 0]


def test_paddle_ids(tokenizer_dir, paddle_golden):
    tokenizer = ErnieMTokenizer.from_pretrained(tokenizer_dir, lone_underline="paddle")
    assert len(paddle_golden) >= 30
    for line in paddle_golden:
        assert tokenizer(line["text"])["input_ids"] == line["ids"], line["text"]
        assert tokenizer.tokenize(line["text"]) == line["tokens"]


def test_paddle_golden_tells_the_two_rules_apart(tokenizer, paddle_golden):
    differ = [line for line in paddle_golden if tokenizer.encode(line["text"]) != line["ids"]]
    assert differ
    for line in differ:
        kept = [token for token in tokenizer.tokenize(line["text"]) if token != "▁"]
        assert kept == line["tokens"]
