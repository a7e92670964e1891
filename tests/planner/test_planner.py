"""`plan` and `simulate` on the command line: what they print, and what they refuse."""

import re

import pytest

from rto_megatron.__main__ import main
from rto_megatron.planner.search import candidates, memory_of, plan
from rto_megatron.schedule.placement import split
from rto_megatron.schedule.rooflines import GPUS, MODELS, Layout, Roofline
from rto_megatron.schedule.trace import read_trace, write_trace
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload
from tests.stages.chain import words_of

SHORT = Workload(prompt_tokens=64, max_new_tokens=128)
YAML = """\
stage: rto
run_dir: runs/x
policy: {policy}
reference: runs/sft
dpo: runs/dpo
reward_model: runs/reward
data: {{train: prompts.jsonl}}
prompts_per_step: 32
samples_per_prompt: 1
samples_per_optimizer_step: 8
rollout: {{max_prompt_tokens: 32, max_new_tokens: 64, max_slots: 8}}
"""


def small(name, *, num_gpus=8, **changed):
    return plan(MODELS[name], GPUS["h100"], **({"num_gpus": num_gpus, "workload": SHORT, "samples": 64, "minibatch": 16,
                                               "max_staleness": 0} | changed))  # fmt: skip


def test_what_is_planned_fits_into_memory_and_is_sorted_by_seconds():
    found = small("llama3-1b")
    assert [planned.seconds for planned in found] == sorted(planned.seconds for planned in found)
    assert {planned.candidate.placement.name for planned in found} == {"colocated", "fused", "split"}
    for planned in found:
        assert planned.slots >= 1
        assert all(sum(parts.values()) <= GPUS["h100"].memory for parts in planned.memory.values())


def test_models_too_large_for_the_gpus_are_refused():
    with pytest.raises(ValueError, match="no map and layout fits the model into 8 GPUs; take more nodes"):
        small("llama3-70b")


def test_staleness_is_tried_only_if_it_is_asked_for():
    def seen(staleness):
        found = candidates(MODELS["llama3-1b"], GPUS["h100"], num_gpus=8, workload=SHORT, max_staleness=staleness)
        return {candidate.staleness for candidate in found}

    assert (seen(0), seen(1)) == ({0}, {0, 1})


def test_a_policy_of_eight_billion_parameters_takes_the_bytes_worked_out_by_hand():
    found = next(
        candidate
        for candidate in candidates(
            MODELS["llama3-8b"], GPUS["h100"], num_gpus=64, workload=SHORT, max_staleness=0
        )
        if candidate.placement.name == "colocated" and candidate.layout.train_tensor == 4
        and candidate.layout.pipeline == 1
    )  # fmt: skip
    memory, _ = memory_of(found, MODELS["llama3-8b"], GPUS["h100"], SHORT)
    # 8.03e9 / 4 parameters: 2 bytes of weight, 4 of gradient, 12 / 16 of optimizer
    assert memory["trains"]["policy"] == pytest.approx(8.03e9 / 4 * (2 + 4 + 12 / 16), rel=0.01)
    assert memory["trains"]["reference"] == pytest.approx(8.03e9 / 4 * 2, rel=0.01)


def test_plan_prints_maps_memory_bound_and_what_binds(capsys):
    words = ["--model=llama3-1b", "--samples=64", "--minibatch=16", "--prompt_tokens=64", "--max_new_tokens=128"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "Rooflines, nothing measured" in printed
    assert "llama3-1b on 8 h100: seconds per step" in printed
    assert "GiB of the fullest rank" in printed
    best = float(re.search(r"\| (?:colocated|fused|split)[^|]*(?:\|[^|]*){4}\| +([\d.]+)", printed)[1])
    assert float(re.search(r"no schedule is faster than ([\d.e-]+) s", printed)[1]) < best
    assert "what binds: " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=llama3-8b", "--nodes=0"], "nodes must be 1 or more, got 0"),
        (["--nodes=1"], "model must be set"),
        (["--model=llama3-8b", "--gpu=b200"], "gpu must be"),
        (["run.yaml", "--model=llama3-8b"], "plan takes no YAML file and no settings of a run, got run.yaml"),
    ],
)
def test_plan_refuses_what_it_cannot_plan(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(policy=tmp_path / "nothing"))
    return path


def test_simulate_times_a_config_with_rooflines_of_its_model(chain, capsys):
    """The words are those that rto itself runs with; the layout is that of the run."""
    assert main(["simulate", *words_of("rto", chain), "--parallel.tensor=2", "--map=fused", "--groups=2"]) == 0
    printed = capsys.readouterr().out
    assert "costs: rooflines of one h100, nothing measured" in printed
    assert re.search(r"fused, 2 groups: [\d.e-]+ seconds per step", printed)


def test_simulate_times_a_config_with_the_costs_of_a_trace(run_yaml, tmp_path, capsys):
    seen = SHORT.run(
        Roofline(MODELS["llama3-1b"], GPUS["h100"], split(1, 1), Layout(engine_ranks=1, train_ranks=1)),
        Sizes(num_steps=3, samples=32, minibatch=8, lanes=1, slots=8),
        split(1, 1),
    )
    write_trace(tmp_path / "seen.jsonl", seen)
    words = ["--map=split", "--groups=3", f"--costs={tmp_path}/seen.jsonl", f"--trace={tmp_path}/told.jsonl"]
    assert main(["simulate", str(run_yaml), *words]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"split, 3 groups: [\d.e-]+ seconds per step", printed)
    assert re.search(r"^   0 .*T.*\n   1 .*T.*\n   2 .*D", printed, re.M)
    told = read_trace(tmp_path / "told.jsonl")
    assert sum(row.samples for row in told if row.kind == "score") == 3 * 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--staleness=1", "--groups=2"],
            "map must be split with staleness 1 or early, which need other ranks, got colocated",
        ),
        (["--map=split", "--groups=1"], "writing must be at least 1 and below groups 1, got 1"),
        (["--costs=nothing.jsonl"], "nothing.jsonl: a trace must be a readable file of JSON lines"),
        ([], "nothing"),
    ],
)
def test_simulate_refuses_what_it_cannot_run(words, message, run_yaml, capsys):
    assert main(["simulate", str(run_yaml), *words]) == 2
    assert message in capsys.readouterr().err
