"""Collation and row order: worked examples, and properties over sizes and ranks."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_megatron.data.collate import collate_preferences, collate_sft, prompt_batch
from rto_megatron.data.readers import PreferenceRow, PromptRow, SFTRow
from rto_megatron.data.sampler import batch_rows, epoch_order, shard


def test_sft_rows_are_padded_to_the_longest():
    rows = [SFTRow(prompt_ids=[5], response_ids=[6, 2]), SFTRow(prompt_ids=[7, 8], response_ids=[9, 9, 2])]
    batch = collate_sft(rows, pad_id=1)
    assert batch.tokens.tolist() == [[5, 6, 2, 1, 1], [7, 8, 9, 9, 2]]
    assert batch.num_tokens.tolist() == [3, 5]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert batch.tokens.dtype == torch.int64


def test_pairs_are_rows_chosen_first():
    rows = [
        PreferenceRow(prompt_ids=[5], chosen_ids=[6, 2], rejected_ids=[2]),
        PreferenceRow(prompt_ids=[7], chosen_ids=[8, 2], rejected_ids=[9, 2]),
    ]
    batch = collate_preferences(rows, pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 2], [5, 2, 0], [7, 8, 2], [7, 9, 2]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]]


def test_a_prompt_that_comes_twice_in_a_step_gets_other_samples():
    first, second = (PromptRow(prompt_ids=[5 + i], text="", index=i) for i in range(2))
    batch = prompt_batch([first, second, first], samples_per_prompt=2)
    assert batch.prompt_ids == (0, 0, 1, 1, 0, 0)
    assert batch.sample_ids == (0, 1, 0, 1, 2, 3)
    assert batch.ids == ((5,), (5,), (6,), (6,), (5,), (5,))


def test_row_order_stays_what_it_is():
    # A change here changes every run: resumed ones would see other rows than they began with.
    assert epoch_order(8, seed=0, epoch=0) == (1, 3, 4, 6, 0, 5, 2, 7)
    assert batch_rows(8, 3, seed=0, step=1) == [6, 0, 5]


@given(num_rows=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(num_rows, seed, epoch):
    assert sorted(epoch_order(num_rows, seed=seed, epoch=epoch)) == list(range(num_rows))


@given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 30), num_epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_batches_run_over_epochs_without_gap_or_repeat(num_rows, batch_size, num_epochs, seed):
    num_steps = -(-num_rows * num_epochs // batch_size)
    rows = [row for step in range(num_steps) for row in batch_rows(num_rows, batch_size, seed=seed, step=step)]
    assert len(rows) == num_steps * batch_size
    assert Counter(rows[: num_rows * num_epochs]) == dict.fromkeys(range(num_rows), num_epochs)


def test_epochs_and_seeds_differ():
    assert len({epoch_order(20, seed=s, epoch=e) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_of_a_batch_are_the_batch_for_any_number_of_ranks(world):
    batch = batch_rows(30, 8, seed=1, step=2)
    parts = [[batch[i] for i in shard(8, rank=rank, world=world)] for rank in range(world)]
    assert [row for part in parts for row in part] == batch
    assert {len(part) for part in parts} == {8 // world}


def test_rows_that_do_not_divide_are_an_error():
    message = "6 rows do not divide by 4 data-parallel ranks; make the batch a multiple of 4"
    with pytest.raises(ValueError, match=message):
        shard(6, rank=0, world=4)
