"""Models and texts for the benchmarks, all from one seed.

    python -m tests.benchmarks.inputs FOLDER --vocab VOCAB_FOLDER [--layers 12] [--rows 250002]

In FOLDER:
  model/encoder, ner, classify  ErnieM as `erniem-batch serve` and transformers load it: one encoder
                                with random weights, and two heads on it.
  xlmr/classify, ner, embed     The same once more, renamed to XLM-RoBERTa, for those who do not
                                know ErnieM.
  short.json, mixed.json        Texts for the service, a list of each kind.
  race-short.json, race-mixed.json
                                Pieces for the race of forward passes, none longer than a window:
                                text and ids of each. Of RACE below.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaTokenizerFast,
)

from erniem_batch import (
    ErnieMConfig,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMTokenizer,
)
from erniem_batch.options import DEMO_FOLDER
from tests.parity.xlmr_names import renamed

ENTITIES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
LABELS = ["negative", "neutral", "positive"]
# Random heads find a name in every token. As many as real ones do: one token in ten or so.
BIAS_OF_NONE = 1.5
# Tokens, from and to, and how many of each block of texts. A block holds every length, so that
# a short measurement sees the same mix as a long one.
SHORT, MEDIUM, LONG = (10, 40), (100, 400), (700, 1500)
BLOCK = 50
KINDS = {
    "short": {SHORT: BLOCK},
    "mixed": {SHORT: 40, MEDIUM: 9, LONG: 1},
}
WINDOW = 512
# Lengths in tokens, special ones included, as drawn from: short texts are sentences; of mixed ones
# 60 % are short, 30 % paragraphs, 10 % long, and for every hundred there are 5,000 tokens of a
# document, in windows.
RACE = {"short": 64, "mixed": 30}


def write_inputs(folder: Path, vocab: Path | None, layers: int, *more: str) -> None:
    """All of it, by a process of its own: what it takes of memory goes with it."""
    command = [sys.executable, "-m", "tests.benchmarks.inputs", str(folder.resolve())]
    command += ["--layers", str(layers), *more]
    if vocab is not None:
        command += ["--vocab", str(vocab.resolve())]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=Path, default=DEMO_FOLDER / "encoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--texts", type=int, default=250, help="of each kind")
    parser.add_argument("--rows", type=int, default=0, help="of the table of words, at least")
    args = parser.parse_args()
    tokenizer = ErnieMTokenizer.from_pretrained(args.vocab)
    for number, (kind, lengths) in enumerate(KINDS.items()):
        texts = make_texts(tokenizer, lengths, args.texts, seed=number)
        (args.folder / f"{kind}.json").write_text(json.dumps(texts))
    for number, (kind, count) in enumerate(RACE.items(), start=len(KINDS)):
        pieces = make_pieces(tokenizer, kind, count, seed=number)
        (args.folder / f"race-{kind}.json").write_text(json.dumps(pieces))
    make_models(args.folder, tokenizer, args.layers, args.rows)


# ---- texts --------------------------------------------------------------------------------------


def make_texts(
    tokenizer: ErnieMTokenizer, lengths: dict[tuple[int, int], int], count: int, seed: int
) -> list[str]:
    """Sample sentences of many languages, joined and cut to the lengths; each text another one."""
    rng = random.Random(seed)
    source = sentences(rng)
    texts: dict[str, None] = {}
    while len(texts) < count:
        block = [span for span, times in lengths.items() for _ in range(times)]
        rng.shuffle(block)
        for low, high in block:
            text = text_of(tokenizer, source, rng.randint(low, high))
            texts.setdefault(text)  # equal ones would be computed once
    return list(texts)[:count]


def make_pieces(
    tokenizer: ErnieMTokenizer, kind: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """Texts of the lengths of a kind, none longer than a window, each with its ids."""
    rng = random.Random(seed)
    source = sentences(rng)
    if kind == "short":
        lengths = [min(160, max(6, round(rng.lognormvariate(3.6, 0.6)))) for _ in range(count)]
    else:
        spans = [(8, 63)] * 6 + [(64, 255)] * 3 + [(256, WINDOW)]
        lengths = [rng.randint(*spans[i % len(spans)]) for i in range(count)]
        lengths += [WINDOW] * round(count / 100 * 5000 / WINDOW)
    pieces = []
    for length in lengths:
        text = text_of(tokenizer, source, length - 2)
        ids = tokenizer(text).input_ids
        pieces.append({"text": text, "ids": ids[: WINDOW - 1] + ids[-1:]})
    rng.shuffle(pieces)
    return pieces


def sample_texts() -> list[str]:
    """Those that come with the package."""
    files = sorted((DEMO_FOLDER / "data").glob("*.jsonl"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines if line]


def sentences(rng: random.Random) -> Iterator[str]:
    """The sample sentences again and again, in ever new order; numbers make each new."""
    known = [unicodedata.normalize("NFC", text) for text in sample_texts()]
    for _ in repeat(None):
        for sentence in rng.sample(known, len(known)):
            yield f"{rng.randint(1, 9999)} {sentence}"


def text_of(tokenizer: ErnieMTokenizer, source: Iterator[str], length: int) -> str:
    """A text of so many tokens, or a few less."""
    text = next(source)
    while len((tokens := tokenizer.encode_batch([text]).of(0)).ids) < length:
        text += f" {next(source)}"
    return text[: int(tokens.ends[length - 1])]


# ---- models -------------------------------------------------------------------------------------


def make_models(folder: Path, tokenizer: ErnieMTokenizer, n_layers: int, n_rows: int) -> None:
    config = ErnieMConfig(vocab_size=max(len(tokenizer), n_rows), num_hidden_layers=n_layers)
    torch.manual_seed(0)
    encoder = ErnieMModel(config).eval()
    save(encoder, tokenizer, folder / "model" / "encoder")
    for name, head, theirs, labels in (
        ("ner", ErnieMForTokenClassification, XLMRobertaForTokenClassification, ENTITIES),
        ("classify", ErnieMForSequenceClassification, XLMRobertaForSequenceClassification, LABELS),
    ):
        model = head(config.with_labels(labels)).eval()
        model.ernie_m.load_state_dict(encoder.state_dict(), strict=False)
        if name == "ner":
            torch.nn.init.constant_(model.classifier.bias[:1], BIAS_OF_NONE)
        save(model, tokenizer, folder / "model" / name)
        save_as_xlmr(model, theirs, labels, folder / "model" / "encoder", folder / "xlmr" / name)
    link_as_encoder(folder / "xlmr" / "classify", folder / "xlmr" / "embed")


def save(model: torch.nn.Module, tokenizer: ErnieMTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_as_xlmr(model: Any, head: Any, labels: list[str], vocab: Path, folder: Path) -> None:
    """The same network under the names of XLM-RoBERTa; its pooler is the first half of the head."""
    tokenizer = XLMRobertaTokenizerFast(
        vocab_file=str(vocab / "sentencepiece.bpe.model"), model_max_length=WINDOW
    )
    ours = model.config
    config = XLMRobertaConfig(
        vocab_size=max(ours.vocab_size, len(tokenizer)),
        num_hidden_layers=ours.num_hidden_layers,
        max_position_embeddings=ours.max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=ours.layer_norm_eps,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    theirs = head(config).eval()
    is_pooled = head is XLMRobertaForSequenceClassification
    tensors = dict(renamed(model.state_dict(), is_pooled))
    words = "roberta.embeddings.word_embeddings.weight"
    padding = theirs.state_dict()[words][len(tensors[words]) :]
    tensors[words] = torch.cat([tensors[words], padding])
    tensors["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, ours.hidden_size)
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def link_as_encoder(source: Path, folder: Path) -> None:
    """The same files, and a config that names the encoder only."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            os.link(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["XLMRobertaModel"]
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
