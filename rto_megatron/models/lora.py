"""Low-rank adapters on Megatron's parallel linear layers: y = W x + alpha / rank * B A x, W frozen.

Which factor tensor ranks divide follows from the matrix, so that no collective moves more than `rank` numbers a token:

    column-parallel (qkv, fc1)   A whole on every rank, B cut like the rows of W
    row-parallel (proj, fc2)     A cut like the columns of W, B whole on every rank

With sequence parallelism the whole factor of each rank sees only its share of the tokens, so its gradient is summed
over the tensor ranks, as those of norms are. With B = 0, as it begins, the output has the bits of the frozen layer's.

Several models may share their frozen weights (`share_base`), as in Hydra-PPO (arXiv 2309.00754).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.distributed.shards import is_own, shards


@dataclass(frozen=True)
class Factors:
    """The live factors of one matrix on this tensor rank."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: what this rank adds to its own part of W x, before any sum over ranks."""
        return self.scale * F.linear(F.linear(x, self.a), self.b)

    def product(self) -> Tensor:
        """[out, in] float32: what this rank adds to its own part of W."""
        return self.scale * (self.b.float() @ self.a.float())


class AdaptedColumnLinear(ColumnParallelLinear):
    """A column-parallel layer with an adapter."""

    def __init__(self, *args: Any, lora: LoRAConfig, parts: int = 1, **options: Any) -> None:
        """Args beyond Megatron's:

        parts: matrices that lie one after the other in W, each cut by itself: 2 for the SwiGLU layer. They are the
            first axis of B, so that a checkpoint has one shape in every layout.
        """
        super().__init__(*args, **options)
        assert self.weight is not None and not self.gather_output
        rows, like = self.weight.shape[0], {"dtype": self.weight.dtype, "device": self.weight.device}
        self.lora_scale = lora.scale
        self.lora_a = Parameter(torch.empty(lora.rank, self.input_size, **like))
        self.lora_b = Parameter(torch.zeros(parts, rows // parts, lora.rank, **like))
        set_tensor_model_parallel_attributes(self.lora_b, True, 1, 1)
        # each tensor rank sees its share of the tokens, so finalize_model_grads must add the gradients
        self.lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[T, B, in] (this rank's share of T under sequence parallelism) -> [T, B, out / tensor ranks]; bias."""
        output, bias = super().forward(input_, *rest, **options)
        low = F.linear(input_, self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.lora_scale * F.linear(low, self.lora_b.flatten(0, 1)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """W, bias and B are divided, A is not."""
        return _sharded(self, {"weight": 0, "bias": 0, "lora_b": 1}, prefix, sharded_offsets, metadata)


class AdaptedRowLinear(RowParallelLinear):
    """A row-parallel layer with an adapter."""

    def __init__(self, *args: Any, lora: LoRAConfig, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.input_is_parallel
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.lora_scale = lora.scale
        self.lora_a = Parameter(torch.empty(lora.rank, self.weight.shape[1], **like))
        self.lora_b = Parameter(torch.zeros(1, self.weight.shape[0], lora.rank, **like))
        set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, in / tensor ranks] -> [T, B, out] (this rank's share of T under sequence parallelism); bias."""
        output, bias = super().forward(input_)
        low = F.linear(input_, self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.lora_scale * F.linear(low, self.lora_b.flatten(0, 1)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """W and A are divided, B is not."""
        return _sharded(self, {"weight": 1, "lora_a": 1}, prefix, sharded_offsets, metadata)


def _sharded(linear: Any, axes: dict[str, int], prefix: str, offsets: tuple, metadata: Any) -> dict[str, Any]:
    state = linear.state_dict(prefix="", keep_vars=True)
    group = (metadata or {}).get("dp_cp_group")
    return make_sharded_tensors_for_checkpoint(
        state, prefix, axes, offsets, tp_group=linear.tp_group, dp_cp_group=group
    )


def adapt_spec(layer: Any, lora: LoRAConfig) -> None:
    """Put adapted layers into Megatron's local spec of a transformer layer (its `submodules`)."""
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    for name, owner, adapted, more in (
        ("linear_qkv", attention, AdaptedColumnLinear, {}),
        ("linear_proj", attention, AdaptedRowLinear, {}),
        ("linear_fc1", mlp, AdaptedColumnLinear, {"parts": 2}),
        ("linear_fc2", mlp, AdaptedRowLinear, {}),
    ):
        if name in lora.targets:
            setattr(owner, name, ModuleSpec(module=adapted, params={"lora": lora, **more}))


def freeze_base(model: Any, *, recomputes: bool) -> None:
    """Leave gradients to adapters and scalar head alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_own(name))
    if recomputes and model.pre_process:
        # a recomputed layer has gradients only if its input has: what comes from a frozen embedding has none
        model.embedding.register_forward_hook(
            lambda _, __, out: out.requires_grad_() if torch.is_grad_enabled() else out
        )


def factors_of(linear: Any) -> Factors | None:
    """The adapter of a linear layer; None where it has none."""
    if not hasattr(linear, "lora_a"):
        return None
    return Factors(linear.lora_a, linear.lora_b.flatten(0, 1), linear.lora_scale)


@torch.no_grad()
def merge_into(plain: MegatronModule, adapted: MegatronModule) -> None:
    """W + alpha / rank * B A of an adapted model into the weights of a plain one in the same layout.

    The sum is taken in float32 and rounded once.
    """
    for module in adapted.modules():
        linear: Any = module
        if (factors := factors_of(linear)) is not None:
            linear.weight.copy_(linear.weight.float() + factors.product())
    merged = {(shard.name, shard.offset): shard.data for shard in shards(adapted)}
    for shard in shards(plain):
        shard.data.copy_(merged[shard.name, shard.offset])


def share_base(model: MegatronModule, trunk: MegatronModule) -> None:
    """Have a model use the frozen weights of another one in place of its own: all but adapters and scalar head."""
    held = dict(trunk.named_parameters())
    for prefix, module in model.named_modules():
        for name in list(module._parameters):
            full = f"{prefix}.{name}" if prefix else name
            if not is_own(full) and full in held:  # a value model has no output layer
                module._parameters[name] = held[full]
