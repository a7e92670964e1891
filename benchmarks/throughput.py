"""Training and scoring FLOP/s of our models, as a share of what bare matrix products reach on the same machine.

    python -m benchmarks.throughput [--models 1M 8M 32M] [--threads=1] [--repeat=3]

Rows of 128 tokens, half of them response; a training step is forward, backward and Adam of one model on 32 rows,
scoring a forward pass. FLOPs are those that the mathematics asks for: 2 a weight and token forward, 4 backward, the
output layer and, of the last layer, all that follows attention at response tokens only, and causal attention; logits
that are computed again and all that is no matrix product count nothing.

Two measures of the machine: `peak`, the fastest float32 product of square matrices, and `shapes`, the products of the
model's own layers (forward and both of the backward), alone, one after the other. In turn with ours, in one process.
Results go to benchmarks/results/throughput.json and .md.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import machine, save, save_table, spread
from benchmarks.shapes import VOCAB, model_config
from rto_megatron.config.model import ModelConfig
from rto_megatron.distributed.runtime import prepare_imports, start_runtime

NUM_ROWS, ROW_TOKENS, RESPONSE_TOKENS = 32, 128, 64
SQUARES = (512, 768, 1024, 1536)


def flops(
    config: ModelConfig, kind: Any, rows: int = NUM_ROWS, length: int = ROW_TOKENS, response: int = RESPONSE_TOKENS
) -> float:
    """Of a forward pass over rows of `length` tokens, `response` of them response."""
    from rto_megatron.models.counts import num_parameters

    embedding = config.padded_vocab_size * config.hidden_size
    layers = num_parameters(config, "value") - embedding
    tokens = rows * length
    heads = config.num_attention_heads * config.kv_channels
    after_attention = (heads + 3 * config.ffn_hidden_size) * config.hidden_size
    unasked = 2 * after_attention * rows * (length - response)
    attention = 2 * config.num_layers * heads * length * tokens  # two products, half of them masked
    head = 2 * embedding * rows * response if kind == "policy" else 0
    return 2 * layers * tokens - unasked + attention + head


def products(config: ModelConfig, kind: Any, rows: int) -> list[tuple[int, int, int]]:
    """(tokens, inputs, outputs) of the matrix products of a forward pass over one microbatch."""
    tokens, h, heads = rows * ROW_TOKENS, config.hidden_size, config.num_attention_heads * config.kv_channels
    wide = heads + 2 * config.num_query_groups * config.kv_channels
    ffn, asked = config.ffn_hidden_size, rows * RESPONSE_TOKENS
    whole, last = ([(n, heads, h), (n, h, 2 * ffn), (n, ffn, h)] for n in (tokens, asked))
    head = [(asked, h, config.padded_vocab_size)] if kind == "policy" else []
    return [(tokens, h, wide)] * config.num_layers + whole * (config.num_layers - 1) + last + head


class Bare:
    """The products of a microbatch, alone."""

    def __init__(self, config: ModelConfig, kind: Any, rows: int) -> None:
        self.work = [
            (torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for n, i, o in products(config, kind, rows)
        ]
        self.flops = sum(2 * n * i * o for n, i, o in products(config, kind, rows))

    def forward(self) -> None:
        """x W', layer by layer."""
        for x, weight, _ in self.work:
            torch.mm(x, weight.T)

    def backward(self) -> None:
        """Both products of a gradient g: g W, and g' x."""
        for x, weight, grad in self.work:
            torch.mm(grad, weight)
            torch.mm(grad.T, x)


def peak() -> float:
    """FLOP/s of the fastest square product."""
    best = 0.0
    for size in SQUARES:
        x, y = torch.randn(size, size), torch.randn(size, size)
        torch.mm(x, y)
        best = max(best, *(2 * size**3 / seconds(lambda x=x, y=y: torch.mm(x, y)) for _ in range(5)))
    return best


