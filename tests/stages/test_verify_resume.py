"""verify-resume: what it kills is dead, what it compares it sees, and a whole proof."""

import json
import math

import psutil
import pytest
import torch

from rto_megatron.config.load import dump_run, load_run
from rto_megatron.distributed.checkpoint import relative_difference
from rto_megatron.errors import CheckpointError, ConfigError
from tests.ranks import run_ranks
from tests.stages.chain import words_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("first", "second", "off"),
    [
        ([1.0, 3.0], [1.0, 4.0], 0.25),  # 1 / (1 + 3)
        ([NAN, INF], [NAN, INF], 0.0),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([INF], [1.0], INF),
        ([1.0], [-INF], INF),
        ([], [], 0.0),
    ],
)
def test_a_number_on_one_side_alone_is_a_difference(first, second, off):
    assert relative_difference(torch.tensor(first), torch.tensor(second)) == off


def sft_config(chain, folder):
    """The YAML file of an sft run below `folder`."""
    words = [*words_of("sft", chain), f"--run_dir={folder / 'run'}", "--train.num_epochs=2"]
    path = folder / "sft.yaml"
    path.write_text(dump_run(load_run("sft", None, words)))
    return path


def start_and_kill(path):
    from rto_megatron.config.load import load_any
    from rto_megatron.stages.verify_resume import Proof

    stage, config = load_any(path, [])
    proof = Proof([stage, str(path)], config, ranks=1, steps=4)
    proof.folder.mkdir(parents=True)
    proof._go("resumed", kill_after=1)


def test_killing_a_run_kills_its_ranks(chain, tmp_path):
    run_ranks(start_and_kill, 1, sft_config(chain, tmp_path))
    assert (tmp_path / "run" / "verify-resume" / "resumed" / "checkpoints" / "latest.txt").exists()
    alive = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in alive if words and any(str(tmp_path) in word for word in words)]


@pytest.mark.parametrize(
    ("word", "says"), [("--steps=1", "steps must be 2 or more, got 1"), ("--ranks=0", "ranks must")]
)
def test_options_are_checked(word, says):
    from rto_megatron.stages.verify_resume import main

    with pytest.raises(ConfigError, match=says):
        main(None, [word])


def test_what_a_run_would_refuse_is_refused_before_anything_is_written(chain, tmp_path):
    from rto_megatron.stages.verify_resume import main

    path, run = tmp_path / "rto.yaml", tmp_path / "run"
    path.write_text(dump_run(load_run("rto", None, [*words_of("rto", chain), f"--run_dir={run}"])))
    with pytest.raises(CheckpointError, match="none: there is no such run folder"):
        main(path, [f"--reference={run / 'none'}"])
    assert not run.exists()


def prove(path):
    from rto_megatron.stages.verify_resume import main

    return main(path, ["--steps=4", "--ranks=2"])


@pytest.mark.slow
def test_a_whole_proof(chain, tmp_path):
    assert run_ranks(prove, 1, sft_config(chain, tmp_path), timeout=600) == [0]
    rows = json.loads((tmp_path / "run" / "verify-resume" / "verify-resume.json").read_text())
    assert {row["run"]: row["verdict"] for row in rows} == {
        "resumed": "equal to the last bit",
        "cold": "differs, as it must",
        "one-rank": "within 1e-05",
    }
