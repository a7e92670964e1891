"""Which weights a role starts from, and what the judges say of greedy responses."""

import json
import math
from types import SimpleNamespace

import torch

from tests.ranks import run_ranks
from tests.stages.chain import run_stage


def critic_of_a_run(chain, folder):
    """Save the reward model as the critic of a run, load a value model from it; both heads and the policy's."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.checkpoint import Manifest, save_checkpoint
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
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
