"""Context ranks: which columns they have, and that attention, log-probs and gradients are those of one rank."""

import pytest
import torch
import torch.distributed as dist

from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.distributed.context import chunks_of, keys_of_all, own_columns, whole_rows
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import rank, start_runtime
from rto_megatron.distributed.step import head_outputs, score, token_log_probs, train_step
from rto_megatron.models.attention import CausalAttention
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks


def test_each_rank_has_a_chunk_from_either_end():
    assert [chunks_of(rank, 3) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


def cut_and_gather():
    """Own columns of 0-11, gathered; and gradients of a sum that all ranks take, and of one that each has its own."""
    start_runtime(threads=1)
    group, weights = dist.group.WORLD, torch.arange(12.0)
    own = own_columns(torch.arange(12.0)[None], group, dim=1).requires_grad_()
    whole, keys = whole_rows(own, group, dim=1), keys_of_all(own, group, dim=1)
    (same,) = torch.autograd.grad((whole * weights).sum(), own)
    (summed,) = torch.autograd.grad((keys * weights * 10 ** rank()).sum(), own)
    return own.tolist(), whole.tolist(), keys.tolist(), same.tolist(), summed.tolist()


def test_columns_come_together_in_order_and_gradients_go_back_to_their_owners():
    columns = [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    for mine, (own, whole, keys, same, summed) in zip(columns, run_ranks(cut_and_gather, 3), strict=True):
        assert own == [mine]
        assert whole == keys == [list(range(12))]
        assert same == [mine]  # the loss is the same on all three ranks, and counts once
        assert summed == [[111 * weight for weight in mine]]


class Alone:
    """The group of a rank that shares nothing."""

    def size(self):
        return 1


class Groups:
    def __init__(self, context):
        self.tp, self.cp = None, context


def attention_and_gradients(num_kv_heads):
    """Output and gradients of query, key and value, whole: of two context ranks, and of one."""
    runtime = start_runtime(threads=1)
    mesh = build_mesh(ParallelConfig(context=2), runtime, seed=0)
    generator, found = torch.Generator().manual_seed(1), []
    shapes = [(16, 3, heads, 8) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    query, key, value, slope = (torch.randn(shape, generator=generator) for shape in shapes)
    for group in (mesh.groups.cp, Alone()):
        attention = CausalAttention(None, pg_collection=Groups(group), softmax_scale=0.5)
        own = [own_columns(x, group, dim=0).clone().requires_grad_() for x in (query, key, value)]
        out = attention(*own).unflatten(-1, (4, 8))
        gradients = torch.autograd.grad((out * own_columns(slope, group, dim=0)).sum(), own)
        found.append([whole_rows(x.detach(), group, dim=0) for x in (out, *gradients)])
    return found


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_attention_and_its_gradients_are_those_of_one_rank(num_kv_heads):
    for ours, plain in run_ranks(attention_and_gradients, 2, num_kv_heads):
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


MODEL = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, vocab_size=60, num_attention_heads=4, num_query_groups=2,
    init_std=0.3,
)  # fmt: skip
LENGTHS = (2, 3, 21, 9, 2, 17)
"""Two of them below the four chunks of a row; microbatches of two get widths of 4, 12 and 24."""


def rows_of_uneven_length():
    tokens = torch.randint(0, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    column, ends = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    # the last half of each row, so that of the short ones only one rank has anything to predict
    mask = (column < ends) & (column >= (ends + 1) // 2)
    return SFTBatch(tokens=tokens.where(column < ends, 0), num_tokens=ends[:, 0], response_mask=mask)


def policy_loss(output, batch):
    log_probs, entropies = output.unbind(-1)
    value = -(log_probs + 0.1 * entropies).where(batch.response_mask, 0.0).sum() / 30
    return value, torch.stack((value.detach(), batch.response_mask.sum().float()))


def value_loss(output, batch):
    value = (output - 0.5).square().where(batch.response_mask, 0.0).sum() / 30
    return value, value.detach()[None]


def scores_and_steps(layout, recompute):
    """What a policy and a value model say of uneven rows, and sums, norm and gradients of a step of each."""
    parallel = ParallelConfig(**layout)
    mesh, batch, found = build_mesh(parallel, start_runtime(threads=1), seed=0), rows_of_uneven_length(), {}
    for kind, forward, loss, num_sums in (
        ("policy", token_log_probs, policy_loss, 2),
        ("value", head_outputs, value_loss, 1),
    ):
        compute = ComputeConfig(recompute=recompute)
        model = build_model(MODEL, mesh, kind=kind, parallel=parallel, compute=compute, seed=3)
        if kind == "value":
            model.value_head.weight.data.fill_(0.1)  # a fresh head is 0 and gives the layers no gradient
        # not distributed, so that every rank has all of each gradient
        trainable = make_trainable(kind, model, OptimizerConfig(clip_grad=0.0, distributed=False), mesh)
        scores = score(model, batch, forward, mesh, cut=Cut(rows=2))
        # a head says something of padding too, and there is more of that where rows are cut
        scores = scores[torch.arange(max(LENGTHS)) < batch.num_tokens[:, None]]
        done = train_step(trainable, batch, forward, loss, mesh, cut=Cut(rows=2), lr=0.0, num_sums=num_sums)
        gradient = torch.cat([weight.main_grad.flatten() for weight in model.parameters()])
        found[kind] = scores, done.sums, torch.tensor(done.grad_norm), gradient.clone()
    return found


@pytest.mark.parametrize(
    ("world", "layout", "recompute"),
    [(2, {"context": 2}, "full"), (3, {"context": 3}, "none"), (4, {"context": 2}, "none")],
    ids=["context 2, recomputed", "context 3", "context 2 x data 2, the same rows twice"],
)
def test_uneven_rows_are_scored_and_learned_from_as_on_one_rank(world, layout, recompute):
    alone = run_ranks(scores_and_steps, 1, {}, "none")[0]
    copies = world // layout["context"]
    for found in run_ranks(scores_and_steps, world, layout, recompute):
        for kind, (scores, *of_the_step) in alone.items():
            torch.testing.assert_close(found[kind][0], scores, rtol=0, atol=1e-5)
            for mine, theirs in zip(found[kind][1:], of_the_step, strict=True):
                torch.testing.assert_close(mine, copies * theirs, rtol=1e-5, atol=1e-5)
