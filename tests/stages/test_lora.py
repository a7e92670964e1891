"""Adapters through the stages: small checkpoints, one trunk for several roles, resume, merged weights."""

import json

import pytest
import torch

from rto_megatron.config.load import load_run
from rto_megatron.errors import ConfigError
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of

LORA = ["--lora.rank=4", "--lora.alpha=8"]
CRITIC = ["--critic_lora.rank=2", "--critic_lora.targets", "linear_qkv", "linear_fc2"]
MEASURED = ("time/", "speed/", "checkpoint/", "memory/")


def stages(folder, *calls):
    """Stages one after the other in this rank."""
    for stage, words in calls:
        run_stage(stage, folder, list(words))


def hydra(chain, lora, run_dir, *more):
    """Policy, critic, reference and DPO policy on the weights of the SFT run."""
    roles = [f"--run_dir={run_dir}", f"--policy={lora}", f"--dpo={lora}", f"--critic={chain}/sft"]
    return "rto", [*roles, *LORA, *CRITIC, "--checkpoint.save_every=1", "--checkpoint.keep_last=null", *more]


@pytest.fixture(scope="module")
def runs(chain, tmp_path_factory):
    """A DPO run of adapters, and RTO runs on it in one layout."""
    folder, tensor = tmp_path_factory.mktemp("lora"), "--parallel.tensor=2"
    dpo = ("dpo", [f"--run_dir={folder}/dpo", *LORA, tensor, "--compute.recompute=full"])
    plain = hydra(chain, folder / "dpo", folder / "rto", tensor)
    words = [tensor, "--parallel.sequence=true", "--schedule.map=fused", "--compute.offload_frozen=true"]
    mapped = hydra(chain, folder / "dpo", folder / "mapped", *words)
    plain[1].append("--parallel.sequence=true")
    run_ranks(stages, 2, chain, dpo, plain, mapped, timeout=300)
    return folder


def log_probs(path, base):
    """Of some tokens by a run's policy: with adapters apart and merged, and by the weights that they belong to."""
    from rto_megatron.batch import SFTBatch
    from rto_megatron.config.lora import LoRAConfig
    from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
    from rto_megatron.distributed.checkpoint import open_checkpoint
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import score, token_log_probs
    from rto_megatron.stages.roles import Trunks, load_role

    mesh, trunks = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0), Trunks()
    common = {"parallel": ParallelConfig(), "compute": ComputeConfig(), "frozen": True}
    tokens = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    batch = SFTBatch(tokens=tokens, num_tokens=torch.full((3,), 20), response_mask=torch.arange(20).expand(3, 20) >= 8)
    found, models = [], []
    for where, more in ((path, {"trunks": trunks}), (base, {"trunks": trunks}), (path, {}), (base, {})):
        model, _ = load_role(where, "policy", mesh, **common, **more)
        models.append(dict(model.named_parameters()))
        found.append(score(model, batch, token_log_probs, mesh, cut=Cut(rows=4))[..., 0])
    shared = {models[0][name] is models[1][name] for name in models[1]}
    checkpoint = open_checkpoint(path)
    sizes = {p.name: p.stat().st_size for p in (checkpoint.folder / "policy").iterdir()}
    return found, shared, checkpoint.manifest.bases["policy"].lora == LoRAConfig(rank=4, alpha=8), sizes


def test_a_dpo_run_of_adapters_is_small_and_merges(runs, chain):
    [(found, shared, same_config, sizes)] = run_ranks(log_probs, 1, runs / "dpo", chain / "sft")
    apart, base, merged, alone = found
    assert shared == {True} and same_config
    assert torch.equal(base, alone)
    assert (apart - base).abs().max() > 1e-3
    assert torch.allclose(apart, merged, rtol=0, atol=1e-5)
    whole = sum(path.stat().st_size for path in (chain / "sft" / "checkpoints").glob("step_*/policy/*.distcp"))
    assert sum(size for name, size in sizes.items() if name.endswith(".distcp")) < 0.5 * whole


def rows_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


def fingerprints(*folders):
    from rto_megatron.distributed.checkpoint import fingerprint, open_checkpoint
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    return [fingerprint(open_checkpoint(folder)) for folder in folders]


