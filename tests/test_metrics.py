"""Numbers that can be merged, the log on disk, and what a person sees."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rto_megatron.errors import UserError
from rto_megatron.metric_names import METRICS, metrics_page
from rto_megatron.metrics import Console, Max, Mean, TensorBoardLog, format_number, merge, take

ROOT = Path(__file__).parents[1]


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """A terminal that understands control sequences, wherever the tests run."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Screen()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_merged_mean_weighs_every_token_once():
    # Averages of averages would give (1 + 4) / 2 = 2.5; the four tokens 1, 4, 4, 4 have mean 3.25.
    merged = Mean.over(torch.tensor([1.0])) + Mean.over(torch.tensor([4.0, 4.0, 4.0]))
    assert merged == Mean(13.0, 4)
    assert merged.value == 3.25


def test_what_lies_outside_the_mask_is_not_counted():
    x = torch.tensor([[2.0, math.nan], [6.0, math.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert Mean.over(x, mask) == Mean(8.0, 2)
    assert Max.over(x, mask) == Max(6.0)


def test_a_mean_of_nothing_is_nan_and_changes_nothing_when_added():
    nothing = Mean.over(torch.tensor([]))
    assert math.isnan(nothing.value)
    assert (nothing + Mean(3, 2)).value == 1.5


def test_a_maximum_of_nothing_changes_nothing_when_added():
    assert Max.over(torch.tensor([])) + Max(-7.0) == Max(-7.0)


def test_shares_of_a_bool_tensor_are_means():
    assert Mean.over(torch.tensor([True, False, False, True])).value == 0.5


def test_dicts_merge_name_by_name_and_may_lack_some():
    merged = merge([{"ppo/ratio_mean": Mean(2, 2), "ppo/ratio_max": Max(1.5)}, {"ppo/ratio_mean": Mean(4, 1)}])
    assert take(merged) == {"ppo/ratio_mean": 2.0, "ppo/ratio_max": 1.5}


def test_merging_does_not_change_what_is_merged():
    parts = [{"sft/loss": Mean(1, 1)}, {"sft/loss": Mean(3, 1)}]
    merge(parts)
    assert parts[0]["sft/loss"] == Mean(1, 1)


def test_log_writes_the_same_numbers_to_tensorboard_and_to_jsonl(tmp_path):
    log = TensorBoardLog(tmp_path, enabled=True)
    log.write(0, {"kl/k1": 0.5, "ppo/clip_frac": 0.0})
    log.write(1, {"kl/k1": 0.25})
    log.close()
    assert rows_of(tmp_path) == [{"step": 0, "kl/k1": 0.5, "ppo/clip_frac": 0.0}, {"step": 1, "kl/k1": 0.25}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl/k1")] == [(0, 0.5), (1, 0.25)]


def test_log_is_on_disk_before_it_is_closed(tmp_path):
    log = TensorBoardLog(tmp_path, enabled=True)
    log.write(3, {"kl/k1": 0.5})
    assert rows_of(tmp_path) == [{"step": 3, "kl/k1": 0.5}]
    log.close()


def test_a_resumed_log_drops_what_the_killed_run_wrote_after_its_checkpoint(tmp_path):
    log = TensorBoardLog(tmp_path, enabled=True)
    for step in range(3):
        log.write(step, {"kl/k1": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as half_written:
        half_written.write('{"step": 3, "kl')
    log = TensorBoardLog(tmp_path, enabled=True, start=1)
    log.write(1, {"kl/k1": 10.0})
    log.close()
    assert rows_of(tmp_path) == [{"step": 0, "kl/k1": 0.0}, {"step": 1, "kl/k1": 10.0}]


GOOD = '{"step": 0, "kl/k1": 0.5}\n'

BAD_LINES = {
    "no JSON": b"garbage",
    "no object": b"[1]",
    "a number": b"3",
    "no step": b'{"kl/k1": 0.5}',
    "a step that is text": b'{"step": "1"}',
    "bytes": b"\xff\x00",
    "hundreds of brackets": b"[" * 5000,
}


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_row_is_named_and_nothing_is_lost(case, start, tmp_path):
    content = GOOD.encode() + BAD_LINES[case] + b"\n" + GOOD.encode()
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(
        UserError, match=r"metrics\.jsonl:2: must be a row of metrics, .* got '.*; mend or remove"
    ) as got:
        TensorBoardLog(tmp_path, enabled=True, start=start)
    assert len(str(got.value)) < 400
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("metrics.jsonl", content)]


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_half_written_last_line_is_dropped_and_a_whole_one_kept(case, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD.encode() + BAD_LINES[case])
    TensorBoardLog(tmp_path, enabled=True, start=1).close()
    assert path.read_text() == GOOD
    path.write_text("\n" + GOOD.strip())  # an editor may leave out the end of the last line
    TensorBoardLog(tmp_path, enabled=True, start=1).close()
    assert path.read_text() == GOOD


@pytest.mark.parametrize("enabled", [True, False])
def test_a_name_without_a_meaning_is_refused_on_every_rank(tmp_path, enabled):
    log = TensorBoardLog(tmp_path, enabled)
    with pytest.raises(ValueError, match=r"kl/k4: not in METRICS; give it a meaning"):
        log.write(0, {"kl/k1": 0.0, "kl/k4": 1.0})
    log.close()


def test_a_log_that_is_not_enabled_leaves_no_trace(tmp_path):
    log = TensorBoardLog(tmp_path / "run", enabled=False)
    log.write(0, {"kl/k1": 0.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_every_metric_is_grouped_and_says_what_it_means():
    for name, meaning in METRICS.items():
        assert name.count("/") == 1 and name == name.lower(), f"{name}: write it as group/name, in lower case"
        assert meaning and "\n" not in meaning, f"{name}: its meaning must be one line"


def test_the_documentation_table_is_the_one_that_the_code_holds():
    assert (ROOT / "docs/metrics.md").read_text() == metrics_page(), "run: python tools/write_metrics_doc.py"


def test_a_table_in_a_pipe_is_markdown_without_control_sequences():
    out = io.StringIO()
    Console(stream=out).table("Result", ["policy", "score"], [["sft", 0.123456], ["rto [bold]x[/bold]", -1.0]])
    assert [line.rstrip() for line in out.getvalue().splitlines() if line.strip()] == [
        "Result",
        "| policy             |  score |",
        "|--------------------|--------|",
        "| sft                | 0.1235 |",
        "| rto [bold]x[/bold] |     -1 |",
    ]


def test_progress_in_a_pipe_is_a_few_plain_lines_and_always_the_last():
    out = io.StringIO()
    with Console(stream=out).progress("sft", total=45) as steps:
        for step in range(45):
            steps.done(step, {"loss": 1 / 3})
    lines = out.getvalue().splitlines()
    assert lines[0] == "sft 2/45  loss 0.3333"
    assert lines[-1] == "sft 45/45  loss 0.3333"
    assert len(lines) == 23
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal_is_a_bar_with_live_numbers(screen):
    with Console(stream=screen).progress("rto", total=4, start=1) as steps:
        steps.done(1, {"score": 0.25})
    assert "\x1b[" in screen.getvalue()
    assert "2/4" in screen.getvalue() and "score 0.25" in screen.getvalue()


def test_a_long_line_is_not_broken_and_brackets_are_kept():
    out = io.StringIO()
    Console(stream=out).say("[red]" + "word " * 60 + ":smile:")
    assert out.getvalue() == "[red]" + "word " * 60 + ":smile:\n"


def test_ranks_that_are_not_enabled_are_silent(screen):
    console = Console(enabled=False, stream=screen)
    console.say("hello")
    console.table("t", ["a"], [[1]])
    with console.progress("rto", total=1) as steps:
        steps.done(0, {"score": 1.0})
    assert screen.getvalue() == ""


def test_a_log_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"run_dir .*tensorboard: cannot be written \(File exists\); make room, or"):
        TensorBoardLog(tmp_path / "tensorboard", enabled=True)


def test_numbers_are_shown_short():
    assert [format_number(x) for x in (0.000123456, 12345678.0, 7, "tensor 2")] == [
        "0.0001235",
        "1.235e+07",
        "7",
        "tensor 2",
    ]
