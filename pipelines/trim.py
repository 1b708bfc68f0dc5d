"""Make a small model of a large one: fewer words, fewer layers.

    python pipelines/trim.py --model BASE --output SMALL --max-vocab 22000 --layers 8 \\
        --texts 'ner/*.train.jsonl.gz' 1.0 --texts 'corpus/*.jsonl.gz' 0.1

Keeps every special token, every token of a single character (a name may need any of them), the
tokens that the texts use most, and the first layers. A dropped token isn't lost: it is spelled with
shorter ones.
"""

import argparse
import glob
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import nn

from erniem_batch import ErnieMModel, ErnieMTokenizer
from erniem_batch.entry import tool
from erniem_batch.job.lines import bounded_lines

N_SPECIAL = 4  # [CLS] [PAD] [SEP] [UNK] open the vocabulary, [MASK] closes it


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-vocab", type=int, default=22_000, help="rows of the word table")
    parser.add_argument("--layers", type=int, default=8, help="how many, from the input up")
    parser.add_argument(
        "--texts",
        nargs=2,
        action="append",
        required=True,
        metavar=("GLOB", "WEIGHT"),
        help="JSONL files whose strings count, and how much each use counts; repeatable",
    )
    args = parser.parse_args()

    tokenizer = ErnieMTokenizer.from_pretrained(args.model)
    uses = np.zeros(len(tokenizer))
    for pattern, weight in args.texts:
        for texts in batches(pattern):
            ids = tokenizer.encode_batch(texts, offsets=False).ids
            uses += float(weight) * np.bincount(ids, minlength=len(uses))
    uses[tokenizer.all_special_ids] = 0
    words = kept_words(tokenizer, uses, args.max_vocab - N_SPECIAL - 1)
    kept = np.concatenate([np.arange(N_SPECIAL), words, [tokenizer.mask_token_id]])
    share = uses[words].sum() / uses.sum()
    print(f"keeping {len(kept)} of {len(uses)} tokens, {share:.1%} of the weighted uses")

    trimmed = trim_tokenizer(tokenizer, kept)
    model = trim_model(ErnieMModel.from_pretrained(args.model), kept, args.layers)
    model.half().save_pretrained(args.output)
    trimmed.save_pretrained(args.output)
    return 0


def kept_words(tokenizer: ErnieMTokenizer, uses: np.ndarray, n_words: int) -> np.ndarray:
    """Ids of the tokens to keep, ascending: single characters first, then by use."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(uses))))
    is_character = np.array([len(token) == 1 for token in tokens])
    is_character[tokenizer.all_special_ids] = False
    best = np.lexsort((-uses, ~is_character))[:n_words]
    return np.sort(best[(uses[best] > 0) | is_character[best]])


def batches(pattern: str, size: int = 2000) -> Iterator[list[str]]:
    """Every string of top-level fields in the files, some thousand at a time."""
    texts: list[str] = []
    for path in sorted(glob.glob(pattern)):
        for line in bounded_lines(path):
            record = {} if isinstance(line, int) else json.loads(line)
            names = ("text", "question", "context", "premise")
            texts += [record[name] for name in names if name in record]
            texts += record.get("choices", [])
        while len(texts) > size:
            yield texts[:size]
            texts = texts[size:]
    yield texts


def trim_tokenizer(tokenizer: ErnieMTokenizer, kept: np.ndarray) -> ErnieMTokenizer:
    """A tokenizer that knows only the kept ids, renumbered in order."""
    tokens = tokenizer.convert_ids_to_tokens(kept.tolist())
    assert isinstance(tokens, list)
    wanted = set(tokens)
    spm = sentencepiece_model_pb2.ModelProto()
    spm.ParseFromString(tokenizer.sentencepiece_model)
    pieces = [p for p in spm.pieces if p.type != p.NORMAL or p.piece in wanted]
    del spm.pieces[:]
    spm.pieces.extend(pieces)
    return ErnieMTokenizer(spm.SerializeToString(), tokens)


def trim_model(model: ErnieMModel, kept: np.ndarray, n_layers: int) -> ErnieMModel:
    """The first layers of a model with the kept rows of its word table."""
    rows = model.embeddings.word_embeddings.weight[torch.from_numpy(kept)].detach().clone()
    model.config = replace(model.config, vocab_size=len(kept), num_hidden_layers=n_layers)
    model.embeddings.word_embeddings = nn.Embedding.from_pretrained(
        rows, freeze=False, padding_idx=model.config.pad_token_id
    )
    model.encoder.layers = model.encoder.layers[:n_layers]
    return model


if __name__ == "__main__":
    raise SystemExit(tool(main))
