"""Weights go from one layout into another, bit by bit, on the ranks that hold them and on no others."""

import pytest
import torch

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed import refit
from rto_megatron.distributed.mesh import role_mesh
from rto_megatron.distributed.refit import Refit, digest
from rto_megatron.distributed.runtime import rank, start_runtime
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks

SHAPE = {"num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24, "vocab_size": 60, "init_std": 0.2}
TIED, UNTIED = {}, {"tie_embeddings": False}
QWEN = {"qkv_bias": True, "qk_norm": True, "num_query_groups": 1}
"""Qwen's biases and norms, and fewer key-value heads than tensor ranks."""

TP2, CP2, PP2, PP4, ONE = {"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"pipeline": 4}, {}


def build(layout, ranks, architecture, *, kind="policy", dtype="float32", seed):
    """A model on some ranks, its weights drawn from `seed`; None on the others."""
    parallel = ParallelConfig(**layout)
    mesh = role_mesh(parallel, start_runtime(threads=1), ranks=range(*ranks))
    if mesh is None:
        return None
    config, compute = ModelConfig(**(SHAPE | architecture)), ComputeConfig(dtype=dtype)
    return build_model(config, mesh, kind=kind, parallel=parallel, compute=compute, seed=seed)


def copied(source, target, architecture, options):
    """(ranks that take part, bytes received, names that arrived wrong) of this rank, the second time."""
    old, new = (build(*part, architecture, **options, seed=seed) for part, seed in ((source, 1), (target, 2)))
    plan = Refit(old, new)
    if rank() not in plan.ranks:
        return plan.ranks, None, None
    plan.run()
    if old is not None:
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.mul_(-0.5)  # exact
    received = plan.run()
    if new is None:
        return plan.ranks, received, []
    want = build(*target, architecture, **options, seed=1)
    pairs = zip(want.named_parameters(), new.parameters(), strict=True)
    return plan.ranks, received, [name for (name, a), b in pairs if not torch.equal(-0.5 * a, b)]


CASES = {
    "TP 2 to one other rank": (3, (TP2, (0, 2)), (ONE, (2, 3)), TIED, {}),
    "TP 2 to two replicas": (4, (TP2, (0, 2)), (ONE, (2, 4)), UNTIED, {}),
    "TP 2 to one other rank, Qwen": (3, (TP2, (0, 2)), (ONE, (2, 3)), QWEN, {}),
    "one rank to TP 2 elsewhere, Qwen": (3, (ONE, (0, 1)), (TP2, (1, 3)), QWEN | UNTIED, {}),
    "PP 2 to TP 2, same ranks": (2, (PP2, (0, 2)), (TP2, (0, 2)), TIED, {}),
    "PP 2 to TP 2, same ranks, untied": (2, (PP2, (0, 2)), (TP2, (0, 2)), UNTIED, {}),
    "TP 2 to PP 2, overlapping ranks": (3, (TP2, (0, 2)), (PP2, (1, 3)), TIED, {}),
    "one rank to PP 4 around it": (4, (ONE, (1, 2)), (PP4, (0, 4)), TIED, {}),
    "PP 2 x DP 2 to TP 2 x DP 2": (4, (PP2, (0, 4)), (TP2, (0, 4)), TIED, {}),
    "CP 2 x PP 2 to TP 2": (4, (CP2 | PP2, (0, 4)), (TP2, (0, 2)), TIED, {}),
    "TP 2 to CP 2 x DP 2": (4, (TP2, (0, 2)), (CP2, (0, 4)), UNTIED, {}),
    "DP 2 to one other rank": (3, (ONE, (0, 2)), (ONE, (2, 3)), TIED, {}),
    "the same rank": (1, (ONE, (0, 1)), (ONE, (0, 1)), TIED, {}),
    "value model, TP 2 to PP 2": (4, (TP2, (0, 2)), (PP2, (2, 4)), TIED, {"kind": "value"}),
    "bfloat16, with bystanders": (4, (TP2, (0, 2)), (ONE, (3, 4)), QWEN, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_arrives_and_only_who_holds_a_part_takes_part(case):
    world, source, target, architecture, options = CASES[case]
    holders = {*range(*source[1]), *range(*target[1])}
    for me, (ranks, received, wrong) in enumerate(run_ranks(copied, world, source, target, architecture, options)):
        assert ranks == tuple(sorted(holders))
        assert wrong == ([] if me in holders else None)
        assert received == 0 if source == target else me not in range(*target[1]) or received is not None


def message_of_a_flipped_bit():
    old, new = build(TP2, (0, 2), TIED, seed=1), build(ONE, (2, 3), TIED, seed=2)
    plan, exchange = Refit(old, new), refit._exchange

    def flip(outgoing, incoming, group):
        exchange(outgoing, incoming, group)
        if 1 in incoming:
            incoming[1][-1] ^= 1

    refit._exchange = flip
    with pytest.raises(RuntimeError) as error:
        plan.run()
    return str(error.value)


def test_a_flipped_bit_is_found_by_all_and_named():
    for message in run_ranks(message_of_a_flipped_bit, 3):
        assert "output_layer" not in message and "has other bits on rank 2 than in the model" in message


def message_of_another_architecture():
    old, new = build(ONE, (0, 1), TIED, seed=1), build(ONE, (1, 2), {"ffn_hidden_size": 32}, seed=2)
    with pytest.raises(ValueError) as error:
        Refit(old, new)
    return str(error.value)


def test_another_architecture_is_refused():
    for message in run_ranks(message_of_another_architecture, 2):
        assert "refit: decoder.layers.0.mlp.linear_fc1.weight is ((48, 16), torch.float32) in the source and" in message


def test_a_digest_is_the_sum_of_its_pieces_and_knows_places_and_bits(monkeypatch):
    whole = torch.arange(24.0).reshape(6, 4)
    cuts = [(slice(0, 2), slice(0, 4)), (slice(2, 6), slice(0, 1)), (slice(2, 6), slice(1, 4))]
    parts = [digest(whole[cut], tuple(axis.start for axis in cut)) for cut in cuts]
    assert sum(parts) == digest(whole, (0, 0))
    monkeypatch.setattr(refit, "DIGEST_CHUNK", 8)
    assert sum(parts) == digest(whole, (0, 0))
    swapped, negated = whole.clone(), whole.clone()
    swapped[0, 1], swapped[3, 2] = whole[3, 2], whole[0, 1]
    negated[0, 0] = -0.0
    assert len({digest(x, (0, 0)).item() for x in (whole, swapped, negated, whole.T, whole.flip(0))}) == 5
