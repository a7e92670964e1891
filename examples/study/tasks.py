"""What the study is done on: where its data come from, how large its models are, who measures gold."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from examples.study import bigrams, sentiment
from examples.study.methods import Method, methods

SHARED = 0
"""The seed of the start of a task that has one for all."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A start, data, a gold reward, and the budget that every method gets."""

    name: str
    grader: str
    """Gold: measured on held-out prompts; no method sees it but through the labels of the pairs."""
    methods: list[Method]
    prepare: Callable[[Path, int], None]
    """Folder and seed -> writes the inputs that need no model; in `to_answer.jsonl` each prompt comes several times."""
    gold: Callable[[list[str], list[str]], Sequence[float]]
    noise: float
    """Log-odds of a label are the lead in gold over this."""
    get_base: Callable[[Path], int]
    """The study's folder -> writes there what all seeds begin with; an exit code."""
    start: Callable[[Path, Path], list[str]]
    """The study's folder and the seed's -> words of the SFT stage."""
    pairs: tuple[str, ...]
    """Words of the stages that learn from pairs."""
    reward: tuple[str, ...]
    """Words of the reward stage alone."""
    samples: tuple[str, ...]
    """Words of the stages that sample."""
    answers: tuple[str, ...]
    """Words of every stage that writes."""
    samples_per_step: int
    best: float | None
    """Gold that no policy can beat on the test prompts, where it is known."""
    copies: int = 2
    """Answers to a prompt in a row of `to_answer.jsonl`: those with most and with least gold become a pair."""
    one_start: bool = False
    """Whether all seeds begin with the same SFT, pairs, reward model and DPO policy, which are dear."""

    def start_of(self, seed: int) -> int:
        """The seed whose start it takes."""
        return SHARED if self.one_start else seed


def label_pairs(task: Task, answers: Path, out: Path, seed: int) -> None:
    """Pairs from the answers of `generate` to prompts that come several times in a row, labelled by gold with noise."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    grades = task.gold([row["prompt"] for row in rows], [row["response"] for row in rows])
    draw, pairs = random.Random(f"labels {seed}"), []
    for first_row in range(0, len(rows), task.copies):
        places = range(first_row, first_row + task.copies)
        most, least = max(places, key=grades.__getitem__), min(reversed(places), key=grades.__getitem__)
        (one, a), (two, b) = ((rows[place], grades[place]) for place in sorted((most, least)))
        first = draw.random() < 1 / (1 + math.exp((b - a) / task.noise))
        chosen, rejected = (one, two) if first else (two, one)
        better, worse = chosen["response"].strip(), rejected["response"].strip()
        if better and worse and better != worse:
            pairs.append({"prompt": one["prompt"], "chosen": better, "rejected": worse})
    bigrams.write_rows(out, pairs)


def _prepare_bigrams(
    folder: Path, seed: int, *, texts: int = 1500, pairs: int = 4096, train: int = 2048, held_out: int = 128
) -> None:
    bigrams.write_tokenizer(folder / "tokenizer")
    bigrams.write_texts(folder / "sft.jsonl", f"texts {seed}", texts)
    bigrams.write_prompts(folder / "to_answer.jsonl", f"pairs {seed}", pairs, copies=2)
    bigrams.write_prompts(folder / "train.jsonl", f"train {seed}", train)
    bigrams.write_prompts(folder / "validation.jsonl", "validation", held_out)
    bigrams.write_prompts(folder / "test.jsonl", "test", held_out)


def bigram_task() -> Task:
    """Study (a); see `bigrams.py`."""
    size = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    window = bigrams.PROMPT + 2 * bigrams.RESPONSE + 4
    model = [f"--model.{name}={value}" for name, value in size.items()]
    return Task(
        name="bigrams",
        grader="examples.study.bigrams:gold",
        methods=methods((1e-3, 3e-3), dpo_rates=(5e-4, 2e-3)),
        prepare=_prepare_bigrams,
        gold=bigrams.gold,
        noise=bigrams.NOISE,
        get_base=lambda _: 0,
        start=lambda _, folder: [
            f"--tokenizer.path={folder}/tokenizer", *model, "--model.num_query_groups=4", "--model.init_std=0.1",
            f"--model.max_length={window}", f"--data.max_length={window}",
            "--train.batch_size=50", "--train.num_epochs=2", "--optimizer.lr=5e-3",
        ],
        pairs=("--train.batch_size=64", "--train.num_epochs=2", f"--data.max_length={window}"),
        reward=("--optimizer.lr=2e-3", "--train.num_epochs=4"),
        samples=(
            "--prompts_per_step=64", "--samples_per_optimizer_step=32", "--num_steps=32", "--eval_every=4",
            "--critic_optimizer.lr=3e-3", "--optimizer.min_lr_frac=1", "--critic_optimizer.min_lr_frac=1",
        ),
        answers=(f"--rollout.max_prompt_tokens={bigrams.PROMPT + 2}", f"--rollout.max_new_tokens={bigrams.RESPONSE}",
                 "--rollout.max_slots=64"),
        samples_per_step=64,
        best=float(bigrams.RESPONSE),
    )  # fmt: skip


def smoke_task() -> Task:
    """Study (a), as small as it gets: to see that a study runs, not to learn from it."""
    whole = bigram_task()
    short = ("--train.batch_size=8", "--train.num_epochs=1")
    return replace(
        whole,
        name="smoke",
        prepare=partial(_prepare_bigrams, texts=16, pairs=40, train=16, held_out=4),
        methods=[method for method in whole.methods if method.name in ("dpo", "ppo", "rto")],
        start=lambda *folders: [*whole.start(*folders), *short],
        pairs=(*whole.pairs, *short),
        reward=(),
        samples=("--prompts_per_step=8", "--samples_per_optimizer_step=8", "--num_steps=2", "--eval_every=1"),
        samples_per_step=8,
    )


def sentiment_task() -> Task:
    """Study (b); see `sentiment.py`."""
    longest = ("--data.max_length=96", "--optimizer.warmup_frac=0.1")
    return Task(
        name="sentiment",
        grader="examples.study.sentiment:gold",
        methods=methods((1e-5, 3e-5), dpo_rates=(2e-5, 5e-6)),
        prepare=sentiment.prepare,
        gold=sentiment.gold,
        noise=sentiment.NOISE,
        get_base=sentiment.get_base,
        start=lambda out, _: [
            f"--start={out}/base", *longest, "--train.batch_size=16", "--optimizer.lr=2e-5",
        ],
        pairs=(*longest, "--train.batch_size=8", "--checkpoint.optimizer_at_end=false"),
        reward=("--optimizer.lr=3e-5",),
        samples=(
            "--prompts_per_step=32", "--samples_per_optimizer_step=8", "--num_steps=4", "--eval_every=2",
            "--critic_optimizer.lr=3e-5", "--optimizer.min_lr_frac=1", "--critic_optimizer.min_lr_frac=1",
        ),
        answers=("--rollout.max_prompt_tokens=48", "--rollout.max_new_tokens=32", "--rollout.max_slots=32",
                 "--rollout.temperature=0.7"),
        samples_per_step=32,
        best=None,
        copies=sentiment.COPIES,
        one_start=True,
    )  # fmt: skip


TASKS = {"bigrams": bigram_task, "sentiment": sentiment_task, "smoke": smoke_task}
