"""Decode tokens a second: our engine beside transformers' `generate`, same weights, prompts and lengths, in turn.

    python -m benchmarks.decode [--models 1M 32M] [--cells 'batch 32, drawn'] [--repeat=1] [--threads=1] [--ours-only]

Both sample at temperature 1 without filters, in float32, in one process. A length controller ends each response at a
length that is known beforehand, on both sides, and no token ends one earlier: both write the same number of tokens.
Responses are of equal length, or log-normal (sigma 0.7, at most 2.3 times the mean). A batch of N is N slots of ours
and N rows of theirs; more prompts than that wait: ours fills a slot when it is free, theirs begins the next N when all
of the last have ended. Theirs runs with the fastest of its settings (cache and attention tried in each cell); ours
tells log-probs too, theirs does not. Before anything is timed, log-probs that our engine gave to its tokens must be
those of transformers within 1e-4, else exit code 3. Order A B B A; results of all cells go to
benchmarks/results/decode.json and .md, some cells are only printed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, save, save_table, spread
from benchmarks.shapes import VOCAB, drawn_lengths, drawn_prompts, hugging_face_folder, model_config
from benchmarks.transformers_side import LengthController, ban, left_padded
from rto_megatron.distributed.runtime import prepare_imports

PAD = 0
PROMPT_TOKENS = (16, 48)
MEAN_TOKENS = {"1M": 96, "8M": 64, "32M": 48}
"""Of a response, by model: the larger ones take longer."""
CELLS = (
    # name, rows that decode together, prompts in all, whether lengths are drawn
    ("batch 1, equal", 1, 2, False),
    ("batch 8, equal", 8, 16, False),
    ("batch 32, equal", 32, 64, False),
    ("batch 1, drawn", 1, 4, True),
    ("batch 8, drawn", 8, 32, True),
    ("batch 32, drawn", 32, 64, True),
)
SETTINGS = tuple((cache, attention) for cache in ("dynamic", "static") for attention in ("sdpa", "eager"))
"""What is tried of transformers in each cell, on a third of the lengths; the fastest is measured."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Task:
    """What both sides write: prompts, and the length of each response."""

    prompts: list[list[int]]
    lengths: list[int]
    batch: int

    @property
    def num_tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths)


def make_task(name: str, batch: int, number: int, drawn: bool) -> Task:
    """The prompts and lengths of a cell, from a fixed seed."""
    mean, ids = MEAN_TOKENS[name], range(1, VOCAB[name])
    lengths = drawn_lengths(number, mean=mean, seed=number) if drawn else [mean] * number
    prompts = drawn_prompts(number, PROMPT_TOKENS if drawn else (32, 32), vocab=ids, seed=number)
    return Task(prompts, lengths, batch)


