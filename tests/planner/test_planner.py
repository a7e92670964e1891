"""`plan` and `simulate` on the command line: what they print, and what they refuse."""

import json
import re
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from rto_megatron.__main__ import main
from rto_megatron.errors import ConfigError
from rto_megatron.planner.search import REUSED, Candidate, Saving, candidates, memory_of, plan
from rto_megatron.planner.told import timed
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import colocated, split
from rto_megatron.schedule.rooflines import GPUS, MODELS, Layout, Roofline
from rto_megatron.schedule.trace import TOGETHER, Load, Row, read_trace, write_trace
from rto_megatron.schedule.work import Item, Sizes
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
    seconds = [planned.timed.seconds for planned in found]
    assert seconds == sorted(seconds)
    assert {planned.candidate.placement.name for planned in found} == {"colocated", "fused", "split"}
    for planned in found:
        assert planned.slots >= 1
        assert all(
            sum(parts.values()) <= GPUS["h100"].memory
            for phases in planned.memory.values()
            for parts in phases.values()
        )


def test_split_maps_are_tried_with_other_scorers_and_with_a_critic_of_its_own():
    names = {planned.candidate.name for planned in small("llama3-1b")}
    assert any("all score" in name for name in names)
    assert any("engines score" in name for name in names)
    assert any("for the critic" in name for name in names)


def test_of_each_map_with_a_pipeline_the_fastest_is_tried_with_blocks_of_layers():
    model = MODELS["llama3-70b"]
    found = small("llama3-70b", num_gpus=128, samples=512, minibatch=128)
    deep = [planned.candidate for planned in found if planned.candidate.layout.pipeline > 1]
    for name in {one.placement.name for one in deep}:
        assert {1, 2} <= {one.layout.virtual_stages for one in deep if one.placement.name == name}
    assert deep
    assert all(model.num_layers % (one.layout.pipeline * one.layout.virtual_stages) == 0 for one in deep)


def test_reused_log_probs_save_one_of_five_forwards_of_scoring():
    asked, reused = small("llama3-1b")[0], small("llama3-1b", roles=REUSED)
    same = next(one for one in reused if one.candidate == asked.candidate)
    assert same.timed.phases["score"] / asked.timed.phases["score"] == pytest.approx(4 / 5)
    assert same.timed.seconds < asked.timed.seconds


def test_models_too_large_for_the_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"no map and layout fits the model, .* into 8 GPUs; take more nodes"):
        small("llama3-70b")


def test_too_few_samples_for_the_gpus_are_refused_with_their_own_reason():
    with pytest.raises(ConfigError, match="64 samples in minibatches of 1 are too few for 1024 GPUs"):
        small("llama3-8b", num_gpus=1024, minibatch=1)


def layouts_tried(max_new_tokens):
    """(tensor, context, pipeline) of what is tried for a billion parameters on 8 GPUs."""
    workload = Workload(prompt_tokens=64, max_new_tokens=max_new_tokens)
    found = candidates(MODELS["llama3-1b"], GPUS["h100"], num_gpus=8, workload=workload, max_staleness=0)
    return {(one.layout.train_tensor, one.layout.context, one.layout.pipeline) for one in found}


def test_context_ranks_are_tried_where_one_row_is_too_long_without_them():
    assert all(context == 1 for _, context, _ in layouts_tried(32_768))
    found = layouts_tried(131_072)
    assert (1, 2, 1) in found and (1, 1, 1) not in found
    assert (2, 1, 1) in found and (2, 2, 1) not in found  # no more of them than it needs


def test_the_plan_names_context_ranks(capsys):
    words = ["--model=llama3-1b", "--samples=8", "--minibatch=8", "--prompt_tokens=64", "--max_new_tokens=131072"]
    assert main(["plan", *words, "--shown=40"]) == 0
    header, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    column = [word.strip() for word in header].index("train CP")
    assert {int(row[column]) for row in rows if row[1].strip() in ("colocated", "fused")} == {1, 2}


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
    (phases,) = memory.values()
    assert set(phases) == {"generate", "score", "train"}
    for parts in phases.values():
        # 8.03e9 / 4 parameters: 2 bytes of weight, 4 of gradient, 12 / 16 of optimizer
        assert parts["policy"] == pytest.approx(8.03e9 / 4 * (2 + 4 + 12 / 16), rel=0.01)
        assert parts["reference"] == pytest.approx(8.03e9 / 4 * 2, rel=0.01)
    assert "cache" in phases["generate"]
    assert "cache" not in phases["train"]


