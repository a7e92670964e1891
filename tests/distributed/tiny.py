"""A GPT small enough to train in a test, built from Megatron alone: the proof of the adapter uses no model of ours."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.distributed.collectives import from_last_stage, sum_in_rank_order
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import sharded_weights
from rto_megatron.distributed.runtime import start_runtime

VOCABULARY, LENGTH, ROWS, MICROBATCHES = 32, 6, 2, 2


@dataclass(frozen=True)
class Trainer:
    """A wrapped model, its optimizer and the mesh they live on."""

    model: DistributedDataParallel
    optimizer: Any
    mesh: Mesh

    def train(self, num_steps: int) -> list[float]:
        """Loss of each step, a mean over its whole batch, on every rank."""
        return [self._step(seed) for seed in range(num_steps)]

    def optimizer_state(self, **kwargs: Any) -> Any:
        """Sharded state of the optimizer, as dist_checkpointing takes it."""
        return self.optimizer.sharded_state_dict(sharded_weights(self.model.module), **kwargs)

    def _step(self, seed: int) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule: Any = forward_backward_no_pipelining
        if self.mesh.pipeline.size > 1:
            config = self.model.module.config
            communicator = P2PCommunicator(pp_group=self.mesh.groups.pp, config=config)
            schedule = partial(forward_backward_pipelining_without_interleaving, p2p_communicator=communicator)
        reported = schedule(
            forward_step_func=_forward,
            data_iterator=iter(_microbatches(seed, self.mesh)),
            model=[self.model],
            num_microbatches=MICROBATCHES // self.mesh.data.size,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
            pg_collection=self.mesh.groups,
        )
        assert self.optimizer.step()[0]
        loss = torch.stack(reported).mean() if self.mesh.is_last_stage else None
        loss = from_last_stage(loss, self.mesh, shape=(), dtype=torch.float32)
        return (sum_in_rank_order(loss, self.mesh) / self.mesh.data.size).item()


def tiny_trainer(tensor: int = 1, pipeline: int = 1) -> Trainer:
    """Two layers, with weights that depend on their names and not on the layout."""
    mesh = build_mesh(ParallelConfig(tensor=tensor, pipeline=pipeline), start_runtime(threads=1), seed=0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        ffn_hidden_size=32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        share_embeddings_and_output_weights=True,
        pg_collection=mesh.groups,
    )
    _fill_by_name(gpt)
    gpt.to(mesh.device)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, settings, gpt, pg_collection=mesh.groups)
    settings = OptimizerConfig(lr=1e-2, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False, pg_collection=mesh.groups)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = model.no_sync
    return Trainer(model, optimizer, mesh)


def _fill_by_name(gpt: GPTModel) -> None:
    """Draw each whole matrix from a seed of its name and keep this rank's part."""
    for shard in sharded_weights(gpt).values():
        if not isinstance(getattr(shard, "data", None), Tensor):
            continue
        seed = int.from_bytes(shard.key.encode()) % 2**31
        whole = 0.1 * torch.randn(shard.global_shape, generator=torch.Generator().manual_seed(seed))
        ends = [
            start + size for start, size in zip(shard.global_offset[-shard.data.dim() :], shard.data.shape, strict=True)
        ]
        starts = shard.global_offset[-shard.data.dim() :]
        layer = shard.global_offset[: -shard.data.dim()]
        part = whole[layer][tuple(slice(*bounds) for bounds in zip(starts, ends, strict=True))]
        with torch.no_grad():
            shard.data.copy_(part)


def _microbatches(seed: int, mesh: Mesh) -> list[Tensor]:
    """[ROWS, LENGTH + 1] tokens each: this data rank's share of the step's batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (MICROBATCHES, ROWS, LENGTH + 1), generator=generator)
    return list(tokens[mesh.data.rank :: mesh.data.size].to(mesh.device))


def _forward(batches: Any, model: Any) -> tuple[Tensor, Any]:
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    future = torch.ones(1, 1, LENGTH, LENGTH, device=tokens.device).triu(1).bool()
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(inputs)

    def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        # not by Megatron's cross entropy, which asks the global parallel state for its group
        whole = gather_from_tensor_model_parallel_region(logits, group=model.module.pg_collection.tp)
        mean = F.cross_entropy(whole.flatten(0, 1).float(), labels.flatten())
        return mean, mean.detach().clone()  # the schedule divides the first one in place

    return model(inputs, positions, future), loss
