"""Counts from the architecture alone, against models that are really built and trained."""

from dataclasses import replace

import pytest

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.models.counts import num_own_parameters, num_parameters
from rto_megatron.models.footprint import Model, hosted_bytes, model_bytes
from tests.ranks import run_ranks

TINY = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=300
)
ARCHITECTURES = {
    "tied": TINY,
    "untied": replace(TINY, tie_embeddings=False),
    "Qwen2's biases": replace(TINY, qkv_bias=True),
    "Qwen3's norms, wide heads, one group": replace(TINY, qk_norm=True, head_dim=16, num_query_groups=1),
}


def counts_on_this_rank(words):
    """(architecture, kind) -> parameters of the model that was built, and what was foretold."""
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.gpt import build_model

    parallel = ParallelConfig(**words)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    found = {}
    for name, config in ARCHITECTURES.items():
        for kind in ("policy", "value"):
            model = build_model(config, mesh, kind=kind, parallel=parallel, compute=ComputeConfig(), seed=None)
            built = sum(parameter.numel() for parameter in model.parameters())
            found[name, kind] = (built, num_parameters(config, kind, parallel, stage=mesh.pipeline.rank))
    return found


@pytest.mark.parametrize("words", [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_the_count_is_that_of_the_model_which_is_built(words):
    world = words.get("tensor", 1) * words.get("pipeline", 1)
    for rank in run_ranks(counts_on_this_rank, world, words):
        for case, (built, foretold) in rank.items():
            assert foretold == built, case


def test_a_model_worked_by_hand():
    # embedding 384 x 32; a layer: qkv 64 x 32, out 32 x 32, fc1 128 x 32, fc2 32 x 64, two norms; the final norm
    layer = 64 * 32 + 32 * 32 + 128 * 32 + 32 * 64 + 2 * 32
    assert num_parameters(TINY, "policy") == 384 * 32 + 4 * layer + 32
    assert num_parameters(TINY, "value") == 384 * 32 + 4 * layer + 32 + 33


PUBLISHED = {
    "SmolLM2-135M": (134_515_008, (30, 576, 1536, 9, 3, 49152), {}),
    "Qwen2.5-0.5B": (494_032_768, (24, 896, 4864, 14, 2, 151936), {"qkv_bias": True}),
    "Llama-3-8B": (8_030_261_248, (32, 4096, 14336, 32, 8, 128256), {"tie_embeddings": False}),
}
"""Parameters; layers, hidden, FFN, heads, groups, vocabulary; what else sets it apart."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_as_they_say(name):
    count, (layers, hidden, ffn, heads, groups, vocabulary), rest = PUBLISHED[name]
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocabulary,
        **rest,
    )
    assert num_parameters(config, "policy") == count


def activations(dtype):
    """Bytes that torch keeps for the backward pass of a microbatch, and what was guessed."""
    import torch

    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.footprint import activation_bytes
    from rto_megatron.models.gpt import build_model

    mesh, compute = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0), ComputeConfig(dtype=dtype)
    model = build_model(TINY, mesh, kind="policy", parallel=ParallelConfig(), compute=compute)
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(x):
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # alive until all are counted, so no address comes twice
        return x

    tokens, response = torch.zeros(4, 60, dtype=torch.int64), torch.arange(60).expand(4, 60) >= 30
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=tokens, position_ids=torch.arange(60).expand(4, 60), attention_mask=None, loss_mask=response)
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    chunk = 3 * 4 * compute.log_prob_chunk * TINY.padded_vocab_size  # not kept: it comes and goes
    return total, activation_bytes(TINY, ParallelConfig(), compute, tokens=240) - chunk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_guess_at_activations_is_near_what_torch_keeps(dtype):
    [(kept, guessed)] = run_ranks(activations, 1, dtype)
    assert 0.6 < guessed / kept < 1.4


def bytes_after_a_step(dtype, distributed):
    """What weights, gradients and optimizer of a trained model take on this rank, and what was foretold."""
    import torch

    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.optimizer import make_trainable
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.footprint import Model, model_bytes
    from rto_megatron.models.gpt import build_model

    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    compute, config = ComputeConfig(dtype=dtype), OptimizerConfig(distributed=distributed)
    model = build_model(TINY, mesh, kind="policy", parallel=ParallelConfig(), compute=compute)
    trainable = make_trainable("policy", model, config, mesh)
    trainable.zero_grad()
    trainable.step(1e-3)

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))

    optimizer = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])[0].optimizer
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    masters = [p for group in optimizer.param_groups for p in group["params"] if dtype == "bfloat16"]
    found = (
        size(model.parameters()),
        size(b.grad_data for ddp in trainable.ddps for b in ddp.buffers),
        size([*states, *masters]),
    )
    role = Model(name="policy", architecture=TINY, kind="policy", optimizer=config)
    told = model_bytes(role, ParallelConfig(), compute, stage=0, num_data=mesh.data.size)
    return found, (told.weights, told.gradients, told.optimizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_memory_is_that_of_a_model_which_is_trained(dtype, distributed):
    ranks = run_ranks(bytes_after_a_step, 2, dtype, distributed)
    for place, name in enumerate(("weights", "gradients", "optimizer")):
        found = sum(found[place] for found, _ in ranks)  # shards of the distributed optimizer are not quite equal
        told = sum(told[place] for _, told in ranks)
        assert told == pytest.approx(found, rel=0.02), name


ADAPTED = {
    "all": LoRAConfig(rank=3),
    "some": LoRAConfig(rank=2, targets=("linear_proj", "linear_fc1")),
}


def adapters_on_this_rank(words):
    """(architecture, kind) -> parameters of the model that was built which are trained, and what was foretold."""
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.gpt import build_model

    parallel, found = ParallelConfig(**words), {}
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    for name, config in ARCHITECTURES.items():
        for kind, which in (("policy", "all"), ("value", "some")):
            lora, more = ADAPTED[which], {"kind": kind, "parallel": parallel, "compute": ComputeConfig()}
            model = build_model(config, mesh, **more, seed=None, lora=lora)
            built = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            found[name, kind] = (built, num_own_parameters(config, kind, lora, parallel, stage=mesh.pipeline.rank))
    return found


@pytest.mark.parametrize("words", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_the_count_of_what_adapters_train_is_that_of_the_model_which_is_built(words):
    for rank in run_ranks(adapters_on_this_rank, 2, words):
        for case, (built, foretold) in rank.items():
            assert foretold == built, case


def test_of_a_reward_model_whose_trunk_the_critic_learns_on_only_the_head_is_moved_to_the_host():
    model = Model(name="reward_model", architecture=TINY, kind="value", optimizer=None, stays=True)
    layout, compute = ParallelConfig(), ComputeConfig()
    whole = model_bytes(model, layout, compute, stage=0, num_data=1).weights
    assert hosted_bytes(model, layout, compute, stage=0) == 4 * (TINY.hidden_size + 1) < whole
    assert hosted_bytes(replace(model, stays=False), layout, compute, stage=0) == whole
