"""Several models in one pipeline stream: each gets the bits that Megatron's own schedule gives it alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.utils import get_model_config

from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.distributed.chunks import model_chunks, named_weights
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.microbatches import cut_rows, make_microbatches
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.step import (
    Task,
    accumulate,
    finish,
    head_outputs,
    score,
    score_all,
    token_log_probs,
    train_step,
)
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks

LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tensor 2, sequence parallel": (2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline 2": (2, ParallelConfig(pipeline=2)),
    "data 2": (2, ParallelConfig()),
    "pipeline 4": (4, ParallelConfig(pipeline=4)),
    "tensor 2 x pipeline 2, sequence parallel": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
    "pipeline 4 x virtual 2": (4, ParallelConfig(pipeline=4, virtual_stages=2)),
    "tensor 2 x pipeline 2 x virtual 2, sequence parallel": (
        4,
        ParallelConfig(tensor=2, pipeline=2, virtual_stages=2, sequence=True),
    ),
    "data 2 x pipeline 2": (4, ParallelConfig(pipeline=2)),
}
SIZES = {"vocab_size": 120, "max_length": 16, "num_attention_heads": 4, "num_query_groups": 2, "init_std": 0.2}
POLICY = ModelConfig(num_layers=8, hidden_size=16, ffn_hidden_size=32, tie_embeddings=True, **SIZES)
CRITIC = ModelConfig(num_layers=8, hidden_size=24, ffn_hidden_size=40, tie_embeddings=False, **SIZES)
MICRO, LR = Cut(rows=2), 0.01


def batch_of(mesh):
    """7 rows of 3 to 15 tokens for each data rank: 4 microbatches of unlike widths, the last of one row."""
    generator = torch.Generator().manual_seed(mesh.data.rank)
    num_tokens = torch.randint(3, 16, (7,), generator=generator)
    columns = torch.arange(15)
    return SFTBatch(
        tokens=torch.randint(1, 120, (7, 15), generator=generator),
        num_tokens=num_tokens,
        response_mask=(columns >= 2) & (columns < num_tokens[:, None]),
    ).to(mesh.device)


def policy_loss(output, batch):
    value = -output[..., 0].sum() / 50 - output[..., 1].sum() / 70
    return value, torch.stack([value.detach(), batch.response_mask.sum().float()])


def value_loss(output, batch):
    value = (output - 0.5).square().where(batch.response_mask, 0.0).sum() / 50
    return value, value.detach()[None]


FORWARDS = {"policy": (token_log_probs, policy_loss), "critic": (head_outputs, value_loss)}


def megatrons_schedule(chunks, role, mesh, *, forward_only=False):
    """Run Megatron's own schedule of one model over the batch; what the last stage collects, an entry a microbatch."""
    batch, (forward, loss) = batch_of(mesh), FORWARDS[role]
    config = get_model_config(chunks[0])
    multiple = mesh.tensor.size if config.sequence_parallel else 1
    micros = make_microbatches(batch, cut_rows(batch, MICRO), packed=False, multiple=multiple)

    def forward_step(batches, module):
        micro = next(batches)

        def finish(output, non_loss_data=False):
            if non_loss_data:
                return output
            value, sums = loss(output, micro.record)
            return value, torch.zeros((), dtype=torch.int), sums.clone()

        return forward(module, micro), finish

    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": iter(micros),
        "model": chunks,
        "num_microbatches": len(micros),
        "seq_length": micros[0].tokens.shape[1],
        "micro_batch_size": len(micros[0].tokens),
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
        "pg_collection": mesh.groups,
    }
    if mesh.pipeline.size == 1:
        return forward_backward_no_pipelining(**arguments)
    communicator = P2PCommunicator(pp_group=mesh.groups.pp, config=config)
    return forward_backward_pipelining_without_interleaving(**arguments, p2p_communicator=communicator)


