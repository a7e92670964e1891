"""Health alarms of a run: said once, written down, and the same however often the run was stopped."""

from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of
from tests.stages.test_stages import rows_of

BROKEN = ["--alarms.patience=3", "--alarms.max_decode_difference=0", "--checkpoint.save_every=2"]
"""The two forwards never agree to the last bit."""


def train(chain, run_dir, parts):
    """A run in parts, each longer than the one before; what was printed on the way."""
    import contextlib
    import io

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        for num_steps in parts:
            run_stage("rto", chain, [f"--run_dir={run_dir}", *BROKEN, f"--num_steps={num_steps}"])
    return [line for line in told.getvalue().splitlines() if line.startswith(("alarm", "rto "))]


def accuracies(chain):
    """Of the DPO reward on the chain's pairs, and with DPO policy and reference swapped."""
    from dataclasses import replace

    from rto_megatron.config.load import load_run
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.stages.actors import load_judges
    from rto_megatron.stages.held_out import HeldOut, dpo_accuracy
    from rto_megatron.stages.roles import tokenizer_of
    from rto_megatron.stages.rules import check_run

    config = load_run("rto", None, words_of("rto", chain))
    mesh = build_mesh(config.parallel, start_runtime(threads=1), seed=0)
    judges, tokenizer = load_judges(config, mesh), tokenizer_of(check_run(config, 1)["reference"])
    pairs = HeldOut.of_run(config, tokenizer).pairs
    swapped = replace(judges, reference=judges.dpo, dpo=judges.reference)
    return len(pairs), *(dpo_accuracy(pairs, found, config, tokenizer, mesh) for found in (judges, swapped))


def test_an_alarm_is_told_once_and_a_run_that_goes_on_knows_of_it(chain, tmp_path):
    [told] = run_ranks(train, 1, chain, tmp_path / "parts", [2, 4])
    assert [line.partition(": ")[0] for line in told if "decode_mismatch" in line] == [
        "alarm decode_mismatch at step 2"
    ]
    places = {line.split(":")[0].split("  ")[0]: place for place, line in enumerate(told)}
    assert places["rto 3/4"] < places["alarm decode_mismatch at step 2"] < places["rto 4/4"], (
        "below the line of its step"
    )
    rings = [row["alarm/decode_mismatch"] for row in rows_of(tmp_path / "parts") if "alarm/decode_mismatch" in row]
    assert rings == [0, 0, 1, 1]


def test_the_dpo_reward_is_held_against_preferences(chain, tmp_path):
    [(count, accuracy, swapped)] = run_ranks(accuracies, 1, chain)
    assert count == 16 and accuracy > 0.5
    assert swapped == 1 - accuracy
