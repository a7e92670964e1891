"""Records check themselves, and give up rows without padding they do not need."""

import pytest
import torch

from rto_megatron.batch import PromptBatch, SFTBatch


def batch(**changed):
    values = {
        "tokens": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        "num_tokens": torch.tensor([3, 2]),
        "response_mask": torch.tensor([[False, True, True, False], [False, True, False, False]]),
    }
    return SFTBatch(**{**values, **changed})


def test_a_tensor_of_another_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SFTBatch.response_mask must match tokens \(2, 4\), got \(2, 3\)"):
        batch(response_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"SFTBatch.num_tokens must match tokens \(2, 4\), got \(3,\)"):
        batch(num_tokens=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"SFTBatch.tokens must be .B, T. int64"):
        batch(tokens=torch.zeros(2, 4))


def test_rows_are_cut_to_the_longest_of_them():
    assert batch().rows([1]).tokens.tolist() == [[8, 9]]
    assert batch().rows([1, 0]).tokens.tolist() == [[8, 9, 0], [5, 6, 7]]


def test_rows_are_rounded_up_to_a_multiple_for_sequence_parallelism():
    assert batch().rows([0], multiple=2).tokens.tolist() == [[5, 6, 7, 0]]
    wide = batch().rows([0], multiple=8)
    assert wide.tokens.shape == wide.response_mask.shape == (1, 8)
    assert not wide.response_mask[:, 3:].any()


def test_prompts_need_an_id_each():
    with pytest.raises(ValueError, match="one prompt_id and sample_id a row, got 2, 1 and 2"):
        PromptBatch(ids=((1,), (2,)), prompt_ids=(0,), sample_ids=(0, 0))
