"""What saves memory changes no bit, and what a role takes is what its architecture foretold."""

import json

import pytest

from tests.ranks import run_ranks
from tests.stages.chain import run_stage
from tests.stages.test_lora import fingerprints_of, rows_of

ROLES = ("reference", "dpo", "reward_model", "policy", "critic")


def runs(chain, folder, *settings):
    """Runs of RTO, each with its settings, in this rank."""
    for number, words in enumerate(settings):
        run_stage("rto", chain, [f"--run_dir={folder}/{number}", *words])


@pytest.fixture(scope="module")
def done(chain, tmp_path_factory):
    """Run folders: nothing saved; all that saves memory, on two maps."""
    folder, tensor = tmp_path_factory.mktemp("memory"), ["--parallel.tensor=2", "--parallel.sequence=true"]
    saving = [*tensor, "--compute.offload_frozen=true"]
    full, selective = "--compute.recompute=full", "--compute.recompute=selective"
    run_ranks(
        runs, 2, chain, folder, tensor, [*saving, full], [*saving, selective, "--schedule.map=colocated"], timeout=300
    )
    return [folder / str(number) for number in range(3)]


def test_offloading_and_recomputing_change_no_bit_on_any_map(done):
    plain, *others = fingerprints_of(*done)
    assert others == [plain, plain]
    assert rows_of(done[0]) == rows_of(done[1]) == rows_of(done[2])


def numbers_of(run_dir, step):
    lines = (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, lines) if row["step"] == step)
    return {name.removeprefix("memory/"): value for name, value in row.items() if name.startswith("memory/")}


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1])
def test_each_role_takes_what_was_foretold(done, number, step):
    found = numbers_of(done[number], step)
    for role in ROLES:
        for part in ("parameters", "host", "gradients", "optimizer"):
            told = found[f"{role}_predicted_{part}_bytes"]
            assert found[f"{role}_{part}_bytes"] == pytest.approx(told, rel=0.02, abs=512), (role, part)
    frozen = ROLES[:3]
    where, elsewhere = ("host", "parameters") if number else ("parameters", "host")
    assert all(found[f"{role}_{where}_bytes"] and not found[f"{role}_{elsewhere}_bytes"] for role in frozen)
    assert found["policy_optimizer_bytes"] and found["critic_gradients_bytes"]
    assert found["peak_bytes"] > 1 << 20


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_activations_are_near_what_was_foretold_for_the_microbatches_that_came(done, number, role):
    found = numbers_of(done[number], 1)
    assert found[f"{role}_activations_bytes"] == pytest.approx(found[f"{role}_predicted_activations_bytes"], rel=0.4)


def test_recomputing_keeps_fewer_activations(done):
    none, full, selective = (numbers_of(run, 1)["policy_activations_bytes"] for run in done)
    assert full < 0.6 * none
    assert selective < 0.9 * none
