"""Fresh weights, which do not depend on the layout."""

import math

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.data.sampler import stream_seed
from rto_megatron.distributed.shards import shards


@torch.no_grad()
def initialize(model: MegatronModule, config: ModelConfig, *, seed: int, only: str = "") -> None:
    """Fill with fresh weights: normal, std `init_std`, narrower by sqrt(2 layers) where a layer adds to the residual.

    Each weight has a random stream of its own, keyed by seed and name, so that a seed means the same
    model in every layout. Norms are 1; biases, the vocabulary's padding and B of an adapter are 0.

    Args:
        only: fill the weights whose names hold this, and leave the others.
    """
    for shard in shards(model):
        if only not in shard.name:
            continue
        shard.data.copy_(fresh_weight(shard.name, shard.full_shape, config, seed=seed)[shard.slices])


def fresh_weight(name: str, shape: tuple[int, ...], config: ModelConfig, *, seed: int) -> Tensor:
    """One full tensor of `initialize`, float32."""
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("lora_b"):
        return torch.zeros(shape)
    std = config.init_std
    if name.startswith("value_head"):
        std = 1 / (config.hidden_size + 1)  # scores start near 0, as in the released code
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std = config.init_std / math.sqrt(2 * config.num_layers)
    generator = torch.Generator().manual_seed(stream_seed(f"weights/{seed}/{name}"))
    if name.endswith("lora_a"):  # as the authors of LoRA do, so that B's first gradient has the size of the input's
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    weight = torch.empty(shape).normal_(0, std, generator=generator)
    if name.startswith(("embedding", "output_layer")):
        weight[config.vocab_size :] = 0
    return weight
