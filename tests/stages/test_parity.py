"""The parity certificate passes where a layout is right, and each line fails where a fault is planted for it."""

import json
from contextlib import nullcontext

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.errors import ConfigError
from tests.ranks import RanksFailed, run_ranks
from tests.stages.chain import words_of
from tests.stages.faults import FAULTS, LAYOUTS, RATES


def words(chain, *more):
    """RTO in which every line has something to show.

    A policy that is not the reference, or the KL term is 0; an entropy bonus, or the loss is, as the mean of whitened
    advantages; one minibatch, so that no loss follows an optimizer step; warm-ups that tell the roles' rates apart.
    """
    return [
        *words_of("rto", chain),
        f"--policy={chain}/dpo",
        "--rto.dpo_clip=0.05",
        "--ppo.entropy_coef=0.01",
        "--samples_per_optimizer_step=8",
        f"--optimizer.warmup_frac={RATES['policy']}",
        f"--critic_optimizer.warmup_frac={RATES['critic']}",
        *more,
    ]


def take_alone(chain, folder):
    """The leg of one process, kept in a folder."""
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.stages.parity_leg import walk, write_weights
    from rto_megatron.stages.rto import prepare

    config = load_run("rto", None, words(chain))
    setup, _ = prepare(config, start_runtime(threads=1))
    walk(setup, config, write_weights(folder)).save(folder)


def certify_with(faults, chain, folder, layout):
    """Name -> (lines that failed, all differences), with each fault planted in turn, and with none."""
    from rto_megatron.distributed.runtime import rank, start_runtime
    from rto_megatron.stages.parity import compare
    from rto_megatron.stages.rto import prepare

    runtime, found = start_runtime(threads=1), {}
    for name in ("", *faults):
        with pytest.MonkeyPatch.context() as patch:
            if name:
                FAULTS[name].plant(patch, rank())
            config = load_run("rto", None, words(chain, *layout))
            setup, _ = prepare(config, runtime)
            certificate = compare(setup, config, folder)
        found[name] = (certificate.failed, certificate.found)
    return found


@pytest.fixture(scope="module")
def alone(chain, tmp_path_factory):
    """A folder with the leg of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(take_alone, 1, chain, folder)
    return folder


@pytest.fixture(scope="module")
def certified(chain, alone):
    """Of a layout, `certify_with` all faults that are planted in it; each layout's ranks are started once."""
    done = {}

    def of(layout):
        if layout not in done:
            faults = [name for name, fault in FAULTS.items() if fault.layout == layout]
            ranks = run_ranks(certify_with, 2, faults, chain, alone, LAYOUTS[layout])
            assert ranks[0] == ranks[1]
            done[layout] = ranks[0]
        return done[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_right_passes_with_room(layout, certified):
    failed, found = certified(layout)[""]
    assert failed == []
    # the machine's rounding may double without a line failing
    assert {line: d.used for line, d in found.items() if d.used > 0.5} == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_line_first(name, certified):
    failed, found = certified(FAULTS[name].layout)[name]
    assert failed[:1] == [FAULTS[name].line]
    assert found[failed[0]].where


def test_every_line_has_a_fault_that_it_alone_is_first_to_see():
    from rto_megatron.stages.parity_lines import LINES

    assert {fault.line for fault in FAULTS.values()} == set(LINES)


def run_command(words):
    """The exit code of `parity` in this rank."""
    from rto_megatron.stages import parity

    return parity.main(None, ["--stage=rto", *words])


def run_command_with_a_fault(words, alone):
    """The same with advantages that are not whitened, against a leg that is there already."""
    from rto_megatron.distributed.runtime import rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rto_megatron.stages.parity.one_process", lambda config, folder: nullcontext(alone))
        FAULTS["advantages are not whitened"].plant(patch, rank())
        return run_command(words)


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_certifies_a_layout_and_leaves_the_run_in_its_folder_alone(chain, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest.txt").write_text("somebody's run\n")
    before = files_below(tmp_path)
    more = [f"--run_dir={tmp_path}", "--parallel.tensor=2", "--samples_per_optimizer_step=4"]
    assert run_ranks(run_command, 2, words(chain, *more)) == [0, 0]
    after = files_below(tmp_path)
    assert after.keys() - before.keys() == {"parity/parity.md", "parity/parity.json"}
    assert before.items() <= after.items()
    certificate = json.loads(after["parity/parity.json"])
    assert certificate["passed"]
    assert certificate["about"]["layout"] == "tensor 2 x pipeline 1 x data 1"
    assert certificate["about"]["step"] == "8 responses, 96 tokens, 2 minibatches"
    assert b"**PASS: all 32 lines are within their tolerance.**" in after["parity/parity.md"]


def test_the_command_ends_with_3_and_says_which_line_failed_first(chain, alone, tmp_path):
    more = [f"--run_dir={tmp_path}", "--parallel.tensor=2"]
    assert run_ranks(run_command_with_a_fault, 2, words(chain, *more), alone) == [3, 3]
    certificate = json.loads((tmp_path / "parity" / "parity.json").read_text())
    assert not certificate["passed"]
    assert certificate["verdict"].endswith("of 32 lines, the first of them advantage/whitened")
    failed = {row["line"]: row for row in certificate["lines"] if not row["passed"]}
    assert failed["advantage/whitened"]["where"].startswith("row ")


def test_what_stops_the_one_process_is_told(chain, tmp_path):
    more = [f"--run_dir={tmp_path}", "--prompts_per_step=64"]
    with pytest.raises(RanksFailed, match=r"one process of parity ended with exit code 2:\n.*16 prompts are left"):
        run_ranks(run_command, 1, words(chain, *more))
    assert files_below(tmp_path) == {}


def test_the_config_of_another_stage_is_refused(tmp_path):
    from rto_megatron.stages.parity import main

    words = ["--stage=reward", f"--run_dir={tmp_path}/r", f"--start={tmp_path}", f"--data.train={tmp_path}/x.jsonl"]
    with pytest.raises(ConfigError, match="parity takes the config of an rto or ppo run, got one of reward"):
        main(None, words)
