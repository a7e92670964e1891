"""`report timeline` on the command line: what it writes and prints, and what it refuses."""

import pytest

from rto_megatron.__main__ import main
from rto_megatron.schedule.trace import Row, write_trace
from tests.report.traces import row, two_ranks, write


def refused(capsys, *words):
    """The message of a command line that is refused."""
    assert main(["report", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_the_page_is_written_into_the_run_folder_and_named(tmp_path, capsys):
    two_ranks(tmp_path)
    assert main(["report", "timeline", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "timeline.html")
    assert printed[1].startswith("measured: 2 ranks, 4 items in 10 seconds, 2 seconds per step")
    assert (tmp_path / "timeline.html").read_text().startswith("<!doctype html>")


def test_out_names_another_file(tmp_path, capsys):
    two_ranks(tmp_path)
    assert main(["report", "timeline", str(tmp_path), f"--out={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").exists() and not (tmp_path / "timeline.html").exists()


def test_steps_picks_steps_with_both_ends(tmp_path, capsys):
    write(tmp_path, 0, [row(step=step, start=step, end=step + 1) for step in range(5)])
    assert main(["report", "timeline", str(tmp_path), "--steps=1:3"]) == 0
    assert "1 rank, 3 items in 3 seconds" in capsys.readouterr().out


def test_a_simulated_trace_stands_beside_the_measured_one(tmp_path, capsys):
    two_ranks(tmp_path)
    write_trace(tmp_path / "simulated.jsonl", [Row(**row(rank=-1, end=8.0))])
    assert main(["report", "timeline", str(tmp_path), f"--simulated={tmp_path / 'simulated.jsonl'}"]) == 0
    assert "simulated: 1 group, 1 items in 8 seconds" in capsys.readouterr().out


def test_what_was_left_out_is_printed(tmp_path, capsys):
    write(tmp_path, 0, [row()], tail='{"group"')
    assert main(["report", "timeline", str(tmp_path)]) == 0
    assert "note: rank_0.jsonl:2: a row was cut off" in capsys.readouterr().out


def test_steps_that_the_trace_has_not_are_refused(tmp_path, capsys):
    two_ranks(tmp_path)
    assert "has no rows of steps 7 to 9, only of 0 to 1" in refused(capsys, "timeline", tmp_path, "--steps=7:9")


@pytest.mark.parametrize("steps", ["3", "3:1", "a:b", ":", "-1:2"])
def test_steps_must_be_two_numbers_in_order(tmp_path, capsys, steps):
    error = refused(capsys, "timeline", tmp_path, f"--steps={steps}")
    assert f"steps must be FIRST:LAST, two step numbers in order, got '{steps}'" in error


@pytest.mark.parametrize(("words", "got"), [([], "none"), (["heatmap", "runs/x"], "'heatmap'"), (["--out=x"], "none")])
def test_a_page_must_be_named(capsys, words, got):
    assert f"report needs the name of a page, one of timeline, credit, curves, got {got}" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "got"), [([], "none"), (["--steps=1:2"], "none"), (["runs/a", "runs/b"], "2: runs/a, runs/b")]
)
def test_the_timeline_is_of_one_run(capsys, words, got):
    assert f"report needs one run folder here, got {got}" in refused(capsys, "timeline", *words)


def test_other_words_are_refused(tmp_path, capsys):
    assert "got '--stepz=1:2' too" in refused(capsys, "timeline", tmp_path, "--stepz=1:2")


def test_a_simulated_trace_must_be_whole(tmp_path, capsys):
    two_ranks(tmp_path)
    (tmp_path / "simulated.jsonl").write_text('{"group"')
    error = refused(capsys, "timeline", tmp_path, f"--simulated={tmp_path / 'simulated.jsonl'}")
    assert "simulated.jsonl: a trace must be whole; simulated.jsonl:1: a row was cut off" in error


def test_a_page_that_cannot_be_written_is_an_error(tmp_path, capsys):
    two_ranks(tmp_path)
    error = refused(capsys, "timeline", tmp_path, f"--out={tmp_path / 'no' / 'page.html'}")
    assert "page.html: cannot be written (No such file or directory); make room, or set another out" in error


def test_help_lists_the_pages(capsys):
    assert main(["report", "--help"]) == 0
    assert "what ran when, on every rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "option"), [("timeline", "--simulated"), ("credit", "--checkpoint"), ("curves", "--group")]
)
def test_help_of_a_page_lists_its_options(capsys, page, option):
    with pytest.raises(SystemExit) as stopped:
        main(["report", page, "--help"])
    assert stopped.value.code == 0
    assert option in capsys.readouterr().out
