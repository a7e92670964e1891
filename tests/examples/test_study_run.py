"""The study from start to page, tiny: one seed, three methods, two steps."""

import json
from dataclasses import replace

import pytest

from examples.study import bigrams
from tests.ranks import run_ranks

METHODS = ("dpo", "ppo", "rto")


def prepare(folder, seed):
    """A few rows of everything."""
    bigrams.write_tokenizer(folder / "tokenizer")
    bigrams.write_texts(folder / "sft.jsonl", f"texts {seed}", 16)
    bigrams.write_prompts(folder / "to_answer.jsonl", f"pairs {seed}", 40, copies=2)
    for name, count in (("train", 16), ("validation", 4), ("test", 4)):
        bigrams.write_prompts(folder / f"{name}.jsonl", name, count)


def study(out):
    """All phases in this process; then once more, which finds all of it done."""
    from examples.study.report import write_report
    from examples.study.run import TUNING_SEED, Job, choose
    from examples.study.tasks import bigram_task

    whole = bigram_task()
    task = replace(
        whole,
        prepare=prepare,
        methods=[method for method in whole.methods if method.name in METHODS],
        start=lambda *folders: [*whole.start(*folders), "--train.batch_size=8", "--train.num_epochs=1"],
        pairs=(*whole.pairs, "--train.batch_size=8", "--train.num_epochs=1"),
        reward=(),
        samples=("--prompts_per_step=8", "--samples_per_optimizer_step=8", "--num_steps=2", "--eval_every=1"),
        samples_per_step=8,
    )
    for _ in range(2):
        for seed in (TUNING_SEED, 0):
            Job(task, out, "start", seed).run()
        for method in task.methods:
            for point in range(len(method.settings())):
                Job(task, out, "tune", TUNING_SEED, method, point).run()
            Job(task, out, "test", 0, method, choose(task, out, method)).run()
        beside = task.methods[-1].pinned(1)
        Job(task, out, "test", 0, beside).run()
    write_report(task, out, [0], [*task.methods, beside])


@pytest.mark.slow
def test_a_study_runs_from_start_to_page(tmp_path):
    run_ranks(study, 1, tmp_path, timeout=600)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert list(results["methods"]) == [*METHODS, "rto-at-1"]
    assert results["methods"]["rto"]["steps"] == [0, 1, 2]
    start = results["methods"]["ppo"]["gold"][0][0]
    assert results["methods"]["rto"]["gold"][0][0] == start == results["start"]["gold"][0]  # one start, same samples
    assert results["methods"]["rto"]["gold"][0][-1] != results["methods"]["ppo"]["gold"][0][-1]
    for name in ("results.md", "results.html", "gold-samples.svg", "gold-kl.svg"):
        assert (tmp_path / "results" / name).stat().st_size > 500
    other = tmp_path / "seed-0" / "rto" / "done"
    other.write_text("[]")
    with pytest.raises(AssertionError, match="was run with other settings"):
        run_ranks(study, 1, tmp_path, timeout=600)
