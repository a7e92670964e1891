"""Several models in one pipeline stream: each gets the bits that Megatron's own schedule gives it alone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)

from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
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
from rto_megatron.distributed.stream import Exchange, Instruction, exchanges, forwards, one_f_one_b
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks


def written(plan):
    return " ".join(f"{kind}{place}" for kind, place in plan)


def test_a_stage_fills_the_pipeline_then_alternates_then_empties_it():
    assert written(one_f_one_b(4, 0, 3)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert written(one_f_one_b(4, 1, 3)) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert written(one_f_one_b(4, 2, 3)) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert written(one_f_one_b(1, 0, 3)) == "F0 B0"


def test_a_result_goes_out_together_with_the_next_input():
    f, b = (lambda place: Instruction("F", place)), (lambda place: Instruction("B", place))
    assert exchanges(one_f_one_b(2, 0, 2), 0, 2) == [
        Exchange(None, None),  # F0
        Exchange(f(0), None),  # F1
        Exchange(f(1), b(0)),  # B0
        Exchange(None, b(1)),  # B1
        Exchange(None, None),
    ]
    assert exchanges(one_f_one_b(2, 1, 2), 1, 2) == [
        Exchange(None, f(0)),  # F0
        Exchange(None, None),  # B0
        Exchange(b(0), f(1)),  # F1
        Exchange(None, None),  # B1
        Exchange(b(1), None),
    ]


@given(num=st.integers(0, 9), num_stages=st.integers(1, 6))
def test_every_microbatch_goes_forward_and_backward_once_and_few_are_in_flight(num, num_stages):
    for stage in range(num_stages):
        plan, in_flight = one_f_one_b(num, stage, num_stages), set()
        assert sorted(plan) == sorted((kind, place) for kind in "FB" for place in range(num))
        for kind, place in plan:
            in_flight ^= {place}
            assert (place in in_flight) == (kind == "F")  # forward first
            assert len(in_flight) <= num_stages - stage


def run_to_the_end(plans):
    """Walk all stages until none can go on: an exchange is over when both ends of all that it moves are at it.

    Neither sends nor receives are buffered, as between GPUs; the strictest case. Returns what each stage has left.
    """
    num_stages = len(plans)
    steps = [exchanges(plan, stage, num_stages) for stage, plan in enumerate(plans)]
    at, over = [0] * num_stages, [set() for _ in plans]

    def post(stage, here):
        """(from, to, what) of everything that the stage has posted."""
        sent, received = here
        out = {(stage, stage + (1 if sent.kind == "F" else -1), sent)} if sent else set()
        return out | ({(stage - (1 if received.kind == "F" else -1), stage, received)} if received else set())

    moved = True
    while moved:
        moved = False
        posted = [post(s, steps[s][at[s]]) if at[s] < len(steps[s]) else set() for s in range(num_stages)]
        for stage, mine in enumerate(posted):
            over[stage] |= {x for x in mine if x in posted[x[0]] and x in posted[x[1]]}
        for stage, mine in enumerate(posted):
            if at[stage] < len(steps[stage]) and mine <= over[stage]:
                at[stage], moved = at[stage] + 1, True
    return [steps[stage][at[stage] :] for stage in range(num_stages)]


@given(num=st.integers(0, 9), num_stages=st.integers(1, 6))
def test_no_stage_waits_forever(num, num_stages):
    assert run_to_the_end([one_f_one_b(num, stage, num_stages) for stage in range(num_stages)]) == [[]] * num_stages
    assert run_to_the_end([forwards(num) for _ in range(num_stages)]) == [[]] * num_stages


def test_the_walk_above_sees_stages_that_wait_for_each_other():
    last_first = [Instruction("F", 0), Instruction("F", 1), Instruction("B", 1), Instruction("B", 0)]
    assert all(run_to_the_end([last_first, one_f_one_b(2, 1, 2)]))


LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tensor 2, sequence parallel": (2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline 2": (2, ParallelConfig(pipeline=2)),
    "data 2": (2, ParallelConfig()),
    "pipeline 4": (4, ParallelConfig(pipeline=4)),
    "tensor 2 x pipeline 2, sequence parallel": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
    "data 2 x pipeline 2": (4, ParallelConfig(pipeline=2)),
}
SIZES = {"vocab_size": 120, "max_length": 16, "num_attention_heads": 4, "num_query_groups": 2, "init_std": 0.2}
POLICY = ModelConfig(num_layers=4, hidden_size=16, ffn_hidden_size=32, tie_embeddings=True, **SIZES)
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


def megatrons_schedule(model, role, mesh, *, forward_only=False):
    """Run Megatron's own schedule of one model over the batch; what the last stage collects, an entry a microbatch."""
    batch, (forward, loss) = batch_of(mesh), FORWARDS[role]
    config = getattr(model, "module", model).config
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
        "model": [model],
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


def weights_of(trainable, attribute):
    found = {name: getattr(weight, attribute) for name, weight in trainable.model.named_parameters()}
    return {f"{trainable.name}.{name}": x.detach().clone() for name, x in found.items()}


