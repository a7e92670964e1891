"""Every stage end to end for a few steps, on one rank and on two."""

import json

import pytest

from rto_megatron.metric_names import METRICS
from tests.ranks import run_ranks
from tests.stages.chain import run_stage


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()]


def test_sft_dpo_and_reward_learn_what_they_were_shown(chain):
    for run, loss in (("sft", "sft/loss"), ("dpo", "dpo/loss"), ("reward", "reward_model/loss")):
        losses = [row[loss] for row in rows_of(chain / run) if loss in row]  # the last row tells of the save alone
        assert losses[-1] < losses[0]
    assert rows_of(chain / "dpo")[0]["dpo/loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2: the policy is its reference


@pytest.mark.parametrize(
    ("loss", "words"),
    [("rdpo", ["--dpo.length_coef=0.02"]), ("simpo", ["--dpo.beta=2", "--dpo.margin=0.5"]), ("una", [])],
)
def test_dpos_neighbours_learn_pairs_too(loss, words, chain, tmp_path):
    run_ranks(run_stage, 1, "dpo", chain, [f"--run_dir={tmp_path}", f"--dpo.loss={loss}", *words])
    rows = [row for row in rows_of(tmp_path) if "dpo/loss" in row]
    assert rows[-1]["dpo/loss"] < rows[0]["dpo/loss"]
    assert rows[-1]["dpo/margin"] > rows[0]["dpo/margin"]
    # at the reference the implicit rewards are 0; SimPO's are log-probs
    assert (abs(rows[0]["dpo/chosen_reward"]) < 1e-4) == (loss != "simpo")


@pytest.mark.parametrize(("loss", "own"), [("tdpo1", []), ("tdpo2", ["--dpo.drift_coef=0.7"])])
def test_tdpo_is_the_same_on_two_tensor_ranks_and_begins_as_dpo(loss, own, chain, tmp_path):
    words = [f"--dpo.loss={loss}", "--dpo.beta=1", *own]
    layouts = (["--parallel.sequence=true", "--parallel.tensor=2"], [])
    for world, layout in ((2, layouts[0]), (1, layouts[1])):
        run_ranks(run_stage, world, "dpo", chain, [f"--run_dir={tmp_path}/{world}", *words, *layout])
    two, one = ([row for row in rows_of(tmp_path / str(world)) if "dpo/loss" in row] for world in (2, 1))
    assert one[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: no margin, no drift
    assert one[-1]["dpo/loss"] < one[0]["dpo/loss"]
    plain = [row for row in rows_of(chain / "dpo") if "dpo/loss" in row]
    for name in ("dpo/loss", "optimizer/grad_norm", "dpo/margin"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-3)
        assert one[-1][name] != pytest.approx(plain[-1][name], rel=1e-3)


def test_a_checkpoint_names_its_parent(chain):
    manifests = {}
    for run in ("sft", "dpo", "reward"):
        folder = chain / run / "checkpoints"
        manifests[run] = json.loads(
            (folder / (folder / "latest.txt").read_text().strip() / "checkpoint.json").read_text()
        )
    assert manifests["dpo"]["parents"].keys() == {"reference"}
    assert manifests["reward"]["score_std"] > 0
    assert len({m["tokenizer"] for m in manifests.values()}) == 1


def test_rto_writes_metrics_checkpoint_and_config(chain, tmp_path):
    run_ranks(run_stage, 2, "rto", chain, [f"--run_dir={tmp_path}", "--parallel.tensor=2"])
    rows = rows_of(tmp_path)
    assert len(rows) == 3  # two steps, and the evaluation after them
    wanted = {
        name for name in METRICS if name.split("/")[0] in {"reward", "kl", "advantage", "critic", "ppo", "length"}
    }
    assert wanted <= rows[0].keys()
    assert {"eval/score", "eval/kl"} <= rows[0].keys() & rows[-1].keys()
    assert rows[0]["eval/win_rate"] == 0.5  # the policy is still the reference: all are ties
    shares = [rows[0][f"reward/{term}_share"] for term in ("dpo", "kl", "score")]
    assert sum(shares) == pytest.approx(1)
    assert rows[0]["decode/log_prob_diff_max"] < 1e-4
    assert rows[0]["decode/effective_share"] == pytest.approx(1, abs=1e-6)
    assert rows[0]["decode/checked_frac"] == 1
    assert rows[0]["ppo/first_ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert rows[0]["advantage/mean"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "run.yaml").exists()
    assert sorted(path.name for path in (tmp_path / "credit").iterdir()) == [
        "step_00000000.jsonl",
        "step_00000002.jsonl",
    ]
    assert "step 0 beside step 2" in (tmp_path / "credit.html").read_text()
    assert (tmp_path / "checkpoints" / "latest.txt").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--rto.shaping=sentence"],
        ["--rto.shaping=terminal", "--ppo.loss_mean=token"],
        ["--rto.shaping=shaping_only", "--rto.kl_target=1"],
        ["--advantage.estimator=reinforce_pp", "--ppo.num_epochs=2", "--ppo.entropy_coef=0.01"],
        ["--samples_per_prompt=2", "--rollout.truncation=overwrite_eos", "--ppo.value_clip=null"],
        ["--compute.dtype=bfloat16", "--compute.recompute=selective"],
        ["--compute.recompute=full", "--optimizer.distributed=false", "--critic_optimizer.distributed=false"],
    ],
)
def test_every_variant_runs(words, chain, tmp_path):
    run_ranks(run_stage, 1, "rto", chain, [f"--run_dir={tmp_path}", *words])
    assert len(rows_of(tmp_path)) == 3


def test_generate_answers_every_prompt_in_order(chain, tmp_path):
    for name, words in {"one": [], "two": ["--parallel.pipeline=2"], "halves": []}.items():
        world = 1 if name == "one" else 2
        run_ranks(run_stage, world, "generate", chain, [f"--out={tmp_path}/{name}.jsonl", *words])
    texts = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("one", "two", "halves")}
    answers = {name: [json.loads(line) for line in lines] for name, lines in texts.items()}
    prompts = [json.loads(line)["prompt"] for line in (chain / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers["one"]] == prompts
    assert [row["tokens"] for row in answers["one"]] == [row["tokens"] for row in answers["two"]]
    assert [row["tokens"] for row in answers["one"]] == [row["tokens"] for row in answers["halves"]]


def test_evaluate_compares_policies(chain, tmp_path):
    run_ranks(run_stage, 2, "evaluate", chain, [f"--run_dir={tmp_path}"])
    sft, dpo = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert sft["kl"] == 0  # the reference itself
    assert sft["win_rate"] == 0.5
    assert dpo["kl"] != 0
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 16
