"""The oracle of the pipelines: an XLM-RoBERTa with the weights of an ErnieM model.

transformers' own pipelines can't be asked with ErnieM itself: its tokenizer isn't a fast one, so
there are no offsets, hence no words, no windows and no answers. XLM-R computes the very same
thing, and has a fast tokenizer. Where that one gives other ids than ErnieM's (which cuts digits,
CJK and some punctuation off), the functions at the end run everything behind the tokenizer
(`_forward` and `postprocess`, unmodified) on ids and offsets of ours.

Tokens are given without special tokens everywhere here.
"""

import re
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from xlmr_names import renamed

from erniem_batch import ErnieMConfig, ErnieMTokenizer
from erniem_batch.model.heads import HEADS
from erniem_batch.text.tokenizer import SENTENCEPIECE_FILE, VOCAB_FILE

with warnings.catch_warnings():
    # transformers 4.40.2 is older than our Python and torch: its own warnings aren't ours.
    warnings.simplefilter("ignore")
    import transformers
    from transformers.data import SquadExample
    from transformers.models import ernie_m

TASKS = {
    "token-classification": "TokenClassification",
    "text-classification": "SequenceClassification",
    "zero-shot-classification": "SequenceClassification",
    "question-answering": "QuestionAnswering",
}
NLI_LABELS = ("contradiction", "neutral", "entailment")


# ---- models -----------------------------------------------------------------------------------


_STDS = {"bias": 0.1, "word_embeddings": 1.0, "classifier": 0.5, "qa_outputs": 0.5}


def save_random_model(
    folder: Path, tokenizer: ErnieMTokenizer, head: str, labels: Sequence[str] = (), **changes: Any
) -> Path:
    """A tiny ErnieM checkpoint whose scores differ clearly from token to token.

    Args:
        head: as in `xlmr_copy`.
        labels: none for answers.
        changes: values of ErnieMConfig.
    """
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    tiny |= {"num_attention_heads": 4, "vocab_size": len(tokenizer)}
    config = ErnieMConfig(**{**tiny, **changes})
    model = HEADS[f"ErnieMFor{head}"](config.with_labels(labels) if labels else config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Words count for more than what all tokens have in common.
            std = next((s for part, s in _STDS.items() if part in name), 0.2)
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter += 1.0
        if labels:  # none of them shall win everywhere
            ids = torch.randint(4, len(tokenizer), (16, 40), generator=generator)
            model.classifier.bias -= model.eval()(ids).logits.flatten(0, -2).mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_KEPT_VALUES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "pad_token_id",
    "layer_norm_eps",
    "id2label",
    "label2id",
    "problem_type",
)


def xlmr_copy(folder: Path, target: Path, head: str) -> Path:
    """Writes the XLM-RoBERTa that computes the same, and its fast tokenizer, for `pipeline`.

    Args:
        folder: an ErnieM checkpoint as transformers writes it, with its tokenizer.
        head: TokenClassification, SequenceClassification or QuestionAnswering.
    """
    source = getattr(ernie_m, f"ErnieMFor{head}").from_pretrained(folder)
    values = {name: getattr(source.config, name) for name in _KEPT_VALUES}
    config = transformers.XLMRobertaConfig(
        **values, type_vocab_size=1, bos_token_id=0, eos_token_id=2
    )
    copy = getattr(transformers, f"XLMRobertaFor{head}")(config)
    weights = dict(renamed(source.state_dict(), head == "SequenceClassification"))
    # ErnieM has no token types.
    types = "roberta.embeddings.token_type_embeddings.weight"
    weights[types] = torch.zeros_like(copy.state_dict()[types])
    copy.load_state_dict(weights, strict=True)
    copy.eval().save_pretrained(target)
    fast_tokenizer(folder).save_pretrained(target)
    return target


def load_pipeline(task: str, folder: Path) -> Any:
    """The reference's pipeline of a task on what `xlmr_copy` wrote."""
    return transformers.pipeline(task, model=str(folder), framework="pt", device="cpu")


NOWHERE = -1


def ignore_blanks(pipe: Any) -> Any:
    """Makes a pipeline of the reference pass over lone "▁" tokens, as ours do (PARITY there).

    All the rest of it stays as it is. Answers that begin or end with such a token are still in its
    list, but begin and end at NOWHERE; of entities they are no part.
    """
    if pipe.task == "question-answering":
        blank, indices = pipe.tokenizer.convert_tokens_to_ids("▁"), pipe.get_indices

        def get_indices(encoding: Any, first: int, last: int, *more: Any) -> tuple[int, int]:
            if blank in (encoding.ids[first], encoding.ids[last]):
                return NOWHERE, NOWHERE
            return indices(encoding, first, last, *more)

        pipe.get_indices = get_indices
    elif pipe.task == "token-classification":
        gather = pipe.gather_pre_entities
        pipe.gather_pre_entities = lambda *args: [e for e in gather(*args) if e["word"] != "▁"]
    return pipe