def test_one_trunk_and_the_host_save_what_is_worked_out_by_hand():
    layout = Layout(engine_ranks=1, train_ranks=1)
    model, gpu, found = MODELS["llama3-1b"], GPUS["h100"], {}
    for name, saving in {
        "plain": Saving(),
        "lora": Saving(lora_rank=16),
        "both": Saving(lora_rank=16, offload_frozen=True),
        "host": Saving(offload_frozen=True),
    }.items():
        one = Candidate(placement=colocated(2), layout=layout, staleness=0, early=False, saving=saving)
        [found[name]] = memory_of(one, model, gpu, SHORT)[0].values()
    whole = found["plain"]["train"]["reference"]
    # rank 16: queries, keys and values 3072 + 2048, out 2 x 2048, fc1 16384 + 2048, fc2 8192 + 2048; 16 layers
    adapters = 16 * 16 * (5120 + 4096 + 18432 + 10240)
    own = found["lora"]["train"]
    assert own["reference"] == whole and own["dpo"] == pytest.approx(2 * adapters, rel=0.01)
    assert own["policy"] == pytest.approx(adapters * (2 + 4 + 12 / 2), rel=0.01)
    assert own["critic"] == pytest.approx(adapters * (2 + 4 + 12 / 2), rel=0.01)
    assert found["both"]["train"].keys() == own.keys() - {"dpo", "reward_model"}  # the policy needs the reference
    score = found["host"]["score"]
    assert not score.keys() & {"reference", "dpo", "reward_model"}
    assert score["frozen roles from the host"] == pytest.approx(2 * whole, rel=0.01)
    assert "frozen roles from the host" not in found["host"]["train"]
    limits = {"num_gpus": 8, "workload": SHORT, "max_staleness": 0}
    maps = {one.placement.name for one in candidates(model, gpu, **limits, saving=Saving(lora_rank=16))}
    assert maps == {"colocated", "fused"}  # a run refuses adapters in the split map


def kinds(placement, **changed):
    layout = Layout(engine_ranks=1, train_ranks=1)
    one = Candidate(placement=placement, layout=layout, **({"staleness": 0, "early": False} | changed))
    memory, _ = memory_of(one, MODELS["llama3-1b"], GPUS["h100"], SHORT)
    return {rank: {phase: set(parts) for phase, parts in phases.items()} for rank, phases in memory.items()}


FROZEN = {"reference", "dpo", "reward_model", "libraries"}
COPIES = {"policy snapshot", "critic snapshot"}


def test_each_kind_of_rank_holds_what_it_needs_and_no_more():
    learns = FROZEN | {"policy", "critic"}
    assert kinds(colocated(2)) == {
        "writes, scores, trains policy and critic": {
            "generate": learns | {"cache"},
            "score": learns | {"activations"},
            "train": learns | {"activations"},
        }
    }
    assert kinds(split(1, 1)) == {
        "scores, trains policy and critic": {
            "score": learns | {"activations"},
            "train": learns | {"activations"},
        },
        "writes": {"generate": {"engine", "cache", "libraries"}},
    }
    rollout = kinds(split(1, 1, 1, score="rollout"), staleness=1)
    assert rollout["writes, scores"]["score"] == FROZEN | COPIES | {"engine", "cache", "activations"}
    assert rollout["trains policy"] == {"train": {"policy", "libraries", "activations"}}
    assert rollout["trains critic"] == {"train": {"critic", "libraries", "activations"}}
    own_critic = kinds(split(1, 1, 1))  # where nothing moves, who trains or writes with a policy needs no copy of it
    assert own_critic["scores, trains policy"]["score"] == FROZEN | {"policy", "critic snapshot", "activations"}
    drained = kinds(split(1, 1, 1, score="rollout"))
    assert drained["writes, scores"]["score"] == FROZEN | {"engine", "critic snapshot", "cache", "activations"}


