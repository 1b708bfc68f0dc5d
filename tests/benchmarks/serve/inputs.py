"""Models and texts for the benchmark of the service, all from one seed.

    python tests/benchmarks/serve/inputs.py FOLDER --vocab VOCAB_FOLDER [--layers 12]

In FOLDER:
  model/encoder, ner, classify  ErnieM as `erniem-batch serve` and transformers load it: one encoder
                                with random weights, and two heads on it.
  xlmr                          The encoder and the classification head once more, renamed to
                                XLM-RoBERTa, for servers that do not know ErnieM.
  short.json, mixed.json        Texts, a list of each kind.
"""

import argparse
import json
import os
import random
import unicodedata
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
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
# XLM-RoBERTa's names for the parts of ErnieM.
RENAMED = (
    ("embeddings.layer_norm", "embeddings.LayerNorm"),
    ("encoder.layers.", "encoder.layer."),
    ("self_attn.self_attn.q_proj", "attention.self.query"),
    ("self_attn.self_attn.k_proj", "attention.self.key"),
    ("self_attn.self_attn.v_proj", "attention.self.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"),
    ("norm2", "output.LayerNorm"),
    ("linear1", "intermediate.dense"),
    ("linear2", "output.dense"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=Path, default=DEMO_FOLDER / "encoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--texts", type=int, default=250, help="of each kind")
    args = parser.parse_args()
    tokenizer = ErnieMTokenizer.from_pretrained(args.vocab)
    for number, (kind, lengths) in enumerate(KINDS.items()):
        texts = make_texts(tokenizer, lengths, args.texts, seed=number)
        (args.folder / f"{kind}.json").write_text(json.dumps(texts))
    make_models(args.folder, tokenizer, args.layers)


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


def sentences(rng: random.Random) -> Iterator[str]:
    """The sample sentences again and again, in ever new order; numbers make each new."""
    files = sorted((DEMO_FOLDER / "data").glob("*.jsonl"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    known = [unicodedata.normalize("NFC", json.loads(line)["text"]) for line in lines if line]
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


def make_models(folder: Path, tokenizer: ErnieMTokenizer, n_layers: int) -> None:
    config = ErnieMConfig(vocab_size=len(tokenizer), num_hidden_layers=n_layers)
    torch.manual_seed(0)
    encoder = ErnieMModel(config).eval()
    save(encoder, tokenizer, folder / "model" / "encoder")
    for name, head, labels in (
        ("ner", ErnieMForTokenClassification, ENTITIES),
        ("classify", ErnieMForSequenceClassification, LABELS),
    ):
        model = head(config.with_labels(labels)).eval()
        model.ernie_m.load_state_dict(encoder.state_dict(), strict=False)
        if name == "ner":
            torch.nn.init.constant_(model.classifier.bias[:1], BIAS_OF_NONE)
        save(model, tokenizer, folder / "model" / name)
    save_as_xlmr(model, folder / "model" / "encoder", folder / "xlmr")


def save(model: torch.nn.Module, tokenizer: ErnieMTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_as_xlmr(model: ErnieMForSequenceClassification, vocab: Path, folder: Path) -> None:
    """The same network under the names of XLM-RoBERTa; its pooler is the first half of the head.

    `classify` is the folder for classification, `embed` the one for embeddings; the weights are in
    one file.
    """
    tokenizer = XLMRobertaTokenizerFast(
        vocab_file=str(vocab / "sentencepiece.bpe.model"), model_max_length=512
    )
    ours = model.config
    config = XLMRobertaConfig(
        vocab_size=max(ours.vocab_size, len(tokenizer)),
        num_hidden_layers=ours.num_hidden_layers,
        max_position_embeddings=ours.max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=ours.layer_norm_eps,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    theirs = XLMRobertaForSequenceClassification(config).eval()
    tensors = {xlmr_name(name): tensor for name, tensor in model.state_dict().items()}
    words = "roberta.embeddings.word_embeddings.weight"
    padding = theirs.state_dict()[words][len(tensors[words]) :]
    tensors[words] = torch.cat([tensors[words], padding])
    tensors["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, ours.hidden_size)
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder / "classify")
    tokenizer.save_pretrained(folder / "classify")
    link_as_encoder(folder / "classify", folder / "embed")


def xlmr_name(name: str) -> str:
    head = {
        "ernie_m.pooler.": "classifier.",
        "classifier.": "classifier.out_proj.",
    }
    for ours, theirs in head.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name.replace("ernie_m.", "roberta.")


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