def weights_of(trainable, attribute, mesh):
    """Of each weight of this rank, by its place in the whole model; the embedding has two, its copy being one."""
    stage = {True: None, False: mesh.pipeline.rank}  # which has a layer does not matter, and differs
    return {
        (trainable.name, name, stage["layers" in name], mesh.tensor.rank, mesh.data.rank): x.detach().clone()
        for name, x in ((name, getattr(weight, attribute)) for name, weight in named_weights(trainable.model))
    }


def step_by_megatron(trainable, mesh):
    """Megatron's schedule with its own reductions, then the optimizer: sums and gradient norm."""
    trainable.zero_grad()
    trainable.model.config.finalize_model_grads_func = lambda model, _, **rest: finalize_model_grads(model, **rest)
    sums = megatrons_schedule(trainable.ddps, trainable.name, mesh)
    return torch.stack(sums).double().sum(0) if sums else None, trainable.step(LR)


def both_ways(parallel, distributed):
    """All that one stream of two models gives on this layout, and what Megatron's schedules give one by one."""
    mesh, made = build_mesh(parallel, start_runtime(threads=1), seed=0), {}
    # Megatron's interleaved schedule with shapes that vary hangs on gloo with 4 stages, and with 2 it takes what one
    # neighbour sends for what the other does, for they are one rank: so chunks are held to its plain 1F1B
    theirs = replace(parallel, virtual_stages=1)
    # a rank's part of the norm is summed over other weights then, so the last bit may differ: it is not to scale any
    clip = 1.0 if theirs == parallel else 0.0
    adam = OptimizerConfig(distributed=distributed, clip_grad=clip)
    for role, config in (("policy", POLICY), ("critic", CRITIC)):
        for way, layout in (("stream", parallel), ("megatron", theirs)):
            kind = "policy" if role == "policy" else "value"
            model = build_model(config, mesh, kind=kind, parallel=layout, compute=ComputeConfig(), seed=3)
            if kind == "value" and mesh.is_last_stage:
                # a fresh head is 0 and gives the layers no gradient
                model_chunks(model)[-1].value_head.weight.data.fill_(0.1)
            made[way, role] = make_trainable(role, model, adam, mesh)
    tasks = [
        Task(made["stream", r], batch_of(mesh), *FORWARDS[r], num_sums=k) for r, k in (("policy", 2), ("critic", 1))
    ]
    found = {}
    asks = [(task.trainable.model, task.forward) for task in tasks]
    asks[1][0].eval()
    found["scores"] = score_all(asks, batch_of(mesh), mesh, cut=MICRO)
    found["separate scores"] = [score(model, batch_of(mesh), ask, mesh, cut=MICRO) for model, ask in asks]
    found["training"] = [model.training for model, _ in asks]
    sums = accumulate(tasks, mesh, cut=MICRO)
    found["gradients"] = {k: x for task in tasks for k, x in weights_of(task.trainable, "main_grad", mesh).items()}
    results = [finish(task.trainable, own, mesh, lr=LR) for task, own in zip(tasks, sums, strict=True)]
    found["sums"], found["reported"] = sums, [result.sums for result in results]
    found["norms"] = [result.grad_norm for result in results]
    found["weights"] = {k: x for task in tasks for k, x in weights_of(task.trainable, "data", mesh).items()}
    theirs = {"gradients": {}, "weights": {}, "sums": [], "norms": [], "scores": []}
    for role in FORWARDS:
        trainable = made["megatron", role]
        with torch.no_grad():
            chunks = model_chunks(trainable.model.eval())
            theirs["scores"].append(megatrons_schedule(chunks, role, mesh, forward_only=True))
        trainable.model.train()
        trainable.zero_grad()
        megatrons_schedule(trainable.ddps, role, mesh)
        theirs["gradients"] |= weights_of(trainable, "main_grad", mesh)
        sums, norm = step_by_megatron(trainable, mesh)
        theirs["sums"].append(sums)
        theirs["norms"].append(norm)
        theirs["weights"] |= weights_of(trainable, "data", mesh)
    return found, theirs, mesh.is_last_stage, cut_rows(batch_of(mesh), MICRO), parallel.virtual_stages > 1