def test_means_are_over_ranks_and_not_over_groups():
    def row(group, kind, start, end, step):
        return Row(group=group, kind=kind, role="", step=step, lane=0, number=0, start=start, end=end)

    rows = [
        row(0, "optimizer", 0, 1, 0),
        row(0, "train", 1, 3, 1),
        row(1, "decode", 1, 5, 1),
        row(0, "optimizer", 4, 5, 1),
    ]
    found = timed(rows, [3, 1], staleness=0)
    assert found.seconds == 4
    assert (found.phases["train"], found.phases["decode"], found.phases["optimizer"]) == (1.5, 1.0, 0.75)
    assert found.idle == 0.75  # the first group's three ranks, for one second
    assert found.overlap == 0.75


@pytest.mark.parametrize("model", [["--model", "llama3-1b"], ["--model=llama3-1b"]])
def test_plan_prints_maps_phases_memory_bound_and_what_binds(model, capsys):
    words = [*model, "--samples=64", "--minibatch=16", "--prompt_tokens=64", "--max_new_tokens=128"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "A step: 64 responses in minibatches of 16; prompts of 64 tokens, responses of log-normal length" in printed
    assert "Rooflines, nothing measured" in printed
    for name in ("colocated", "fused", "split"):
        assert re.search(rf"^\| {name}", printed, re.M), name
    assert "llama3-1b on 8 h100: seconds per step" in printed
    best = float(re.search(r"best: .* training TP \d x PP \d: ([\d.e-]+) s a step", printed)[1])
    assert re.search(r"next best map: .* \d+% slower", printed)
    check_told(printed, seconds=best)


PARTS = r"s, ([\d.e-]+) s are the work .*; ([\d.e-]+) s are waiting; ([\d.e-]+) s are what the bound leaves out"


def check_told(printed, *, seconds):
    """What plan and simulate both say."""
    for phase in ("decode", "score", "train", "optimizer", "idle"):
        assert re.search(rf"\| {phase} +\| +[\d.e-]+ \|", printed), phase
    assert re.search(r"ranks run different phases at once in \d+% of the time", printed)
    for part in ("policy", "critic", "reference", "dpo", "reward_model", "libraries", "cache", "activations", "sum"):
        assert re.search(rf"\| {part} +\|.* (GiB|MiB|KiB)", printed), part
    assert "the fullest rank needs" in printed
    bound = float(re.search(r"bound of any schedule: ([\d.e-]+) s \(all work without a gap", printed)[1])
    assert bound <= seconds
    counted, waiting, rest = map(float, re.search(PARTS, printed).groups())
    assert counted + waiting + rest == pytest.approx(seconds, rel=0.02)
    assert "what binds: " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=llama3-8b", "--nodes=0"], "nodes must be 1 or more, got 0"),
        (["--nodes=1"], "model must be set"),
        (["--model", "llama3-8b", "--samples=100"], "minibatch must divide samples 100, got 128"),
        (["--model", "llama3-8b", "extra"], "model must be"),
        (["--model", "llama3-8b", "--nodes", "two"], "nodes must be a whole number, got 'two'"),
        (["--model", "llama3-8b", "--max_new_tokens=100000000"], "no map and layout fits the model"),
        (["--model", "llama3-8b", "--tp=2"], "plan takes no YAML file and no settings of a run, got --tp=2"),
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
    words = ["--parallel.tensor=2", "--schedule.map=fused", "--ranks", "4"]
    assert main(["simulate", *words_of("rto", chain), *words]) == 0
    printed = capsys.readouterr().out
    assert "costs: rooflines of h100, nothing measured" in printed
    seconds = float(re.search(r"fused, 2 groups, 2 lanes: ([\d.e-]+) seconds per step", printed)[1])
    check_told(printed, seconds=seconds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.pipeline=2", "--parallel.virtual_stages=3"], "must divide model.num_layers 4, got 2 x 3"),
        (["--rollout.max_new_tokens=9999"], "must be at most the 64 tokens that the reference"),
    ],
)
def test_simulate_refuses_what_the_run_would_refuse_for_its_models(words, message, chain, capsys):
    assert main(["simulate", *words_of("rto", chain), *words, "--ranks=4"]) == 2
    assert message in capsys.readouterr().err