# ---- tokenizer --------------------------------------------------------------------------------


def fast_tokenizer(folder: Path) -> Any:
    """XLM-R's fast tokenizer with the vocabulary and the special tokens of an ErnieM folder.

    Its parts are those of xlm-roberta-base/tokenizer.json: SentencePiece's own normalisation,
    words at white space (so that a token's offsets don't hold the space before it), Unigram.
    That is SentencePiece but for graphemes of six bytes and more, which it normalises one
    character at a time: half-width kana and their sound marks stay apart ("ｶﾞ").
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / SENTENCEPIECE_FILE).read_bytes())
    score_of = {piece.piece: piece.score for piece in proto.pieces}
    with (folder / VOCAB_FILE).open(encoding="utf-8", newline="\n") as lines:
        vocab = [line.rstrip("\n") for line in lines]
    special = dict(zip(("cls", "pad", "sep", "unk", "mask"), _SPECIAL, strict=True))
    assert [vocab.index(token) for token in _SPECIAL[:4]] == [0, 1, 2, 3]
    # What SentencePiece doesn't know must never be chosen, but special tokens are cut out before.
    never = min(score_of.values()) - 1000.0
    scores = [(t, 0.0 if t in _SPECIAL else score_of.get(t, never)) for t in vocab]
    assert set(score_of) - {"<unk>", "<s>", "</s>"} <= set(vocab)

    tokenizer = Tokenizer(Unigram(scores, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return transformers.XLMRobertaTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": AddedToken(t, normalized=False) for name, t in special.items()},
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=512,
        clean_up_tokenization_spaces=True,
    )


_SPECIAL = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")


def same_ids(
    ours: ErnieMTokenizer, fast: Any, texts: Sequence[str] | Sequence[tuple[str, str]]
) -> list[bool]:
    """For each text or pair of texts, whether both tokenizers give it the same ids."""
    columns = [[t] if isinstance(t, str) else list(t) for t in texts]
    rows = [text for column in columns for text in column]
    mine = ours.encode_batch(rows, offsets=False)
    theirs = fast(rows, add_special_tokens=False)["input_ids"] if rows else []
    equal = iter([mine.of(i).ids.tolist() == ids for i, ids in enumerate(theirs)])
    return [all([next(equal) for _ in column]) for column in columns]


def plain(text: str) -> str:
    """Test data of which ErnieM cuts off as little as XLM-R: words, full stops and commas.

    Texts whose first word isn't one piece with its "▁" still differ: ErnieM drops that "▁".
    """
    text = re.sub(r"[^\w\s.,]|[\d_]", "", text)
    text = re.sub(r"\s+(?=[.,])", "", text)
    return " ".join(re.sub(r"([.,])[.,]+", r"\1", text).split())


# ---- the pipelines behind the tokenizer -------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A run of tokens of one text, without special tokens.

    Attributes:
        offsets: where each begins and ends in the text.
        words: the word each is a part of; none: every token stands alone.
    """

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    words: Sequence[int] = ()

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.ids[part], self.offsets[part], self.words[part])


# What SentencePiece's normaliser turns into spaces is more than white space.
_WORD = re.compile(r"[^\s\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]+")


def our_tokens(tokenizer: ErnieMTokenizer, text: str, *, exact: bool = False) -> Tokens:
    """The tokens of a text as ErnieM cuts it; words are what stands between white space.

    Args:
        exact: a lone "▁" lies where the space is, as our tokenizer says. Else on the first
            character of the word that follows, as in the reference.
    """
    encoded = tokenizer.encode_batch([text])
    offsets = list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True))
    words, word_starts = [], [match.start() for match in _WORD.finditer(text)]
    for i, (start, end) in enumerate(offsets):
        if not _WORD.search(text, start, end):
            start = next(s for s, _ in offsets[i + 1 :])
            offsets[i] = offsets[i] if exact else (start, start + 1)
        words.append(bisect_right(word_starts, start) - 1)
    return Tokens(encoded.ids.tolist(), offsets, words)


