"""Side by side with transformers 4.40.2 on small random models: heads, losses, files, both ways.

atol=1e-5: fp32 on a CPU, where only the order of additions differs.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erniem_batch import ErnieMConfig, ErnieMTokenizer
from erniem_batch.model.activations import ACTIVATIONS
from erniem_batch.model.convert import CONVERTIBLE, convert

with warnings.catch_warnings():
    # transformers 4.40.2 is older than our Python and torch: its own warnings aren't ours.
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != "4.40.2":
        pytest.skip("the reference is transformers 4.40.2", allow_module_level=True)
    from transformers.models import ernie_m as reference

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

ENCODERS = [name for name in CONVERTIBLE if name != "ErnieMForMultipleChoice"]
N_LABELS = {"ErnieMForSequenceClassification": 5, "ErnieMForTokenClassification": 7}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def pair(tiny_config: ErnieMConfig, tmp_path: Path, random_model: Callable[..., Any]):
    """A model of ours and the reference's with the same weights, through our own files."""

    def make(name: str, **changes: Any) -> tuple[Any, Any]:
        config = replace(tiny_config, num_labels=N_LABELS.get(name, 2), id2label=None)
        config = replace(config, id2label=None, **changes)
        ours = random_model(CONVERTIBLE[name], config)
        ours.save_pretrained(tmp_path / name)
        return ours, _load_reference(name, tmp_path / name)

    return make


def _load_reference(name: str, folder: Path) -> Any:
    theirs, info = getattr(reference, name).from_pretrained(folder, output_loading_info=True)
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems
    return theirs.eval()


def _assert_equal(ours: Any, theirs: Any) -> None:
    """Every field that the reference gives, and no other."""
    given = {name: value for name, value in theirs.items() if value is not None}
    named = {name for name, value in vars(ours).items() if value is not None}
    assert named == given.keys()
    for name, expected in given.items():
        actual = getattr(ours, name)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        else:
            assert len(actual) == len(expected)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=0, atol=1e-5)


def _inputs(batch: dict[str, Tensor], case: str, words: Callable[[Tensor], Tensor]) -> Any:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    holes = mask.clone()
    holes[:, 1::3] = 0
    nothing = mask.clone()
    nothing[1] = 0
    positions = torch.arange(ids.size(1)).flip(0).expand_as(ids).contiguous()
    return {
        "mask": lambda: {"input_ids": ids, "attention_mask": mask},
        "bool_mask": lambda: {"input_ids": ids, "attention_mask": mask.bool()},
        "no_mask": lambda: {"input_ids": ids},
        "holes": lambda: {"input_ids": ids, "attention_mask": holes},
        "row_hidden": lambda: {"input_ids": ids, "attention_mask": nothing},
        "positions": lambda: {"input_ids": ids, "position_ids": positions},
        "embeds": lambda: {"inputs_embeds": words(ids), "attention_mask": mask},
        "head_mask": lambda: {
            "input_ids": ids,
            "head_mask": torch.tensor([[1, 0, 1, 0.5], [0, 1, 1, 1], [1, 1, 1, 1.0]]),
        },
        "all": lambda: {
            "input_ids": ids,
            "attention_mask": mask,
            "output_hidden_states": True,
            "output_attentions": True,
        },
    }[case]()