def test_simulate_asks_the_policy_about_checked_rows_only_where_log_probs_are_reused(chain, capsys):
    def score(*words):
        assert main(["simulate", *words_of("rto", chain), *words]) == 0
        return float(re.search(r"\| score +\| +([\d.e-]+) \|", capsys.readouterr().out)[1])

    # 8 samples a step and five roles: 4 + 2 / 8 forwards instead of 5
    shares = score("--rollout.reuse_log_probs=true", "--rollout.check_rows=2") / score()
    assert shares == pytest.approx(4.25 / 5, rel=1e-2)


def test_adapters_train_without_the_gradients_of_frozen_weights(chain, capsys):
    def train(*words):
        assert main(["simulate", *words_of("rto", chain), *words]) == 0
        return float(re.search(r"\| train +\| +([\d.e-]+) \|", capsys.readouterr().out)[1])

    both, lora, critic_lora = train(), "--lora.rank=2", "--critic_lora.rank=2"
    assert train("--compute.recompute=full") / both == pytest.approx(4 / 3, rel=1e-2)
    assert train(lora) / both == pytest.approx(2.5 / 3, rel=1e-2)
    assert train(lora, critic_lora, "--compute.recompute=full") / both == pytest.approx(1, rel=1e-2)
    assert train(lora, "--advantage.estimator=reinforce_pp") / both == pytest.approx(2 / 6, rel=1e-2)


