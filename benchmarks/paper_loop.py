"""One step of RTO, ours beside a port of the loop that the paper's code runs, on the same models and numbers.

    python -m benchmarks.paper_loop [--models 1M] [--repeat=1]

The port is ours, written from what that loop does (tests/golden says where it is known from), not a run of its code:
transformers' models; responses by `generate` for 4 prompts at a time, padded; then a whole forward pass of policy,
reference, DPO policy, critic and reward model for these 4, log-probs from logits of all positions; padding taken off,
advantages whitened over the step; then PPO in microbatches of 4, padded anew, policy and critic each with its own Adam.
One process of two threads; ours is two data-parallel ranks of one thread. 64 prompts, 8 minibatches, 1 epoch, float32.

Before anything is timed, both are asked about the tokens that the port wrote, at drawn lengths: log-probs, values,
scores, rewards, advantages and the first gradient norms within 1e-4, else exit code 3. Order A B B A; results go to
benchmarks/results/paper_loop.json and .md.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import steps
from benchmarks.machine import machine, peak_bytes, resident_bytes, save, save_table
from benchmarks.steps import Task
from benchmarks.trl_ppo import MEAN_TOKENS

MICRO_BATCH = 4


@dataclass
class Sample:
    """A response without padding, and what is known of it."""

    prompt: Tensor
    response: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    score: Tensor
    rewards: Tensor
    raw_advantages: Tensor
    returns: Tensor
    advantages: Tensor


class Loop:
    """The roles, and a step of the loop."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from benchmarks.transformers_side import ban, scalar_model

        folder = Path(task.folder) / "hf"
        about = json.loads((folder / "reward" / "config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
        self.task, self.pad = task, tokenizer.pad_token_id

        def policy(name: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
            ban(model, (tokenizer.pad_token_id, tokenizer.eos_token_id))
            return model.eval()

        self.policy, self.reference, self.dpo = policy("dpo"), policy("sft"), policy("dpo")
        self.critic = scalar_model(folder / "reward").eval()
        self.reward_model = scalar_model(folder / "reward", mean=about["score_mean"], std=about["score_std"]).eval()
        trained = {"policy": self.policy, "critic": self.critic}
        self.adam = {name: torch.optim.Adam(model.parameters(), lr=task.lr) for name, model in trained.items()}
        self.norms: dict[str, float] = {}

    def step(self, lengths: Sequence[int]) -> list[Sample]:
        """Responses, experience, updates."""
        micros = range(0, len(lengths), MICRO_BATCH)
        task = self.task
        samples = [
            sample
            for start in micros
            for sample in self.experience(
                task.prompts[start : start + MICRO_BATCH], lengths[start : start + MICRO_BATCH]
            )
        ]
        whole = torch.cat([sample.raw_advantages for sample in samples])
        mean, deviation = whole.mean(), whole.var(correction=0).clamp(min=1e-8).sqrt()
        for sample in samples:
            sample.advantages = (sample.raw_advantages - mean) / deviation
        size = len(samples) // task.num_minibatches
        order = torch.randperm(len(samples)).tolist()
        for start in range(0, len(order), size):
            self.train([samples[row] for row in order[start : start + size]])
        return samples

    @torch.no_grad()
    def experience(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Sample]:
        """Responses to a microbatch of prompts, and what every role says of them."""
        from transformers import GenerationConfig, StoppingCriteriaList

        from benchmarks.transformers_side import LengthController, left_padded

        ids, mask = left_padded(prompts, self.pad)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), pad_token_id=self.pad
        )
        stop = StoppingCriteriaList([LengthController(ids.shape[1], lengths)])
        tokens = self.policy.generate(
            ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop, use_cache=True
        )
        width = ids.shape[1]
        mask = torch.cat((mask, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()), 1)
        policy, reference, dpo = (
            log_probs_of(model, tokens, mask)[:, width - 1 :] for model in (self.policy, self.reference, self.dpo)
        )
        values = outputs_of(self.critic, tokens, mask)[:, width - 1 : -1]
        scores = outputs_of(self.reward_model, tokens, mask)
        samples = []
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            score = scores[row, width + length - 1].clamp(-10, 10)
            rewards = -self.task.kl_coef * (policy - reference)[row, :length]
            dense = self.task.dpo_coef * (dpo - reference)[row, :length]
            rewards += dense.clamp(-self.task.dpo_clip, self.task.dpo_clip)
            rewards[-1] += score
            advantages = self.advantages(rewards, values[row, :length])
            samples.append(
                Sample(
                    prompt=torch.tensor(prompt),
                    response=tokens[row, width : width + length],
                    log_probs=policy[row, :length],
                    ref_log_probs=reference[row, :length],
                    values=values[row, :length],
                    score=score,
                    rewards=rewards,
                    raw_advantages=advantages,
                    returns=advantages + values[row, :length],
                    advantages=advantages,
                )
            )
        return samples

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """Generalized advantage estimation of one response."""
        after = torch.cat((values[1:], values.new_zeros(1)))
        errors = (rewards + self.task.gamma * after - values).tolist()
        found, later = [], 0.0
        for error in reversed(errors):
            later = error + self.task.gamma * self.task.lam * later
            found.append(later)
        return torch.tensor(found[::-1])

    def train(self, minibatch: Sequence[Sample]) -> None:
        """One step of policy and critic, in microbatches."""
        micros = [minibatch[start : start + MICRO_BATCH] for start in range(0, len(minibatch), MICRO_BATCH)]
        for micro in micros:
            tokens, mask, width = self.collated(micro)
            lengths = torch.tensor([len(sample.response) for sample in micro])
            real = torch.arange(tokens.shape[1] - width) < lengths[:, None]
            for loss in (
                self.policy_loss(micro, tokens, mask, width, real),
                self.value_loss(micro, tokens, mask, real),
            ):
                (loss / len(micros)).backward()
        for name, adam in self.adam.items():
            if name not in self.norms:
                grads = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
                self.norms[name] = float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())
            adam.step()
            adam.zero_grad()

    def collated(self, micro: Sequence[Sample]) -> tuple[Tensor, Tensor, int]:
        """Prompts padded on the left, responses on the right: ids, mask, and the width of the prompts."""
        from benchmarks.transformers_side import left_padded

        ids, mask = left_padded([sample.prompt.tolist() for sample in micro], self.pad)
        responses = pad_sequence([sample.response for sample in micro], batch_first=True, padding_value=self.pad)
        real = pad_sequence([torch.ones_like(sample.response) for sample in micro], batch_first=True)
        return torch.cat((ids, responses), 1), torch.cat((mask, real), 1), ids.shape[1]

    def policy_loss(self, micro: Sequence[Sample], tokens: Tensor, mask: Tensor, width: int, real: Tensor) -> Tensor:
        """The clipped surrogate: mean of each response, then over responses."""
        old, advantages = (padded([getattr(sample, name) for sample in micro]) for name in ("log_probs", "advantages"))
        ratio = (log_probs_of(self.policy, tokens, mask)[:, width - 1 :] - old).exp()
        held = ratio.clamp(1 - self.task.clip, 1 + self.task.clip)
        return means_of(-torch.minimum(ratio * advantages, held * advantages), real)

    def value_loss(self, micro: Sequence[Sample], tokens: Tensor, mask: Tensor, real: Tensor) -> Tensor:
        """Half the worse squared error of free and clipped values."""
        old, returns = (padded([getattr(sample, name) for sample in micro]) for name in ("values", "returns"))
        values = outputs_of(self.critic, tokens, mask)[:, -real.shape[1] - 1 : -1]
        held = old + (values - old).clamp(-self.task.clip, self.task.clip)
        return means_of(torch.maximum((values - returns).square(), (held - returns).square()), real) / 2


