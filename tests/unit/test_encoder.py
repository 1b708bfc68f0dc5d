from dataclasses import replace

import pytest
import torch
from torch import Tensor

from erniem_batch.errors import ConfigError
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import (
    HEADS,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)


@pytest.fixture
def model(random_model):
    return random_model(ErnieMModel)


def _close(a: Tensor, b: Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


def _for(name: str, tensor: Tensor) -> Tensor:
    """Multiple choice wants a dimension of choices."""
    return tensor[None] if name == "ErnieMForMultipleChoice" else tensor


# ---- arguments --------------------------------------------------------------------------------


@torch.no_grad()
def test_position_ids_are_not_changed(model, batch):
    """The reference adds 2 to the caller's tensor; a second call then computes something else."""
    position_ids = torch.arange(12).expand(3, 12)
    before = position_ids.clone()
    first = model(**batch, position_ids=position_ids)[0]
    assert torch.equal(position_ids, before)
    assert torch.equal(first, model(**batch, position_ids=position_ids)[0])
    assert torch.equal(first, model(**batch)[0])


@torch.no_grad()
def test_position_ids_may_be_one_row_for_all(model, batch):
    positions = torch.arange(12) + 5
    expected = model(**batch, position_ids=positions.expand(3, 12))[0]
    assert torch.equal(model(**batch, position_ids=positions)[0], expected)
    assert torch.equal(model(**batch, position_ids=positions[None])[0], expected)


@pytest.mark.parametrize("shape", [(3, 11), (2, 12), (3, 1), (1, 3, 12), ()])
def test_position_ids_of_another_shape_are_refused(model, batch, shape):
    with pytest.raises(ValueError, match="position_ids"):
        model(**batch, position_ids=torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_position_ids_reach_exactly_the_rows_of_the_table(model):
    ids = torch.tensor([[0, 2]])
    assert model(ids, position_ids=torch.tensor([[-2, 63]]))[0].isfinite().all()
    for outside in (-3, 64):
        with pytest.raises(ValueError, match="from -2 to 63"):
            model(ids, position_ids=torch.tensor([[0, outside]]))


@pytest.mark.parametrize("name", HEADS)
def test_everything_after_input_ids_is_keyword_only(random_model, batch, name):
    """In the reference the second argument is a mask in the heads and positions in the encoder."""
    with pytest.raises(TypeError, match="positional"):
        random_model(HEADS[name])(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("name", HEADS)
def test_unknown_arguments_are_type_errors(random_model, batch, name):
    ids = _for(name, batch["input_ids"])
    with pytest.raises(TypeError, match="token_type_ids"):
        random_model(HEADS[name])(ids, token_type_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("name", HEADS)
def test_past_key_values_and_cache_are_refused(random_model, batch, name):
    model, ids = random_model(HEADS[name]), _for(name, batch["input_ids"])
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, past_key_values=((torch.zeros(1),),))
    with pytest.raises(ValueError, match="use_cache"):
        model(ids, use_cache=True)
    model(ids, past_key_values=None, use_cache=False)


def test_exactly_one_kind_of_input(model, batch):
    embeds = torch.zeros(3, 12, 32)
    for arguments in ({}, {"input_ids": batch["input_ids"], "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**arguments)


@pytest.mark.parametrize("shape", [(12,), (1, 2, 3), (3, 0), ()])
def test_inputs_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match="batch, tokens"):
        model(torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_an_empty_batch_gives_an_empty_result(random_model, batch):
    ids = torch.zeros(0, 12, dtype=torch.long)
    output = random_model(ErnieMModel)(ids, output_attentions=True)
    assert output.last_hidden_state.shape == (0, 12, 32)
    assert output.pooler_output.shape == (0, 32)
    assert output.attentions[0].shape == (0, 4, 12, 12)
    assert random_model(ErnieMModel)(ids, attention_mask=ids)[0].shape == (0, 12, 32)
    assert random_model(ErnieMForTokenClassification)(ids).logits.shape == (0, 12, 2)
    assert random_model(ErnieMForQuestionAnswering)(ids).end_logits.shape == (0, 12)
    choices = torch.zeros(0, 4, 12, dtype=torch.long)
    assert random_model(ErnieMForMultipleChoice)(choices).logits.shape == (0, 4)


@torch.no_grad()
def test_longest_text(model):
    assert model(torch.full((1, 64), 5))[0].shape == (1, 64, 32)
    with pytest.raises(ValueError, match="65 tokens do not fit: this model holds 64"):
        model(torch.full((1, 65), 5))
    with pytest.raises(ValueError, match="65 tokens"):
        model(inputs_embeds=torch.zeros(1, 65, 32))


def test_512_tokens_fit_the_real_position_table_and_513_do_not(tiny_config, random_model):
    model = random_model(ErnieMModel, replace(tiny_config, max_position_embeddings=514))
    assert model(torch.full((1, 512), 5))[0].shape == (1, 512, 32)
    with pytest.raises(ValueError, match="513 tokens"):
        model(torch.full((1, 513), 5))


@torch.no_grad()
def test_embeds_without_a_mask_attend_to_everything(model, batch):
    embeds = model.embeddings.word_embeddings(batch["input_ids"])
    everything = torch.ones(3, 12)
    expected = model(batch["input_ids"], attention_mask=everything)[0]
    assert _close(model(inputs_embeds=embeds)[0], expected)


# ---- masks ------------------------------------------------------------------------------------


@torch.no_grad()
def test_masks_of_two_three_and_four_dimensions_agree(model, batch):
    mask = batch["attention_mask"]
    expected = model(**batch)[0]
    for same in (
        mask.bool(),
        mask.float(),
        mask[:, None, :].expand(3, 12, 12),
        mask[:, None, None, :],
        mask[:, None, None, :].expand(3, 4, 12, 12),
    ):
        assert _close(model(batch["input_ids"], attention_mask=same)[0], expected)


@torch.no_grad()
def test_a_causal_mask_hides_the_future(model, batch):
    ids = batch["input_ids"][:1]
    causal = torch.ones(12, 12).tril()[None]
    changed = ids.clone()
    changed[0, 8] = 77
    before = model(ids, attention_mask=causal)[0][0, :8]
    assert _close(before, model(changed, attention_mask=causal)[0][0, :8], atol=1e-6)
    assert not _close(before, model(ids)[0][0, :8])


@torch.no_grad()
def test_a_mask_for_each_head(model, batch):
    ids = batch["input_ids"]
    by_head = torch.ones(3, 4, 12, 12)
    by_head[:, 2, :, 6:] = 0
    probs = model(ids, attention_mask=by_head, output_attentions=True).attentions[1]
    assert probs[:, 2, :, 6:].max() == 0
    assert (probs[:, 1, :, 6:].sum(-1) > 0).all()
    model.prune_heads({1: [0, 1]})
    pruned = model(ids, attention_mask=by_head, output_attentions=True).attentions[1]
    assert pruned[:, 0, :, 6:].max() == 0
    assert (pruned[:, 1, :, 6:].sum(-1) > 0).all()
    assert _close(
        model(ids, attention_mask=by_head)[0],
        model(ids, attention_mask=by_head, output_attentions=True)[0],
    )


@pytest.mark.parametrize(
    "shape",
    [
        (12,),
        (3, 11),
        (2, 12),
        (1, 12),
        (3, 12, 11),
        (3, 1, 12),
        (3, 2, 12, 12),
        (2, 1, 1, 12),
        (3, 1, 5, 12),
        (3, 1, 1, 12, 12),
    ],
)
@pytest.mark.parametrize("attentions", [True, False])
def test_wrong_masks_are_refused(model, batch, shape, attentions):
    with pytest.raises(ValueError, match="attention_mask"):
        model(batch["input_ids"], attention_mask=torch.ones(shape), output_attentions=attentions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attentions", [True, False])
@torch.no_grad()
def test_a_fully_hidden_row_stays_finite(model, batch, dtype, attentions):
    """It attends evenly, as in the reference (which has no float16 to compare with)."""
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    model = model.to(dtype)
    output = model(batch["input_ids"], attention_mask=mask, output_attentions=attentions)
    assert output.last_hidden_state.isfinite().all()
    if attentions:
        assert _close(output.attentions[0][1].float(), torch.full((4, 12, 12), 1 / 12), atol=1e-3)
    elif dtype != torch.float16:  # fused kernels add its mask in float32, where scores survive
        exact = model.float()(batch["input_ids"], attention_mask=mask)[0]
        assert _close(output[0].float(), exact, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("mask_mode", ["pad", "paddle"])
@torch.no_grad()
def test_padding_changes_nothing(random_model, tiny_config, batch, mask_mode):
    """With the mask that these modes build, and with a given one."""
    model = random_model(ErnieMModel, replace(tiny_config, mask_mode=mask_mode))
    padded = model(batch["input_ids"])[0]
    for row, length in enumerate((12, 7, 3)):
        alone = model(batch["input_ids"][row : row + 1, :length])[0]
        assert _close(padded[row, :length], alone[0])


@torch.no_grad()
def test_paddle_padded_depends_on_the_padded_length(random_model, tiny_config, batch):
    """Why the mode `paddle` exists: lengths may be bucketed only there."""
    model = random_model(ErnieMModel, replace(tiny_config, mask_mode="paddle_padded"))
    ids = batch["input_ids"][2:, :3]
    wider = torch.cat([ids, torch.ones(1, 9, dtype=torch.long)], dim=1)
    assert not _close(model(ids)[0], model(wider)[0][:, :3], atol=1e-3)


@torch.no_grad()
def test_mask_modes_are_given_masks(random_model, tiny_config, batch):
    ids = batch["input_ids"]
    masks = {"pad": ids != 1, "paddle": (ids != 1) & (ids != 0), "paddle_padded": ids != 0}
    for mode, mask in masks.items():
        model = random_model(ErnieMModel, replace(tiny_config, mask_mode=mode))
        assert torch.equal(model(ids)[0], model(ids, attention_mask=mask)[0])


# ---- heads ------------------------------------------------------------------------------------


@torch.no_grad()
def test_head_mask(model, batch):
    assert _close(model(**batch, head_mask=torch.ones(4))[0], model(**batch)[0])
    silent = torch.ones(3, 4)
    silent[1, 2] = 0
    probs = model(**batch, head_mask=silent, output_attentions=True).attentions
    assert probs[1][:, 2].abs().max() == 0
    assert probs[1][:, 1].abs().max() > 0
    for shape in ((3,), (2, 4), (1, 3, 4)):
        with pytest.raises(ValueError, match="head_mask"):
            model(**batch, head_mask=torch.ones(shape))


@torch.no_grad()
def test_pruning_equals_silencing(model, batch):
    silent = torch.ones(3, 4)
    silent[0, [1, 3]] = silent[2, 0] = 0
    expected = model(**batch, head_mask=silent)[0]
    model.prune_heads({0: [1, 3], 2: [0]})
    assert _close(model(**batch)[0], expected)
    assert _close(model(**batch, head_mask=silent)[0], expected)
    assert model.encoder.layers[0].self_attn.self_attn.q_proj.out_features == 16


@torch.no_grad()
def test_pruned_model_survives_saving(random_model, batch, tmp_path):
    model = random_model(ErnieMForTokenClassification)
    model.prune_heads({0: [1]})
    model.prune_heads({0: [0, 1], 2: [3]})
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = ErnieMForTokenClassification.from_pretrained(tmp_path)
    assert again.config.pruned_heads == {0: [0, 1], 2: [3]}
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-6, rtol=0)
    again.prune_heads({2: [0]})
    assert again(**batch).logits.shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_pruned_and_resized_model_survives_saving(random_model, batch, tmp_path, name, dtype):
    model = random_model(HEADS[name]).to(dtype)
    model.prune_heads({0: [1, 3], 2: [0]})
    model.resize_token_embeddings(150)
    inputs = _for(name, batch["input_ids"])
    expected = model(inputs, output_hidden_states=True)
    model.save_pretrained(tmp_path)
    again = HEADS[name].from_pretrained(tmp_path, dtype=dtype)
    assert again.config.pruned_heads == {0: [1, 3], 2: [0]}
    assert again.config.vocab_size == 150
    found = again(inputs, output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(a, b)
    # Weights at another place in memory may be added up in another order.
    close = {"atol": 1e-6 if dtype == torch.float32 else 1e-2, "rtol": 0}
    torch.testing.assert_close(found[0], expected[0], **close)
    again.resize_token_embeddings(120)
    torch.testing.assert_close(again(inputs)[0], expected[0], **close)


@pytest.mark.parametrize("heads", [{0: [4]}, {3: [0]}, {0: [0, 1, 2, 3]}, {-1: [0]}])
def test_impossible_pruning_changes_nothing(model, heads):
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="pruned_heads"):
        model.prune_heads(heads)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert model.config.pruned_heads == {}


# ---- resizing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [100, 120, 300])
@torch.no_grad()
def test_resized_word_table(random_model, batch, tmp_path, vocab_size):
    model = random_model(ErnieMForSequenceClassification)
    ids = batch["input_ids"].clamp(max=99)
    expected = model(ids).logits
    model.resize_token_embeddings(vocab_size)
    assert model.config.vocab_size == vocab_size
    assert torch.equal(model(ids).logits, expected)
    assert model.ernie_m.embeddings.word_embeddings.padding_idx == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, expected)


def test_word_table_must_keep_the_padding_row(model):
    with pytest.raises(ConfigError, match="pad_token_id"):
        model.resize_token_embeddings(1)
    assert model.config.vocab_size == 120


# ---- types, outputs, training -----------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types_run_and_come_close(random_model, batch, name, dtype):
    """The reference fails in half precision: its mask is always float32."""
    model = random_model(HEADS[name])
    arguments = {key: _for(name, value) for key, value in batch.items()}
    exact = model(**arguments, output_attentions=True)
    for attentions in (False, True):
        output = model.to(dtype)(**arguments, output_attentions=attentions)
        assert output[0].dtype == dtype
        assert _close(output[0].float(), exact[0].float(), atol=0.1)


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast(model, batch, dtype, attentions):
    exact = model(**batch)[0]
    with torch.autocast("cpu", dtype=dtype):
        output = model(**batch, output_attentions=attentions)[0]
    assert _close(output.float(), exact, atol=0.1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("more", [False, True])
@torch.no_grad()
def test_tuples_hold_the_same_as_objects(random_model, tiny_config, batch, name, more):
    """The reference's extraction head fails here."""
    arguments = {key: _for(name, value) for key, value in batch.items()}
    arguments |= {"output_hidden_states": more, "output_attentions": more}
    expected = random_model(HEADS[name])(**arguments).to_tuple()
    model = random_model(HEADS[name], replace(tiny_config, return_dict=False))
    for output in (
        model(**arguments),
        random_model(HEADS[name])(**arguments, return_dict=False),
    ):
        assert type(output) is tuple
        assert len(output) == len(expected)
        assert torch.equal(output[0], expected[0])
    assert not isinstance(model(**arguments, return_dict=True), tuple)


@torch.no_grad()
def test_tuple_without_a_pooler_keeps_its_place(random_model, tiny_config, batch):
    model = random_model(ErnieMModel, tiny_config, add_pooling_layer=False)
    hidden, pooled, states = model(**batch, output_hidden_states=True, return_dict=False)
    assert pooled is None
    assert torch.equal(states[-1], hidden)


@torch.no_grad()
def test_attentions_do_not_change_the_result(model, batch):
    plain, explicit = model(**batch), model(**batch, output_attentions=True)
    assert _close(plain[0], explicit[0])
    assert plain.attentions is None
    assert plain.hidden_states is None
    sums = torch.stack(explicit.attentions).sum(-1)
    assert _close(sums, torch.ones_like(sums))


@torch.no_grad()
def test_config_flags_are_defaults(random_model, tiny_config, batch):
    config = replace(tiny_config, output_hidden_states=True, output_attentions=True)
    model = random_model(ErnieMModel, config)
    assert len(model(**batch).hidden_states) == 4
    assert len(model(**batch).attentions) == 3
    assert model(**batch, output_attentions=False).attentions is None


@pytest.mark.parametrize("attentions", [False, True])
def test_dropout_acts_in_training_only(random_model, batch, attentions):
    model = random_model(ErnieMModel)
    arguments = {**batch, "output_attentions": attentions}
    assert torch.equal(model(**arguments)[0], model(**arguments)[0])
    model.train()
    assert not torch.equal(model(**arguments)[0], model(**arguments)[0])


@pytest.mark.parametrize(("act_dropout", "expected"), [(None, 0.3), (0.0, 0.0), (0.2, 0.2)])
def test_dropout_of_the_activation(tiny_config, random_model, act_dropout, expected):
    config = replace(tiny_config, hidden_dropout_prob=0.3, act_dropout=act_dropout)
    assert random_model(ErnieMModel, config).encoder.layers[0].dropout.p == expected


@pytest.mark.parametrize(("classifier_dropout", "expected"), [(None, 0.3), (0.0, 0.0)])
def test_dropout_of_the_classifier(tiny_config, random_model, classifier_dropout, expected):
    config = replace(tiny_config, hidden_dropout_prob=0.3, classifier_dropout=classifier_dropout)
    assert random_model(ErnieMForTokenClassification, config).dropout.p == expected


def test_fresh_weights(tiny_config):
    torch.manual_seed(0)
    model = ErnieMForInformationExtraction(tiny_config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0 < parameter.std() < 0.4, name
    assert model.ernie_m.embeddings.word_embeddings.weight[1].abs().max() == 0


# ---- labels -----------------------------------------------------------------------------------


def test_kind_of_labels_is_decided_on_every_call(random_model, tiny_config, batch):
    """The reference stores its first guess and then refuses labels of another kind."""
    model = random_model(ErnieMForSequenceClassification, replace(tiny_config, id2label=None))
    multi = model(**batch, labels=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])).loss
    single = model(**batch, labels=torch.tensor([1, 0, 1])).loss
    small = model(**batch, labels=torch.tensor([1, 0, 1], dtype=torch.int32)).loss
    column = model(**batch, labels=torch.tensor([[1], [0], [1]])).loss
    assert multi != single
    assert single == small == column
    assert model.config.problem_type is None


def test_integers_of_the_shape_of_the_logits_are_multi_label(random_model, batch):
    model = random_model(ErnieMForSequenceClassification)
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert model(**batch, labels=labels).loss == model(**batch, labels=labels.float()).loss


def test_multiple_choice_takes_expanded_inputs(random_model, batch):
    """`.view` fails on these in the reference."""
    model = random_model(ErnieMForMultipleChoice)
    ids = batch["input_ids"][:2, None].expand(2, 3, 12)
    logits = model(ids, attention_mask=(ids != 1)).logits
    assert logits.shape == (2, 3)
    assert _close(logits[:, 0], logits[:, 2])
    for wrong in ({"input_ids": batch["input_ids"]}, {"inputs_embeds": torch.zeros(3, 12, 32)}, {}):
        with pytest.raises(ValueError, match="choices"):
            model(**wrong)


def test_extraction_labels_may_be_integers_and_must_have_the_shape(random_model, batch):
    model = random_model(ErnieMForInformationExtraction)
    labels = (batch["input_ids"] % 2).long()
    both = {"start_positions": labels, "end_positions": labels}
    as_floats = {name: value.float() for name, value in both.items()}
    assert model(**batch, **both).loss == model(**batch, **as_floats).loss
    with pytest.raises(ValueError, match="start_positions"):
        model(**batch, start_positions=labels[:, 0], end_positions=labels)


def test_extraction_of_a_single_token(random_model):
    """(batch, 1) labels were squeezed and refused in the reference."""
    model = random_model(ErnieMForInformationExtraction)
    labels = torch.ones(2, 1)
    output = model(
        torch.zeros(2, 1, dtype=torch.long), start_positions=labels, end_positions=labels
    )
    assert output.loss.isfinite()


def test_question_answering_always_has_two_outputs(random_model, tiny_config, batch, tmp_path):
    """A config of seven labels, kept while fine-tuning, once made a folder no one could load."""
    model = random_model(
        ErnieMForQuestionAnswering, replace(tiny_config.with_labels(list("abcdefg")))
    )
    assert len(model.config.labels) == 2
    model.save_pretrained(tmp_path)
    again = ErnieMForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).start_logits, model(**batch).start_logits)
