"""Megatron's own model, DDP, distributed optimizer and schedules train on CPU, the same on every layout."""

import pytest

from tests.distributed.tiny import tiny_trainer
from tests.ranks import run_ranks


def losses_of_two_steps(tensor, pipeline):
    return tiny_trainer(tensor, pipeline).train(3)


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(losses_of_two_steps, 1, 1, 1)[0]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 1)], ids=["tensor 2", "pipeline 2", "data 2"])
def test_two_ranks_train_as_one_process_does(tensor, pipeline, one_process):
    for losses in run_ranks(losses_of_two_steps, 2, tensor, pipeline):
        assert losses == pytest.approx(one_process, abs=1e-5)


def test_training_lowers_nothing_by_accident(one_process):
    # Three different batches: were the optimizer idle, the test above would compare three forward passes only.
    assert len(set(one_process)) == 3
