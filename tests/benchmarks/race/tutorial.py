"""transformers' pipeline as its documentation has it. Needs nothing of ours."""

from pathlib import Path

import torch
from transformers import pipeline
from transformers.models.ernie_m.modeling_ernie_m import ErnieMForTokenClassification
from transformers.models.ernie_m.tokenization_ernie_m import ErnieMTokenizer


def ner_pipeline(folder: Path, threads: int):
    """For named entities, with the plain tokenizer of ErnieM, which gives no offsets."""
    torch.set_num_threads(threads)
    tokenizer = ErnieMTokenizer(
        str(folder / "sentencepiece.bpe.model"),
        vocab_file=str(folder / "vocab.txt"),
        model_max_length=512,
    )
    return pipeline(
        "token-classification",
        model=ErnieMForTokenClassification.from_pretrained(folder),
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        device="cpu",
    )
