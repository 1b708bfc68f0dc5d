import pytest
import torch

from erniem_batch.model.outputs import EncoderOutput, LogitsOutput, SpanOutput

ONE, TWO = torch.ones(1), torch.ones(2)


def test_tuple_leaves_out_what_is_not_set():
    assert LogitsOutput(logits=ONE).to_tuple() == (ONE,)
    assert LogitsOutput(loss=TWO, logits=ONE).to_tuple() == (TWO, ONE)
    assert EncoderOutput(ONE).to_tuple() == (ONE,)


def test_reads_by_name_index_and_slice():
    output = SpanOutput(start_logits=ONE, end_logits=TWO)
    assert output["end_logits"] is TWO
    assert output.end_logits is TWO
    assert output[1] is TWO
    assert output[:2] == (ONE, TWO)
    assert output["loss"] is None


def test_unpacks_like_a_tuple():
    start, end = SpanOutput(start_logits=ONE, end_logits=TWO)
    assert start is ONE
    assert end is TWO


def test_unknown_names_and_indices():
    with pytest.raises(AttributeError):
        LogitsOutput(logits=ONE)["start_logits"]
    with pytest.raises(IndexError):
        LogitsOutput(logits=ONE)[1]
