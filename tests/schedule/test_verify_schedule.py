"""verify-schedule: what it runs, what it sees, and a whole proof."""

import json
import shutil

import pytest

from rto_megatron.config.load import dump_run, load_run
from rto_megatron.errors import ConfigError, UserError
from rto_megatron.schedule.cast import cast_of
from tests.ranks import run_ranks
from tests.stages.chain import words_of


def config(chain, *words):
    return load_run("rto", None, [*words_of("rto", chain), *words])


def legs(chain, ranks, *words):
    from rto_megatron.stages.verify_schedule import Options, legs_of

    settings = config(chain, *words)
    return {leg.name: leg for leg in legs_of(settings, cast_of(settings, ranks), ranks, Options())}


def test_every_map_is_compared_with_the_sequential_run_at_the_same_training_layout(chain):
    found = legs(chain, 2, "--parallel.tensor=2")
    assert {name: leg.ranks for name, leg in found.items()} == {
        "sequential": 2,
        "colocated": 2,
        "fused": 2,
        "split": 4,
        "another seed": 2,
    }
    assert all("--schedule.lanes=1" in leg.words for leg in found.values())
    assert found["another seed"].must_differ and not found["split"].must_differ


@pytest.mark.parametrize("name", ["lora", "critic_lora"])
def test_adapters_are_not_tried_on_the_map_that_refuses_them(name, chain):
    assert list(legs(chain, 1, f"--{name}.rank=2")) == ["sequential", "colocated", "fused", "another seed"]


def test_lanes_are_a_number_that_all_maps_can_share(chain):
    found = legs(chain, 5, "--schedule.map=split", "--schedule.rollout_ranks=3")
    assert {leg.ranks for leg in found.values()} == {2, 5}
    assert all("--schedule.lanes=6" in leg.words for leg in found.values())


def test_a_critic_in_another_layout_is_held_to_a_tolerance(chain):
    own = ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.critic_ranks=1"]
    assert legs(chain, 3, *own)["split"].tolerance == 0
    assert legs(chain, 4, *own, "--parallel.tensor=2", "--schedule.rollout.tensor=1", "--schedule.critic.tensor=1")[
        "split"
    ].tolerance == pytest.approx(1e-5)


def test_staleness_is_compared_with_itself_under_other_pauses(chain):
    found = legs(chain, 2, "--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.staleness=1")
    assert list(found) == ["without pauses", "with pauses", "with other pauses", "another seed"]


def verdict(chain, folder, other):
    """The exit code where the fused run has ended as another run has."""
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.metrics import Console
    from rto_megatron.stages.verify_schedule import Leg, _report

    start_runtime(threads=1)
    names = {"sequential": "sft", "fused": other, "another seed": "dpo"}
    for name, run in names.items():
        shutil.copytree(chain / run, folder / name.replace(" ", "-"))
    runs = [Leg(name=name, ranks=1, words=(), must_differ=name == "another seed") for name in names]
    return _report(Console(), folder, runs, dict.fromkeys(names, 0.0))


@pytest.mark.parametrize(("other", "code"), [("sft", 0), ("dpo", 3)])
def test_a_difference_is_seen(other, code, chain, tmp_path):
    assert run_ranks(verdict, 1, chain, tmp_path, other) == [code]
    rows = {row["run"]: row["verdict"] for row in json.loads((tmp_path / "verify-schedule.json").read_text())}
    assert rows["fused"] == ("equal to the last bit" if code == 0 else "DIFFERS")
    assert (tmp_path / "fused").exists() == (code != 0)  # what differs is kept


def options(words):
    from rto_megatron.stages.verify_schedule import main

    with pytest.raises(ConfigError) as refused:
        main(None, words)
    return str(refused.value)


@pytest.mark.parametrize(
    ("word", "says"), [("--steps=0", "steps must be 1 or more, got 0"), ("--ranks=0", "ranks must")]
)
def test_options_are_checked(word, says):
    assert says in options([word])


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("--reference=RUN/none", r"RUN/none: there is no such run folder"),
        ("--data.train=RUN/none.jsonl", r"RUN/none\.jsonl: "),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_anything_is_written(lacks, says, chain, tmp_path):
    from rto_megatron.stages.verify_schedule import main

    path, run = tmp_path / "rto.yaml", tmp_path / "run"
    path.write_text(dump_run(config(chain, f"--run_dir={run}")))
    with pytest.raises(UserError, match=says.replace("RUN", str(run))):
        main(path, ["--ranks=2", lacks.replace("RUN", str(run))])
    assert not run.exists()


def prove(path):
    from rto_megatron.stages.verify_schedule import main

    return main(path, ["--steps=2", "--delay_seconds=0.01"])


@pytest.mark.slow
def test_a_whole_proof(chain, tmp_path):
    path = tmp_path / "rto.yaml"
    path.write_text(dump_run(config(chain, f"--run_dir={tmp_path / 'run'}")))
    assert run_ranks(prove, 1, path, timeout=600) == [0]
    rows = json.loads((tmp_path / "run" / "verify-schedule" / "verify-schedule.json").read_text())
    assert [row["verdict"] for row in rows] == ["", *["equal to the last bit"] * 3, "differs, as it must"]