CASES = (
    "mask",
    "bool_mask",
    "no_mask",
    "holes",
    "row_hidden",
    "positions",
    "embeds",
    "head_mask",
    "all",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_heads(pair, batch, name, case):
    ours, theirs = pair(name)
    words = getattr(ours, "ernie_m", ours).embeddings.word_embeddings
    arguments = _inputs(batch, case, words)
    # The reference changes the caller's position ids, so each side gets its own.
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    _assert_equal(ours(**arguments), theirs(**copies))


@pytest.mark.parametrize("case", ["mask", "no_mask", "positions", "embeds", "all"])
@torch.no_grad()
def test_multiple_choice(pair, batch, case):
    ours, theirs = pair("ErnieMForMultipleChoice")
    arguments = _inputs(batch, case, ours.ernie_m.embeddings.word_embeddings)
    shaped = {
        name: torch.stack([value, value.flip(0)]) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    labels = torch.tensor([2, 0])
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in shaped.items()}
    _assert_equal(ours(**shaped, labels=labels), theirs(**copies, labels=labels))


LOSSES = {
    "single": ("ErnieMForSequenceClassification", {}, {"labels": torch.tensor([4, 0, -100])}),
    "single_column": (
        "ErnieMForSequenceClassification",
        {},
        {"labels": torch.tensor([[4], [0], [1]])},
    ),
    "multi": ("ErnieMForSequenceClassification", {}, {"labels": torch.eye(5)[:3]}),
    "regression_of_many": (
        "ErnieMForSequenceClassification",
        {"problem_type": "regression"},
        {"labels": torch.linspace(-1, 1, 15).view(3, 5)},
    ),
    "regression": (
        "ErnieMForSequenceClassification",
        {"num_labels": 1},
        {"labels": torch.tensor([0.5, -1.0, 2.0])},
    ),
    "regression_column": (
        "ErnieMForSequenceClassification",
        {"num_labels": 1},
        {"labels": torch.tensor([[0.5], [-1.0], [2.0]])},
    ),
    "explicit_single": (
        "ErnieMForSequenceClassification",
        {"problem_type": "single_label_classification"},
        {"labels": torch.tensor([4, 0, 1])},
    ),
    "explicit_multi": (
        "ErnieMForSequenceClassification",
        {"problem_type": "multi_label_classification"},
        {"labels": torch.eye(5)[:3]},
    ),
    "tokens": (
        "ErnieMForTokenClassification",
        {},
        {"labels": torch.arange(36).view(3, 12) % 8 - 1},
    ),
    "answers": (
        "ErnieMForQuestionAnswering",
        {},
        {"start_positions": torch.tensor([1, 12, -5]), "end_positions": torch.tensor([3, 400, 2])},
    ),
    "answers_in_a_column": (
        "ErnieMForQuestionAnswering",
        {},
        {
            "start_positions": torch.tensor([[1], [2], [0]]),
            "end_positions": torch.tensor([[3], [4], [2]]),
        },
    ),
    "answers_without_end": (
        "ErnieMForQuestionAnswering",
        {},
        {"start_positions": torch.tensor([1, 2, 0])},
    ),
    "spans": (
        "ErnieMForInformationExtraction",
        {},
        {"start_positions": torch.eye(12)[:3], "end_positions": torch.eye(12)[3:6]},
    ),
    "spans_without_start": (
        "ErnieMForInformationExtraction",
        {},
        {"end_positions": torch.eye(12)[3:6]},
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_their_gradients(pair, batch, case):
    name, changes, labels = LOSSES[case]
    if case == "tokens":
        labels = {"labels": labels["labels"].masked_fill(labels["labels"] < 0, -100)}
    ours, theirs = pair(name, **changes)
    a, b = ours(**batch, **labels), theirs(**batch, **labels)
    _assert_equal(a, b)
    if b.loss is None:
        return
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if expected[key].grad is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_question_answering_loss_with_nothing_to_learn_is_nan_in_both(pair, batch):
    ours, theirs = pair("ErnieMForQuestionAnswering")
    beyond = {"start_positions": torch.full((3,), 99), "end_positions": torch.full((3,), 99)}
    assert math.isnan(ours(**batch, **beyond).loss)
    assert math.isnan(theirs(**batch, **beyond).loss)


@pytest.mark.parametrize(
    "name", [n for n in CONVERTIBLE if "Choice" not in n and "Extraction" not in n]
)
@torch.no_grad()
def test_tuples(pair, batch, name):
    ours, theirs = pair(name)
    more = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    a, b = ours(**batch, **more), theirs(**batch, **more)
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        assert type(mine) is type(other)
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@torch.no_grad()
def test_activations(activation):
    from transformers.activations import ACT2FN

    x = torch.cat([torch.linspace(-12, 12, 500), torch.tensor([0.0, -0.0, 100.0, -100.0])])
    torch.testing.assert_close(ACTIVATIONS[activation](x), ACT2FN[activation](x), rtol=0, atol=1e-5)


def test_every_activation_of_the_reference_is_known():
    from transformers.activations import ACT2FN

    assert set(ACT2FN) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_eps": 1e-3},
        {"intermediate_size": 32},
        {"num_attention_heads": 1},
        {"pad_token_id": 5},
        {"pruned_heads": {0: [1, 3], 2: [0]}},
    ],
    ids=str,
)
@torch.no_grad()
def test_unusual_configs(pair, batch, changes):
    ours, theirs = pair("ErnieMForTokenClassification", **changes)
    _assert_equal(ours(batch["input_ids"]), theirs(batch["input_ids"]))


# ---- files ------------------------------------------------------------------------------------


def _their_model(name: str, tiny_config: ErnieMConfig) -> Any:
    values = tiny_config.to_dict()
    for absent in ("mask_mode", "model_type", "id2label", "label2id", "architectures"):
        values.pop(absent)
    torch.manual_seed(5)
    labels = N_LABELS.get(name, 2)
    model = getattr(reference, name)(reference.ErnieMConfig(**values, num_labels=labels)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


FILES = {
    "safetensors": ({}, ["model.safetensors"]),
    "sharded safetensors": ({"max_shard_size": "30KB"}, ["model.safetensors.index.json"]),
    "pytorch": ({"safe_serialization": False}, ["pytorch_model.bin"]),
    "sharded pytorch": (
        {"safe_serialization": False, "max_shard_size": "30KB"},
        ["pytorch_model.bin.index.json"],
    ),
}


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_folders_of_the_reference_load(tiny_config, batch, tmp_path, name, form):
    options, expected_files = FILES[form]
    theirs = _their_model(name, tiny_config)
    theirs.save_pretrained(tmp_path, **options)
    assert all((tmp_path / file).is_file() for file in expected_files)
    ours = CONVERTIBLE[name].from_pretrained(tmp_path)
    ids = batch["input_ids"]
    ids = ids[None] if "Choice" in name else ids
    _assert_equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_our_folders_load_through_the_reference_and_back(pair, batch, tmp_path, name):
    """0 missing and 0 unexpected keys are checked by `pair`."""
    ours, theirs = pair(name)
    theirs.save_pretrained(tmp_path / "again")
    again = CONVERTIBLE[name].from_pretrained(tmp_path / "again")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    assert again.config.labels == ours.config.labels


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_pruned_and_resized_folders_load_in_the_reference(random_model, batch, tmp_path, name):
    ours = random_model(CONVERTIBLE[name])
    ours.prune_heads({0: [1, 3], 2: [0]})
    ours.resize_token_embeddings(150)
    ours.save_pretrained(tmp_path)
    theirs = _load_reference(name, tmp_path)
    assert theirs.config.pruned_heads == {0: [1, 3], 2: [0]}
    ids = batch["input_ids"]
    ids = ids[None] if "Choice" in name else ids
    _assert_equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("name", CONVERTIBLE)
@torch.no_grad()
def test_what_the_reference_pruned_and_resized_loads(tiny_config, batch, tmp_path, name):
    theirs = _their_model(name, tiny_config)
    theirs.prune_heads({1: [2], 2: [0, 1]})
    theirs.resize_token_embeddings(150)
    theirs.save_pretrained(tmp_path)
    ours = CONVERTIBLE[name].from_pretrained(tmp_path)
    assert ours.config.pruned_heads == {1: [2], 2: [0, 1]}
    ids = batch["input_ids"]
    ids = ids[None] if "Choice" in name else ids
    _assert_equal(ours(ids), theirs(ids))


@torch.no_grad()
def test_converted_paddle_folder_loads_in_the_reference(data_dir, batch, tmp_path):
    convert(data_dir / "uiem_paddle", tmp_path / "hf")
    theirs = _load_reference("ErnieMForInformationExtraction", tmp_path / "hf")
    ours = CONVERTIBLE["ErnieMForInformationExtraction"].from_pretrained(tmp_path / "hf")
    ids = batch["input_ids"]
    kept = (ids != 0) & (ids != 1)  # mask_mode="paddle", given by hand
    expected = theirs(ids, attention_mask=kept.long())
    torch.testing.assert_close(ours(ids).start_logits, expected.start_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONVERTIBLE if "Extraction" not in n])
def test_auto_classes_find_our_folders(pair, tmp_path, name):
    pair(name)
    auto = name.replace("ErnieM", "AutoModel", 1).replace("ModelModel", "Model")
    assert type(getattr(transformers, auto).from_pretrained(tmp_path / name)).__name__ == name


def test_labels_survive_the_reference(tiny_config, random_model, tmp_path):
    config = tiny_config.with_labels(["nichts", "Ort·", "人"])
    random_model(CONVERTIBLE["ErnieMForTokenClassification"], config).save_pretrained(tmp_path)
    theirs = reference.ErnieMConfig.from_pretrained(tmp_path)
    assert theirs.id2label == {0: "nichts", 1: "Ort·", 2: "人"}
    assert theirs.label2id == {"nichts": 0, "Ort·": 1, "人": 2}
    assert theirs.num_labels == 3


@torch.no_grad()
def test_bfloat16_folder_keeps_its_type_in_the_reference(pair, tmp_path):
    ours, _ = pair("ErnieMModel")
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    theirs = reference.ErnieMModel.from_pretrained(tmp_path / "half", torch_dtype="auto")
    assert theirs.dtype == torch.bfloat16


# ---- tokenizer --------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024年2月8日, ½ cup of café.",
    "北京 上海 a , b ， c",
    "a [SEP] b[MASK]c [CLS]",
    "ﷺ ㌔ ｶﾞ e\u0301 👨‍👩‍👧 مرحبا",
    "İstanbul ΟΔΟΣ GROSS",
    "tab\there\nnew line\u200bzero\u3000wide",
]
EVERYTHING = {"return_token_type_ids": True, "return_special_tokens_mask": True}


