"""The parity certificate passes where a layout is right, and each line fails where a fault is planted for it."""

import gc
import json
from contextlib import nullcontext

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.errors import ConfigError
from tests.parity.faults import FAULTS, LAYOUTS, RATES
from tests.ranks import RanksFailed, run_ranks
from tests.stages.chain import run_stage, words_of


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


def take_alone(chain, legs):
    """Legs of one process: folder -> words of the config beyond `words`."""
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.parity.leg import walk, write_weights
    from rto_megatron.stages.rto import prepare

    runtime = start_runtime(threads=1)
    for folder, more in legs.items():
        config = load_run("rto", None, words(chain, *more))
        setup, _ = prepare(config, runtime)
        folder.mkdir(exist_ok=True)
        walk(setup, config, write_weights(folder)).save(folder)


def certify_with(faults, chain, folder, layout):
    """Name -> (lines that failed, all differences), with each fault planted in turn, and with none."""
    from rto_megatron.distributed.runtime import rank

    gc.freeze()  # Megatron collects garbage whenever its optimizer is read, among all that is imported
    found = {}
    for name in ("", *faults):
        with pytest.MonkeyPatch.context() as patch:
            if name:
                FAULTS[name].plant(patch, rank())
            certificate = certificate_of(words(chain, *layout), folder)
        found[name] = (certificate.failed, certificate.found)
    return found


def certificate_of(words, folder):
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.parity.command import compare
    from rto_megatron.stages.rto import prepare

    config = load_run("rto", None, words)
    setup, _ = prepare(config, start_runtime(threads=1))
    return compare(setup, config, folder)


@pytest.fixture(scope="module")
def alone(chain, tmp_path_factory):
    """A folder with the leg of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(take_alone, 1, chain, {folder: []})
    return folder


@pytest.fixture(scope="module")
def certified(chain, alone):
    """Of a layout, `certify_with` all faults that are planted in it; each layout's ranks are started once."""
    done = {}

    def of(layout):
        if layout not in done:
            faults = [name for name, fault in FAULTS.items() if fault.layout == layout]
            ranks = run_ranks(certify_with, 2, faults, chain, alone, LAYOUTS[layout], timeout=300)
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
    from rto_megatron.parity.lines import LINES

    assert {fault.line for fault in FAULTS.values()} == set(LINES)


def tied_sft(chain, folder):
    run_stage("sft", chain, [f"--run_dir={folder}/tied", "--model.tie_embeddings=true", "--train.max_steps=1"])


def certify_all(chain, layout, legs):
    """The lines that failed in each config, and how many there were."""
    found = [certificate_of(words(chain, *more, *layout), folder) for folder, more in legs.items()]
    return [(certificate.failed, len(certificate.found)) for certificate in found]


def test_other_optimizers_arithmetic_and_estimators_pass_too(chain, tmp_path):
    plain = ["--optimizer.distributed=false", "--critic_optimizer.distributed=false"]
    half, no_critic = ["--compute.dtype=bfloat16"], ["--advantage.estimator=reinforce_pp"]
    legs = {tmp_path / str(i): more for i, more in enumerate((plain, half, half + plain, no_critic))}
    run_ranks(take_alone, 1, chain, legs)
    # a critic has eight lines: its start, six of its update, its values afterwards
    assert run_ranks(certify_all, 2, chain, LAYOUTS["data 2"], legs) == [[([], 32)] * 3 + [([], 24)]] * 2


def test_the_two_copies_of_tied_embeddings_pass_on_two_stages(chain, tmp_path):
    run_ranks(tied_sft, 1, chain, tmp_path)
    roles = [f"--policy={tmp_path}/tied", f"--reference={tmp_path}/tied", "--allow_other_reference=true"]
    run_ranks(take_alone, 1, chain, {tmp_path / "alone": roles})
    assert run_ranks(certify_all, 2, chain, LAYOUTS["pipeline 2"], {tmp_path / "alone": roles}) == [[([], 32)]] * 2


def run_command(words):
    """The exit code of `parity` in this rank."""
    from rto_megatron.parity.command import main

    return main(None, ["--stage=rto", *words])


def run_command_with_a_fault(words, alone):
    """The same with advantages that are not whitened, against a leg that is there already."""
    from rto_megatron.distributed.runtime import rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rto_megatron.parity.command.taken_alone", lambda config, folder: nullcontext(alone))
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
    from rto_megatron.parity.command import main

    words = ["--stage=reward", f"--run_dir={tmp_path}/r", f"--start={tmp_path}", f"--data.train={tmp_path}/x.jsonl"]
    with pytest.raises(ConfigError, match="parity takes the config of an rto or ppo run, got one of reward"):
        main(None, words)
