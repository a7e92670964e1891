"""Which weights a role starts from, and what the judges say of greedy responses."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rto_megatron.errors import CheckpointError
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, sft_from


def critic_of_a_run(chain, folder):
    """Save the reward model as the critic of a run, load a value model from it; both heads and the policy's."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.checkpoint import Manifest
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.save import save_checkpoint
    from rto_megatron.stages.roles import load_role, tokenizer_of

    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    common = {"parallel": ParallelConfig(), "compute": ComputeConfig(), "frozen": True}
    policy, checkpoint = load_role(chain / "sft", "policy", mesh, **common)
    critic, _ = load_role(chain / "reward", "value", mesh, **common)
    architecture = checkpoint.manifest.architecture_for("policy")
    models = {"policy": architecture, "critic": architecture}
    manifest = Manifest(stage="rto", step=1, models=models, tokenizer=checkpoint.manifest.tokenizer)
    save_checkpoint(folder, manifest, {"policy": policy, "critic": critic}, tokenizer_of(checkpoint).save)
    loaded, _ = load_role(folder, "value", mesh, **common)
    return [{name: w.detach() for name, w in model.named_parameters()} for model in (loaded, critic, policy)]


def test_a_critic_goes_on_from_the_critic_of_an_earlier_run(chain, tmp_path):
    loaded, critic, policy = run_ranks(critic_of_a_run, 1, chain, tmp_path)[0]
    assert loaded.keys() == critic.keys()
    assert all(torch.equal(loaded[name], critic[name]) for name in critic)
    assert any(not torch.equal(loaded[name], policy[name]) for name in critic.keys() & policy.keys())


def rto_after_rto(chain, folder, reward):
    """A run of RTO with a reward model, and so a critic, of another size; another from its policy and critic."""
    first, second = f"{folder}/first", f"{folder}/second"
    words = ["--parallel.tensor=2", "--num_steps=1", f"--reward_model={reward}"]
    run_stage("rto", chain, [*words, f"--run_dir={first}"])
    run_stage("rto", chain, [*words, f"--run_dir={second}", f"--policy={first}", f"--critic={first}"])


def test_rto_goes_on_from_policy_and_critic_of_an_rto_run(chain, small_reward, tmp_path):
    from rto_megatron.distributed.checkpoint import open_checkpoint

    run_ranks(rto_after_rto, 2, chain, tmp_path, small_reward)
    judge, first, second = (open_checkpoint(run) for run in (small_reward, tmp_path / "first", tmp_path / "second"))
    assert first.manifest.parents["critic"] == first.manifest.parents["reward_model"] == judge.id
    assert second.manifest.parents["policy"] == second.manifest.parents["critic"] == first.id
    for run in (first, second):
        assert {role: model.hidden_size for role, model in run.manifest.models.items()} == {"policy": 32, "critic": 16}
    # The first policy starts as the reference itself, the second as what the first has become.
    starts = [
        json.loads((tmp_path / name / "tensorboard" / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("first", "second")
    ]
    assert starts[0]["eval/kl"] == 0 != starts[1]["eval/kl"]


def refusals_of_a_reward_run(chain, folder):
    """What each stage says that is given a reward run where its policy, or its start, should be."""
    reward, run_dir, messages = f"{chain}/reward", f"--run_dir={folder}/run", []
    for start in (
        lambda: sft_from(reward, chain, [run_dir]),
        lambda: run_stage("dpo", chain, [run_dir, f"--start={reward}"]),
        lambda: run_stage("rto", chain, [run_dir, f"--policy={reward}"]),
        lambda: run_stage("generate", chain, [f"--checkpoint={reward}", f"--out={folder}/run"]),
    ):
        with pytest.raises(CheckpointError) as refused:
            start()
        messages.append(str(refused.value))
    return messages


def test_a_reward_run_is_no_policy_even_where_embeddings_are_tied(chain, tmp_path):
    [messages] = run_ranks(refusals_of_a_reward_run, 1, chain, tmp_path)
    rule = "a policy must start from a run of sft, dpo, rto, ppo or convert, got one of reward, which holds none"
    for message in messages:
        assert message.startswith(f"{chain}/reward/") and message.endswith(f": {rule}; name such a run")
    assert not (tmp_path / "run").exists()


def never_sampled(vocab_size):
    from rto_megatron.stages.roles import never_sampled

    return never_sampled(SimpleNamespace(pad_id=1, vocab_size=10), vocab_size)


def test_rows_that_stand_for_no_token_are_never_sampled():
    assert run_ranks(never_sampled, 1, 10) == [(1,)]
    assert run_ranks(never_sampled, 1, 12) == [(1, 10, 11)]


def test_greedy_responses_are_judged_at_temperature_1(chain, tmp_path):
    run_ranks(run_stage, 1, "evaluate", chain, [f"--run_dir={tmp_path}", "--rollout.temperature=0"])
    sft, dpo = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert sft["kl"] == 0
    assert dpo["kl"] != 0 and math.isfinite(dpo["kl"])
