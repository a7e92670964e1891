"""One step of PPO and of RTO, ours beside TRL's PPO trainer: same weights, prompts, lengths, batch and maths, in turn.

    pip install 'rto_megatron[bench]' && python -m benchmarks.trl_ppo [--models 1M] [--repeat=1]

64 prompts of 16 to 48 tokens, 8 minibatches of 8 rows, 1 epoch, float32, two cores each: ours as two data-parallel
ranks of one thread, TRL as one process of two threads, with the rollout batch that is fastest of those tried. Adam of
policy and critic with the same constants, no clipping of gradients, as TRL has none. Our weights are converted for TRL
by our `convert`. TRL runs unmodified for PPO; RTO's token rewards are added by a subclass (`rto_trainer` below). Ours
takes decoding's log-probs as pi_old behind its guard, where TRL asks its policy anew, and does not cut its optimizers'
state over ranks; `--ours` alone takes our defaults. In `equal` all responses have one length, in `drawn` log-normal
ones; both sides write the same number of tokens. `products alone` is the time that the step's matrix products would
take at the peak of both cores: no step of these numbers, whoever takes it, can be shorter.

Before anything is timed, TRL's own first step at equal lengths is compared with ours on the tokens that TRL wrote:
log-probs, values, rewards, advantages and the first gradient norms within 1e-4, else exit code 3. At drawn lengths TRL
puts the score one place behind a response that ends early, so its advantages are other numbers there; the work is the
same. Results go into benchmarks/results/trl_ppo.json and .md; models that were not measured stay as they are.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.machine import RESULTS, machine, peak_bytes, resident_bytes, save, save_table
from benchmarks.shapes import model_config
from benchmarks.steps import Task

MEAN_TOKENS = {"1M": 64, "8M": 24, "32M": 16}
"""Of a response, by model: so that a step of the larger ones takes seconds too."""
CELLS = {"1M": ("ppo", "rto"), "8M": ("rto",)}
"""What is measured unless told otherwise."""
OURS = [
    "--rollout.reuse_log_probs=true",
    # gradients of two ranks summed in one call: cutting Adam's state of a small model costs more than it spares
    "--optimizer.distributed=false",
    "--critic_optimizer.distributed=false",
]
"""Settings of ours beside the task's; told in the results. The gate does without: there TRL has written the tokens."""
RESULT = RESULTS / "trl_ppo.json"
ROLLOUT_ROWS = (16, 32, 64)
"""Rows of TRL's rollout forward that are tried; the fastest is measured."""


