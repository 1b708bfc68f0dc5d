"""ErnieMTokenizer: texts in, ids with exact character offsets out.

The ids are those of transformers 4.40.2 (or of PaddleNLP with `lone_underline="paddle"`); the
offsets, which the reference cannot give, are always exact.
"""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import sentencepiece

from erniem_batch.cache import ByteCache
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.files import read_bytes, read_json_object, short_repr
from erniem_batch.model.overlay import base_folder
from erniem_batch.text.pieces import UNDERLINE, IntArray, PieceTable
from erniem_batch.text.segments import (
    SegmentEncoder,
    Tokens,
    has_surrogates,
    replace_surrogates,
)

SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
VOCAB_FILE = "vocab.txt"
DEFAULT_MAX_LENGTH = 512
SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
PADDINGS = ("longest", "max_length", "do_not_pad")
_SIDES = ("left", "right")
# Of tokens of prompts seen lately.
PROMPT_CACHE_BYTES = 32 << 20

# sentencepiece.bpe.model and vocab.txt of ErnieM are 5 MB each, with 250,002 tokens.
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENS = 1 << 20
MAX_ADDED_TOKENS = 10_000
# The most that SentencePiece allows.
MAX_NBEST = 512

# What the settings of a tokenizer_config.json must be.
_TYPES: dict[str, type] = {
    "do_lower_case": bool,
    "split_special_tokens": bool,
    "sp_model_kwargs": dict,
    **dict.fromkeys(SPECIAL_TOKENS, str),
}


class Encoding(dict[str, Any]):
    """What a tokenizer call gives: a mapping whose entries are attributes as well.

    Attributes:
        replaced_surrogates: for each text, how many lone surrogates were read as U+FFFD.
    """

    replaced_surrogates: list[int]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; there are: {', '.join(self)}") from None


