"""The forward pass without padding says what the padded one says."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.model import onednn, steps
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import HEADS, ErnieMForEmbedding, ErnieMForMultipleChoice
from erniem_batch.model.onednn import prepack_linears
from erniem_batch.model.outputs import SpanOutput
from erniem_batch.model.packed import encode_packed, pack

CPU = torch.device("cpu")
MODES = ("pad", "paddle", "paddle_padded")
PAD, CLS, SEP = 1, 0, 2


def texts_of(lengths, seed=3):
    """As windows are: [CLS], tokens, [SEP]."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, 120, size=length) for length in lengths]
    for ids in texts:
        ids[0] = CLS
        ids[-1] = SEP
    return texts


@torch.no_grad()
def alone(model, ids):
    """What `forward` gives for one text."""
    input_ids = torch.from_numpy(ids)[None]
    if isinstance(model, ErnieMForMultipleChoice):
        input_ids = input_ids[None]
    output = model(input_ids)
    if isinstance(output, SpanOutput):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)[0]
    logits = output.logits
    return logits[0] if logits.ndim == 3 else logits


@torch.no_grad()
def assert_same(model, texts, atol=1e-5):
    expected = torch.cat([alone(model, ids) for ids in texts])
    prepacked = deepcopy(model)
    # As on a CPU, as on a GPU; by MKL, by oneDNN with weights as they are and in its own order.
    ways = ((model, False), (model, True), (prepacked, True))
    for one_call, (chosen, by_onednn) in product((False, True), ways):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onednn, "onednn_is_faster", lambda by_onednn=by_onednn: by_onednn)
            if chosen is prepacked:
                prepack_linears(prepacked.ernie_m.encoder)
            rows = chosen.rows(pack(texts, model.config, CPU, one_call=one_call))
        assert rows.shape == expected.shape
        assert rows.dtype == expected.dtype
        torch.testing.assert_close(rows, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("head", sorted(set(HEADS) - {"ErnieMModel", "ErnieMForEmbedding"}))
def test_heads(random_model, tiny_config, head, mask_mode):
    config = replace(tiny_config, mask_mode=mask_mode)
    assert_same(random_model(HEADS[head], config), texts_of([3, 12, 12, 7, 2, 12, 64]))


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean", "max", "none"])
def test_embeddings(random_model, tiny_config, pooling, mask_mode):
    model = random_model(
        ErnieMForEmbedding, replace(tiny_config, mask_mode=mask_mode), pooling=pooling
    )
    texts = texts_of([9, 9, 4, 20])
    texts[1][3] = PAD  # a document may have that word in it
    assert_same(model, texts)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.sampled_from(MODES),
    st.data(),
)
def test_any_ids(tiny_config, lengths, mask_mode, data):
    """[CLS] and padding anywhere: hidden there too, and everywhere."""
    torch.manual_seed(1)
    config = replace(tiny_config, mask_mode=mask_mode)
    model = HEADS["ErnieMForTokenClassification"](config.with_labels(["a", "b"])).eval()
    few = st.sampled_from([CLS, PAD, SEP, 5, 77])
    texts = [
        np.array(data.draw(st.lists(few, min_size=n, max_size=n)), dtype=np.int64) for n in lengths
    ]
    assert_same(model, texts)


def test_pruned_heads(random_model, tiny_config):
    model = random_model(HEADS["ErnieMForTokenClassification"], tiny_config)
    model.prune_heads({0: [1, 2], 2: [0]})
    assert_same(model, texts_of([5, 8, 8]))


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_new", "quick_gelu"])
def test_activations(random_model, tiny_config, hidden_act):
    config = replace(tiny_config, hidden_act=hidden_act)
    assert_same(random_model(HEADS["ErnieMForQuestionAnswering"], config), texts_of([5, 8, 30]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_numbers(random_model, tiny_config, dtype):
    config = replace(tiny_config, mask_mode="paddle")
    model = random_model(HEADS["ErnieMForTokenClassification"], config).to(dtype)
    texts = texts_of([6, 6, 11])
    texts[2][4] = CLS  # needs a bias, which must not overflow
    assert_same(model, texts, atol=1e-9 if dtype == torch.float64 else 0.15)


@torch.no_grad()
def test_only_the_first_token(random_model):
    model = random_model(ErnieMModel)
    texts = texts_of([5, 9, 9])
    for one_call in (False, True):
        batch = pack(texts, model.config, CPU, one_call=one_call)
        every = encode_packed(model, batch)
        firsts = encode_packed(model, batch, firsts_only=True)
        torch.testing.assert_close(firsts, every[batch.firsts_N], atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_may_be_given(random_model):
    model = random_model(ErnieMModel)
    (ids,) = texts_of([7])
    positions = np.array([0, 1, 2, 3, 4, 0, 0])
    packed = encode_packed(model, pack([ids], model.config, CPU, [positions]))
    padded = model(torch.from_numpy(ids)[None], position_ids=torch.from_numpy(positions)[None])
    torch.testing.assert_close(packed, padded[0][0], atol=1e-5, rtol=0)


def test_too_long(random_model):
    model = random_model(ErnieMModel)
    with pytest.raises(ValueError, match="65 tokens do not fit: this model holds 64"):
        encode_packed(model, pack(texts_of([65]), model.config, CPU))


@pytest.mark.parametrize(
    ("processor", "dtype", "expected"),
    [
        ("vendor_id : AuthenticAMD", torch.float32, steps.OneDnnSteps),
        ("vendor_id : AuthenticAMD", torch.bfloat16, steps.Steps),
        ("vendor_id : GenuineIntel", torch.float32, steps.Steps),
    ],
)
def test_who_multiplies(monkeypatch, processor, dtype, expected):
    monkeypatch.setattr(onednn, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    onednn.onednn_is_faster.cache_clear()
    found = steps.steps_for(torch.nn.Linear(4, 4, dtype=dtype))
    onednn.onednn_is_faster.cache_clear()
    assert type(found) is expected