@pytest.fixture(scope="module")
def their_tokenizer(tokenizer_dir: Path) -> Any:
    return reference.ErnieMTokenizer.from_pretrained(tokenizer_dir)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": True},
        {"split_special_tokens": True},
        {"padding_side": "left"},
        {"truncation_side": "left"},
    ],
    ids=str,
)
def test_saved_tokenizer_loads_in_the_reference(tokenizer_dir, tmp_path, options):
    ours = ErnieMTokenizer.from_pretrained(tokenizer_dir, **options)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "ErnieMTokenizer"
    call = {"padding": True, "truncation": True, "max_length": 9, **EVERYTHING}
    call |= {"return_attention_mask": True}
    assert dict(ours(TEXTS, **call)) == dict(theirs(TEXTS, **call))
    again = ErnieMTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS, **call) == ours(TEXTS, **call)
    theirs.save_pretrained(tmp_path / "theirs")
    assert ErnieMTokenizer.from_pretrained(tmp_path / "theirs")(TEXTS, **call) == ours(
        TEXTS, **call
    )


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text_pair", [None, list(reversed(TEXTS))], ids=["single", "pair"])
def test_calls(tokenizer, their_tokenizer, text_pair, special):
    call = {"padding": "max_length", "max_length": 90, **EVERYTHING}
    if not special:  # the reference refuses token types then
        call |= {"add_special_tokens": False, "return_token_type_ids": False}
    ours = tokenizer(TEXTS, text_pair, **call, pad_to_multiple_of=8)
    assert dict(ours) == dict(their_tokenizer(TEXTS, text_pair, **call, pad_to_multiple_of=8))


