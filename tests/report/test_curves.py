"""Event files of runs -> one page; what is read, how runs are grouped, and files that are damaged."""

import json
from pathlib import Path

import pytest

from rto_megatron.__main__ import main
from rto_megatron.metrics import TensorBoardLog
from rto_megatron.report import curves
from rto_megatron.report.curves import groups_of, names_of, page, read_curves
from tests.browser import chromium, needs_browser, problems
from tests.credit.evaluations import HOSTILE
from tests.credit.test_page import data_of
from tests.report.test_command import refused


def write_run(run_dir: Path, values=(1.0, 2.0, 4.0), *, start=0, samples: int | None = 32) -> Path:
    """A run with a score a step, KL growing by 0.5, and one evaluation at its end."""
    log = TensorBoardLog(run_dir / "tensorboard", enabled=True, start=start)
    for step, value in enumerate(values, start):
        log.write(step, {"reward/score_sum": value, "kl/sequence": 0.5 * step})
    log.write(start + len(values), {"eval/score": 9.0, "eval/kl": 3.0})
    log.close()
    if samples:
        (run_dir / "run.yaml").write_text(f"stage: rto\nprompts_per_step: {samples // 2}\nsamples_per_prompt: 2\n")
    return run_dir


def events_of(run_dir: Path) -> Path:
    return next((run_dir / "tensorboard").glob("*tfevents*"))


def test_all_scalars_are_read(tmp_path):
    found = read_curves(write_run(tmp_path), "run")
    assert found.scalars == {
        "reward/score_sum": {0: 1.0, 1: 2.0, 2: 4.0},
        "kl/sequence": {0: 0.0, 1: 0.5, 2: 1.0},
        "eval/score": {3: 9.0},
        "eval/kl": {3: 3.0},
    }
    assert (found.samples_per_step, found.notes) == (32, [])


def test_a_step_that_was_run_again_counts_as_it_was_run_last(tmp_path):
    write_run(tmp_path, [1.0, 2.0, 3.0])
    write_run(tmp_path, [7.0, 8.0], start=1)
    assert read_curves(tmp_path, "run").scalars["reward/score_sum"] == {0: 1.0, 1: 7.0, 2: 8.0}


def test_a_number_that_is_none_is_left_out_and_told(tmp_path):
    found = read_curves(write_run(tmp_path, [1.0, float("nan"), float("inf"), 2.0]), "a/run")
    assert found.scalars["reward/score_sum"] == {0: 1.0, 3: 2.0}
    assert found.notes == ["a/run: reward/score_sum is no finite number at 2 steps, left out"]


def test_an_event_file_that_is_cut_off_is_read_up_to_there_and_told(tmp_path):
    path = events_of(write_run(tmp_path))
    path.write_bytes(path.read_bytes()[:-7])
    found = read_curves(tmp_path, "run")
    assert found.scalars["reward/score_sum"] == {0: 1.0, 1: 2.0, 2: 4.0} and "eval/kl" not in found.scalars
    assert len(found.notes) == 1 and found.notes[0].startswith(f"{path.name}: ")
    assert "damaged or cut off" in found.notes[0]


def test_a_file_that_holds_something_else_is_told(tmp_path):
    path = events_of(write_run(tmp_path))
    path.write_bytes(b"no events " * 100)
    with pytest.raises(ValueError, match=r"its event files hold no scalar|TensorBoard cannot read its event files"):
        read_curves(tmp_path, "run")


def test_samples_are_known_where_the_config_says_them(tmp_path):
    write_run(tmp_path, samples=None)
    assert read_curves(tmp_path, "run").samples_per_step is None
    for text, samples in (("train: {batch_size: 16}\n", 16), ("- 1\n", None), ("a: [\n", None)):
        (tmp_path / "run.yaml").write_text(text)
        assert read_curves(tmp_path, "run").samples_per_step == samples


def test_names_are_paths_without_what_all_have_in_common():
    assert names_of([Path("/runs/a/rto-seed1"), Path("/runs/a/rto-seed2")]) == ["rto-seed1", "rto-seed2"]
    assert names_of([Path("/runs/seed1/rto"), Path("/runs/seed2/ppo")]) == ["seed1/rto", "seed2/ppo"]
    assert names_of([Path("/runs/rto")]) == ["rto"]


@pytest.mark.parametrize(
    ("names", "pattern", "groups"),
    [
        (["rto-seed1", "rto_seed_2", "ppo.seed3"], curves.SEED, ["rto", "rto", "ppo"]),
        (["seed1/rto", "seed2/rto"], curves.SEED, ["rto", "rto"]),
        (["study/seed-1/rto", "study/seed-2/ppo"], curves.SEED, ["study/rto", "study/ppo"]),
        (["rto", "rto2"], curves.SEED, ["rto", "rto2"]),
        (["seed1", "seed2"], curves.SEED, ["seed1", "seed2"]),
        (["rto-a", "rto-b"], "-[ab]$", ["rto", "rto"]),
        (["rto-seed1", "rto-seed2"], None, ["rto-seed1", "rto-seed2"]),
    ],
)
def test_runs_whose_names_differ_in_the_seed_are_a_group(names, pattern, groups):
    assert groups_of(names, pattern) == groups


