"""Runs across hosts that share a disk alone: the bits of one host, and an end with a report when a cable is cut."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.schedule.test_maps import fingerprint_of
from tests.stages.chain import words_of
from tools.hosts import NoHosts, launch_words, make_hosts

SHORT = ["--schedule.slice_steps=2", "--schedule.pack_tokens=90", "--num_steps=20", "--checkpoint.save_every=2"]
SPLIT = ["--schedule.map=split", "--schedule.rollout_ranks=1"]
MOST_SECONDS = 120.0
"""From the cut to the end of every rank."""


@pytest.mark.slow
def test_a_cut_cable_ends_all_ranks_with_a_report_and_the_run_goes_on_to_equal_bits(chain, tmp_path):
    words = ["--nproc-per-node=1", "-m", "rto_megatron", "rto", *words_of("rto", chain), *SHORT]
    try:
        with make_hosts(2) as hosts:

            def start(name, *more):
                logs = [tmp_path / f"{name}-{host.name}.log" for host in hosts]
                told = [*words, f"--run_dir={tmp_path}/{name}", *more]
                return logs, [
                    host.start(launch_words(hosts, host, told), log) for host, log in zip(hosts, logs, strict=True)
                ]

            logs, processes = start("cut", *SPLIT)
            wait_for(lambda: "rto 5/20" in logs[0].read_text(), 180, logs)
            hosts[1].cut()
            cut = time.monotonic()
            said = ["rank 0: the run cannot go on: rank 1 is dead", "rank 1: the store of the ranks does not answer"]
            for log, words_of_it in zip(logs, said, strict=True):
                wait_for(lambda log=log, said=words_of_it: re.search(f"^{said}", log.read_text(), re.M), 180, logs)
            assert time.monotonic() - cut < MOST_SECONDS
            for log in logs:
                assert "last beat" in log.read_text(), "each host has the table"
            wait_for(lambda: all(process.poll() is not None for process in processes), 60, logs)  # torchrun too
            assert [process.returncode for process in processes] == [1, 1]

            hosts[1].mend()
            logs, processes = start("cut", *SPLIT)
            wait_for(lambda: all(process.poll() is not None for process in processes), 300, logs)
            assert [process.returncode for process in processes] == [0, 0], texts(logs)
            assert "going on after step" in logs[0].read_text()
    except NoHosts as error:
        pytest.skip(f"no hosts can be made here: {error}")
    alone = [sys.executable, "-m", "rto_megatron.launch", "--standalone", *words, f"--run_dir={tmp_path}/alone"]
    subprocess.run(alone, check=True, timeout=300, capture_output=True)
    prints = [run_ranks(fingerprint_of, 1, tmp_path / name)[0] for name in ("cut", "alone")]
    assert prints[0] == prints[1], "one host, sequential, never interrupted"


def wait_for(condition, seconds, logs):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, texts(logs)
        time.sleep(0.3)


def texts(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())
