"""One step of RTO or PPO beside other trainers: the task both get, our side of it, the gate, and the order of runs.

Not a program of its own: `benchmarks.trl_ppo` and `benchmarks.paper_loop` say what the other side is.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, launch, peak_bytes, resident_bytes, spread
from benchmarks.shapes import MODELS, VOCAB, drawn_lengths, drawn_prompts

CORES = 2
TOLERANCE = 1e-4
NUM_PROMPTS = 64
NUM_MINIBATCHES = 8
NUM_STEPS = {"1M": 3, "8M": 2, "32M": 2}
"""Of a process, the first of them to warm up."""
PROMPT_TOKENS = (16, 48)
GATE = 3
"""Exit code where the two sides do not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both sides do: the same prompts, lengths and settings, on weights in `folder`."""

    folder: str
    model: str
    algorithm: str
    """`ppo`, or `rto` with DPO's token rewards."""
    prompts: list[list[int]]
    parts: dict[str, list[int]]
    """Done one after the other by a process: name -> length of the response to each prompt."""
    loss_mean: str = "token"
    """Of the loss of a minibatch: over its tokens, or `sequence`: over those of a response, then over responses."""
    num_minibatches: int = NUM_MINIBATCHES
    num_steps: int = 3
    """Of each part; the first warms up and does not count."""
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    kl_coef: float = 0.01
    dpo_coef: float = 0.05
    dpo_clip: float = 0.05
    lr: float = 1e-5
    dtype: str = "float32"
    """Of weights and activations: `bfloat16`, ours with float32 main weights, TRL's without."""

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(length for lengths in self.parts.values() for length in lengths)

    def save(self, path: Path) -> Path:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Task":
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text()))


def make_task(folder: Path, model: str, algorithm: str, *, mean: int, parts: Sequence[str], **more: Any) -> Task:
    """Prompts of drawn lengths; responses of `mean` tokens, each (`equal`) or on average (`drawn`)."""
    ids = range(400, VOCAB[model])  # clear of the tokenizer's own ids
    lengths = {"drawn": drawn_lengths(NUM_PROMPTS, mean=mean, seed=1), "equal": [mean] * NUM_PROMPTS}
    prompts = drawn_prompts(NUM_PROMPTS, PROMPT_TOKENS, vocab=ids, seed=2)
    kinds = {kind: lengths[kind] for kind in parts}
    return Task(folder=str(folder), model=model, algorithm=algorithm, prompts=prompts, parts=kinds, **more)


@contextmanager
def inputs(model: str, kept: Path | None) -> Iterator[Path]:
    """A folder with the runs `sft`, `dpo`, `reward` of a shape, and the same as `hf/sft` and so on.

    Args:
        kept: where such folders are kept for other benchmarks; None makes one that goes away.
    """
    with tempfile.TemporaryDirectory() as passing:
        folder = (kept or Path(passing)) / model
        if not (folder / "hf" / "reward").exists():
            folder.mkdir(parents=True)
            launch(1, "-m", "benchmarks.steps", "inputs", str(folder), model, threads=CORES)
        yield folder


def make_inputs(folder: Path, name: str) -> None:
    """Train each run for two steps, and convert it: weights that need not be good, and differ from each other."""
    from importlib import import_module

    from benchmarks.event_loop import write_rows
    from rto_megatron.config.load import load_run
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=CORES)
    write_rows(folder, max(384, VOCAB[name] - 128))  # a model may have a few rows that no token needs
    model = [f"--model.{key}={value}" for key, value in MODELS[name].items()]
    model += [f"--model.vocab_size={VOCAB[name]}", "--model.max_length=512", "--model.init_std=0.06"]
    train = [f"--data.train={folder}/rows.jsonl", "--train.max_steps=2", "--train.batch_size=8"]
    train += ["--data.max_length=128", "--optimizer.lr=3e-3", "--checkpoint.optimizer_at_end=false"]
    own = {"sft": [f"--tokenizer.path={folder}/tokenizer.model", *model]}
    for stage in ("sft", "dpo", "reward"):
        words = own.get(stage, [f"--start={folder}/sft"])
        run = import_module(f"rto_megatron.stages.{stage}").run
        run(load_run(stage, None, [f"--run_dir={folder}/{stage}", *words, *train]), runtime)
    (folder / "hf").mkdir()
    for stage in ("sft", "dpo", "reward"):
        words = [f"--source={folder}/{stage}", f"--out={folder}/hf/{stage}", "--verify=false"]
        import_module("rto_megatron.stages.convert").run(load_run("convert", None, words), runtime)


