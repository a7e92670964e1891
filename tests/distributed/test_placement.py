"""Roles that live on ranks of their own: they train while others do not, and any placement reads any checkpoint."""

import pytest
import torch

from rto_megatron.batch import SFTBatch
from rto_megatron.config.checkpoint import CheckpointConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.distributed.checkpoint import Manifest, load_optimizer, load_weights, open_checkpoint
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.mesh import role_mesh, seed_streams
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.save import Saver
from rto_megatron.distributed.shards import optimizer_shards, shards
from rto_megatron.distributed.step import token_log_probs, train_step
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks

SHAPE = ModelConfig(num_layers=4, hidden_size=16, ffn_hidden_size=24, vocab_size=60, init_std=0.2)
KINDS = {"policy": "policy", "critic": "value"}

APART = {"policy": ({"tensor": 2}, (0, 2)), "critic": ({}, (2, 3))}
SWAPPED = {"policy": ({"pipeline": 2, "virtual_stages": 2}, (1, 3)), "critic": ({}, (0, 1))}
ON_ONE = {"policy": ({}, (0, 1)), "critic": ({}, (0, 1))}
ON_THE_LAST = {"policy": ({}, (2, 3)), "critic": ({}, (2, 3))}


def place(places, distributed):
    """Role -> what trains it, None where this rank has no part."""
    trained = {}
    for role, (layout, ranks) in places.items():
        parallel = ParallelConfig(**layout)
        mesh = role_mesh(parallel, start_runtime(threads=1), ranks=range(*ranks))
        trained[role] = None
        if mesh is not None:
            model = build_model(SHAPE, mesh, kind=KINDS[role], parallel=parallel, compute=ComputeConfig(), seed=1)
            trained[role] = make_trainable(role, model, OptimizerConfig(distributed=distributed), mesh)
    return trained


def step(trainable):
    """A step with made-up gradients, the same in every layout."""
    trainable.zero_grad()
    for parameter in trainable.model.parameters():
        parameter.main_grad.copy_(parameter.detach() * 0.5)
    trainable.step(1e-2)


def everything(trainable):
    """(kind, name) -> full tensor of weights and moments, and the step count; on all ranks."""
    mine = []
    if trainable is not None:
        kinds = {"weight": list(shards(trainable.model)), **optimizer_shards(trainable)}
        mine = [((k, s.name), s.full_shape, s.slices, s.data.clone()) for k, found in kinds.items() for s in found]
        mine.append((("step",), (1,), (slice(0, 1),), torch.tensor([trainable.optimizer.param_groups[0]["step"]])))
    full = {}
    for name, shape, where, data in (piece for pieces in gather_objects(mine) for piece in pieces):
        full.setdefault(name, torch.full(shape, torch.nan))[where] = data.float()
    return full


def save(places, run_dir, distributed=True):
    """Two steps and a checkpoint."""
    trained = place(places, distributed)
    for trainable in trained.values():
        if trainable is not None:
            step(trainable)
            step(trainable)
    return write(trained, run_dir)


def move(places, run_dir, new_run_dir, distributed=True):
    """Take up what another placement wrote, and write it again."""
    trained, checkpoint = place(places, distributed), open_checkpoint(run_dir)
    for role, trainable in trained.items():
        load_weights(trainable.model if trainable else None, checkpoint, role)
        load_optimizer(trainable, checkpoint, role)
    return write(trained, new_run_dir)


def write(trained, run_dir):
    manifest = Manifest(stage="rto", step=2, models=dict.fromkeys(trained, SHAPE), tokenizer="", optimizers=(*trained,))
    saver = Saver(run_dir, CheckpointConfig(), lambda folder: folder.mkdir())
    saver.start(manifest, {role: trainable and trainable.model for role, trainable in trained.items()}, trained)
    saver.wait()
    return {role: everything(trainable) for role, trainable in trained.items()}


def assert_same(found, want):
    assert found.keys() == want.keys()
    for role in want:
        assert found[role].keys() == want[role].keys()
        wrong = [name for name, tensor in want[role].items() if not torch.equal(found[role][name], tensor)]
        assert not wrong, (role, wrong)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_a_run_goes_from_placement_to_placement_and_back_with_every_bit(tmp_path, distributed):
    want = run_ranks(save, 3, APART, tmp_path / "0", distributed)[0]
    assert want["critic"]["step",] == 2 and want["policy"]["exp_avg", "embedding.word_embeddings.weight"].any()
    hops = [(1, ON_ONE), (3, APART), (3, SWAPPED), (3, ON_THE_LAST)]
    for i, (world, places) in enumerate(hops):
        for found in run_ranks(move, world, places, tmp_path / f"{i}", tmp_path / f"{i + 1}", distributed):
            assert_same(found, want)


def load_with_a_setting_more(run_dir):
    """A checkpoint of ours into an Adam that looks for a setting in its groups which ours does not write."""
    save(ON_ONE, run_dir)
    trainable = place(ON_ONE, True)["critic"]
    (part,) = trainable.optimizer.chained_optimizers
    for group in part.optimizer.param_groups:
        group["bias_correction"] = True
    load_optimizer(trainable, open_checkpoint(run_dir), "critic")
    return [(group["bias_correction"], group["step"]) for group in part.optimizer.param_groups]


def test_another_librarys_adam_finds_its_own_settings(tmp_path):
    (found,) = run_ranks(load_with_a_setting_more, 1, tmp_path)
    assert found == [(True, 2)] * len(found)


def loss(output, batch):
    total = -output[..., 0].sum() / 16
    return total, total.detach()[None]


def three_steps(layout, ranks):
    """(loss, gradient norm) of three steps of a policy; None on ranks without it, which do nothing."""
    policy = place({"policy": (layout, ranks)}, True)["policy"]
    if policy is None:
        return None
    mesh = role_mesh(ParallelConfig(**layout), start_runtime(threads=1), ranks=range(*ranks))
    seed_streams(0, mesh)
    tokens = torch.arange(32).reshape(4, 8)[mesh.data.rank :: mesh.data.size]
    mask = torch.arange(8).expand_as(tokens) >= 4
    batch = SFTBatch(tokens=tokens, num_tokens=torch.full((len(tokens),), 8), response_mask=mask)
    options = {"cut": Cut(rows=1), "lr": 1e-2, "num_sums": 1}
    done = [train_step(policy, batch, token_log_probs, loss, mesh, **options) for _ in range(3)]
    return [number for result in done for number in (result.sums.item(), result.grad_norm)]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}], ids=str)
def test_a_policy_trains_on_some_ranks_while_the_others_do_nothing(layout):
    (alone,) = run_ranks(three_steps, 1, {}, (0, 1))
    assert run_ranks(three_steps, 3, layout, (1, 3)) == [
        None,
        pytest.approx(alone, abs=1e-4),
        pytest.approx(alone, abs=1e-4),
    ]
    assert alone[0] > alone[2] > alone[4]
