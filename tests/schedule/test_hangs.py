"""A rank that is killed, stopped, or asleep at a random item of a real run ends all ranks, with a report."""

import random
import re
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.stages.chain import words_of

RANK = """
    import os, random, signal, sys, time
    from functools import partial
    from rto_megatron.distributed.runtime import prepare_imports
    prepare_imports()
    from rto_megatron.__main__ import main
    from rto_megatron.errors import DataError
    from rto_megatron.stages import interleaved, rto, run

    culprit, deed, after = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rto.Watchdog = partial(rto.Watchdog, beat_seconds=0.3, dead_seconds=4)
    begun = [0]

    def refuse():
        raise DataError("p.jsonl:2: is no object")

    def strikes(work):
        def wrapped(*words, **more):
            begun[0] += os.environ["RANK"] == str(culprit)
            if begun[0] == after:
                print("is about to", flush=True)
                time.sleep(0.4 * random.random())  # some beat may come before, some may not
                {
                    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
                    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
                    "asleep": lambda: time.sleep(300),
                    "refuses": refuse,
                }[deed]()
            return work(*words, **more)
        return wrapped

    interleaved.RTOWork.run = strikes(interleaved.RTOWork.run)
    rto.roll_out = strikes(rto.roll_out)
    sys.exit(main(sys.argv[4:]))
"""
COLOCATED = (2, ["--schedule.map=colocated", "--schedule.lanes=2"])
SEQUENTIAL = (2, ["--schedule.lanes=2"])
SPLIT = (3, ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.critic_ranks=1"])
TENSOR = (
    3,
    ["--parallel.tensor=2", "--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.rollout.tensor=1"],
)
SLOW = pytest.mark.slow
CASES = [
    (SPLIT, "killed", 1),
    (COLOCATED, "stopped", 2),
    (SPLIT, "asleep", 3),
    pytest.param(TENSOR, "asleep", 4, marks=SLOW),
    pytest.param(TENSOR, "stopped", 5, marks=SLOW),
    pytest.param(TENSOR, "killed", 6, marks=SLOW),
    pytest.param(SEQUENTIAL, "asleep", 7, marks=SLOW),
    pytest.param(SEQUENTIAL, "killed", 8, marks=SLOW),
    pytest.param(COLOCATED, "asleep", 9, marks=SLOW),
]
ITEM = r"(prefill|decode|score|advantage|train|optimizer|refit|boundary|save|generate|update|waiting|between items)"


@pytest.mark.parametrize(("where", "deed", "seed"), CASES)
@pytest.mark.parametrize("launcher", ["rto_megatron.launch", pytest.param("torch.distributed.run", marks=SLOW)])
def test_all_ranks_end_with_a_report(where, deed, seed, launcher, chain, tmp_path):
    world, _ = where
    rng = random.Random(seed)
    culprit, after = rng.randrange(world), rng.randint(3, 6) if where is SEQUENTIAL else rng.randint(60, 120)
    code, output, seconds = run_until(tmp_path, launcher, where, [culprit, deed, after], chain)

    assert code == 1, output
    assert seconds < 40, output
    found = {
        "killed": f"rank {culprit} is dead: its process is gone, last seen in {ITEM} '",
        "stopped": f"rank {culprit} is dead: no sign of life for .* s, last seen in {ITEM} '",
        "asleep": f"stuck in {ITEM} '.*rank {culprit} (for .* s|is at rank.py:.* wrapped)",
    }[deed]
    for rank in range(world):
        if rank != culprit or deed == "asleep":
            assert re.search(f"^rank {rank}: the run cannot go on: {found}", output, re.MULTILINE), output
        at = "rank.py:.* wrapped" if deed == "asleep" and rank == culprit else ".*py:"
        star = r"\*" if rank == culprit else "[ *]" if deed == "asleep" else " "
        assert re.search(rf"^{star}  {rank} +\S+ +{ITEM} .* s .*{at}", output, re.MULTILINE), output
        assert re.search(rf"^  rank {rank}: {ITEM} .*s;", output.partition("last items")[2], re.MULTILINE), output
    if where is not SEQUENTIAL:
        assert re.search(r"^queues:\n  rank \d: group 0 before ", output, re.MULTILINE), output
    assert output.count("last beat") == 1, "one rank a node prints the table"
    if launcher == "rto_megatron.launch":  # torchrun prints its own
        assert "Traceback" not in output


@pytest.mark.parametrize(("where", "culprit", "after"), [(SPLIT, 2, 40), pytest.param(SEQUENTIAL, 1, 3, marks=SLOW)])
def test_what_the_user_did_wrong_on_one_rank_is_told_once(where, culprit, after, chain, tmp_path):
    code, output, seconds = run_until(tmp_path, "rto_megatron.launch", where, [culprit, "refuses", after], chain)
    assert code == 2, output
    assert seconds < 20, output
    assert output.endswith(f"is about to\nerror on rank {culprit}: p.jsonl:2: is no object\n")
    assert output.count("is no object") == 1, output
    assert "Traceback" not in output and "last beat" not in output and "rank 0:" not in output, output


def run_until(folder, launcher, where, deed, chain):
    """Exit code, output, and seconds from the deed to the end of the last rank."""
    world, layout = where
    short = ["--schedule.slice_steps=2", "--schedule.pack_tokens=90", "--schedule.hang_seconds=3", "--num_steps=1000"]
    words = [*deed, "rto", *words_of("rto", chain), f"--run_dir={folder}/run", *short, *layout]
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    command = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", world, script, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        ranks, lines, since = [], [], 0.0
        try:
            for line in process.stdout:
                lines.append(line)
                if "is about to" in line:
                    since = time.monotonic()
                    ranks = psutil.Process(process.pid).children(recursive=True)
            process.wait(timeout=60)
            _, survivors = psutil.wait_procs(ranks, timeout=5)
            assert not survivors, "".join(lines)
            assert since, "".join(lines)
        finally:
            for rank in ranks:
                if rank.is_running():
                    rank.kill()
    return process.returncode, "".join(lines), time.monotonic() - since