def test_the_command_writes_the_page_and_prints_what_was_left_out(tmp_path, capsys):
    runs = [write_run(tmp_path / f"rto-seed{i}", [1.0 + i, float("nan")]) for i in (1, 2)]
    out = tmp_path / "page.html"
    assert main(["report", "curves", *map(str, runs), f"--out={out}", "--metric=kl/sequence"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(out) and printed[1].startswith("note: rto-seed1: reward/score_sum is no finite number")
    found = data_of(out.read_text())
    assert found["first"] == "kl/sequence"
    assert [(run["name"], run["group"], run["samples"]) for run in found["runs"]] == [
        ("rto-seed1", "rto", 32),
        ("rto-seed2", "rto", 32),
    ]
    assert found["runs"][0]["scalars"]["reward/score_sum"] == [[0], [2]]


def test_wrong_words_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "a" / "rto")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([], "report curves needs at least one run folder, got none"),
        ([tmp_path / "gone"], "gone: there is no such run folder"),
        ([tmp_path / "empty"], "empty: holds no event files of TensorBoard"),
        ([tmp_path / "a"], f"name the runs in it: {run}"),
        ([run, run], f"takes each run once, got {run} twice"),
        ([run, "--metric=score"], "such as eval/score, reward/score_sum; got 'score'"),
        ([run, "--group=["], "group must be a regular expression, got '['"),
        (
            [run, f"--out={tmp_path}/no/page.html"],
            f"out {tmp_path}/no/page.html: cannot be written (No such file or directory)",
        ),
    ):
        assert message in refused(capsys, "curves", *words)


def test_more_numbers_than_a_page_takes_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MOST_NUMBERS", 3)
    found = read_curves(write_run(tmp_path), "run")  # eight numbers: three go into one
    text = page([found], ["run"])
    assert data_of(text)["runs"][0]["scalars"]["reward/score_sum"] == [[2], [2.3333]]
    assert "8 numbers are too many for a page: each shown is a mean of 3 steps" in text


def test_hostile_names_stay_texts(tmp_path):
    found = read_curves(write_run(tmp_path), "run")
    text = page([curves.Curves(name=name, scalars=found.scalars, notes=[name]) for name in HOSTILE], HOSTILE)
    text.encode("utf-8")
    assert "<img" not in text and text.count("</script>") == 2 and "\0" not in text
    assert len(json.dumps(data_of(text)["runs"])) > 100


@pytest.mark.slow
@needs_browser
def test_the_page_draws_means_bands_and_smoothing_over_any_axis(tmp_path):
    runs = [write_run(tmp_path / f"rto-seed{i}", [float(i), 2.0 * i, 4.0 * i]) for i in (1, 3)]
    runs.append(write_run(tmp_path / "ppo", [1.0, 1.0, 1.0], samples=None))
    out = tmp_path / "page.html"
    assert main(["report", "curves", *map(str, runs), f"--out={out}", "--metric=reward/score_sum"]) == 0
    ask = "return aggregate('reward/score_sum', arguments[0], arguments[1]).map(group => [group.name, group.points])"
    with chromium() as browser:
        browser.open(out)
        (rto, points), (ppo, flat) = browser.run(ask, "step", 0)
        assert (rto, ppo) == ("rto", "ppo")
        assert points[1] == {
            "step": 1,
            "x": 1,
            "y": 4,
            "low": 2,
            "high": 6,
            "deviation": pytest.approx(8**0.5),
            "count": 2,
        }
        assert [point["y"] for point in flat] == [1, 1, 1]
        # with weight 0.5 the second of 2, 4 is (0.5 * 2 + 4) / 1.5
        assert browser.run(ask, "step", 0.5)[0][1][1]["y"] == pytest.approx(10 / 3)
        assert [point["x"] for point in browser.run(ask, "samples", 0)[0][1]] == [0, 32, 64]
        assert browser.run(ask, "samples", 0)[1][1] == []
        assert [point["x"] for point in browser.run(ask, "kl", 0)[0][1]] == [0, 0.5, 1]
        count = "return document.querySelectorAll('#plot path.' + arguments[0]).length"
        assert [browser.run(count, name) for name in ("mean", "band", "run")] == [2, 1, 0]
        browser.click("#single")
        assert browser.run(count, "run") == 3
        browser.click("#legend li:nth-child(2) button")
        assert browser.run(count, "mean") == 1
        browser.run("document.getElementById('plot').focus()")
        browser.press("\ue014", "\ue014")
        assert browser.run("return document.getElementById('tip').textContent") == "step 1rto4 (2 to 6, 2 runs)"
        assert browser.run("return document.querySelector('#last tbody tr').textContent") == "rto228412" + "5.657"
        browser.run("document.getElementById('metric').append(new Option('memory/critic_predicted_'.repeat(4)))")
        browser.resize(500, 800)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "a long name widens no phone"
        # of a run alone and then two seeds: no line lies below a band
        assert main(["report", "curves", *map(str, runs[::-1]), f"--out={out}", "--metric=reward/score_sum"]) == 0
        browser.open(out)
        order = "return [...document.querySelectorAll('#plot path')].map(path => path.getAttribute('class'))"
        assert browser.run(order) == ["band", "mean", "mean"]
        ticks = "return [...document.querySelectorAll('#plot text[text-anchor=middle]')].map(tick => tick.textContent)"
        assert browser.run(ticks) == ["0", "1", "2"], "there is no half of a step"
        assert problems(browser) == []