@pytest.mark.parametrize("text", TEXTS)
def test_single_text(tokenizer, their_tokenizer, text):
    assert tokenizer.tokenize(text) == their_tokenizer.tokenize(text)
    assert tokenizer.encode(text) == their_tokenizer.encode(text)
    assert dict(tokenizer(text)) == dict(their_tokenizer(text))
    tensors = tokenizer(text, text, return_tensors="pt")
    assert torch.equal(
        tensors["input_ids"], their_tokenizer(text, text, return_tensors="pt").input_ids
    )


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_decode(tokenizer, their_tokenizer, skip, clean):
    """Special tokens once had spaces around them, and an id that does not exist vanished."""
    rows = [tokenizer.encode(text, text) for text in TEXTS]
    rows += [[], [2], [5, 0, 2, 2, 50, 3, 3, 4, 4, 8001], [99999], [0, 4, 2], list(range(500))]
    options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
    assert tokenizer.batch_decode(rows, **options) == their_tokenizer.batch_decode(rows, **options)


def test_vocabulary(tokenizer, their_tokenizer):
    assert tokenizer.get_vocab() == their_tokenizer.get_vocab()
    assert len(tokenizer) == len(their_tokenizer)
    assert tokenizer.vocab_size == their_tokenizer.vocab_size
    assert tokenizer.all_special_tokens == their_tokenizer.all_special_tokens
    assert tokenizer.all_special_ids == their_tokenizer.all_special_ids
    ids = [0, 5, 8001, 8002, -1, 70000]
    assert tokenizer.convert_ids_to_tokens(ids) == their_tokenizer.convert_ids_to_tokens(ids)
    tokens = ["[SEP]", "▁the", "no such token", ""]
    assert tokenizer.convert_tokens_to_ids(tokens) == their_tokenizer.convert_tokens_to_ids(tokens)
    for method in ("get_special_tokens_mask", "create_token_type_ids_from_sequences"):
        for a, b in (([5, 6], None), ([5, 6], [7]), ([], [])):
            assert getattr(tokenizer, method)(a, b) == getattr(their_tokenizer, method)(a, b)
    ids = [0, 5, 1, 3, 2]
    ours = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert ours == their_tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)


