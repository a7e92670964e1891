"""The launcher gives the ranks' exit codes, and hands signals on to them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest


def launch(folder, script):
    """Two ranks of a script that imports nothing heavy."""
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(script))
    words = [sys.executable, "-m", "rto_megatron.launch", "--standalone", "--nproc-per-node", "2", str(path)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(2)", 2, ""),
        ("import sys; sys.exit(75)", 75, ""),
        (
            "import os, time; os.environ['RANK'] == '0' and time.sleep(60) or os.kill(os.getpid(), 9)",
            1,
            "rank 1 ended with signal SIGKILL",
        ),
        ("raise SystemExit(7)", 1, "ended with exit code 7"),
    ],
)
def test_the_exit_code_is_the_ranks(script, code, said, tmp_path):
    process = launch(tmp_path, script)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert said in errors
    assert "Traceback" not in errors


def test_words_of_the_module_are_not_taken_for_torchruns(tmp_path):
    (tmp_path / "shows.py").write_text("import sys; print(sys.argv[1:])")
    words = [
        sys.executable,
        "-m",
        "rto_megatron.launch",
        "--standalone",
        "-m",
        "shows",
        "--start=a",
        "--log",
        "--",
        "-m",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.stdout.strip() == "['--start=a', '--log', '--', '-m']", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_are_asked_to_stop_and_not_killed(number, tmp_path):
    script = f"""
        import os, pathlib, signal, sys, time
        here = pathlib.Path({str(tmp_path)!r})
        asked = []
        signal.signal({int(number)}, lambda *_: asked.append(1))
        (here / f"ready-{{os.environ['RANK']}}").touch()
        while not asked:
            time.sleep(0.05)
        time.sleep(1)  # the end of the step, and the save
        (here / f"saved-{{os.environ['RANK']}}").touch()
        while len(list(here.glob("saved-*"))) < 2:
            time.sleep(0.05)
        sys.exit(75)
    """
    process = launch(tmp_path, script)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_ranks_that_do_not_listen_yet_are_to_be_started_again(tmp_path):
    script = f"""
        import os, pathlib, time
        (pathlib.Path({str(tmp_path)!r}) / f"ready-{{os.environ['RANK']}}").touch()
        time.sleep(60)
    """
    process = launch(tmp_path, script)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors


@pytest.mark.slow
def test_a_rank_that_was_stopped_does_not_outlive_the_others(tmp_path):
    script = f"""
        import os, pathlib, signal, time
        pid = pathlib.Path({str(tmp_path)!r}) / "pid"
        if os.environ["RANK"] == "0":
            pid.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        while not pid.exists() or psutil.Process(int(pid.read_text())).status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
        raise SystemExit(1)
    """
    process = launch(tmp_path, "import psutil\n" + textwrap.dedent(script))
    _, errors = process.communicate(timeout=100)  # torchrun gives it 30 seconds to hear a SIGTERM
    assert process.returncode == 1
    assert "rank 0 ended with signal SIGKILL" in errors
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