@pytest.fixture(scope="module", params=[(name, True) for name in LAYOUTS] + [("data 2", False)], ids=lambda p: f"{p}")
def ranks(request):
    """Of each rank: ours, Megatron's, whether it is the last stage, rows of each microbatch, whether it has chunks."""
    name, distributed = request.param
    world, parallel = LAYOUTS[name]
    return run_ranks(both_ways, world, parallel, distributed)


def of_all(ranks, what):
    """`what` of all ranks in one, ours and Megatron's."""
    return ({k: x for rank in ranks for k, x in rank[side][what].items()} for side in (0, 1))


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), f"{name}: off by up to {(x - theirs[name]).abs().max()}"


def test_gradients_of_each_model_are_those_of_megatrons_schedule(ranks):
    ours, theirs = of_all(ranks, "gradients")
    assert_same_bits(ours, theirs)
    without = [name for name, x in ours.items() if not x.any()]
    assert not without, f"no gradient at all: {without}"


def test_a_step_gives_the_weights_and_norms_of_megatrons_schedule_and_reductions(ranks):
    assert_same_bits(*of_all(ranks, "weights"))
    for ours, theirs, *_, is_chunked in ranks:
        rel = 1e-6 if is_chunked else 0.0
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=rel, abs=0.0)


def test_every_stage_knows_the_sums_of_its_replica(ranks):
    for ours, theirs, is_last, *_ in ranks:
        assert [x.dtype for x in ours["sums"]] == [torch.float64] * 2
        if is_last:
            assert all(map(torch.equal, ours["sums"], theirs["sums"]))
        assert any(all(map(torch.equal, ours["sums"], other["sums"])) for _, other, last, *_ in ranks if last)


def test_every_rank_reports_the_sums_of_all_replicas(ranks):
    for ours, *_ in ranks:
        assert all(map(torch.equal, ours["reported"], ranks[0][0]["reported"]))


def test_scores_of_one_pass_are_those_of_a_pass_each_and_of_megatrons_schedule(ranks):
    for ours, theirs, is_last, cuts, _ in ranks:
        assert all(map(torch.equal, ours["scores"], ours["separate scores"]))
        for whole, outputs in zip(ours["scores"], theirs["scores"], strict=True):
            assert len(outputs) == (len(cuts) if is_last else 0)
            for rows, out in zip(cuts, outputs, strict=False):
                width = min(out.shape[1], whole.shape[1])
                assert torch.equal(whole[rows, :width], out[:, :width])
                assert not whole[rows, width:].any()


def test_every_stage_has_the_scores_of_its_replica(ranks):
    for ours, *_ in ranks:
        assert any(all(map(torch.equal, ours["scores"], other["scores"])) for other, _, last, *_ in ranks if last)


def test_scoring_leaves_the_mode_of_a_model_as_it_was(ranks):
    assert all(ours["training"] == [True, False] for ours, *_ in ranks)


def train_step_and_its_halves():
    parallel = ParallelConfig(pipeline=2)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    batch, (forward, loss), found = batch_of(mesh), FORWARDS["policy"], []
    for whole in (True, False):
        model = build_model(POLICY, mesh, kind="policy", parallel=parallel, compute=ComputeConfig(), seed=3)
        trainable = make_trainable("policy", model, OptimizerConfig(), mesh)
        for _ in range(2):
            if whole:
                result = train_step(trainable, batch, forward, loss, mesh, cut=MICRO, lr=LR, num_sums=2)
            else:
                [sums] = accumulate([Task(trainable, batch, forward, loss, 2)], mesh, cut=MICRO)
                result = finish(trainable, sums, mesh, lr=LR)
        found.append((result.sums, result.grad_norm, weights_of(trainable, "data", mesh)))
    return found


def test_train_step_is_accumulate_and_finish():
    for (sums, norm, weights), (sums_2, norm_2, weights_2) in run_ranks(train_step_and_its_halves, 2):
        assert torch.equal(sums, sums_2) and norm == norm_2
        assert_same_bits(weights, weights_2)