def test_simulate_reads_map_and_layouts_from_the_schedule_of_the_run(chain, capsys):
    words = ["map=split", "rollout_ranks=2", "rollout.tensor=2", "critic_ranks=1", "staleness=1", "minibatches=logical"]
    assert main(["simulate", *words_of("rto", chain), *(f"--schedule.{word}" for word in words)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"split: policy on ranks 0-0 .* critic on 3-3 .*, one step off, early minibatches: ", printed)
    for rank in ("scores, trains policy", "writes", "trains critic"):
        assert f"memory of the fullest rank that {rank}" in " ".join(printed.split())
    assert re.search(r"\| policy snapshot +\|", printed)


def split_run():
    """What a run on two ranks does, the first of which trains."""
    return SHORT.run(
        Roofline(MODELS["llama3-1b"], GPUS["h100"], split(1, 1), Layout(engine_ranks=1, train_ranks=1)),
        Sizes(num_steps=3, samples=32, minibatch=8, lanes=1, slots=8),
        split(1, 1),
    )


SPLIT = ["--schedule.map=split", "--schedule.rollout_ranks=1"]


def test_simulate_times_a_config_with_the_costs_of_a_trace(run_yaml, tmp_path, capsys):
    write_trace(tmp_path / "seen.jsonl", split_run())
    files = [f"--costs={tmp_path}/seen.jsonl", f"--trace={tmp_path}/told.jsonl"]
    assert main(["simulate", str(run_yaml), *SPLIT, "--ranks=3", *files]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"split: .* seconds per step", printed)
    assert re.search(r"^   0 .*T.*\n   1 .*T.*\n   2 .*D", printed, re.M)
    assert "memory is not told" in printed  # the run's checkpoints are not here
    assert "bound of any schedule" in printed
    told = read_trace(tmp_path / "told.jsonl")
    assert sum(row.samples for row in told if row.kind == "score") == 3 * 32


@pytest.fixture
def run_dir(tmp_path):
    """As two ranks leave it: each comes to what they do together when it is done with its own."""
    folder, free = tmp_path / "run", {0: 0.0, 1: 0.0}
    came: dict[int, list[Row]] = {0: [], 1: []}
    for row in split_run():
        start = free[row.group] if row.kind in TOGETHER else row.start
        came[row.group].append(replace(row, rank=row.group, start=start))
        free[row.group] = row.end
    (folder / "trace").mkdir(parents=True)
    for rank, rows in came.items():
        write_trace(folder / "trace" / f"rank_{rank:05d}.jsonl", rows)
    return folder


def simulated(run_yaml, tmp_path, costs):
    told = tmp_path / "told.jsonl"
    assert main(["simulate", str(run_yaml), *SPLIT, f"--costs={costs}", f"--trace={told}"]) == 0
    return read_trace(told)


@pytest.mark.parametrize("inside", ["", "trace"])
def test_simulate_takes_the_folder_of_a_run_whose_waiting_is_no_cost(inside, run_yaml, run_dir, tmp_path):
    write_trace(tmp_path / "seen.jsonl", split_run())
    assert simulated(run_yaml, tmp_path, run_dir / inside) == simulated(run_yaml, tmp_path, tmp_path / "seen.jsonl")


def test_simulate_takes_what_ran_since_the_last_start_of_a_run(run_yaml, run_dir, tmp_path, capsys):
    expected = simulated(run_yaml, tmp_path, run_dir)
    for path in (run_dir / "trace").iterdir():
        slow = "".join(json.dumps(asdict(replace(row, end=row.end + 9))) + "\n" for row in read_trace(path))
        path.write_text(slow + path.read_text())
    capsys.readouterr()
    assert simulated(run_yaml, tmp_path, run_dir) == expected
    assert "note: started 2 times; only what ran since the last start is taken" in capsys.readouterr().out


def test_simulate_waits_between_items_as_long_as_the_run_did(run_yaml, tmp_path):
    late = [replace(row, start=row.start + 5 * i, end=row.end + 5 * i) for i, row in enumerate(split_run())]
    write_trace(tmp_path / "late.jsonl", late)
    engine = [row for row in simulated(run_yaml, tmp_path, tmp_path / "late.jsonl") if row.group == 1]
    assert min(after.start - row.end for row, after in pairwise(engine)) >= 5 - 1e-9


def test_a_trace_of_another_map_is_refused_by_kind_role_and_map(run_yaml, run_dir, capsys):
    words = ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.critic_ranks=1", f"--costs={run_dir}"]
    assert main(["simulate", str(run_yaml), *words]) == 2
    error = capsys.readouterr().err
    assert f"{run_dir}, for schedule.map split: the trace holds no train policy, which this schedule runs" in error
    assert "only advantage, boundary, decode, " in error and "Traceback" not in error


def test_a_folder_without_a_trace_gives_no_costs(run_yaml, tmp_path, capsys):
    assert main(["simulate", str(run_yaml), f"--costs={tmp_path}"]) == 2
    assert f"{tmp_path}/trace: holds no rank_NUMBER.jsonl" in capsys.readouterr().err


def test_bytes_of_new_weights_are_those_of_who_received_them():
    def refit(number, group, num_bytes, seconds):
        return Row(
            group=group, kind="refit", role="engine", step=0, lane=-1, number=number, start=0, end=seconds,
            num_bytes=num_bytes,
        )  # fmt: skip

    sent = [refit(number, 0, 0, 1.0) for number in range(3)]
    received = [refit(number, 1, num_bytes, seconds) for number, num_bytes, seconds in [(0, 1000, 3.0), (1, 2000, 5.0)]]
    item = Item(kind="refit", step=0, groups=(0, 1), number=1, role="engine")
    assert Fitted(sent + received)(item, Load(), 0) == pytest.approx(4.0)  # 1 + 0.002 * 1500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--schedule.staleness=1"],
            "schedule.staleness needs schedule.map split, got 1 with schedule.map sequential; set",
        ),
        (["--schedule.map=split", "--schedule.rollout_ranks=2", "--ranks=2"], "leave no rank of 2 to train the policy"),
        (["--parallel.tensor=2", "--ranks=3"], "does not divide its 3 ranks"),
        (["--ranks=0"], "ranks must be 1 or more or null, got 0"),
        (["--steps=1"], "steps must be 2 or more or null, got 1"),
        (["--costs=nothing.jsonl"], "nothing.jsonl: a trace must be a readable file of JSON lines"),
        ([], "runs/sft: there is no such run folder"),
    ],
)
def test_simulate_refuses_what_it_cannot_run(words, message, run_yaml, capsys):
    assert main(["simulate", str(run_yaml), *words]) == 2
    assert message in capsys.readouterr().err