def cut(tokens: Tokens, size: int, overlap: int) -> list[Tokens]:
    """Windows as the reference's fast tokenizers cut them: the last one is simply shorter."""
    assert 0 <= overlap < size
    n_tokens = len(tokens.ids)
    last = max(0, n_tokens - size)
    n_steps = -(-last // (size - overlap))
    starts = [i * (size - overlap) for i in range(n_steps + 1)]
    return [tokens[start : start + size] for start in starts]


def tag(pipe: Any, text: str, windows: Sequence[Tokens], **options: Any) -> list[dict[str, Any]]:
    """What the token-classification pipeline finds in a text, given its tokens.

    Args:
        windows: one, or overlapping ones as with `stride`.
        options: of the pipeline's call, without `stride`.
    """
    outputs = []
    for i, window in enumerate(windows):
        ids = _with_special_tokens(pipe.tokenizer, window.ids)
        special = [1, *[0] * len(window.ids), 1]
        inputs = {
            **_tensors(ids),
            "special_tokens_mask": torch.tensor([special]),
            "offset_mapping": torch.tensor([[(0, 0), *window.offsets, (0, 0)]]),
            "sentence": text if i == 0 else None,
            "is_last": i == len(windows) - 1,
        }
        outputs.append(pipe.forward(inputs))
    return pipe.postprocess(outputs, **_postprocess_options(pipe, options))


def classify(
    pipe: Any, ids: Sequence[int], pair_ids: Sequence[int] | None = None, **options: Any
) -> Any:
    """What the text-classification pipeline says of one text or pair.

    A dict without `top_k`, a list with it: the list that the pipeline wraps around the dict of a
    single string isn't added here.
    """
    inputs = _tensors(_with_special_tokens(pipe.tokenizer, ids, pair_ids))
    return pipe.postprocess(pipe.forward(inputs), **_postprocess_options(pipe, options))


def zero_shot(
    pipe: Any,
    text: str,
    pairs: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    **options: Any,
) -> dict[str, Any]:
    """What the zero-shot-classification pipeline says of one text.

    Args:
        pairs: for each candidate label, the ids of the text and those of the template with the
            label in it. The pipeline cuts the text so that both fit, for each label anew.
        options: `multi_label`.
    """
    outputs = []
    for i, (label, (ids, pair_ids)) in enumerate(pairs.items()):
        inputs = {
            **_tensors(_with_special_tokens(pipe.tokenizer, ids, pair_ids)),
            "candidate_label": label,
            "sequence": text,
            "is_last": i == len(pairs) - 1,
        }
        outputs.append(pipe.forward(inputs))
    return pipe.postprocess(outputs, **_postprocess_options(pipe, options))


class FakeEncoding:
    """As much of a `tokenizers.Encoding` as the question-answering pipeline looks at.

    Args:
        n_before: tokens before the context: the question and special tokens.
    """

    def __init__(self, context: Tokens, n_before: int) -> None:
        self.ids = [*[NOWHERE] * n_before, *context.ids, NOWHERE]
        self.offsets = [*[(0, 0)] * n_before, *context.offsets, (0, 0)]
        self._context = context
        self._n_before = n_before

    def token_to_word(self, token: int) -> int | None:
        """The word of a token, None if it has none."""
        place = int(token) - self._n_before
        return self._context.words[place] if 0 <= place < len(self._context.words) else None

    def word_to_chars(self, word: int | None, sequence_index: int) -> tuple[int, int]:
        """From the first to the last token of the word *in this window*, as in the original."""
        assert sequence_index == 1
        if word is None:
            raise TypeError("None is no word")
        places = [i for i, other in enumerate(self._context.words) if other == word]
        return self._context.offsets[places[0]][0], self._context.offsets[places[-1]][1]


def answer(
    pipe: Any, context: str, question_ids: Sequence[int], windows: Sequence[Tokens], **options: Any
) -> Any:
    """What the question-answering pipeline answers, given the windows of the context.

    Args:
        windows: see `cut`; the pipeline's are `max_seq_len - 4 - len(question_ids)` tokens long
            and overlap by `doc_stride`.
        options: `top_k`, `max_answer_len`, `handle_impossible_answer`, `align_to_words`.
    """
    example = SquadExample(None, "-", context, None, None, None)
    outputs = []
    for i, window in enumerate(windows):
        ids = _with_special_tokens(pipe.tokenizer, question_ids, window.ids)
        n_before = len(question_ids) + 3
        hidden = [*[1] * n_before, *[0] * len(window.ids), 1]
        cls = pipe.tokenizer.cls_token_id
        hidden = [0 if token == cls else h for token, h in zip(ids, hidden, strict=True)]
        inputs = {
            **_tensors(ids),
            "p_mask": torch.tensor([hidden]),
            "example": example,
            "encoding": FakeEncoding(window, n_before),
            "is_last": i == len(windows) - 1,
        }
        outputs.append(pipe.forward(inputs))
    return pipe.postprocess(outputs, **_postprocess_options(pipe, options))


def _with_special_tokens(
    tokenizer: Any, ids: Sequence[int], pair_ids: Sequence[int] | None = None
) -> list[int]:
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if pair_ids is None:
        return [cls, *ids, sep]
    return [cls, *ids, sep, sep, *pair_ids, sep]


def _tensors(ids: Sequence[int]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([list(ids)])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _postprocess_options(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `postprocess`, read from those of a call as the pipeline itself does."""
    before, forward, after = pipe._sanitize_parameters(**options)
    assert not before
    assert not forward
    return {**pipe._postprocess_params, **after}