def test_without_a_vocab_file(tokenizer_dir, tmp_path):
    """SentencePiece's own ids, with the special tokens appended."""
    (tmp_path / "sentencepiece.bpe.model").write_bytes(
        (tokenizer_dir / "sentencepiece.bpe.model").read_bytes()
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    ours = ErnieMTokenizer.from_pretrained(tmp_path)
    theirs = reference.ErnieMTokenizer(str(tmp_path / "sentencepiece.bpe.model"), unk_token="<unk>")
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_added_tokens(tokenizer_dir, tmp_path, skip):
    theirs = reference.ErnieMTokenizer.from_pretrained(tokenizer_dir)
    theirs.add_tokens(["<e1>", "<e1>x", "Ünï"])
    theirs.save_pretrained(tmp_path)
    ours = ErnieMTokenizer.from_pretrained(tmp_path)
    texts = ["a <e1> b", "<e1>x<e1>", "Ünï Ünïüü 12<e1>34", "[MASK]<e1>[SEP]"]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert len(ours) == len(theirs)
    rows = ours(texts)["input_ids"]
    options = {"skip_special_tokens": skip}
    assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)
    ours.save_pretrained(tmp_path / "again")
    again = reference.ErnieMTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts)["input_ids"] == ours(texts)["input_ids"]


@pytest.mark.parametrize("text", ["Ab [SEP] Cd", "[MASK]X", "İ [SEP]É [sep]"])
def test_lower_case_keeps_special_tokens_that_are_read_as_text(
    tokenizer_dir: Path, text: str
) -> None:
    """What was lower-cased too, once."""
    theirs = transformers.ErnieMTokenizer.from_pretrained(tokenizer_dir, do_lower_case=True)
    ours = ErnieMTokenizer.from_pretrained(
        tokenizer_dir, do_lower_case=True, split_special_tokens=True
    )
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
