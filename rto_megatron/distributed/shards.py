"""Weights by their global names: which piece of which tensor a rank holds, whatever the layout.

The names are those of the checkpoint, which are the same for local and Transformer Engine layers.
Fresh weights, Hugging Face conversion, refitting and comparison between layouts all go through here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.distributed.optimizer import Trainable, optimizer_state, sharded_weights


@dataclass(frozen=True)
class Shard:
    """A rank's piece of one weight."""

    key: str
    """Name in the checkpoint, with `{i}` for the layer."""
    layer: int | None
    offset: tuple[int, ...]
    """Where the piece begins in the full tensor."""
    full_shape: tuple[int, ...]
    data: Tensor
    """View of the live parameter."""
    is_main: bool
    """Whether this rank, of those that hold the same piece, is the one to write it."""

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indices of the piece in the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.data.shape, strict=True))

    @property
    def name(self) -> str:
        """Name with the layer filled in."""
        return self.key.format(i=self.layer)


def is_adapter(name: str) -> bool:
    """Whether a weight is a factor of a low-rank adapter (`models/lora.py`)."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def is_own(name: str) -> bool:
    """Whether an adapted model has a weight for itself: its adapters and its scalar head; all others are frozen."""
    return is_adapter(name) or "value_head." in name


def shards(model: MegatronModule) -> Iterator[Shard]:
    """All pieces that this rank holds, in the model's own order."""
    state = sharded_weights(model)
    for value in state.values():
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            value.data = value.data.detach()  # a factory's pieces are views only of a detached tensor
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            yield _shard(tensor, tensor.key)


def optimizer_shards(trainable: Trainable) -> dict[str, list[Shard]]:
    """What the optimizer keeps beside each weight this rank holds, by kind, under the weight's own name.

    Kinds are `exp_avg` and `exp_avg_sq`, and `master` where there are float32 copies of the weights. Every kind
    is whole on every data-parallel rank, so all of them must call.
    """
    state = optimizer_state(trainable)
    apply_factories(state)
    kinds: dict[str, list[Shard]] = {}
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            kind, key = tensor.key.removeprefix("optimizer.state.").split(".", 1)
            # two names, one for each of Megatron's optimizers
            kind = "master" if kind in ("param", "fp32_param") else kind
            kinds.setdefault(kind, []).append(_shard(tensor, key))
    return kinds


def _shard(tensor: ShardedTensor, key: str) -> Shard:
    layer, skip = None, tensor.prepend_axis_num
    if named := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", key):
        layer, key = int(named[1]), "decoder.layers.{i}." + named[2]
    elif key.startswith("decoder.layers."):  # all layers under one name, the layer as first axis
        layer, key = tensor.global_offset[0], "decoder.layers.{i}." + key.removeprefix("decoder.layers.")
    assert tensor.data is not None  # only shards that are being loaded lack it
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return Shard(
        key=key,
        layer=layer,
        offset=tuple(tensor.global_offset[skip:]),
        full_shape=tuple(tensor.global_shape[skip:]),
        data=tensor.data,
        is_main=not any(replica),
    )
