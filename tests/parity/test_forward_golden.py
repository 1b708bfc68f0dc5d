"""Outputs of the references' own runs, array by array.

atol=1e-5: fp32 on a CPU, where only the order of additions differs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import HEADS, ErnieMForInformationExtraction

CASES = ("mask", "nomask", "holes", "pos", "embeds")
CLASSES = {
    "embed": "ErnieMModel",
    "classify": "ErnieMForSequenceClassification",
    "choose": "ErnieMForMultipleChoice",
    "ner": "ErnieMForTokenClassification",
    "qa": "ErnieMForQuestionAnswering",
    "extract": "ErnieMForInformationExtraction",
}
MASKED_CASES = {"mask": "attention_mask", "holes": "mask_with_holes"}


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, np.ndarray]:
    with np.load(shared_dir / "golden" / "forward.npz") as arrays:
        return dict(arrays)


def _model(shared_dir: Path, head: str, **changes: Any) -> Any:
    folder = shared_dir / "golden" / head
    config = None
    if changes:
        config = replace(ErnieMConfig.from_pretrained(folder), **changes)
    return HEADS[CLASSES[head]].from_pretrained(folder, config=config)


def _arguments(golden: dict[str, np.ndarray], case: str, model: Any) -> dict[str, Tensor]:
    ids = torch.from_numpy(golden["input_ids"])
    mask = torch.from_numpy(golden["attention_mask"])
    if case in MASKED_CASES:
        return {"input_ids": ids, "attention_mask": torch.from_numpy(golden[MASKED_CASES[case]])}
    if case == "nomask":
        return {"input_ids": ids}
    if case == "pos":
        positions = torch.from_numpy(golden["position_ids"])
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    words = getattr(model, "ernie_m", model).embeddings.word_embeddings
    return {"inputs_embeds": words(ids), "attention_mask": mask}


@torch.no_grad()
def _compare(golden: dict[str, np.ndarray], prefix: str, output: Any) -> int:
    """Compares every array of a case; gives how many there were."""
    names = [name for name in golden if name.startswith(prefix + ".")]
    for name in names:
        field, _, index = name.removeprefix(prefix + ".").partition(".")
        ours = getattr(output, field)
        ours = ours[int(index)] if index else ours
        np.testing.assert_allclose(ours.numpy(), golden[name], rtol=0, atol=1e-5, err_msg=name)
    return len(names)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["embed", "classify", "ner", "qa", "extract"])
@torch.no_grad()
def test_heads_give_the_logits_of_transformers(golden, shared_dir, head, case):
    model = _model(shared_dir, head)
    output = model(**_arguments(golden, case, model))
    assert _compare(golden, f"{head}.{case}", output) == (1 if head in ("classify", "ner") else 2)


@torch.no_grad()
def test_hidden_states_and_attentions(golden, shared_dir):
    model = _model(shared_dir, "embed")
    arguments = _arguments(golden, "mask", model)
    output = model(**arguments, output_hidden_states=True, output_attentions=True)
    assert _compare(golden, "embed.all", output) == 2 + 4 + 3


# Labels that the golden file does not hold were found by trying; they reproduce the losses.
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
@torch.no_grad()
def test_classification_losses(golden, shared_dir, kind):
    changes = {"problem_type": "regression"} if kind == "regression" else {}
    model = _model(shared_dir, "classify", **changes)
    labels = torch.from_numpy(golden["classify.multi_labels"])
    labels = torch.arange(6) % 5 if kind == "single" else labels
    output = model(**_arguments(golden, "mask", model), labels=labels)
    assert _compare(golden, f"classify.loss_{kind}", output) == 2


@torch.no_grad()
def test_multiple_choice(golden, shared_dir):
    model = _model(shared_dir, "choose")
    ids = torch.from_numpy(golden["choice_ids"])
    assert _compare(golden, "choose.plain", model(ids)) == 1
    assert _compare(golden, "choose.loss", model(ids, labels=torch.tensor([2]))) == 2


@torch.no_grad()
def test_token_classification_loss(golden, shared_dir):
    model = _model(shared_dir, "ner")
    labels = torch.from_numpy(golden["ner.labels"])
    output = model(**_arguments(golden, "mask", model), labels=labels)
    assert _compare(golden, "ner.loss", output) == 2


@torch.no_grad()
def test_question_answering_loss_with_positions_beyond_the_text(golden, shared_dir):
    model = _model(shared_dir, "qa")
    start, end = (torch.from_numpy(golden[f"qa.{side}"]) for side in ("start", "end"))
    assert end.max() > 54  # ignored, as the reference clamps it to the number of tokens
    arguments = _arguments(golden, "mask", model)
    output = model(**arguments, start_positions=start, end_positions=end)
    assert _compare(golden, "qa.loss", output) == 3


@torch.no_grad()
def test_extraction_loss(golden, shared_dir):
    model = _model(shared_dir, "extract")
    start, end = torch.zeros(6, 54), torch.zeros(6, 54)
    start[:, 3], end[:, 4] = 1.0, 1.0
    arguments = _arguments(golden, "mask", model)
    output = model(**arguments, start_positions=start, end_positions=end)
    assert _compare(golden, "extract.loss", output) == 3


def test_every_golden_array_is_compared(golden):
    """A new case in the file must not go unnoticed."""
    inputs = {"input_ids", "attention_mask", "mask_with_holes", "position_ids", "choice_ids"}
    labels = {"classify.multi_labels", "ner.labels", "qa.start", "qa.end"}
    losses = {"classify.loss_single", "classify.loss_multi", "classify.loss_regression"}
    losses |= {f"{head}.loss" for head in ("choose", "ner", "qa", "extract")}
    plain = {f"{head}.{case}" for head in CLASSES for case in CASES if head != "choose"}
    known = losses | plain | {"choose.plain", "embed.all"}
    seen = {".".join(name.split(".")[:2]) for name in golden if name not in inputs | labels}
    assert seen == known


# ---- PaddleNLP, and an encoder: need nothing but this repository ------------------------------


@pytest.fixture(scope="module")
def uiem_golden(data_dir: Path) -> dict[str, np.ndarray]:
    with np.load(data_dir / "uiem_paddle" / "uiem_raw.npz") as arrays:
        return dict(arrays)


@torch.no_grad()
def _probabilities(folder: Path, mask_mode: str, ids: np.ndarray, **more: Tensor) -> Any:
    model = ErnieMForInformationExtraction.from_pretrained(folder, mask_mode=mask_mode)
    output = model(torch.from_numpy(ids), **more)
    return output.start_logits.sigmoid().numpy(), output.end_logits.sigmoid().numpy()


@pytest.mark.parametrize("length", [51, 71])
def test_uiem_gives_the_probabilities_of_paddlenlp(data_dir, uiem_golden, length):
    ids = uiem_golden[f"ids{length}"]
    start, end = _probabilities(data_dir / "uiem_paddle", "paddle_padded", ids)
    np.testing.assert_allclose(start, uiem_golden[f"start{length}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, uiem_golden[f"end{length}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_mode", ["pad", "paddle", "paddle_padded"])
def test_uiem_with_a_given_mask(data_dir, uiem_golden, mask_mode):
    ids = uiem_golden["ids51"]
    mask = torch.from_numpy(ids != 1)
    start, end = _probabilities(data_dir / "uiem_paddle", mask_mode, ids, attention_mask=mask)
    np.testing.assert_allclose(start, uiem_golden["mask_start"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, uiem_golden["mask_end"], rtol=0, atol=1e-5)


def test_uiem_golden_tells_the_mask_modes_apart(data_dir, uiem_golden):
    """Else the two tests above would prove nothing about the masks."""
    ids = uiem_golden["ids51"]
    modes = ("pad", "paddle", "paddle_padded")
    starts = [_probabilities(data_dir / "uiem_paddle", mode, ids)[0] for mode in modes]
    for i, first in enumerate(starts):
        for second in starts[i + 1 :]:
            assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("case", ["mask", "nomask", "holes", "pos"])
@torch.no_grad()
def test_encoder_of_a_paddle_folder_equals_transformers(data_dir, case):
    model = ErnieMModel.from_pretrained(data_dir / "uiem_paddle", mask_mode="pad")
    with np.load(data_dir / "uiem_paddle" / "encoder.npz") as arrays:
        golden = dict(arrays)
    assert _compare(golden, case, model(**_arguments(golden, case, model))) == 2


def test_shared_uiem_golden_equals_the_copy(shared_dir, data_dir, uiem_golden):
    with np.load(shared_dir / "golden" / "uiem_raw.npz") as arrays:
        for name, array in uiem_golden.items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=name)