def be_trl(task: Task, out: Path, rows: Sequence[int], numbers: Path | None) -> None:
    """Train with TRL for the steps of a task; seconds of each, or with `numbers` what its first step computed.

    Args:
        rows: of a rollout forward; several of them are tried one after the other, as parts of these names.
    """
    import torch

    torch.set_num_threads(steps.CORES)
    import trl.experimental.ppo.ppo_trainer as theirs
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from benchmarks.transformers_side import LengthController, ban, left_padded, scalar_model

    imported = resident_bytes()
    folder, dtype = Path(task.folder) / "hf", getattr(torch, task.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    pad, never = tokenizer.pad_token_id, (tokenizer.pad_token_id, tokenizer.eos_token_id)
    about = json.loads((folder / "reward" / "config.json").read_text())

    def policy(name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
        ban(model, never)
        model.generation_config.pad_token_id = pad
        return model

    actor, now = policy("dpo"), {"written": 0, "lengths": next(iter(task.parts.values()))}
    generate = actor.generate

    def of_known_length(input_ids: Any, **more: Any) -> Any:
        first = now["written"] % len(now["lengths"])
        now["written"] += len(input_ids)
        stop = [LengthController(input_ids.shape[1], now["lengths"][first : first + len(input_ids)])]
        return generate(input_ids=input_ids, stopping_criteria=stop, **more)

    actor.generate = of_known_length
    reference = policy("sft")
    trainer_class = theirs.PPOTrainer
    if task.algorithm == "rto":
        reference, trainer_class = with_dpo(reference, policy("dpo"), task), rto_trainer(theirs, task)
    settings = theirs.PPOConfig(
        output_dir=str(out.parent / "trl"),
        # one process steps after each of these rows x accumulation; minibatches are cut from them: 8 steps of 8 rows
        per_device_train_batch_size=len(task.prompts),
        gradient_accumulation_steps=1,
        num_mini_batches=task.num_minibatches,
        local_rollout_forward_batch_size=rows[0],
        num_ppo_epochs=1,
        total_episodes=len(task.prompts) * task.num_steps,
        response_length=task.longest,
        temperature=1.0,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        kl_coef=task.kl_coef,
        kl_estimator="k1",
        cliprange=task.clip,
        cliprange_value=task.clip,
        vf_coef=1.0,
        gamma=task.gamma,
        lam=task.lam,
        whiten_rewards=False,
        missing_eos_penalty=None,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    marks, kept = [], {}

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if numbers is not None and not kept:
                kept.update(locals_of("train"))
            marks.append(time.perf_counter())

    trainer = trainer_class(
        args=settings,
        processing_class=tokenizer,
        model=actor,
        ref_model=reference,
        reward_model=scalar_model(folder / "reward", mean=about["score_mean"], std=about["score_std"], dtype=dtype),
        value_model=scalar_model(folder / "reward", dtype=dtype),
        train_dataset=Dataset.from_dict({"input_ids": task.prompts}),
        data_collator=lambda some: {"input_ids": left_padded([row["input_ids"] for row in some], pad)[0]},
        callbacks=[Watch()],
    )
    norms: list[float] = []
    if numbers is not None:
        backward = trainer.accelerator.backward

        def watched(loss: Any, **more: Any) -> None:
            backward(loss, **more)
            if not norms:
                norms.extend(norm_of(model) for model in (trainer.model.policy, trainer.model.value_model))

        trainer.accelerator.backward = watched
    loaded, parts = resident_bytes(), {}
    for size, (part, lengths) in product(rows, task.parts.items()):
        now |= {"written": 0, "lengths": lengths}
        settings.local_rollout_forward_batch_size, settings.response_length = size, max(lengths)
        marks[:] = [time.perf_counter()]
        trainer.train()
        seconds = [after - before for before, after in pairwise(marks)]
        parts[part if len(rows) == 1 else str(size)] = [{"step_seconds": each} for each in seconds]
    if numbers is not None:
        tell(kept, norms, task, pad, numbers)
    memory = {"imported": imported, "loaded": loaded, "peak": peak_bytes()}
    out.write_text(json.dumps({"parts": parts, "memory": memory}))


def locals_of(name: str) -> dict[str, Any]:
    """The variables of the nearest running function of that name: what its loop has just computed."""
    frame = sys._getframe()
    while frame.f_code.co_name != name:
        assert frame.f_back is not None
        frame = frame.f_back
    return dict(frame.f_locals)


def norm_of(model: Any) -> float:
    """Of the gradient."""
    import torch

    return float(torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt())


def tell(kept: dict[str, Any], norms: list[float], task: Task, pad: int, path: Path) -> None:
    """Write what TRL's step computed."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.transformers_side import prompt_lengths

    names = {
        "policy log-probs": "logprobs",
        "values": "values",
        "rewards": "rewards",
        "advantages": "advantages",
    }
    if task.algorithm == "ppo":  # in RTO's place DPO's reward is part of it
        names["reference log-probs"] = "ref_logprobs"
    found = {name: kept[theirs].float().cpu().contiguous().clone() for name, theirs in names.items()}
    queries = kept["queries"].cpu()
    found |= {
        "tokens": kept["responses"].cpu().contiguous().clone(),
        "lengths": kept["sequence_lengths"].cpu() + 1,
        "prompts": queries.contiguous().clone(),
        "prompt_lengths": prompt_lengths(queries, pad),
        "policy's first gradient norm": torch.tensor(norms[0]),
        "critic's first gradient norm": torch.tensor(norms[1]),
        "unbiased": torch.tensor(1.0),
    }
    save_file(found, path)


def with_dpo(reference: Any, dpo: Any, task: Task) -> Any:
    """A reference that is asked together with the DPO policy, whose logits it keeps for `rto_trainer`."""
    import torch

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reference, self.dpo, self.pending = reference, dpo, []

        def forward(self, **batch: Any) -> Any:
            self.pending.append(self.dpo(**batch).logits)
            return self.reference(**batch)

    return Both()


def rto_trainer(theirs: Any, task: Task) -> type:
    """TRL's trainer with DPO's token rewards: its KL penalty is -kl_coef (log pi - log pi_ref), so a reference log-prob
    that is larger by reward / kl_coef adds exactly that reward to a token."""

    class RTOTrainer(theirs.PPOTrainer):
        def train(self) -> None:
            plain, both = theirs.selective_log_softmax, self.ref_model

            def with_reward(logits: Any, tokens: Any) -> Any:
                log_probs = plain(logits, tokens)
                if both.pending:
                    mine = plain(both.pending.pop()[:, -tokens.shape[1] - 1 : -1], tokens)
                    reward = (task.dpo_coef * (mine - log_probs)).clamp(-task.dpo_clip, task.dpo_clip)
                    log_probs = log_probs + reward / task.kl_coef
                return log_probs

            theirs.selective_log_softmax = with_reward
            try:
                super().train()
            finally:
                theirs.selective_log_softmax = plain

    return RTOTrainer


def run_trl(task: Task, rows: Sequence[int], numbers: Path | None = None, path: Path | None = None) -> dict[str, Any]:
    """TRL's steps in a process of its own: as `steps.run_ours`."""
    folder = Path(task.folder)
    path = path or task.save(folder / "task.json")
    out = folder / "theirs.json"
    words = [str(path), str(out), ",".join(map(str, rows)), *([str(numbers)] if numbers else [])]
    steps.run_python("benchmarks.trl_ppo", "--side", *words)
    return json.loads(out.read_text())


def main() -> None:
    """Gate, then time, for each model and algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CELLS), help="shapes of benchmarks/shapes.py")
    parser.add_argument("--algorithms", nargs="+", help="ppo, rto, or both; else as CELLS says")
    parser.add_argument("--repeat", type=int, default=1, help="times A B B A for each")
    parser.add_argument("--inputs", type=Path, help="a folder that keeps the models for another start")
    words = {"nargs": "*", "default": OURS, "metavar": "--section.field=value"}
    parser.add_argument("--ours", **words, help="settings of ours in place of those that OURS says")
    parser.add_argument("--gate-only", action="store_true", help="compare, and time nothing")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        path, out, rows, *numbers = options.side
        some = [int(each) for each in rows.split(",")]
        be_trl(Task.load(path), Path(out), some, Path(numbers[0]) if numbers else None)
        return
    found: dict[str, Any] = {"machine": machine("trl", "transformers", "accelerate"), "cells": []}
    for model in options.models:
        with steps.inputs(model, options.inputs) as folder:
            rows: dict[str, float] = {}
            for algorithm in options.algorithms or CELLS.get(model, ("rto",)):
                apart = check(folder, model, algorithm)
                if options.gate_only:
                    continue
                rows = rows or try_rows(folder, model)
                found["cells"] += measure(folder, model, algorithm, rows, apart, options)
    if options.gate_only:
        return
    # cells of another start stay, each with what was told of its machine
    for cell in found["cells"]:
        cell["machine"] = found["machine"] | {"load_average_after": os.getloadavg()}
    kept = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    cells = {key(cell): cell for cell in [*kept, *found["cells"]]}
    save("trl_ppo", {"cells": list(cells.values())})
    save_table("trl_ppo", HEADER, [row(cell) for cell in cells.values()], found["machine"])


def key(cell: dict[str, Any]) -> tuple[str, ...]:
    """What a cell is about."""
    return cell["model"], cell["algorithm"], cell["lengths"]


def check(folder: Path, model: str, algorithm: str) -> dict[str, float]:
    """The gate, at equal lengths: all rows as one minibatch, so that their order does not matter."""
    print(f"{model} {algorithm}: parity on the tokens that TRL wrote, relative", flush=True)
    once = {"num_minibatches": 1, "num_steps": 1}
    task = steps.make_task(folder, model, algorithm, mean=MEAN_TOKENS[model], parts=["equal"], **once)

    def their_side(path: Path, numbers: Path) -> None:
        run_trl(task, [32], numbers, path)

    return steps.gate(task, their_side)


def try_rows(folder: Path, model: str) -> dict[str, float]:
    """Seconds of a PPO step of TRL's by the rows of its rollout forward, at drawn lengths."""
    task = steps.make_task(
        folder, model, "ppo", mean=MEAN_TOKENS[model], parts=["drawn"], num_steps=steps.NUM_STEPS[model] - 1
    )
    return {rows: each[-1]["step_seconds"] for rows, each in run_trl(task, ROLLOUT_ROWS)["parts"].items()}


def least_seconds(task: Task, lengths: Sequence[int]) -> float:
    """That the matrix products of a step take where all cores run at the peak of a square one, whoever takes the step.

    Decoding and the updates are counted as `throughput.flops` counts them, log-probs of the policy that wrote not at
    all: ours keeps them.
    """
    import torch

    from benchmarks.throughput import flops, peak

    config, products = model_config(task.model), 0.0
    frozen = 1 + (task.algorithm == "rto")  # the reference, and DPO's policy
    for prompt, response in zip(task.prompts, lengths, strict=True):
        length = len(prompt) + response
        policy, value = (flops(config, kind, 1, length, response) for kind in ("policy", "value"))
        score = flops(config, "value", 1, length, 1)
        products += policy + frozen * policy + value + score + 3 * (policy + value)
    torch.set_num_threads(1)
    return products / (steps.CORES * peak())


def measure(
    folder: Path, model: str, algorithm: str, rows: dict[str, float], apart: dict[str, float], options: Any
) -> list[dict[str, Any]]:
    """Both sides in turn; a cell for each kind of lengths."""
    how: dict[str, Any] = {"mean": MEAN_TOKENS[model], "num_steps": steps.NUM_STEPS[model]}
    task = steps.make_task(folder, model, algorithm, parts=["drawn", "equal"], **how)
    best = int(min(rows, key=lambda each: rows[each]))
    both = {"ours": lambda: steps.run_ours(task, more=options.ours), "trl": lambda: run_trl(task, [best])}
    sides, found = steps.alternate(both, options.repeat), []
    for kind, lengths in task.parts.items():
        cell = {"model": model, "algorithm": algorithm, "lengths": kind, "tokens": sum(lengths)}
        cell |= {"parity": apart, "our_settings": options.ours}
        cell |= {side: each["parts"][kind] | {"memory": each["memory"]} for side, each in sides.items()}
        cell |= {"trl_rollout_rows_tried": rows, "trl_rollout_rows": best}
        cell["least_seconds"] = least_seconds(task, lengths)
        cell["times_as_fast"] = cell["trl"]["step_seconds"]["median"] / cell["ours"]["step_seconds"]["median"]
        found.append(cell)
        print(row(cell), flush=True)
    return found


HEADER = (
    "| model | step | lengths | tokens written | ours, s (range) | TRL, s (range) | TRL / ours | products alone, s "
    "| ours, peak MB (above imports) | TRL, peak MB (above imports) |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = [cell[side]["step_seconds"] for side in ("ours", "trl")]
    memory = [cell[side]["memory"] for side in ("ours", "trl")]
    words = [cell["model"], cell["algorithm"].upper(), cell["lengths"], str(cell["tokens"])]
    words += [f"{s['median']:.2f} ({s['min']:.2f} - {s['max']:.2f})" for s in seconds]
    words += [f"{cell['times_as_fast']:.2f}", f"{cell['least_seconds']:.2f}" if "least_seconds" in cell else ""]
    words += [f"{m['peak'] / 1e6:.0f} ({(m['peak'] - m['imported']) / 1e6:.0f})" for m in memory]
    return "| " + " | ".join(words) + " |"


if __name__ == "__main__":
    main()