def words_of(task: Task, ranks: int, more: Sequence[str] = ()) -> list[str]:
    """The command line of our run."""
    folder, minibatch = Path(task.folder), len(task.prompts) // task.num_minibatches
    roles = {"policy": "dpo", "reference": "sft", "reward_model": "reward"}
    rto = {"kl_coef": task.kl_coef, "dpo_coef": 0}
    if task.algorithm == "rto":
        roles["dpo"] = "dpo"
        rto |= {"dpo_coef": task.dpo_coef, "dpo_clip": task.dpo_clip}
    adam = {"lr": task.lr, "min_lr_frac": 1, "warmup_frac": 0, "beta2": 0.999, "clip_grad": 0}
    sections = {
        "rto": rto,
        "ppo": {"clip": task.clip, "value_clip": task.clip, "loss_mean": task.loss_mean},
        "advantage": {"gamma": task.gamma, "lam": task.lam},
        "optimizer": adam,
        "critic_optimizer": adam,
        "rollout": {"max_prompt_tokens": PROMPT_TOKENS[1], "max_new_tokens": task.longest},
        "compute": {"threads": CORES // ranks, "dtype": task.dtype},
        "schedule": {"lanes": ranks},
    }
    return [
        *(f"--{role}={folder / name}" for role, name in roles.items()),
        *(f"--{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()),
        f"--data.train={folder}/rows.jsonl",
        f"--run_dir={folder}/run",
        f"--num_steps={task.num_steps}",
        f"--prompts_per_step={len(task.prompts)}",
        f"--samples_per_optimizer_step={minibatch}",
        *more,
    ]


def be_our_rank(task: Task, out: Path, ranks: int, more: Sequence[str]) -> None:
    """Take the steps of a task in this rank, and say how long each took and how much memory was used."""
    from rto_megatron.distributed.runtime import rank
    from rto_megatron.stages.rto import take_step
    from rto_megatron.stages.run import Clock

    setup, config, imported = prepared(task, ranks, more)
    loaded, clock, parts = resident_bytes(), Clock(), {}
    for part, lengths in task.parts.items():
        with written_to(lengths):
            clock.take()
            parts[part] = []
            for step in range(task.num_steps):
                take_step(setup, config, step=step, kl_coef=task.kl_coef, clock=clock)
                parts[part].append(clock.take())
    memory = {"imported": imported, "loaded": loaded, "peak": peak_bytes()}
    out.with_suffix(f".{rank()}").write_text(json.dumps({"parts": parts, "memory": memory}))


@contextmanager
def written_to(lengths: Sequence[int]) -> Iterator[None]:
    """Our length controller: the response to prompt i of a step has `lengths[i]` tokens."""
    from dataclasses import replace

    from rto_megatron.stages.samples import Samples

    plain = Samples.requests

    def of_known_length(self: Samples) -> list[Any]:
        return [replace(one, max_new_tokens=length) for one, length in zip(plain(self), lengths, strict=True)]

    Samples.requests = of_known_length  # type: ignore[method-assign]
    try:
        yield
    finally:
        Samples.requests = plain  # type: ignore[method-assign]


def prepared(task: Task, ranks: int, more: Sequence[str] = ()) -> tuple[Any, Any, int]:
    """Roles loaded as a run does, its prompts those of the task; the config; bytes before models came."""
    from dataclasses import replace

    from rto_megatron.config.load import load_run
    from rto_megatron.data.readers import PromptRow
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.stages.rto import prepare

    config = load_run("ppo" if task.algorithm == "ppo" else "rto", None, words_of(task, ranks, more))
    runtime = start_runtime(threads=config.compute.threads)
    imported = resident_bytes()
    setup, _ = prepare(config, runtime)
    rows = [PromptRow(prompt_ids=prompt, text="", index=i) for i, prompt in enumerate(task.prompts)]
    never = setup.actors.tokenizer.pad_id, setup.actors.tokenizer.eos_id
    judges = setup.actors.judges
    for model in (setup.actors.policy.model, judges.reference, judges.dpo):
        if model is not None:
            model.banned_ids = never
    return replace(setup, prompts=rows), config, imported


def compare(task: Task, theirs: Path, out: Path) -> None:
    """Score their tokens, go on to the first gradient, and write how far each number is from theirs."""
    import torch
    from safetensors.torch import load_file

    from rto_megatron.batch import PromptBatch
    from rto_megatron.rollout.engine import Completion
    from rto_megatron.rollout.responses import rollout_of
    from rto_megatron.stages.rto import judge, learn
    from rto_megatron.stages.run import Clock

    # their tokens come without log-probs of our decoding, so there is nothing for its guard to compare
    unguarded = [f"--rollout.{limit}=1e9" for limit in ("max_mean_difference", "max_difference")]
    setup, config, _ = prepared(task, 1, unguarded)
    their = load_file(theirs)
    lengths, tokens = their["lengths"].tolist(), their["tokens"]
    number = range(len(lengths))
    prompts = [their["prompts"][i, -n:].tolist() for i, n in enumerate(their["prompt_lengths"].tolist())]
    batch = PromptBatch(ids=tuple(map(tuple, prompts)), prompt_ids=tuple(number), sample_ids=(0,) * len(lengths))
    done = [
        Completion(uid=i, tokens=tokens[i, :n].tolist(), log_probs=[0.0] * n, truncated=True)
        for i, n in enumerate(lengths)
    ]
    tokenizer = setup.actors.tokenizer
    sampled = rollout_of(batch, done, config.rollout, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    rollout, signals = judge(setup, config, sampled.to(setup.mesh.device), step=0)
    step = learn(setup, config, rollout, signals, step=0, kl_coef=task.kl_coef, clock=Clock())
    mask, count = rollout.response_mask, sum(lengths)
    # where their variance is divided by one less than the count: taken out here, as it is no fault of either
    other_variance = torch.tensor((1 - 1 / count) ** (their["unbiased"].item() / 2))
    ours = {
        "policy log-probs": signals.policy_log_probs[mask],
        "reference log-probs": signals.ref_log_probs[mask],
        "values": signals.values[mask],
        "scores": signals.scores,
        "rewards": step.credit.rewards.total[mask],
        "raw advantages": step.credit.raw_advantages[mask],
        "advantages": step.experience.advantages[mask] * other_variance,
        "policy's first gradient norm": other_variance * step.updates[0]["optimizer/policy_grad_norm"].value,
        "critic's first gradient norm": torch.tensor(step.updates[0]["optimizer/critic_grad_norm"].value),
    }
    theirs_mask = torch.arange(tokens.shape[1]) < their["lengths"][:, None]
    apart = {}
    for name, mine in ours.items():
        if name in their:
            other = their[name][theirs_mask] if their[name].dim() == 2 else their[name]
            mine = mine.detach().cpu()
            apart[name] = float((mine - other).abs().max() / other.abs().max())
    out.write_text(json.dumps(apart))


def gate(task: Task, their_side: Callable[[Path, Path], None]) -> dict[str, float]:
    """Both sides on the same tokens, from log-probs to the first gradient; exit code 3 if any number is off.

    Args:
        their_side: given the file of a task, writes its tokens and numbers into the other file.
    """
    folder = Path(task.folder)
    path = task.save(folder / "gate.json")
    their_side(path, folder / "theirs.safetensors")
    launch(1, "-m", "benchmarks.steps", "compare", str(path), str(folder / "theirs.safetensors"), str(folder / "apart"))
    apart = json.loads((folder / "apart").read_text())
    for name, value in apart.items():
        print(f"  {name:32}{value:10.1e}{'' if value <= TOLERANCE else '   not within 1e-4'}", flush=True)
    if not all(value <= TOLERANCE for value in apart.values()):
        print("the two sides do not compute the same; nothing was timed")
        sys.exit(GATE)
    return apart


def run_ours(task: Task, *, ranks: int = CORES, more: Sequence[str] = ()) -> dict[str, Any]:
    """Our steps in processes of their own: parts -> steps -> seconds by phase, and memory of all ranks."""
    folder = Path(task.folder)
    path, out = task.save(folder / "task.json"), folder / "ours"
    launch(ranks, "-m", "benchmarks.steps", "ours", str(path), str(out), str(ranks), *more, threads=CORES // ranks)
    found = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    memory = {name: sum(rank["memory"][name] for rank in found) for name in found[0]["memory"]}
    return found[0] | {"memory": memory}


def alternate(sides: dict[str, Callable[[], dict[str, Any]]], repeat: int = 1) -> dict[str, dict[str, Any]]:
    """Run two sides in the order A B B A, `repeat` times; of each: seconds of a step by part and phase, and memory."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for name in [*sides, *reversed(sides)] * repeat:
        runs[name].append(sides[name]())
    return {name: summary(each) for name, each in runs.items()}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes of a side: part -> phase -> seconds, and the most memory."""
    parts: dict[str, Any] = {}
    for part in runs[0]["parts"]:
        steps = [step for run in runs for step in run["parts"][part][1:]]
        parts[part] = {phase.removeprefix("time/"): spread([step[phase] for step in steps]) for phase in steps[0]}
    memory = {key: max(run["memory"][key] for run in runs) for key in runs[0]["memory"]}
    return {"parts": parts, "memory": memory}


def run_python(*words: str, threads: int = CORES) -> None:
    """Run a module of the benchmarks in a process of its own."""
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    """A rank of ours, started by the functions above."""
    from rto_megatron.distributed.runtime import import_megatron

    import_megatron()  # as a run does, before a stage imports parts of it
    what, *words = sys.argv[1:]
    if what == "inputs":
        make_inputs(Path(words[0]), words[1])
    elif what == "ours":
        be_our_rank(Task.load(words[0]), Path(words[1]), int(words[2]), words[3:])
    elif what == "compare":
        compare(Task.load(words[0]), Path(words[1]), Path(words[2]))


if __name__ == "__main__":
    main()