def means_of(x: Tensor, real: Tensor) -> Tensor:
    """Mean over responses of the mean over their tokens."""
    return (torch.where(real, x, 0.0).sum(1) / real.sum(1)).mean()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows under each other, zeros on the right."""
    return pad_sequence(list(rows), batch_first=True)


def log_probs_of(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, S - 1] log-prob of each token but the first, from the logits of all positions."""
    logits = model(tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


def outputs_of(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, S] of a scalar head."""
    trunk = getattr(model, model.base_model_prefix)
    hidden = trunk(tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False).last_hidden_state
    return model.score(hidden)[..., 0]


def positions(mask: Tensor) -> Tensor:
    """Of tokens that are not padding: 0, 1, 2 ..."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def be_loop(task: Task, out: Path, numbers: Path | None) -> None:
    """Take the steps of a task; seconds of each, or with `numbers` what the first step computed."""
    from safetensors.torch import save_file

    torch.set_num_threads(steps.CORES)
    imported = resident_bytes()
    loop = Loop(task)
    loaded, parts = resident_bytes(), {}
    for part, lengths in task.parts.items():
        parts[part] = []
        for _ in range(task.num_steps):
            start = time.perf_counter()
            samples = loop.step(lengths)
            parts[part].append({"step_seconds": time.perf_counter() - start})
    if numbers is not None:
        names = {
            "policy log-probs": "log_probs", "reference log-probs": "ref_log_probs", "values": "values",
            "rewards": "rewards", "raw advantages": "raw_advantages", "advantages": "advantages",
        }  # fmt: skip
        found = {name: padded([getattr(sample, mine) for sample in samples]) for name, mine in names.items()}
        widest = max(len(sample.prompt) for sample in samples)
        prompts = [torch.cat((s.prompt.new_zeros(widest - len(s.prompt)), s.prompt)) for s in samples]
        found |= {
            "scores": torch.stack([sample.score for sample in samples]),
            "tokens": padded([sample.response for sample in samples]),
            "lengths": torch.tensor([len(sample.response) for sample in samples]),
            "prompts": torch.stack(prompts),
            "prompt_lengths": torch.tensor([len(sample.prompt) for sample in samples]),
            "policy's first gradient norm": torch.tensor(loop.norms["policy"]),
            "critic's first gradient norm": torch.tensor(loop.norms["critic"]),
            "unbiased": torch.tensor(0.0),
        }
        save_file(found, numbers)
    memory = {"imported": imported, "loaded": loaded, "peak": peak_bytes()}
    out.write_text(json.dumps({"parts": parts, "memory": memory}))


def run_loop(task: Task, path: Path, numbers: Path | None = None) -> dict[str, Any]:
    """The port's steps in a process of its own: as `steps.run_ours`."""
    out = Path(task.folder) / "theirs.json"
    more = [str(numbers)] if numbers else []
    steps.run_python("benchmarks.paper_loop", "--side", str(path), str(out), *more)
    return json.loads(out.read_text())


def main() -> None:
    """Gate, then time, for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1M"], help="shapes of benchmarks/shapes.py")
    parser.add_argument("--repeat", type=int, default=1, help="times A B B A for each")
    parser.add_argument("--inputs", type=Path, help="a folder that keeps the models for another start")
    parser.add_argument("--gate-only", action="store_true", help="compare, and time nothing")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        path, out, *numbers = options.side
        be_loop(Task.load(path), Path(out), Path(numbers[0]) if numbers else None)
        return
    found: dict[str, Any] = {"machine": machine("transformers"), "cells": []}
    for model in options.models:
        with steps.inputs(model, options.inputs) as folder:
            found["cells"] += cells(folder, model, options)
    found["load_average_after"] = os.getloadavg()
    if options.models == parser.get_default("models") and not options.gate_only:
        save("paper_loop", found)
        save_table("paper_loop", HEADER, [row(cell) for cell in found["cells"]], found["machine"])


def cells(folder: Path, model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate and timings of one model."""
    how: dict[str, Any] = {"mean": MEAN_TOKENS[model], "loss_mean": "sequence"}
    print(f"{model}: parity on the tokens that the port wrote, relative", flush=True)
    once = steps.make_task(folder, model, "rto", parts=["drawn"], num_minibatches=1, num_steps=1, **how)
    apart = steps.gate(once, lambda path, numbers: discard(run_loop(once, path, numbers)))
    if options.gate_only:
        return []
    task, found = (
        steps.make_task(folder, model, "rto", parts=["drawn", "equal"], num_steps=steps.NUM_STEPS[model], **how),
        [],
    )
    path = task.save(folder / "task.json")
    both = {"ours": lambda: steps.run_ours(task), "port": lambda: run_loop(task, path)}
    sides = steps.alternate(both, options.repeat)
    for kind, lengths in task.parts.items():
        cell = {"model": model, "lengths": kind, "tokens": sum(lengths), "parity": apart}
        cell |= {side: each["parts"][kind] | {"memory": each["memory"]} for side, each in sides.items()}
        cell["times_as_fast"] = cell["port"]["step_seconds"]["median"] / cell["ours"]["step_seconds"]["median"]
        found.append(cell)
        print(row(cell), flush=True)
    return found


def discard(_: Any) -> None:
    """Nothing: the gate reads what was written."""


HEADER = (
    "| model | lengths | tokens written | ours, s (range) | port, s (range) | port / ours |",
    "|---|---|---|---|---|---|",
)


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = [cell[side]["step_seconds"] for side in ("ours", "port")]
    words = [cell["model"], cell["lengths"], str(cell["tokens"])]
    words += [f"{s['median']:.2f} ({s['min']:.2f} - {s['max']:.2f})" for s in seconds]
    return "| " + " | ".join([*words, f"{cell['times_as_fast']:.2f}"]) + " |"


if __name__ == "__main__":
    main()