def test_a_map_and_a_resumed_run_end_with_the_same_bits(runs, chain):
    steps = runs / "rto" / "checkpoints"
    last = (steps / "latest.txt").read_text().strip()
    before = fingerprints_of(steps / last, runs / "mapped")
    assert before[0] == before[1]
    assert rows_of(runs / "rto") == rows_of(runs / "mapped")
    assert rows_of(runs / "rto")[1]["decode/log_prob_diff_max"] < 1e-4
    assert rows_of(runs / "rto")[1]["kl/k2"] > 0
    # back to the first step, and again
    (steps / "latest.txt").write_text("step_00000001\n")
    again = hydra(chain, runs / "dpo", runs / "rto", "--parallel.tensor=2", "--parallel.sequence=true")
    run_ranks(stages, 2, chain, again, timeout=200)
    assert fingerprints_of(runs / "rto") == before[:1]


def fingerprints_of(*folders):
    return run_ranks(fingerprints, 1, *folders)[0]


@pytest.mark.parametrize("name", ["rto", "mapped"])
def test_what_roles_share_is_held_once_and_foretold(runs, name):
    lines = (runs / name / "tensorboard" / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, lines) if row["step"] == 1)
    for role in ("reference", "dpo", "reward_model", "policy", "critic"):
        for part in ("parameters", "host", "gradients", "optimizer"):
            told = row[f"memory/{role}_predicted_{part}_bytes"]
            assert row[f"memory/{role}_{part}_bytes"] == pytest.approx(told, rel=0.02, abs=512), (role, part)
    trunk = row["memory/reference_parameters_bytes"]  # on the device also where others live on the host
    assert trunk > 5 * row["memory/policy_parameters_bytes"] > 0
    assert trunk > 5 * row["memory/critic_parameters_bytes"] > 0
    where = "host" if name == "mapped" else "parameters"
    assert 0 < row[f"memory/dpo_{where}_bytes"] < trunk / 5
    assert row["memory/policy_gradients_bytes"] < trunk / 5


def test_a_run_of_adapters_is_generated_from_evaluated_and_written_out(runs, chain, tmp_path):
    answers = ("generate", [f"--checkpoint={runs}/rto", f"--out={tmp_path}/out.jsonl", "--max_prompts=2"])
    table = ["--checkpoints", f"{runs}/dpo", f"{runs}/rto", f"--run_dir={tmp_path}/evaluation", f"--dpo={runs}/dpo"]
    run_ranks(stages, 1, chain, answers, ("evaluate", [*table, "--max_prompts=2"]), timeout=200)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    run_ranks(written_out, 1, runs / "rto", tmp_path / "hf")  # it compares logits with transformers'
    assert (tmp_path / "hf" / "model.safetensors").exists()


def written_out(source, out):
    from rto_megatron.config.run import ConvertRun
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.stages.convert import run

    run(ConvertRun(source=source, out=out), start_runtime(threads=1))


def test_what_does_not_go_together_is_refused(runs, chain, tmp_path):
    with pytest.raises(ConfigError, match=r"command line: lora must be null with schedule.map split"):
        load_run("rto", None, [*words_of("rto", chain), *LORA, "--schedule.map=split", "--schedule.rollout_ranks=1"])
    with pytest.raises(ConfigError, match=r"lora.targets must be some of linear_qkv"):
        load_run("dpo", None, [*words_of("dpo", chain), "--lora.targets", "linear_q"])
    with pytest.raises(ConfigError, match=r"lora must be null for a model from scratch"):
        load_run("sft", None, [*words_of("sft", chain), *LORA])
    run_ranks(other_adapters, 1, chain, runs, tmp_path)


def other_adapters(chain, runs, tmp_path):
    from rto_megatron.errors import CheckpointError

    with pytest.raises(ConfigError, match=r"lora must be as that of .*rank 4, alpha 8"):
        run_stage("dpo", chain, [f"--run_dir={tmp_path}/dpo", f"--start={runs}/dpo", "--lora.rank=5"])
    copy = tmp_path / "elsewhere"
    import shutil

    shutil.copytree(runs / "dpo", copy / "deeper" / "dpo")
    with pytest.raises(CheckpointError, match=r"its adapters belong to .*, which is not there"):
        run_stage("generate", chain, [f"--checkpoint={copy}/deeper/dpo", f"--out={tmp_path}/out.jsonl"])
