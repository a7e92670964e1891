"""Grades of held-out answers by a function of the user's: in training, in `evaluate`, and the best by them."""

import json

import pytest

from rto_megatron.errors import ConfigError
from rto_megatron.stages.answer_files import alpaca_eval, arena_hard, labels_of
from rto_megatron.stages.grader import load_grader, win_rate
from tests.ranks import run_ranks
from tests.stages.chain import run_stage

SHORT = "tests.stages.graders:shortness"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:f", "cannot be imported: No module named 'no'"),
        ("tests.stages.graders:nothing", "cannot be imported: .*no attribute 'nothing'"),
        ("tests.stages.graders", "must name a function as module:function"),
        ("tests.stages.graders:__doc__", "must name a function as module:function"),
    ],
)
def test_a_grader_that_there_is_not_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        load_grader(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "must give 2 numbers, one a response, gave 1"),
        ("not_finite", "must give finite numbers, gave nan"),
        ("fails", "failed with TimeoutError: the judge does not answer"),
    ],
)
def test_grades_that_are_none_are_refused(name, message):
    name = f"tests.stages.graders:{name}"
    with pytest.raises(ConfigError, match=f"grader {name}: {message}"):
        load_grader(name)(["a", "b"], ["c", "d"])


def test_a_tie_counts_half():
    assert win_rate([1, 2, 3, 0], [0, 2, 4, -1]) == 2.5 / 4


def test_the_best_checkpoint_by_a_grader_stays_beside_the_last(chain, tmp_path):
    words = [f"--run_dir={tmp_path}", f"--grader={SHORT}", "--num_steps=4", "--eval_every=1"]
    saves = ["--checkpoint.save_every=1", "--checkpoint.keep_last=1", "--checkpoint.keep_best=true"]
    run_ranks(run_stage, 2, "rto", chain, [*words, *saves, "--checkpoint.best_metric=eval/grade"])
    rows = [json.loads(line) for line in (tmp_path / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    grades = [row["eval/grade"] for row in rows]
    assert rows[0]["eval/grade_win_rate"] == rows[0]["eval/win_rate"] == 0.5  # the reference itself
    assert len(set(grades)) > 1
    best = max(range(1, 5), key=lambda step: grades[step])  # the first of equals; nothing is saved before step 1
    root = tmp_path / "checkpoints"
    assert (root / "best.txt").read_text() == f"step_{best:08d}\n"
    assert {path.name for path in root.glob("step_*")} == {f"step_{best:08d}", "step_00000004"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint.best_metric=eval/grade"], "must be a held-out metric of this run .*, got eval/grade"),
        (["--checkpoint.best_metric=ppo/loss"], r"must be .* \(eval/score, eval/kl, .*, got ppo/loss"),
    ],
)
def test_the_best_is_known_by_what_the_run_measures(words, message, tmp_path):
    from rto_megatron.config.load import load_run
    from rto_megatron.stages.resume import best_metric_of
    from tests.stages.chain import words_of

    with pytest.raises(ConfigError, match=f"checkpoint.best_metric {message}"):
        best_metric_of(load_run("rto", None, [*words_of("rto", tmp_path), *words]))


def test_evaluate_writes_grades_and_the_files_of_the_benchmarks(chain, tmp_path):
    rows = [json.loads(line) for line in (chain / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"question_id": f"q{i}", "dataset": "cats"} for i, row in enumerate(rows)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(
        run_stage, 1, "evaluate", chain,
        [f"--run_dir={tmp_path}/out", f"--prompts={tmp_path}/prompts.jsonl", f"--grader={SHORT}", "--max_prompts=6"],
    )  # fmt: skip
    sft, dpo = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    answers = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert sft["grade_win_rate"] == 0.5
    assert dpo["grade"] == pytest.approx(-sum(len(row["responses"]["dpo"]) for row in answers) / 6)
    alpaca = json.loads((tmp_path / "out" / "alpaca_eval" / "dpo.json").read_text())
    assert [set(row) for row in alpaca] == [{"instruction", "output", "generator", "dataset"}] * 6
    assert [row["output"] for row in alpaca] == [row["responses"]["dpo"] for row in answers]
    assert {(row["generator"], row["dataset"]) for row in alpaca} == {("dpo", "cats")}
    arena = [json.loads(line) for line in (tmp_path / "out" / "arena_hard" / "sft.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in arena] == [f"q{i}" for i in range(6)]
    assert [row["choices"][0]["turns"][0]["content"] for row in arena] == [row["responses"]["sft"] for row in answers]
    assert {row["model_id"] for row in arena} == {"sft"}
    assert len({row["answer_id"] for row in arena}) == 6
    assert all(row["tstamp"] > 1.7e9 for row in arena)


def test_a_question_without_an_id_gets_one_from_its_text(tmp_path):
    from rto_megatron.data.readers import PromptRow

    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "dropped"}\n{"prompt": "Why?"}\n{"prompt": "Who?", "question_id": 7}\n')
    prompts = [PromptRow(prompt_ids=[1], text=text, index=i) for i, text in ((1, "Why?"), (2, "Who?"))]
    why, who = labels_of(str(path), prompts)
    assert who == {"question_id": "7", "dataset": "asked"}
    assert why["question_id"] == labels_of(str(path), prompts)[0]["question_id"] != who["question_id"]
    assert json.loads(alpaca_eval("a", prompts, [why, who], ["x", "ü"]))[1]["output"] == "ü"
    lines = arena_hard("a", [why, who], ["x", "ü"], [1, 2]).splitlines()
    assert json.loads(lines[1])["choices"] == [{"index": 0, "turns": [{"content": "ü", "token_len": 2}]}]
