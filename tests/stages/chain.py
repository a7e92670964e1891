"""A tiny model through all stages: what the stage tests start from."""

import json
from pathlib import Path

from rto_megatron.config.load import load_run
from tests.data.tokenizers import ours

NUM_ROWS = 16

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_length": 64,
    "init_std": 0.2,
}


def write_inputs(folder: Path) -> None:
    """A tokenizer, and pairs whose better answer is polite."""
    ours().save(folder / "tokenizer")
    pairs, answers = [], []
    for i in range(NUM_ROWS):
        prompt = f"Where is the cat{' now' * (i % 3)}? {i}"
        pairs.append(
            {"prompt": prompt, "chosen": f"I am fine, thank you. {i}", "rejected": f"Where? {'no ' * (i % 4)}"}
        )
        answers.append({"prompt": prompt, "response": f"The cat sat on the mat. {i}"})
    for name, rows in (("pairs", pairs), ("sft", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_stage(stage: str, folder: Path, words: list[str]) -> None:
    """One stage in this process, as the command line runs it."""
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=1)
    import importlib

    module = importlib.import_module(f"rto_megatron.stages.{'rto' if stage == 'ppo' else stage}")
    module.run(load_run(stage, None, words_of(stage, folder) + words), runtime)


def sft_from(start: str, folder: Path, words: list[str]) -> None:
    """The stage sft in this process, from another run: that brings model and tokenizer."""
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.stages.sft import run

    own = [word for word in words_of("sft", folder) if not word.startswith(("--model.", "--tokenizer."))]
    run(load_run("sft", None, [*own, f"--start={start}", *words]), start_runtime(threads=1))


def words_of(stage: str, folder: Path) -> list[str]:
    """The command-line words of each stage on the inputs of `write_inputs`."""
    train = ["--train.batch_size=8", "--data.max_length=64", "--compute.micro_batch_size=2"]
    pairs = [f"--data.train={folder}/pairs.jsonl", f"--data.eval={folder}/pairs.jsonl", *train, "--optimizer.lr=3e-3"]
    answers = ["--rollout.max_prompt_tokens=40", "--rollout.max_new_tokens=12", "--rollout.max_slots=3"]
    roles = [f"--reference={folder}/sft", f"--dpo={folder}/dpo", f"--reward_model={folder}/reward"]
    if stage == "sft":
        model = [f"--model.{name}={value}" for name, value in MODEL.items()]
        data = [f"--data.train={folder}/sft.jsonl", f"--data.eval={folder}/sft.jsonl", *train, "--optimizer.lr=1e-2"]
        return [f"--run_dir={folder}/sft", f"--tokenizer.path={folder}/tokenizer", *model, *data]
    if stage in ("dpo", "reward"):
        return [f"--run_dir={folder}/{stage}", f"--start={folder}/sft", *pairs]
    if stage == "generate":
        return [f"--checkpoint={folder}/sft", f"--prompts={folder}/pairs.jsonl", f"--out={folder}/out.jsonl", *answers]
    if stage == "evaluate":
        runs = ["--checkpoints", f"{folder}/sft", f"{folder}/dpo"]
        return [f"--run_dir={folder}/evaluation", f"--prompts={folder}/pairs.jsonl", *runs, *roles, *answers]
    sizes = ["--num_steps=2", "--prompts_per_step=8", "--samples_per_optimizer_step=4", "--compute.micro_batch_size=2"]
    rates = ["--optimizer.lr=1e-3", "--critic_optimizer.lr=1e-3", "--rto.dpo_coef=0.5", "--rto.dpo_clip=0.2"]
    data = [f"--data.train={folder}/pairs.jsonl", f"--data.eval={folder}/pairs.jsonl"]
    return [f"--run_dir={folder}/rto", f"--policy={folder}/sft", *roles, *data, *answers, *sizes, *rates]


def build_chain(folder: Path) -> None:
    """sft, dpo and reward, in one process."""
    for stage in ("sft", "dpo", "reward"):
        run_stage(stage, folder, [])


def build_small_reward(folder: Path, out: Path) -> None:
    """A reward run at `out`/reward of half the chain's width and depth, from an SFT run beside it."""
    short, size = "--train.max_steps=1", ["--model.hidden_size=16", "--model.num_layers=2"]
    run_stage("sft", folder, [f"--run_dir={out}/sft", short, *size])
    run_stage("reward", folder, [f"--run_dir={out}/reward", f"--start={out}/sft", short])
