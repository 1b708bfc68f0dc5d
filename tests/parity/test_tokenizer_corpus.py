"""The real 250,002-token vocabulary on sentences in 97 languages, against transformers 4.40.2.

Needs the reference data beside the repository. The long run: `pytest -m slow tests/parity`.
"""

import gzip
import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniem_batch import ErnieMTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers 4.40.2 is older than our Python and torch
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")


@pytest.fixture(scope="module")
def tokenizer(shared_dir: Path) -> ErnieMTokenizer:
    return ErnieMTokenizer.from_pretrained(shared_dir / "vocab")


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.ErnieMTokenizer(
        str(shared_dir / "vocab" / "sentencepiece.bpe.model"),
        vocab_file=str(shared_dir / "vocab" / "vocab.txt"),
    )


@pytest.fixture(scope="module")
def corpus(shared_dir: Path) -> list[str]:
    path = shared_dir / "data" / "corpus" / "sample.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _batches(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


def _check(tokenizer: ErnieMTokenizer, reference: Any, texts: Sequence[str]) -> None:
    for batch in _batches(texts, 1000):
        tokens = tokenizer.encode_batch(batch)
        expected = [reference.convert_tokens_to_ids(reference.tokenize(text)) for text in batch]
        normalize = tokenizer._processor.normalize
        for i, (text, ids) in enumerate(zip(batch, expected, strict=True)):
            mine = tokens.of(i)
            assert mine.ids.tolist() == ids, text
            if not ids:
                continue
            starts, ends = mine.starts, mine.ends
            assert (starts < ends).all(), text
            assert (np.diff(starts) >= 0).all(), text
            assert (np.diff(ends) >= 0).all(), text
            assert starts[0] >= 0, text
            assert ends[-1] <= len(text), text
            # What lies between two tokens is white space or vanishes.
            borders = zip([0, *ends.tolist()], [*starts.tolist(), len(text)], strict=True)
            gaps = {text[end:start] for end, start in borders if start > end}
            assert not any(normalize(gap).replace("▁", "") for gap in gaps), text


def test_a_thousand_lines(tokenizer, reference, corpus):
    _check(tokenizer, reference, corpus[:: len(corpus) // 1000][:1000])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_lines(tokenizer, reference, corpus):
    assert len(corpus) == 60_000
    _check(tokenizer, reference, corpus)
