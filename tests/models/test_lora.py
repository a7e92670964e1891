"""Adapters and recomputed activations on any layout: the same bits, gradients of one process, weights that merge."""

from dataclasses import replace

import pytest
import torch

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from tests.ranks import run_ranks

TINY = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=300,
    init_std=0.2,
)  # fmt: skip
LORA = LoRAConfig(rank=3, alpha=6)
LAYOUTS = {
    "one": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2 x virtual 2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "data 2": (2, {}),
}


def build(mesh, parallel, *, kind="policy", lora=None, recompute="none", targets=None):
    from rto_megatron.models.gpt import build_model

    compute = ComputeConfig(recompute=recompute)
    lora = lora if targets is None else replace(LORA, targets=targets)
    return build_model(TINY, mesh, kind=kind, parallel=parallel, compute=compute, seed=1, lora=lora)


def batch_of(mesh):
    from rto_megatron.batch import SFTBatch
    from rto_megatron.data.sampler import shard

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 300, (4, 16), generator=generator)
    whole = SFTBatch(tokens=tokens, num_tokens=torch.full((4,), 16), response_mask=torch.arange(16).expand(4, 16) >= 6)
    return whole, whole.rows(shard(4, rank=mesh.data.rank, world=mesh.data.size))


def fill_adapters(model):
    """B away from 0, the same in any layout."""
    from rto_megatron.distributed.shards import shards

    for piece in shards(model):
        if piece.key.endswith("lora_b"):
            generator = torch.Generator().manual_seed(sum(piece.name.encode()))
            piece.data.copy_(torch.empty(piece.full_shape).normal_(0, 0.3, generator=generator)[piece.slices])


def trained(mesh, parallel, **more):
    """An adapted model after one step: its own weights by name, its base's weights, the norm."""
    from rto_megatron.config.optimizer import OptimizerConfig
    from rto_megatron.distributed.optimizer import make_trainable
    from rto_megatron.distributed.shards import is_own, shards
    from rto_megatron.distributed.step import head_outputs, token_log_probs, train_step

    model = build(mesh, parallel, **more)
    if "lora" in more or "targets" in more:
        fill_adapters(model)
    kind = more.get("kind", "policy")
    trainable = make_trainable(kind, model, OptimizerConfig(), mesh)

    def loss(output, batch):
        value = -output[..., 0].sum() if kind == "policy" else ((output - 1) ** 2).sum()
        return value / 40, value.detach()[None]

    forward = token_log_probs if kind == "policy" else head_outputs
    result = train_step(trainable, batch_of(mesh)[1], forward, loss, mesh, cut=Cut(rows=1), lr=1e-2, num_sums=1)
    pieces = [(s.name, s.full_shape, s.slices, s.data.clone()) for s in shards(model)]
    own = [p for p in pieces if is_own(p[0]) or ("lora" not in more and "targets" not in more)]
    return own, [p for p in pieces if not is_own(p[0])], result.grad_norm


def everything(words):
    """What a rank of a layout finds."""
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import score, token_log_probs
    from rto_megatron.models.lora import merge_into, share_base

    parallel = ParallelConfig(**words)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    whole, _ = batch_of(mesh)

    def log_probs(model):
        return score(model, whole, token_log_probs, mesh, cut=Cut(rows=2))[..., 0]

    frozen, adapted = build(mesh, parallel).requires_grad_(False), build(mesh, parallel, lora=LORA)
    found = {"frozen": log_probs(frozen), "fresh": log_probs(adapted)}
    share_base(adapted, frozen)
    other = dict(frozen.named_parameters())
    found["shared"] = {n: p is other[n] for n, p in adapted.named_parameters() if n in other}
    fill_adapters(adapted)
    found["adapted"], found["still frozen"] = log_probs(adapted), log_probs(frozen)
    plain = build(mesh, parallel)
    merge_into(plain, build_filled(mesh, parallel))
    found["merged"] = log_probs(plain)
    for kind in ("policy", "value"):
        found[f"train {kind}"] = trained(mesh, parallel, kind=kind, lora=LORA)
    for recompute in ("none", "selective", "full"):
        found[f"whole {recompute}"] = trained(mesh, parallel, recompute=recompute)[::2]
        found[f"adapters {recompute}"] = trained(mesh, parallel, recompute=recompute, targets=("linear_fc2",))[::2]
    return found


def build_filled(mesh, parallel):
    model = build(mesh, parallel, lora=LORA)
    fill_adapters(model)
    return model


@pytest.fixture(scope="module")
def found():
    return {name: run_ranks(everything, world, words) for name, (world, words) in LAYOUTS.items()}


def whole(ranks):
    """Full tensors by name, from the pieces of all ranks."""
    made = {}
    for pieces in ranks:
        for name, shape, slices, data in pieces:
            made.setdefault(name, torch.full(shape, torch.nan))[slices] = data
    assert not any(tensor.isnan().any() for tensor in made.values())
    return made


def close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.allclose(x, b[name], rtol=tolerance, atol=tolerance), f"{name}: {(x - b[name]).abs().max()}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_of_zero_leave_the_bits_of_the_frozen_model(found, layout):
    for rank in found[layout]:
        assert torch.equal(rank["fresh"], rank["frozen"]) and torch.equal(rank["still frozen"], rank["frozen"])
        assert rank["frozen"].abs().max() > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_say_the_same_in_every_layout_and_merged(found, layout):
    for rank in found[layout]:
        assert (rank["adapted"] - rank["frozen"]).abs().max() > 0.1
        assert torch.allclose(rank["merged"], rank["adapted"], rtol=0, atol=1e-5)
        assert torch.allclose(rank["adapted"], found["one"][0]["adapted"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_a_step_moves_adapters_and_head_as_in_one_process_and_nothing_else(found, layout, kind):
    own, base, norm = zip(*(rank[f"train {kind}"] for rank in found[layout]), strict=True)
    mine, alone = whole(own), found["one"][0][f"train {kind}"]
    close(mine, whole(alone[:1]))
    assert norm[0] == pytest.approx(alone[2], rel=1e-5)
    layers, heads = [n for n in mine if "lora_" in n], [n for n in mine if n.startswith("value_head")]
    assert len(layers) == 4 * 4 * 2 and len(heads) == (2 if kind == "value" else 0)
    close(whole(base), whole(alone[1:2]), tolerance=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_weights_are_shared_and_not_copied(found, layout):
    for rank in found[layout]:
        assert rank["shared"] and all(rank["shared"].values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["whole", "adapters"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(found, layout, what, recompute):
    for rank in found[layout]:
        (own, norm), (kept, kept_norm) = rank[f"{what} {recompute}"], rank[f"{what} none"]
        assert norm == kept_norm and norm > 0
        for (name, *_, data), (_, *_, other) in zip(own, kept, strict=True):
            assert torch.equal(data, other), name
