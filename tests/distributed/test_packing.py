"""However rows are cut, packed and shared out, a step is the same: scores, gradients and weights within 1e-5."""

from collections import Counter

import pytest
import torch

from rto_megatron.batch import SFTBatch
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.data.shares import deal
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.microbatches import pack
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.step import (
    Task,
    accumulate,
    finish,
    head_outputs,
    head_outputs_at_end,
    head_outputs_before_response,
    score_all,
)
from rto_megatron.models.gpt import build_model
from tests.distributed.test_stream import CRITIC, FORWARDS, POLICY, weights_of
from tests.ranks import run_ranks

LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "data 2": (2, ParallelConfig()),
    "tensor 2 x pipeline 2, sequence parallel": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
}
LENGTHS = [15, 3, 4, 14, 6, 15, 5, 3]
WAYS = {
    "one padded row at a time": Cut(rows=1),
    "padded, by tokens": Cut(tokens=20),
    "packed, by tokens": Cut(tokens=23, packed=True),
    "packed, by rows": Cut(rows=3, packed=True),
    "packed, all at once": Cut(tokens=10_000, packed=True),
}


def batch_of(lengths):
    """Rows whose first token is never asked for, and of the last of which only one token is."""
    num_tokens = torch.tensor(lengths)
    columns = torch.arange(max(lengths))
    mask = (columns >= 1) & (columns < num_tokens[:, None])
    mask[-1, 2:] = False
    tokens = torch.randint(1, 120, mask.shape, generator=torch.Generator().manual_seed(0))
    return SFTBatch(tokens=tokens.where(columns < num_tokens[:, None], 0), num_tokens=num_tokens, response_mask=mask)


def every_way(parallel):
    """Scores, sums, norms, gradients and weights of a step of two models, by the way that the rows are cut."""
    mesh, found = build_mesh(parallel, start_runtime(threads=1), seed=0), {}
    whole, calls = batch_of(LENGTHS).to(mesh.device), Counter()
    for way, cut in WAYS.items():
        tasks, compute = [], ComputeConfig(recompute="full" if way == "packed, by rows" else "none")
        # the first way shares rows out as they come, the others by their tokens
        contiguous = [range(n * 4, n * 4 + 4) for n in range(2)] if mesh.data.size == 2 else [range(8)]
        shares = contiguous if way == next(iter(WAYS)) else deal(LENGTHS, mesh.data.size)
        mine = whole.rows(list(shares[mesh.data.rank]))
        for role, config in (("policy", POLICY), ("critic", CRITIC)):
            kind = "policy" if role == "policy" else "value"
            model = build_model(config, mesh, kind=kind, parallel=parallel, compute=compute, seed=3)
            if kind == "value" and mesh.is_last_stage:
                model.value_head.weight.data.fill_(0.1)
            # an epsilon this large makes Adam's first step smooth: else it is the sign of a rounding error
            settings = OptimizerConfig(eps=1.0, clip_grad=0.0)
            trainable = make_trainable(role, model, settings, mesh)
            model.decoder.register_forward_hook(lambda *_, way=way: calls.update([way]))
            tasks.append(Task(trainable, mine, *FORWARDS[role], num_sums={"policy": 2, "critic": 1}[role]))
        asks = [(task.trainable.model, task.forward) for task in tasks]
        real = torch.arange(whole.tokens.shape[1]) < whole.num_tokens[:, None]
        log_probs, values = score_all(asks, whole, mesh, cut=cut)
        scores = [log_probs, values.where(real, 0.0)]
        sums = accumulate(tasks, mesh, cut=cut)
        results = [finish(task.trainable, own, mesh, lr=0.1) for task, own in zip(tasks, sums, strict=True)]
        found[way] = {
            "scores": scores,
            "sums": [result.sums for result in results],
            "norms": [torch.tensor(result.grad_norm) for result in results],
            "gradients": [x for task in tasks for x in weights_of(task.trainable, "main_grad", mesh).values()],
            "weights": [x for task in tasks for x in weights_of(task.trainable, "data", mesh).values()],
        }
    return found, calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_how_its_rows_are_cut_packed_and_shared_out(layout):
    world, parallel = LAYOUTS[layout]
    for found, calls in run_ranks(every_way, world, parallel):
        plain = found.pop("one padded row at a time")
        assert all(weight.abs().max() > 0 for weight in plain["gradients"])
        for way, same in found.items():
            for name, expected in plain.items():
                for ours, theirs in zip(same[name], expected, strict=True):
                    if layout == "data 2" and name == "gradients":
                        continue  # the distributed optimizer leaves each rank its part of the sum
                    allowed = 1e-5 * max(1.0, theirs.abs().max().item())
                    assert (ours - theirs).abs().max() <= allowed, f"{way}: {name}"
        assert calls["packed, all at once"] < calls["packed, by rows"] < calls["one padded row at a time"]


def whole_and_part(parallel):
    """A critic's outputs where each way of asking reads them, and the tokens that went through its last MLP."""
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    model = build_model(CRITIC, mesh, kind="value", parallel=parallel, compute=ComputeConfig(), seed=3)
    model.value_head.weight.data.fill_(0.1)
    batch, went = batch_of(LENGTHS), []
    model.decoder.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: went.append(len(inputs[0])))
    asks = [(model, forward) for forward in (head_outputs, head_outputs_before_response, head_outputs_at_end)]
    whole, before, end = score_all(asks, batch, mesh, cut=Cut(tokens=10_000, packed=True))
    states = batch.response_mask[:, 1:]
    last = torch.arange(len(batch)), batch.num_tokens - 1
    return [(whole[:, :-1][states], before[:, :-1][states]), (whole[last], end[last])], went


def test_tokens_that_nobody_asks_about_skip_the_last_mlp_and_change_nothing():
    [(pairs, went)] = run_ranks(whole_and_part, 1, ParallelConfig())
    for whole, part in pairs:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)
        assert part.abs().min() > 0
    assert went == [sum(LENGTHS), int(batch_of(LENGTHS).response_mask.sum()), len(LENGTHS)]


def test_packed_rows_are_their_tokens_and_nothing_else():
    micro = pack(batch_of([3, 2, 4]), multiple=4)
    assert micro.packed_seq_params.cu_seqlens_q.tolist() == [0, 3, 5, 12]  # 3 more to make 12 a multiple of 4
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 0]]
    assert micro.tokens[0, :9].tolist() == [
        *micro.record.tokens[0, :3].tolist(),
        *micro.record.tokens[1, :2].tolist(),
        *micro.record.tokens[2].tolist(),
    ]
    assert micro.unpack(micro.tokens).tolist() == micro.record.tokens.tolist()
    assert (micro.response_mask.sum(), micro.response_mask[0, 9:].any()) == (micro.record.response_mask.sum(), False)
