"""A seeded corpus of many small shards with some bad rows, and a small random model for it."""

import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from fakes import save_tiny_ner_model, write_bytes, write_parquet

from erniem_batch import ErnieMTokenizer

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
SENTENCES = {
    "en": "Ada Lovelace met Charles Babbage in London in {n}.",
    "de": "Die Universität Würzburg liegt am Main, {n} Jahre alt.",
    "fr": "Émilie du Châtelet a traduit Newton à Paris, page {n}.",
    "es": "Gabriela Mistral nació en Vicuña, Chile, hace {n} días.",
    "ru": "Сергей Королёв жил в Москве, дом {n}.",
    "zh": "鲁迅在北京写了{n}篇文章。",
    "ja": "東京大学は文京区本郷{n}にあります。",
    "ko": "세종대왕은 서울에서 {n}권의 책을 읽었다.",
    "ar": "ولد ابن خلدون في تونس سنة {n}.",
    "hi": "रवीन्द्रनाथ ठाकुर कोलकाता में {n} वर्ष रहे।",
    "el": "Ο Νίκος Καζαντζάκης γεννήθηκε στο Ηράκλειο το {n}.",
    "th": "สุนทรภู่เกิดที่กรุงเทพมหานคร ปี {n}",
}
BAD_SHARE = 0.05
LONG_SHARE = 0.02
GROUP_ROWS = 25
# One for all files: the version of an input file is made of its size and time.
MODIFIED_NS = 1_700_000_000_000_000_000


@dataclass
class Corpus:
    """Where the shards are, and the ids of their rows.

    Attributes:
        good, bad: ids of rows that can be tagged, and of those that cannot.
    """

    folder: Path
    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)


def make_corpus(folder: Path, seed: int, n_shards: int = 24, rows_per_shard: int = 110) -> Corpus:
    """Shards of Parquet (several row groups), JSONL and, the last one, compressed JSONL."""
    corpus = Corpus(folder)
    for number in range(n_shards):
        write_shard(corpus, number, n_shards, random.Random(f"{seed}-{number}"), rows_per_shard)
    return corpus


def change_corpus(corpus: Corpus, seed: int, rows_per_shard: int = 110) -> Corpus:
    """The corpus of the next night: four files with other texts, and a new one."""
    shards = sorted(corpus.folder.iterdir())
    n_shards = len(shards)
    changed = [0, n_shards // 2, n_shards - 2, n_shards - 1, n_shards]
    after = Corpus(corpus.folder)
    for ids, kept in ((corpus.good, after.good), (corpus.bad, after.bad)):
        kept |= {row_id for row_id in ids if int(row_id[:2]) not in changed}
    for number in changed:
        generator = random.Random(f"{seed}-{number}-changed")
        write_shard(after, number, n_shards, generator, rows_per_shard, MODIFIED_NS + 10**9)
    return after


def write_shard(
    corpus: Corpus,
    number: int,
    n_shards: int,
    generator: random.Random,
    rows_per_shard: int,
    modified_ns: int = MODIFIED_NS,
) -> None:
    """One file; three of five are Parquet."""
    n_rows = generator.randint(rows_per_shard * 2 // 3, rows_per_shard * 4 // 3)
    bad = {i for i in range(n_rows) if generator.random() < BAD_SHARE}
    rows = [_row(f"{number:02}-{i:04}", generator) for i in range(n_rows)]
    corpus.good |= {row["id"] for i, row in enumerate(rows) if i not in bad}
    corpus.bad |= {row["id"] for i, row in enumerate(rows) if i in bad}
    stem = corpus.folder / f"part-{number:05}"
    if number % 5 < 3 and number != n_shards - 1:
        for i in bad:
            rows[i]["text"] = None
        path = write_parquet(stem.with_suffix(".parquet"), pa.Table.from_pylist(rows), GROUP_ROWS)
    else:
        suffix = ".jsonl.gz" if number == n_shards - 1 else ".jsonl"
        lines = (_broken(row, generator) if i in bad else _line(row) for i, row in enumerate(rows))
        path = write_bytes(stem.with_suffix(suffix), "".join(lines).encode())
    os.utime(path, ns=(modified_ns, modified_ns))


def _row(row_id: str, generator: random.Random) -> dict[str, Any]:
    lang = generator.choice(list(SENTENCES))
    n_sentences = 60 if generator.random() < LONG_SHARE else generator.randint(1, 5)
    numbers = (generator.randint(1, 2000) for _ in range(n_sentences))
    text = " ".join(SENTENCES[lang].format(n=n) for n in numbers)
    return {"id": row_id, "lang": lang, "text": text, "n": generator.randint(0, 10**6)}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _broken(row: dict[str, Any], generator: random.Random) -> str:
    """A line that cannot become a row, though its id can be found in it."""
    kind = generator.choice(("null", "number", "broken"))
    if kind == "broken":
        return _line(row)[: -generator.randint(4, 12)] + "\n"
    return _line({**row, "text": None if kind == "null" else 7})


def ids_in(lines: Iterable[str]) -> list[str]:
    """Ids of raw lines, broken ones too."""
    return [line.partition('"id": "')[2].partition('"')[0] for line in lines]


def save_model(folder: Path) -> Path:
    """A random model, slow enough that a run takes seconds, that finds something in every text."""
    tokenizer = ErnieMTokenizer.from_pretrained(TOKENIZER)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128}
    return save_tiny_ner_model(folder, tokenizer, **sizes, initializer_range=0.2)
