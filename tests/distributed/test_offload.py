"""Frozen weights on the host: the same bits, two roles on the device at most, in the order of the roles."""

import torch

from rto_megatron.batch import SFTBatch
from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from tests.ranks import run_ranks

TINY = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=300,
    init_std=0.2,
)  # fmt: skip


def score_from_the_host(words):
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.offload import HostWeights
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import head_outputs, score_all, token_log_probs
    from rto_megatron.models.gpt import build_model
    from rto_megatron.models.lora import share_base

    parallel = ParallelConfig(**words)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    tokens = torch.randint(0, 300, (5, 12), generator=torch.Generator().manual_seed(1))
    batch = SFTBatch(tokens=tokens, num_tokens=torch.full((5,), 12), response_mask=torch.arange(12).expand(5, 12) >= 4)
    models = {}
    for seed, (name, kind, lora) in enumerate(
        (
            ("policy", "policy", None),
            ("reference", "policy", None),
            ("dpo", "policy", LoRAConfig(rank=2)),
            ("critic", "value", None),
            ("reward", "value", None),
        )
    ):
        more = {"kind": kind, "parallel": parallel, "compute": ComputeConfig(), "lora": lora, "seed": seed}
        models[name] = build_model(TINY, mesh, **more).requires_grad_(False)
    share_base(models["dpo"], models["reference"])
    asks = [(m, head_outputs if n in ("critic", "reward") else token_log_probs) for n, m in models.items()]
    kept = score_all(asks, batch, mesh, cut=Cut(rows=2))
    host = HostWeights(mesh.device)
    on_host = ("reference", "dpo", "reward")
    sizes = {name: sum(p.nbytes for p in models[name].parameters()) for name in on_host}
    seen = []

    def look(name):
        def hook(*_):
            there = {n for n in on_host if all(p.numel() for p in models[n].parameters())}
            if not seen or seen[-1] != (name, there):
                seen.append((name, there))

        return hook

    for name, model in models.items():
        model.register_forward_pre_hook(look(name))
        if name in on_host:
            host.take(model)
    passes = [score_all(asks, batch, mesh, cut=Cut(rows=2), host=host) for _ in range(2)]
    gone = [not p.numel() for name in on_host for p in models[name].parameters()]
    equal = [torch.equal(a, b) for outputs in passes for a, b in zip(outputs, kept, strict=True)]
    host.give_back(models["dpo"])
    stays = [p.numel() > 0 for name in ("dpo", "reference") for p in models[name].parameters()]
    again = score_all(asks, batch, mesh, cut=Cut(rows=2), host=host)
    equal += [torch.equal(a, b) for a, b in zip(again, kept, strict=True)]
    return equal, gone, stays, seen, host.peak_bytes, sizes


def test_weights_visit_in_the_order_of_the_roles_and_leave_the_bits_alone():
    for rank in run_ranks(score_from_the_host, 2, {"pipeline": 2}):
        equal, gone, stays, seen, peak, sizes = rank
        assert all(equal) and all(gone) and all(stays)
        once = [
            ("policy", {"reference"}),
            ("reference", {"reference", "dpo"}),  # who shares its weights
            ("dpo", {"dpo", "reference", "reward"}),
            ("critic", {"reward"}),
            ("reward", {"reward"}),
        ]
        assert seen[:10] == once + once
        assert peak <= sizes["dpo"] + sizes["reward"]


def test_roles_that_take_turns_chunk_by_chunk_are_all_there():
    for equal, gone, stays, *_ in run_ranks(score_from_the_host, 2, {"pipeline": 2, "virtual_stages": 2}):
        assert all(equal) and all(gone) and all(stays)