def seconds(action: Callable[[], Any]) -> float:
    """That it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, kind: Any, micro: int, repeat: int, runtime: Any) -> dict[str, Any]:
    """One model: rates of ours, of its bare products and of the peak, in turn."""
    from rto_megatron.batch import Experience
    from rto_megatron.config.algorithm import PPOConfig
    from rto_megatron.config.optimizer import OptimizerConfig
    from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.optimizer import make_trainable
    from rto_megatron.distributed.step import head_outputs_before_response, score, token_log_probs, train_step
    from rto_megatron.models.gpt import build_model
    from rto_megatron.stages.update import make_policy_loss, make_value_loss

    config, parallel, cut = model_config(name), ParallelConfig(), Cut(tokens=micro * ROW_TOKENS, packed=True)
    mesh = build_mesh(parallel, runtime, seed=0)
    model = build_model(config, mesh, kind=kind, parallel=parallel, compute=ComputeConfig())
    trainable = make_trainable(kind, model, OptimizerConfig(), mesh)
    shape = NUM_ROWS, ROW_TOKENS
    numbers = {key: torch.randn(shape) for key in ("old_values", "advantages", "returns")}
    batch = Experience(
        tokens=torch.randint(0, VOCAB[name], shape),
        num_tokens=torch.full((NUM_ROWS,), ROW_TOKENS),
        response_mask=(torch.arange(ROW_TOKENS) >= ROW_TOKENS - RESPONSE_TOKENS).expand(shape).clone(),
        old_log_probs=torch.full(shape, -6.0),
        **numbers,
    )
    policy = kind == "policy"
    forward = token_log_probs if policy else head_outputs_before_response
    make_loss = make_policy_loss if policy else make_value_loss
    loss, num_sums = make_loss(PPOConfig(loss_mean="token"), NUM_ROWS * RESPONSE_TOKENS), 6 if policy else 3

    def train() -> None:
        train_step(trainable, batch, forward, loss, mesh, cut=cut, lr=1e-5, num_sums=num_sums)

    def ask() -> None:
        score(model, batch, forward, mesh, cut=cut)

    bare, work = Bare(config, kind, micro), flops(config, kind)
    train(), ask(), bare.forward(), bare.backward()
    taken: dict[str, list[float]] = {key: [] for key in ("train", "score", "forward", "backward", "peak")}
    for _ in range(repeat):
        taken["peak"].append(peak())
        taken["forward"].append(bare.flops / seconds(bare.forward))
        taken["train"].append(3 * work / seconds(train))
        taken["score"].append(work / seconds(ask))
        taken["backward"].append(2 * bare.flops / seconds(bare.backward))
    rates = {key: spread([value / 1e9 for value in values]) for key, values in taken.items()}
    middle = {key: rate["median"] for key, rate in rates.items()}
    whole = 3 / (1 / middle["forward"] + 2 / middle["backward"])
    return {
        "model": name, "kind": kind, "micro_batch": micro, "gigaflops": rates, "shapes_training": whole,
        "train_of_peak": middle["train"] / middle["peak"], "score_of_peak": middle["score"] / middle["peak"],
        "train_of_shapes": middle["train"] / whole, "score_of_shapes": middle["score"] / middle["forward"],
    }  # fmt: skip


def main() -> None:
    """All models, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1M", "8M", "32M"], help="shapes of benchmarks/shapes.py")
    parser.add_argument("--kinds", nargs="+", default=["policy", "value"])
    parser.add_argument("--micro", type=int, default=16, help="rows of a microbatch, packed one after another")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prepare_imports()
    runtime = start_runtime(threads=options.threads)
    found: dict[str, Any] = {"machine": machine(), "threads": options.threads, "cells": []}
    for name in options.models:
        for kind in options.kinds:
            found["cells"].append(measure(name, kind, options.micro, options.repeat, runtime))
            print(row(found["cells"][-1]), flush=True)
    found["load_average_after"] = os.getloadavg()
    if all(getattr(options, name) == parser.get_default(name) for name in ("models", "kinds", "micro", "threads")):
        save("throughput", found)
        save_table("throughput", HEADER, [row(cell) for cell in found["cells"]], found["machine"])


HEADER = (
    "| model | training, GFLOP/s (range) | of peak | of its shapes | scoring, GFLOP/s (range) | of peak "
    "| of its shapes | peak, GFLOP/s |",
    "|---|---|---|---|---|---|---|---|",
)


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""

    def rate(key: str) -> str:
        told = cell["gigaflops"][key]
        return f"{told['median']:.0f} ({told['min']:.0f} - {told['max']:.0f})"

    words = [f"{cell['model']} {cell['kind']}"]
    for key in ("train", "score"):
        words += [rate(key), f"{cell[f'{key}_of_peak']:.0%}", f"{cell[f'{key}_of_shapes']:.0%}"]
    return "| " + " | ".join([*words, f"{cell['gigaflops']['peak']['median']:.0f}"]) + " |"


if __name__ == "__main__":
    main()
