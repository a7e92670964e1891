"""What a microbatch should be: rows padded by number, by tokens, or packed; of training and scoring, on one CPU core.

    python -m benchmarks.packing [--repeat=3] [--only=1M]

One policy, rows of log-normal length (sigma 0.7), one process with one thread. Every way computes the same gradients
(tests/distributed/test_packing.py); they run in turn, forwards and backwards, each once before it counts. Tables show
the fastest run of each, since what else a machine does only adds. Floating-point operations are counted from the tokens
that are there, padding and logits that are computed again not included, and compared with the speed of one matrix
product of 1024 x 1024 in the same process. Results go to benchmarks/results/packing.json.
"""

import argparse
import math
import os
import random
import time
from typing import Any

import torch

from benchmarks.machine import machine, save, spread
from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.data.shares import cut_by_length, padded_tokens
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.step import Task, accumulate, score, token_log_probs
from rto_megatron.models.gpt import build_model

PROMPT, MEAN, SIGMA, WINDOW = 16, 96, 0.7, 448
"""Tokens of every prompt; of responses: the mean before they are cut at the window, and sigma of their logarithm."""
MODELS = {
    "1M": ModelConfig(
        num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, vocab_size=2048,
        max_length=512,
    ),
    "28M": ModelConfig(
        num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4, vocab_size=8192,
        max_length=512,
    ),
}  # fmt: skip
ROWS = {"1M": 32, "28M": 16}
WAYS = {
    "padded, 4 rows": Cut(rows=4),
    "padded, 2048 tokens": Cut(tokens=2048),
    "padded, 4096 tokens": Cut(tokens=4096),
    "packed, 2048 tokens": Cut(tokens=2048, packed=True),
    "packed, 4096 tokens": Cut(tokens=4096, packed=True),
}


def main() -> None:
    """Run all models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="times each way counts")
    parser.add_argument("--only", choices=MODELS, help="one model, and write no results")
    options = parser.parse_args()
    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    found: dict[str, Any] = {"machine": machine(), "prompt": PROMPT, "mean": MEAN, "sigma": SIGMA, "window": WINDOW}
    for name in [options.only] if options.only else MODELS:
        found[name] = measure(MODELS[name], rows_of(ROWS[name]), mesh, options.repeat)
        show(name, found[name])
    found["load_average_after"] = os.getloadavg()
    if not options.only:
        save("packing", found)


def rows_of(num: int) -> SFTBatch:
    """Random tokens in rows whose lengths are drawn."""
    rng, middle = random.Random("benchmarks/packing"), math.log(MEAN) - SIGMA**2 / 2
    responses = [min(WINDOW, max(1, round(rng.lognormvariate(middle, SIGMA)))) for _ in range(num)]
    num_tokens = torch.tensor([PROMPT + response for response in responses])
    columns = torch.arange(int(num_tokens.max()))
    mask = (columns >= PROMPT) & (columns < num_tokens[:, None])
    tokens = torch.randint(1, 2000, mask.shape, generator=torch.Generator().manual_seed(0))
    return SFTBatch(tokens=tokens, num_tokens=num_tokens, response_mask=mask)


def measure(config: ModelConfig, batch: SFTBatch, mesh: Mesh, repeat: int) -> dict[str, Any]:
    """Seconds of training (forward and backward) and scoring by each way, in turn, and shares of the peak."""
    model = build_model(config, mesh, kind="policy", parallel=ParallelConfig(), compute=ComputeConfig())
    task = Task(make_trainable("policy", model, OptimizerConfig(), mesh), batch, token_log_probs, loss, num_sums=1)
    lengths = batch.num_tokens.tolist()
    seconds: dict[tuple[str, str], list[float]] = {(way, what): [] for way in WAYS for what in ("train", "score")}
    peaks: list[float] = []
    for number in range(repeat + 1):
        for way, cut in list(WAYS.items())[:: 1 if number % 2 else -1]:
            for what in ("train", "score"):
                start = time.perf_counter()
                if what == "train":
                    accumulate([task], mesh, cut=cut)
                else:
                    score(model, batch, token_log_probs, mesh, cut=cut)
                if number:
                    seconds[way, what].append(time.perf_counter() - start)
        peaks.append(matmul_rate())
    peak = max(peaks)
    work = {"train": 3 * forward_work(config, batch), "score": forward_work(config, batch)}
    ways = {}
    for way, cut in WAYS.items():
        ways[way] = {
            "microbatches": len(cut_by_length(lengths, cut)),
            "computed_per_token": padded_tokens(lengths, cut) / sum(lengths),
        }
        for what in ("train", "score"):
            taken = spread(seconds[way, what])
            ways[way] |= {f"{what}_seconds": taken, f"{what}_share_of_peak": work[what] / taken["min"] / peak}
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "parameters": parameters, "rows": len(batch), "tokens": sum(lengths), "peak_flops": peak, "ways": ways,
    }  # fmt: skip


def loss(output: torch.Tensor, rows: SFTBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the log-probs, over a number of tokens."""
    value = -output[..., 0].where(rows.response_mask, 0.0).sum() / 1000
    return value, value.detach()[None]


def forward_work(config: ModelConfig, batch: SFTBatch) -> float:
    """Floating-point operations of matrix products and causal attention in one forward pass over what is there."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.kv_channels
    groups = config.num_query_groups * config.kv_channels
    layer = hidden * (2 * heads + 2 * groups) + 3 * hidden * config.ffn_hidden_size
    pairs = sum(length * (length + 1) / 2 for length in batch.num_tokens.tolist())
    layers = config.num_layers * (2 * layer * int(batch.num_tokens.sum()) + 4 * heads * pairs)
    return layers + 2 * hidden * config.vocab_size * int(batch.response_mask.sum())


def matmul_rate() -> float:
    """Operations a second of one product of 1024 x 1024: the best of five."""
    square, best = torch.ones(1024, 1024), math.inf
    for _ in range(5):
        start = time.perf_counter()
        _ = square @ square
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def show(name: str, found: dict[str, Any]) -> None:
    """A table of one model."""
    print(
        f"{name}: {found['parameters']:,} parameters, {found['rows']} rows, {found['tokens']} tokens; "
        f"matrix product {found['peak_flops'] / 1e9:.0f} GFLOP/s"
    )
    print(f"  {'':20} microbatches  computed  train: seconds  of peak   score: seconds  of peak")
    for way, cells in found["ways"].items():
        times = "".join(
            f"{cells[f'{what}_seconds']['min']:>16.3f}{cells[f'{what}_share_of_peak']:>9.1%}"
            for what in ("train", "score")
        )
        print(f"  {way:20} {cells['microbatches']:>12} {cells['computed_per_token']:>9.2f}{times}", flush=True)


if __name__ == "__main__":
    main()
