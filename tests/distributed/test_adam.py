"""Our Adam against torch's, and the contract that Megatron's distributed optimizer reads."""

import copy

import pytest
import torch

from rto_megatron.distributed.adam import FusedAdam


def train(optimizer_class, **settings):
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = optimizer_class([param], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **settings)
    for step in range(5):
        param.grad = torch.tensor([1.0, -1.0, 0.5]) * (step - 1)
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize(
    ("decoupled", "torchs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["adamw", "adam"]
)
def test_it_steps_as_torchs_does(decoupled, torchs):
    torch.testing.assert_close(train(FusedAdam, adam_w_mode=decoupled)[0], train(torchs)[0], rtol=1e-6, atol=0)


def test_the_step_lies_in_the_group_and_survives_a_state_dict():
    param, optimizer = train(FusedAdam)
    state = copy.deepcopy(optimizer.state_dict())  # as from a file: torch shares the tensors otherwise
    assert state["param_groups"][0]["step"] == 5
    assert sorted(state["state"][0]) == ["exp_avg", "exp_avg_sq"]
    resumed = FusedAdam([torch.nn.Parameter(param.clone())])
    resumed.load_state_dict(state)
    for each in (optimizer, resumed):
        each.param_groups[0]["params"][0].grad = torch.ones(3)
        each.step()
    assert torch.equal(resumed.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])


def test_slices_of_no_elements_and_parameters_without_gradient_are_left_alone():
    empty, idle = torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.ones(1))
    empty.grad = torch.zeros(0)
    optimizer = FusedAdam([{"params": [empty, idle]}, {"params": []}])
    optimizer.step()
    assert idle.item() == 1
    assert [group.get("step") for group in optimizer.param_groups] == [1, None]


def test_what_only_a_gpu_library_can_do_is_refused_by_name():
    FusedAdam([torch.nn.Parameter(torch.ones(1))], capturable=False)  # megatron-core 0.19 passes it
    with pytest.raises(ValueError, match=r"does not take \{'master_weights': True\}"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], master_weights=True)