class ErnieMTokenizer:
    """Tokenizer of an ErnieM model; pickles by value.

    Args:
        sentencepiece_model: content of `sentencepiece.bpe.model`.
        vocab: tokens in id order (lines of `vocab.txt`). None: SentencePiece's own ids, with
            the special tokens appended, as the reference does without a vocab.txt.
        do_lower_case: lower-case everything but special tokens.
        lone_underline: what becomes of a piece that is only a space. `hf`: a token of its own
            where transformers makes it one. `paddle`: dropped, as in PaddleNLP.
        split_special_tokens: read "[SEP]" in a text as plain text instead of as a special token.
        model_max_length: where `truncation` cuts unless told otherwise, in tokens.
        num_threads: threads inside one batch call.
        added_tokens: further tokens with ids of their own, by text.

    Attributes:
        prompts: tokens of short texts that come again and again, for tasks that ask questions.

    Raises:
        ConfigError: an option is impossible.
        CheckpointError: the SentencePiece model cannot be read or a special token has no id.
    """

    model_input_names = ("input_ids",)

    def __init__(
        self,
        sentencepiece_model: bytes,
        vocab: Sequence[str] | None = None,
        *,
        do_lower_case: bool = False,
        lone_underline: str = "hf",
        split_special_tokens: bool = False,
        unk_token: str = "[UNK]",
        sep_token: str = "[SEP]",
        pad_token: str = "[PAD]",
        cls_token: str = "[CLS]",
        mask_token: str = "[MASK]",
        model_max_length: int = DEFAULT_MAX_LENGTH,
        padding_side: str = "right",
        truncation_side: str = "right",
        sp_model_kwargs: Mapping[str, Any] | None = None,
        num_threads: int = 1,
        added_tokens: Mapping[str, int] | None = None,
    ) -> None:
        for name, value, allowed in (
            ("lone_underline", lone_underline, ("hf", "paddle")),
            ("padding_side", padding_side, _SIDES),
            ("truncation_side", truncation_side, _SIDES),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.do_lower_case = do_lower_case
        self.lone_underline = lone_underline
        self.split_special_tokens = split_special_tokens
        self.unk_token, self.sep_token, self.pad_token = unk_token, sep_token, pad_token
        self.cls_token, self.mask_token = cls_token, mask_token
        self.model_max_length = model_max_length
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.num_threads = num_threads
        self._sentencepiece_model = sentencepiece_model
        self._vocab_lines = None if vocab is None else list(vocab)
        self._given_added_tokens = dict(added_tokens or {})
        self._build()

    def _build(self) -> None:
        """What follows from the settings; done again after unpickling."""
        if not self._sentencepiece_model:  # the library takes it for no argument
            raise CheckpointError("not a SentencePiece model: it is empty")
        self.prompts: ByteCache[str, Tokens] = ByteCache(PROMPT_CACHE_BYTES)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=self._sentencepiece_model
            )
            pieces = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        except (
            RuntimeError,
            OSError,
            ValueError,
        ) as error:  # ValueError: pieces that are not UTF-8
            raise CheckpointError(f"not a SentencePiece model: {error}") from error
        lines = pieces if self._vocab_lines is None else self._vocab_lines
        self._vocab = {token: index for index, token in enumerate(lines)}
        self._added = dict(self._given_added_tokens)
        for token in self.all_special_tokens:  # those the vocabulary lacks come after it
            if token not in self._vocab and token not in self._added:
                self._added[token] = max([len(self._vocab) - 1, *self._added.values()]) + 1
        self._token_of = {i: token for token, i in {**self._vocab, **self._added}.items()}
        (
            self.unk_token_id,
            self.sep_token_id,
            self.pad_token_id,
            self.cls_token_id,
            self.mask_token_id,
        ) = (self._id_of(getattr(self, name)) for name in SPECIAL_TOKENS)
        literals = sorted({*self.all_special_tokens, *self._added}, key=len, reverse=True)
        self._literals = tuple(literals)
        self._literal = re.compile("|".join(map(re.escape, literals)))
        sampling = {
            k: v
            for k, v in self.sp_model_kwargs.items()
            if k in ("enable_sampling", "nbest_size", "alpha")
        }
        if sampling.get("enable_sampling"):
            sampling = {"nbest_size": 64, "alpha": 0.1, **sampling}
        self._segments = SegmentEncoder(
            self._processor,
            PieceTable(lambda token: self._vocab.get(token, self.unk_token_id)),
            drop_underlines=self.lone_underline == "paddle",
            num_threads=self.num_threads,
            sampling=sampling,
            literal=self._literal,
        )

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_processor", "_segments", "_literal", "_vocab", "_added", "_token_of")
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in (*hidden, "_literals", "prompts")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    # ---- folders ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """The tokenizer of a model folder of transformers or PaddleNLP.

        An overlay (see `model.overlay`) without a tokenizer of its own has that of its base.

        Args:
            changes: constructor arguments instead of the folder's own.

        Raises:
            CheckpointError: `sentencepiece.bpe.model` is absent or the settings cannot be read.
        """
        folder = Path(folder)
        if not (folder / SENTENCEPIECE_FILE).is_file():
            folder = base_folder(folder) or folder
        model_path, vocab_path = folder / SENTENCEPIECE_FILE, folder / VOCAB_FILE
        if not model_path.is_file():
            raise CheckpointError(f"{folder}: expected a tokenizer file {SENTENCEPIECE_FILE}")
        settings: dict[str, Any] = {"lone_underline": "paddle" if _is_paddle(folder) else "hf"}
        settings.update(_settings(read_json_object(folder / "tokenizer_config.json"), folder))
        settings["added_tokens"].update(read_json_object(folder / "added_tokens.json"))
        _check_added_tokens(settings["added_tokens"], folder)
        vocab = _read_vocab(vocab_path) if vocab_path.is_file() else None
        model = read_bytes(model_path, MAX_TOKENIZER_BYTES)
        try:
            return cls(model, vocab, **{**settings, **changes})
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the vocabulary files and settings, readable by transformers 4.40.2."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vocabulary(folder)
        specials = {name: getattr(self, name) for name in SPECIAL_TOKENS}
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added = {
            str(self._id_of(token)): {"content": token, **flags, "special": True}
            for token in [*self.all_special_tokens, *self._added]
        }
        settings = {
            **specials,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": self.do_lower_case,
            "lone_underline": self.lone_underline,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "sp_model_kwargs": self.sp_model_kwargs,
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": "ErnieMTokenizer",
            "truncation_side": self.truncation_side,
        }
        for name, content in (
            ("tokenizer_config.json", settings),
            ("special_tokens_map.json", specials),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    def save_vocabulary(
        self, folder: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes vocab.txt (if there is one) and the SentencePiece model; gives their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        model_path = Path(folder) / f"{prefix}{SENTENCEPIECE_FILE}"
        model_path.write_bytes(self._sentencepiece_model)
        if self._vocab_lines is None:
            return (str(model_path),)
        vocab_path = Path(folder) / f"{prefix}{VOCAB_FILE}"
        with vocab_path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{token}\n" for token in self._vocab_lines)
        return str(vocab_path), str(model_path)

    @property
    def sentencepiece_model(self) -> bytes:
        """Content of `sentencepiece.bpe.model`."""
        return self._sentencepiece_model

    # ---- vocabulary ---------------------------------------------------------------------------

    @property
    def all_special_tokens(self) -> list[str]:
        """[UNK], [SEP], [PAD], [CLS], [MASK], in the reference's order, each once."""
        return list(dict.fromkeys(getattr(self, name) for name in SPECIAL_TOKENS))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return [self._id_of(token) for token in self.all_special_tokens]

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added ones."""
        return len(self._vocab)

    def __len__(self) -> int:
        return len({**self._vocab, **self._added})

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return {**self._vocab, **self._added}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of tokens; unknown ones get the id of [UNK]."""
        if isinstance(tokens, str):
            return self._id_of(tokens)
        return [self._id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """Tokens of ids; an id that does not exist gives [UNK], as in the reference."""
        if isinstance(ids, int | np.integer):
            return self._token_of.get(int(ids), self.unk_token)
        return [self._token_of.get(int(i), self.unk_token) for i in ids]

    def _id_of(self, token: str) -> int:
        found = self._added.get(token, self._vocab.get(token))
        return self._id_of(self.unk_token) if found is None else found

    # ---- texts to tokens ----------------------------------------------------------------------

    def encode_batch(self, texts: Sequence[str], *, offsets: bool = True) -> Tokens:
        """Tokens of many texts without special tokens around them, as flat arrays.

        The fast way in: everything else here is built on it.

        Raises:
            TypeError: a text is not a string; names its place and type.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string")
        if not set(map(type, texts)) <= {str}:
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(f"text {i} must be a string, got {type(text).__name__}")
        # One look at all of them: very few texts hold anything of the two.
        joined = "\n".join(texts)
        if has_surrogates(joined):
            texts = [replace_surrogates(text) for text in texts]
        if self._may_split(joined):
            with_literals = {i for i, text in enumerate(texts) if self._may_split(text)}
            return self._encode_with_literals(texts, with_literals, offsets)
        return self._segments.encode(texts, self.do_lower_case, offsets)

    def _may_split(self, text: str) -> bool:
        # Faster than a search by regular expression, which would hold up other threads.
        return not self.split_special_tokens and any(map(text.__contains__, self._literals))

    def _encode_with_literals(self, texts: Sequence[str], rows: set[int], offsets: bool) -> Tokens:
        """Cuts the texts at special tokens written out in them, as the reference does."""
        segments, row_of, shift, literals = [], [], [], []
        for row, text in enumerate(texts):
            at = 0
            for match in self._literal.finditer(text) if row in rows else ():
                segments += [text[at : match.start()], ""]
                row_of += [row, row]
                shift += [at, match.start()]
                literals += [None, match.group()]
                at = match.end()
            segments.append(text[at:])
            row_of.append(row)
            shift.append(at)
            literals.append(None)
        encoded = self._segments.encode(segments, self.do_lower_case, offsets)
        parts = []
        for i, literal in enumerate(literals):
            part = encoded.of(i)
            if literal is not None:
                end = len(literal) if offsets else 0
                part = Tokens(*map(np.array, ([self._id_of(literal)], [0], [end], [0, 1])))
            if offsets:
                part = part._replace(starts=part.starts + shift[i], ends=part.ends + shift[i])
            parts.append(part)
        return Tokens.join(parts, row_of, len(texts))

    def tokenize(self, text: str) -> list[str]:
        """Token strings; unlike `convert_ids_to_tokens`, unknown ones show their own text."""
        tokens = []
        at = 0
        matches = self._literal.finditer(text) if self._may_split(text) else iter(())
        for match in matches:
            tokens += self._tokenize_plain(text[at : match.start()])
            tokens.append(match.group())
            at = match.end()
        return tokens + self._tokenize_plain(text[at:])

    def _tokenize_plain(self, text: str) -> list[str]:
        return self._segments.tokens(replace_surrogates(text), self.do_lower_case)

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """The `input_ids` of a call."""
        ids: list[int] = self(text, text_pair, **options)["input_ids"]
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = False,
        return_token_type_ids: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
    ) -> Encoding:
        """Model inputs for one text (or pair), or for a list of them.

        Args:
            truncation: True or `longest_first`, `only_first`, `only_second`; False: never cut.
            max_length: for truncation and padding, in tokens with the special ones; None:
                `model_max_length`.
            padding: True or `longest`, `max_length`; False: none.
            return_tensors: `pt` or `np`; None: lists.
            return_attention_mask: PARITY: not given unless asked; the models know their padding.
            return_offsets_mapping: (start, end) of each token in its own text; (0, 0) for
                special tokens and padding.

        Raises:
            TypeError: a text is not a string.
            ValueError: `text_pair` doesn't fit, a truncation leaves nothing to cut, or tensors are
                asked for rows of different lengths.
        """
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        pairs = [text_pair] if isinstance(text_pair, str) else text_pair
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} text pairs")
        how_to_cut = _choice("truncation", truncation, TRUNCATIONS)
        how_to_pad = _choice("padding", padding, PADDINGS)
        limit = self.model_max_length if max_length is None else max_length
        first = self.encode_batch(texts, offsets=return_offsets_mapping)
        second = None
        if pairs is not None:
            second = self.encode_batch(list(pairs), offsets=return_offsets_mapping)
        n_special = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
        kept = _Kept(first.splits, None if second is None else second.splits)
        if how_to_cut != "do_not_truncate":
            kept.truncate(limit, n_special, how_to_cut, self.truncation_side)
        asked = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        columns = self._columns(kept, first, second, add_special_tokens, asked)
        if how_to_pad != "do_not_pad":
            width = limit if how_to_pad == "max_length" else None
            self._pad(columns, width, pad_to_multiple_of)
        encoding = Encoding(_to_tensors(columns, return_tensors))
        if single and return_tensors is None:
            encoding = Encoding({name: values[0] for name, values in columns.items()})
        encoding.replaced_surrogates = count_surrogates(texts, pairs)
        return encoding

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """2 for one text, 4 for a pair."""
        return 4 if pair else 2

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """[CLS] A [SEP], or [CLS] A [SEP] [SEP] B [SEP]."""
        cls, sep = [self.cls_token_id], [self.sep_token_id]
        if token_ids_1 is None:
            return [*cls, *token_ids_0, *sep]
        return [*cls, *token_ids_0, *sep, *sep, *token_ids_1, *sep]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token, 0 for the others."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError(
                    "token_ids_1 must be None when the ids already have special tokens"
                )
            # PARITY: only [CLS] and [SEP] count.
            return [int(i in (self.cls_token_id, self.sep_token_id)) for i in token_ids_0]
        if token_ids_1 is None:
            return [1, *[0] * len(token_ids_0), 1]
        return [1, *[0] * len(token_ids_0), 1, 1, *[0] * len(token_ids_1), 1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """0 for the first text, 1 from its [SEP] on (PARITY). The models don't use them."""
        if token_ids_1 is None:
            return [0] * (len(token_ids_0) + 2)
        return [0] * (len(token_ids_0) + 1) + [1] * (len(token_ids_1) + 3)

    def _columns(
        self,
        kept: "_Kept",
        first: Tokens,
        second: Tokens | None,
        add_special_tokens: bool,
        asked: Mapping[str, bool],
    ) -> dict[str, list[list[Any]]]:
        """What was asked for, row by row, special tokens put in."""
        if second is None and add_special_tokens and not kept.is_cut:
            only = {"input_ids", "offset_mapping"}
            if not any(wanted for name, wanted in asked.items() if name not in only):
                return self._common_columns(first, asked["offset_mapping"])
        ids_a, ids_b = first.ids.tolist(), [] if second is None else second.ids.tolist()
        a = [ids_a[low:high] for low, high in kept.first]
        b: list[Any] = [None] * len(a)
        if kept.second is not None:
            b = [ids_b[low:high] for low, high in kept.second]
        pairs = list(zip(a, b, strict=True))
        columns: dict[str, list[list[Any]]] = {}
        if add_special_tokens:
            columns["input_ids"] = [self.build_inputs_with_special_tokens(*pair) for pair in pairs]
        else:
            columns["input_ids"] = [x + (y or []) for x, y in pairs]
        lengths = [len(ids) for ids in columns["input_ids"]]
        if asked["token_type_ids"]:
            columns["token_type_ids"] = [
                self.create_token_type_ids_from_sequences(x, y)
                if add_special_tokens
                else [0] * len(x) + [1] * len(y or [])
                for x, y in pairs
            ]
        if asked["attention_mask"]:
            columns["attention_mask"] = [[1] * length for length in lengths]
        if asked["special_tokens_mask"]:
            columns["special_tokens_mask"] = [
                self.get_special_tokens_mask(x, y) if add_special_tokens else [0] * length
                for (x, y), length in zip(pairs, lengths, strict=True)
            ]
        if asked["offset_mapping"]:
            columns["offset_mapping"] = _offset_rows(kept, first, second, add_special_tokens)
        return columns

    def _common_columns(self, tokens: Tokens, offsets: bool) -> dict[str, list[list[Any]]]:
        """`_columns` for what is asked for most, with special tokens put in by array."""
        n_rows = len(tokens.splits) - 1
        row_of = np.repeat(np.arange(n_rows), np.diff(tokens.splits))
        place = np.arange(len(row_of)) + 2 * row_of + 1
        splits = tokens.splits + 2 * np.arange(n_rows + 1)
        ids = np.full(int(splits[-1]), self.sep_token_id)
        ids[splits[:-1]] = self.cls_token_id
        ids[place] = tokens.ids
        ranges, flat = _ranges(splits), ids.tolist()
        columns = {"input_ids": [flat[low:high] for low, high in ranges]}
        if offsets:
            bounds = np.zeros((2, len(ids)), dtype=np.int64)
            bounds[:, place] = tokens.starts, tokens.ends
            pairs = list(zip(*bounds.tolist(), strict=True))
            columns["offset_mapping"] = [pairs[low:high] for low, high in ranges]
        return columns

    def _pad(
        self, columns: dict[str, list[list[Any]]], length: int | None, multiple: int | None
    ) -> None:
        target = max(map(len, columns["input_ids"]), default=0) if length is None else length
        if multiple:
            target = -(-target // multiple) * multiple
        filler = {
            "input_ids": self.pad_token_id,
            "token_type_ids": 0,
            "attention_mask": 0,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }
        for name, rows in columns.items():
            for i, row in enumerate(rows):
                padding = [filler[name]] * (target - len(row))
                rows[i] = row + padding if self.padding_side == "right" else padding + row

    # ---- tokens to text -----------------------------------------------------------------------

    def decode(
        self,
        token_ids: Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = True,
    ) -> str:
        """Text of ids: readable, not exact (use offsets for that)."""
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        tokens = self.convert_ids_to_tokens([i for i in token_ids if i not in skipped])
        # PARITY: special tokens are joined like any other, added ones stand alone.
        alone = self._added.keys() - set(self.all_special_tokens)
        runs: list[list[str]] = [[]]
        for token in tokens:
            if token in alone:
                runs += [[token], []]
            else:
                runs[-1].append(token)
        text = " ".join(filter(None, map(self.convert_tokens_to_string, runs)))
        return clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Iterable[Iterable[int]], **options: Any) -> list[str]:
        """`decode` for each."""
        return [self.decode(sequence, **options) for sequence in sequences]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Tokens joined, "▁" read as a space."""
        return "".join(tokens).replace(UNDERLINE, " ").strip()


class _Kept:
    """Which tokens of each text, and of each pair, stay after truncation.

    Attributes:
        first, second: (low, high) in the flat arrays of all texts, of all pairs.
    """

    def __init__(self, first: IntArray, second: IntArray | None) -> None:
        self.first = _ranges(first)
        self.second = None if second is None else _ranges(second)
        self.is_cut = False

    def truncate(self, max_length: int, n_special: int, how: str, side: str) -> None:
        """Cuts every row to `max_length` tokens, `n_special` special ones among them.

        Raises:
            ValueError: a row cannot be cut this way.
        """
        for i, (low, high) in enumerate(self.first):
            n_a = high - low
            n_b = 0 if self.second is None else self.second[i][1] - self.second[i][0]
            excess = n_a + n_b + n_special - max_length
            if excess <= 0:
                continue
            left = _lengths_left(n_a, None if self.second is None else n_b, excess, how)
            if left is None:
                # PARITY: the reference logs an error and returns a sequence that is too long.
                raise ValueError(
                    f"truncation={how!r} cannot cut {n_a} + {n_b} tokens to max_length="
                    f"{max_length}: raise max_length or use truncation='longest_first'"
                )
            self.is_cut = True
            keep_a, keep_b = left
            self.first[i] = _cut(self.first[i], keep_a, side)
            if self.second is not None:
                self.second[i] = _cut(self.second[i], keep_b, side)


def _ranges(splits: IntArray) -> list[tuple[int, int]]:
    return list(pairwise(splits.tolist()))


def _cut(part: tuple[int, int], keep: int, side: str) -> tuple[int, int]:
    low, high = part
    return (low, low + keep) if side == "right" else (high - keep, high)


def _lengths_left(n_a: int, n_b: int | None, excess: int, how: str) -> tuple[int, int] | None:
    """Lengths of text and pair after cutting; None if they cannot be cut this way."""
    if n_b is not None and how == "longest_first":
        keep_a, keep_b = longest_first(n_a, n_b, excess)
        fits = keep_a >= 0 and keep_b >= 0
    elif how == "only_second":
        keep_a, keep_b = n_a, (n_b or 0) - excess
        fits = keep_b >= 1
    else:
        keep_a, keep_b = n_a - excess, n_b or 0
        fits = keep_a >= 1
    return (keep_a, keep_b) if fits else None


def _offset_rows(
    kept: _Kept, first: Tokens, second: Tokens | None, add_special_tokens: bool
) -> list[list[tuple[int, int]]]:
    """Offsets of each row; (0, 0) for special tokens."""
    none = [(0, 0)] if add_special_tokens else []
    pairs_a = list(zip(first.starts.tolist(), first.ends.tolist(), strict=True))
    rows = [[*none, *pairs_a[low:high], *none] for low, high in kept.first]
    if second is not None and kept.second is not None:
        pairs_b = list(zip(second.starts.tolist(), second.ends.tolist(), strict=True))
        for row, (low, high) in zip(rows, kept.second, strict=True):
            row += [*none, *pairs_b[low:high], *none]
    return rows


def count_surrogates(texts: Sequence[str], pairs: Sequence[str] | None) -> list[int]:
    """For each text, with its pair, how many lone surrogates it holds."""
    groups = list(texts) if pairs is None else [a + b for a, b in zip(texts, pairs, strict=True)]
    if not has_surrogates("".join(groups)):
        return [0] * len(groups)
    return [sum("\ud800" <= char <= "\udfff" for char in group) for group in groups]


def longest_first(n_a: int, n_b: int, excess: int) -> tuple[int, int]:
    """What is left of two lengths after taking one at a time from the longer, ties from the second.

    Example:
        >>> longest_first(5, 3, 4)
        (2, 2)
    """
    from_longer = min(excess, abs(n_a - n_b))
    if n_a > n_b:
        n_a -= from_longer
    else:
        n_b -= from_longer
    rest = excess - from_longer
    return n_a - rest // 2, n_b - (rest + 1) // 2


def clean_up_tokenization(text: str) -> str:
    """Removes the space before English punctuation and contractions, as transformers does."""
    for mark in (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark[1:])
        if mark == " ,":
            text = text.replace(" ' ", "'")
    return text


def _choice(name: str, value: bool | str, choices: Sequence[str]) -> str:
    if isinstance(value, bool):
        return choices[0] if value else choices[-1]
    if value not in choices:
        raise ValueError(f"{name} must be a boolean or one of {', '.join(choices)}, got {value!r}")
    return value


def _to_tensors(columns: dict[str, list[Any]], kind: str | None) -> dict[str, Any]:
    if kind is None:
        return columns
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}")
    if len({len(row) for row in columns["input_ids"]}) > 1:
        raise ValueError("rows of different lengths do not make a tensor: pass padding=True")
    arrays = {name: np.array(rows, dtype=np.int64) for name, rows in columns.items()}
    if kind == "np":
        return arrays
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---- folders ----------------------------------------------------------------------------------


def _read_vocab(path: Path) -> list[str]:
    """The lines of a vocab.txt.

    Raises:
        CheckpointError: the file is too large, has too many lines or is not UTF-8.
    """
    content = io.BytesIO(read_bytes(path, MAX_TOKENIZER_BYTES))
    lines: list[str] = []
    try:
        for line in io.TextIOWrapper(content, encoding="utf-8"):
            if len(lines) == MAX_TOKENS:
                raise CheckpointError(f"{path}: expected at most {MAX_TOKENS:,} lines")
            lines.append(line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error
    return lines


def _is_paddle(folder: Path) -> bool:
    """Whether PaddleNLP wrote the folder."""
    if any((folder / name).exists() for name in ("model_state.pdparams", "model_config.json")):
        return True
    config = read_json_object(folder / "config.json")
    architectures = config.get("architectures")
    is_uie = isinstance(architectures, list) and "UIEM" in architectures
    return is_uie or "paddlenlp_version" in config


def _settings(stored: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Constructor arguments from a tokenizer_config.json."""
    names = (
        "do_lower_case",
        "lone_underline",
        "split_special_tokens",
        "padding_side",
        "truncation_side",
        "sp_model_kwargs",
        *SPECIAL_TOKENS,
    )
    settings = {name: stored[name] for name in names if stored.get(name) is not None}
    for name in SPECIAL_TOKENS:  # written as an object by some versions
        if isinstance(settings.get(name), dict):
            settings[name] = settings[name].get("content")
    for name, expected in _TYPES.items():
        value = settings.get(name, expected())
        is_empty = name in SPECIAL_TOKENS and name in settings and not value
        if not isinstance(value, expected) or is_empty:
            raise CheckpointError(
                f"{folder}: tokenizer_config.json: {name} must be of the type "
                f"{expected.__name__} and not empty, got {short_repr(value)}"
            )
    _check_sampling(settings.get("sp_model_kwargs", {}), folder)
    length = stored.get("model_max_length")
    if isinstance(length, int) and 0 < length <= DEFAULT_MAX_LENGTH:
        # Larger values are "no limit" (transformers) or wrong by two (PaddleNLP's 514).
        settings["model_max_length"] = length
    settings["added_tokens"] = _added_tokens(stored.get("added_tokens_decoder") or {}, folder)
    return settings


def _added_tokens(stored: Any, folder: Path) -> dict[str, int]:
    """Ids by token from the added_tokens_decoder of a tokenizer_config.json."""
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder}: added_tokens_decoder must be an object")
    added = {}
    for index, token in stored.items():
        if not isinstance(token, dict) or not index.isdecimal() or len(index) > 9:
            raise CheckpointError(
                f"{folder}: added token {short_repr(index)} must be an object with a number as key"
            )
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise CheckpointError(
                f"{folder}: added token {index} uses lstrip, rstrip or single_word, "
                f"which is not supported"
            )
        if not isinstance(token.get("content"), str):
            raise CheckpointError(f"{folder}: added token {index} has no content")
        added[token["content"]] = int(index)
    return added


def _check_added_tokens(added: Mapping[str, Any], folder: Path) -> None:
    if len(added) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{folder}: expected at most {MAX_ADDED_TOKENS:,} added tokens, got {len(added):,}"
        )
    for token, index in added.items():
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if not token or not is_index or not 0 <= index < MAX_TOKENS:
            raise CheckpointError(
                f"{folder}: added token {short_repr(token)}: expected a text and a number below "
                f"{MAX_TOKENS:,}, got {short_repr(index)}"
            )


def _check_sampling(options: Mapping[str, Any], folder: Path) -> None:
    """SentencePiece takes what it is given and fails at the first text."""
    limits = {"nbest_size": (int, -1, MAX_NBEST), "alpha": (int | float, 0, 100)}
    is_right = isinstance(options.get("enable_sampling", False), bool)
    for name, (expected, low, high) in limits.items():
        value = options.get(name, low)
        is_right &= isinstance(value, expected) and low <= value <= high
    if not is_right:
        raise CheckpointError(
            f"{folder}: sp_model_kwargs: expected enable_sampling as true or false, nbest_size "
            f"from -1 to {MAX_NBEST} and alpha from 0 to 100, got {short_repr(options)}"
        )
