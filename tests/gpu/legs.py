"""What the tests compare: a policy and a critic scored and trained, or responses written, on this process's device.

A leg runs in ranks of its own (`tests.ranks`): on GPUs where there are any, and inside `hidden` on the CPU, without
Transformer Engine, on the same machine. All of it comes back as CPU tensors.
"""

import functools
import os
import sys
from typing import Any

import torch

SHAPE = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 500, "max_length": 128, "init_std": 0.1, "qk_norm": False,
}  # fmt: skip
"""Heads of 64, and sizes that 8 bits can take."""
ROWS, LR = 8, 1e-3


def hidden(leg, *args):
    """A leg on the CPU, whatever this machine has."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda"):
        sys.modules[name] = None  # type: ignore[assignment]  # for find_spec and import: not installed
    return leg(*args)


def batch_on(device):
    """Rows of 40 to 96 tokens, a third of them prompt, with what PPO knows of each token."""
    from rto_megatron.batch import Experience

    generator = torch.Generator().manual_seed(1)
    num_tokens = torch.randint(40, 97, (ROWS,), generator=generator)
    shape, columns = (ROWS, 96), torch.arange(96)
    mask = (columns >= num_tokens[:, None] // 3) & (columns < num_tokens[:, None])
    numbers = {key: torch.randn(shape, generator=generator) * mask for key in ("old_values", "advantages", "returns")}
    return Experience(
        tokens=torch.randint(1, 500, shape, generator=generator),
        num_tokens=num_tokens,
        response_mask=mask,
        old_log_probs=torch.full(shape, -6.0),
        **numbers,
    ).to(device)


def policy_loss(output, rows, *, count):
    """Smooth: where PPO clips, the last bit of a log-prob may decide whether a token has a gradient."""
    value = -(output[..., 0] * rows.advantages).where(rows.response_mask, 0.0).sum() / count
    return value, value.detach()[None]


def value_loss(output, rows, *, count):
    value = (output - rows.returns).square().where(rows.response_mask, 0.0).sum() / count
    return value, value.detach()[None]


def train(parallel=None, compute=None, optimizer=None, *, packed=True, local=False, steps=2, model=None):
    """Scores, then optimizer steps of policy and critic, then scores again.

    Returns:
        name -> tensor: `scores` before, `after`, `sums` and `norms` of each step, and of policy and critic.
    """
    from rto_megatron.config.model import ModelConfig
    from rto_megatron.config.optimizer import OptimizerConfig
    from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
    from rto_megatron.data.shares import deal
    from rto_megatron.distributed.chunks import model_chunks
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.optimizer import make_trainable
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import head_outputs, score, token_log_probs, train_step
    from rto_megatron.models.gpt import build_model

    layout, arithmetic = ParallelConfig(**parallel or {}), ComputeConfig(**compute or {})
    runtime = start_runtime(threads=1, deterministic=arithmetic.deterministic)
    mesh = build_mesh(layout, runtime, seed=0)
    whole = batch_on(mesh.device)
    mine = whole.rows(deal(whole.num_tokens.tolist(), mesh.data.size)[mesh.data.rank])
    cut, count = Cut(rows=2, packed=packed), int(whole.response_mask.sum())
    config, found = ModelConfig(**(SHAPE | (model or {}))), {}
    for kind, forward, loss, num_sums in (
        ("policy", token_log_probs, functools.partial(policy_loss, count=count), 1),
        ("value", head_outputs, functools.partial(value_loss, count=count), 1),
    ):
        built = build_model(config, mesh, kind=kind, parallel=layout, compute=arithmetic, seed=3, local=local)
        trainable = make_trainable(kind, built, OptimizerConfig(**optimizer or {}), mesh)
        before = score(built, whole, forward, mesh, cut=cut)
        results = [
            train_step(trainable, mine, forward, loss, mesh, cut=cut, lr=LR, num_sums=num_sums) for _ in range(steps)
        ]
        after = score(built, whole, forward, mesh, cut=cut)
        found[f"{kind} scores"], found[f"{kind} after"] = before, after
        found[f"{kind} sums"] = torch.stack([result.sums for result in results])
        found[f"{kind} norms"] = torch.tensor([result.grad_norm for result in results])
        names = {type(module).__name__ for chunk in model_chunks(built) for module in chunk.modules()}
        found[f"{kind} is fused"] = torch.tensor("TEDotProductAttention" in names)
        found[f"{kind} dtypes"] = torch.tensor(
            [next(built.parameters()).dtype == torch.bfloat16, all(x == torch.float32 for x in _masters(trainable))]
        )
    mask = whole.response_mask
    return {name: _on_cpu(x, mask) for name, x in found.items()}


def _masters(trainable: Any) -> list[torch.dtype]:
    """Types of what Adam steps and of the sums of gradients."""
    parts = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    stepped = [p.dtype for part in parts for group in part.optimizer.param_groups for p in group["params"]]
    return [*stepped, *(buffer.grad_data.dtype for ddp in trainable.ddps for buffer in ddp.buffers)]


def _on_cpu(x, mask):
    x = x.detach()
    return (x[mask] if x.dim() > 1 and x.shape[:2] == mask.shape else x).cpu()


def write(parallel=None, compute=None, *, temperature=0.0, new_tokens=24, **options):
    """Responses and their log-probs, and what the training forward says of the same tokens.

    Args:
        options: of the engine.
    """
    from rto_megatron.batch import SFTBatch
    from rto_megatron.config.model import ModelConfig
    from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import score, token_log_probs
    from rto_megatron.models.gpt import build_model
    from rto_megatron.rollout.engine import Request, RolloutEngine

    layout, arithmetic = ParallelConfig(**parallel or {}), ComputeConfig(**compute or {})
    mesh = build_mesh(layout, start_runtime(threads=1, deterministic=arithmetic.deterministic), seed=0)
    model = build_model(ModelConfig(**SHAPE), mesh, kind="policy", parallel=layout, compute=arithmetic, seed=3)
    model.eval()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(1, 500, (8 + i,), generator=generator).tolist() for i in range(6)]
    requests = [
        Request(uid=i, prompt=tuple(p), max_new_tokens=new_tokens, seed=i, temperature=temperature)
        for i, p in enumerate(prompts)
    ]
    engine = RolloutEngine(model, max_slots=4, max_length=64, eos_ids=(), **options)
    done = sorted(engine.generate(requests), key=lambda completion: completion.uid)
    rows = [p + completion.tokens for p, completion in zip(prompts, done, strict=True)]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    starts, columns = torch.tensor([len(p) for p in prompts])[:, None], torch.arange(width)
    batch = SFTBatch(
        tokens=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        num_tokens=lengths,
        response_mask=(columns >= starts) & (columns < lengths[:, None]),
    )
    said = score(model, batch.to(mesh.device), token_log_probs, mesh, cut=Cut(rows=3, packed=True))[..., 0].cpu()
    return {
        "tokens": torch.tensor([completion.tokens for completion in done]),
        "decode": torch.tensor([x for completion in done for x in completion.log_probs]),
        "forward": said[batch.response_mask],
    }