def step_by_megatron(trainable, mesh):
    """Megatron's schedule with its own reductions, then the optimizer: sums and gradient norm."""
    trainable.zero_grad()
    trainable.model.config.finalize_model_grads_func = lambda model, _, **rest: finalize_model_grads(model, **rest)
    sums = megatrons_schedule(trainable.ddp, trainable.name, mesh)
    return torch.stack(sums).double().sum(0) if sums else None, trainable.step(LR)


def both_ways(parallel, distributed):
    """All that one stream of two models gives on this layout, and what Megatron's schedules give one by one."""
    mesh, made = build_mesh(parallel, start_runtime(threads=1), seed=0), {}
    for role, config in (("policy", POLICY), ("critic", CRITIC)):
        for way in ("stream", "megatron"):
            kind = "policy" if role == "policy" else "value"
            model = build_model(config, mesh, kind=kind, parallel=parallel, compute=ComputeConfig(), seed=3)
            if kind == "value" and mesh.is_last_stage:
                model.value_head.weight.data.fill_(0.1)  # a fresh head is 0 and gives the layers no gradient
            made[way, role] = make_trainable(role, model, OptimizerConfig(distributed=distributed), mesh)
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
    found["gradients"] = {k: x for task in tasks for k, x in weights_of(task.trainable, "main_grad").items()}
    results = [finish(task.trainable, own, mesh, lr=LR) for task, own in zip(tasks, sums, strict=True)]
    found["sums"], found["reported"] = sums, [result.sums for result in results]
    found["norms"] = [result.grad_norm for result in results]
    found["weights"] = {k: x for task in tasks for k, x in weights_of(task.trainable, "data").items()}
    theirs = {"gradients": {}, "weights": {}, "sums": [], "norms": [], "scores": []}
    for role in FORWARDS:
        trainable = made["megatron", role]
        with torch.no_grad():
            theirs["scores"].append(megatrons_schedule(trainable.model.eval(), role, mesh, forward_only=True))
        trainable.ddp.train()
        trainable.zero_grad()
        megatrons_schedule(trainable.ddp, role, mesh)
        theirs["gradients"] |= weights_of(trainable, "main_grad")
        sums, norm = step_by_megatron(trainable, mesh)
        theirs["sums"].append(sums)
        theirs["norms"].append(norm)
        theirs["weights"] |= weights_of(trainable, "data")
    return found, theirs, mesh.is_last_stage, cut_rows(batch_of(mesh), MICRO)


@pytest.fixture(scope="module", params=[(name, True) for name in LAYOUTS] + [("data 2", False)], ids=lambda p: f"{p}")
def ranks(request):
    """Of each rank: ours, Megatron's, whether it is the last stage, rows of each microbatch."""
    name, distributed = request.param
    world, parallel = LAYOUTS[name]
    return run_ranks(both_ways, world, parallel, distributed)


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), f"{name}: off by up to {(x - theirs[name]).abs().max()}"


def test_gradients_of_each_model_are_those_of_megatrons_schedule(ranks):
    for ours, theirs, *_ in ranks:
        assert_same_bits(ours["gradients"], theirs["gradients"])
        without = [name for name, x in ours["gradients"].items() if not x.any()]
        assert not without, f"no gradient at all: {without}"


def test_a_step_gives_the_weights_and_norms_of_megatrons_schedule_and_reductions(ranks):
    for ours, theirs, *_ in ranks:
        assert_same_bits(ours["weights"], theirs["weights"])
        assert ours["norms"] == theirs["norms"]


def test_every_stage_knows_the_sums_of_its_replica(ranks):
    for ours, theirs, is_last, _ in ranks:
        assert [x.dtype for x in ours["sums"]] == [torch.float64] * 2
        if is_last:
            assert all(map(torch.equal, ours["sums"], theirs["sums"]))
        assert any(all(map(torch.equal, ours["sums"], other["sums"])) for _, other, last, _ in ranks if last)


def test_every_rank_reports_the_sums_of_all_replicas(ranks):
    for ours, *_ in ranks:
        assert all(map(torch.equal, ours["reported"], ranks[0][0]["reported"]))


def test_scores_of_one_pass_are_those_of_a_pass_each_and_of_megatrons_schedule(ranks):
    for ours, theirs, is_last, cuts in ranks:
        assert all(map(torch.equal, ours["scores"], ours["separate scores"]))
        for whole, outputs in zip(ours["scores"], theirs["scores"], strict=True):
            assert len(outputs) == (len(cuts) if is_last else 0)
            for rows, out in zip(cuts, outputs, strict=False):
                width = min(out.shape[1], whole.shape[1])
                assert torch.equal(whole[rows, :width], out[:, :width])
                assert not whole[rows, width:].any()


def test_every_stage_has_the_scores_of_its_replica(ranks):
    for ours, *_ in ranks:
        assert any(all(map(torch.equal, ours["scores"], other["scores"])) for other, _, last, _ in ranks if last)


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
        found.append((result.sums, result.grad_norm, weights_of(trainable, "data")))
    return found


def test_train_step_is_accumulate_and_finish():
    for (sums, norm, weights), (sums_2, norm_2, weights_2) in run_ranks(train_step_and_its_halves, 2):
        assert torch.equal(sums, sums_2) and norm == norm_2
        assert_same_bits(weights, weights_2)
