"""The study as its one command, tiny: killed on the way, started again, and gone on with by another study."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

COMMAND = [sys.executable, "-m", "examples.study.run", "smoke", "--workers=2", "--seeds=1"]


def study(out, *words):
    return subprocess.run([*COMMAND, f"--out={out}", *words], capture_output=True, text=True, timeout=600)


def files(out):
    return {path.relative_to(out) for path in (out / "records").rglob("*.json")}


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_and_another_goes_on_from_its_records(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([*COMMAND, f"--out={one}"], stdout=log, stderr=log)
    until = time.monotonic() + 300
    while not len(files(one)) > 6 and time.monotonic() < until:
        time.sleep(0.2)
    workers = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in workers if worker.is_running()], "workers end with the study"
    before = {path: (one / path).stat().st_mtime_ns for path in files(one)}
    assert 6 < len(before) < 3 * 12 + 4

    ended = study(one)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert all((one / path).stat().st_mtime_ns == when for path, when in before.items())
    assert len(files(one)) == 3 * 12 + 4 + 3  # three methods of four points on three seeds, four starts, three results
    for name in ("results.md", "results.html", "gold-samples.svg", "gold-kl.svg"):
        assert (one / "results" / name).stat().st_size > 500
    runs = [json.loads(line) for line in (one / "results" / "runs.jsonl").read_text().splitlines()]
    at = {(run["seed"], run["run"]): run for run in runs}
    rto, ppo = at[10, "rto"], at[10, "ppo"]
    assert rto["steps"] == [0, 1, 2]
    assert rto["numbers"]["gold"][0] == ppo["numbers"]["gold"][0]  # one start, the same prompts
    assert rto["numbers"]["kl"][-1] != ppo["numbers"]["kl"][-1]

    ended = study(two, f"--known={one}/results/runs.jsonl", "--seeds=2")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {path.parts[1] for path in files(two)} == {"seed-11"}
    assert "2 seeds" in (two / "results" / "results.md").read_text()

    with contextlib.suppress(FileNotFoundError):
        (one / "records" / "seed-10" / "rto.json").unlink()
    (one / "seed-10" / "rto" / "done").write_text("[]")
    ended = study(one)
    assert ended.returncode != 0
    assert "was run with other settings" in ended.stderr