class Ours:
    """Our engine, on a model of one rank."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
        from rto_megatron.distributed.mesh import build_mesh
        from rto_megatron.distributed.runtime import start_runtime
        from rto_megatron.models.gpt import build_model
        from rto_megatron.models.hf_weights import load_hf

        runtime, parallel, config = start_runtime(threads=threads), ParallelConfig(), model_config(name)
        mesh = build_mesh(parallel, runtime, seed=0)
        whole = {"parallel": parallel, "compute": ComputeConfig(), "seed": None}
        self.cache_bytes = 0
        """Most that keys and values took in the last `write`."""
        self.model = build_model(config, mesh, kind="policy", banned_ids=(PAD,), **whole)
        load_hf(self.model, folder, config)

    def write(self, task: Task, **options: Any) -> list[Any]:
        """Completions of all prompts, in their order.

        Args:
            options: of the engine.
        """
        from rto_megatron.rollout.engine import Request, RolloutEngine

        longest = max(len(p) + n for p, n in zip(task.prompts, task.lengths, strict=True))
        engine = RolloutEngine(self.model, max_slots=task.batch, max_length=longest, eos_ids=(), **options)
        requests = [
            Request(uid=uid, prompt=tuple(prompt), max_new_tokens=length, seed=uid)
            for uid, (prompt, length) in enumerate(zip(task.prompts, task.lengths, strict=True))
        ]
        batches, make = [], engine.batch
        engine.batch = lambda some: batches.append(make(some)) or batches[-1]
        done = sorted(engine.generate(requests), key=lambda completion: completion.uid)
        self.cache_bytes = sum(batch.cache_bytes for batch in batches)
        assert [len(completion.tokens) for completion in done] == task.lengths
        return done


class Theirs:
    """transformers' `generate`, on the same weights."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ban(self.model, (PAD,))
        self.cache = "dynamic"

    def use(self, cache: str, attention: str) -> None:
        """Choose its settings."""
        self.cache = cache
        self.model.set_attn_implementation(attention)

    @torch.no_grad()
    def write(self, task: Task) -> int:
        """Write all responses, batch by batch; how many tokens these were."""
        from transformers import GenerationConfig, StoppingCriteriaList

        written = 0
        for start in range(0, len(task.prompts), task.batch):
            prompts, lengths = (some[start : start + task.batch] for some in (task.prompts, task.lengths))
            ids, mask = left_padded(prompts, PAD)
            config = GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(lengths),
                pad_token_id=PAD,
                use_cache=True,
                cache_implementation=None if self.cache == "dynamic" else self.cache,
            )
            stop = StoppingCriteriaList([LengthController(ids.shape[1], lengths)])
            out = self.model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
            written += int((out[:, ids.shape[1] :] != PAD).sum())
        assert written == task.num_tokens, (written, task.num_tokens)
        return written

    @torch.no_grad()
    def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Of each token of a response, by one pass over the whole sequence."""
        logits = self.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def check_parity(ours: Ours, theirs: Theirs, task: Task) -> float:
    """Largest difference of log-probs, relative to the largest log-prob; exit code 3 if it is too large."""
    worst = 0.0
    for prompt, done in zip(task.prompts, ours.write(task), strict=True):
        want = theirs.log_probs(prompt, done.tokens)
        worst = max(worst, float((torch.tensor(done.log_probs) - want).abs().max() / want.abs().max()))
    if not worst <= TOLERANCE:
        print(f"log-probs of decode differ from transformers' by {worst:.2e}, more than {TOLERANCE}; nothing was timed")
        sys.exit(3)
    return worst


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(ours: Ours, theirs: Theirs | None, task: Task, repeat: int) -> dict[str, Any]:
    """Tokens a second of both, in turn."""
    ours.write(task)
    found: dict[str, Any] = {"prompts": len(task.prompts), "tokens": task.num_tokens, "longest": max(task.lengths)}
    if theirs is None:
        return found | {"ours": spread([task.num_tokens / timed(lambda: ours.write(task)) for _ in range(repeat)])}
    short, tried = replace(task, lengths=[-(-length // 3) for length in task.lengths]), {}
    for setting in SETTINGS:
        theirs.use(*setting)
        tried[setting] = timed(lambda: theirs.write(short))
    best = min(tried, key=lambda setting: tried[setting])
    theirs.use(*best)
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours.write(task), "theirs": lambda: theirs.write(task)}
    for side in ("ours", "theirs", "theirs", "ours") * repeat:
        rates[side].append(task.num_tokens / timed(sides[side]))
    found |= {side: spread(each) for side, each in rates.items()}
    found["their_settings"] = " cache, ".join(best)
    found["their_rates_tried"] = {" cache, ".join(s): short.num_tokens / seconds for s, seconds in tried.items()}
    found["ratio"] = found["ours"]["median"] / found["theirs"]["median"]
    return found


def main() -> None:
    """All cells of all models, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1M", "32M"], help="shapes of benchmarks/shapes.py")
    parser.add_argument("--cells", nargs="+", default=[name for name, *_ in CELLS], help="some of the cells, by name")
    parser.add_argument("--repeat", type=int, default=1, help="times A B B A in each cell")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side")
    parser.add_argument("--ours-only", action="store_true", help="no transformers: for work on our engine; not saved")
    options = parser.parse_args()
    prepare_imports()
    found: dict[str, Any] = {"machine": machine("transformers"), "threads": options.threads, "cells": []}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            path = hugging_face_folder(name, Path(folder) / "model")
            ours, theirs = Ours(name, path, options.threads), Theirs(path)
        apart = check_parity(ours, theirs, make_task(name, 8, 16, drawn=True))
        for cell, batch, number, drawn in CELLS:
            if cell not in options.cells or (batch, name) == (8, "32M"):  # which would take minutes
                continue
            task = make_task(name, batch, number, drawn)
            numbers = measure(ours, None if options.ours_only else theirs, task, options.repeat)
            found["cells"].append({"model": name, "cell": cell, "parity": apart, **numbers})
            print(row(found["cells"][-1]), flush=True)
    found["load_average_after"] = os.getloadavg()
    if not options.ours_only and all(
        getattr(options, name) == parser.get_default(name) for name in ("models", "cells")
    ):
        save("decode", found)
        save_table("decode", HEADER, [row(cell) for cell in found["cells"]], found["machine"])


HEADER = (
    "| model | responses | tokens | ours, tokens/s (range) | transformers, tokens/s (range) | ratio | its settings |",
    "|---|---|---|---|---|---|---|",
)


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    rates = [
        f"{cell[side]['median']:.0f} ({cell[side]['min']:.0f} - {cell[side]['max']:.0f})" if side in cell else "-"
        for side in ("ours", "theirs")
    ]
    ratio = f"{cell['ratio']:.2f}" if "ratio" in cell else "-"
    cells = [cell["model"], cell["cell"], str(cell["tokens"]), *rates, ratio, cell.get("their_settings", "-")]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
