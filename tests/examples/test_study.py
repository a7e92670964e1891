"""The study's task, grids, labels, statistics and page, without a model."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from examples.study import bigrams, sentiment
from examples.study.figures import Line, draw, ticks
from examples.study.records import Record, read, write, write_all
from examples.study.report import collapsed, contrasts, page, summarise
from examples.study.run import Study, main
from examples.study.statistics import band, band_of, first_reach
from examples.study.tasks import TASKS, label_pairs
from rto_megatron.config.load import load_run
from rto_megatron.errors import ConfigError


def test_a_tenth_of_the_bigrams_pays_and_a_tenth_costs():
    table = list(itertools.chain(*bigrams.rewards()))
    assert (table.count(1), table.count(-1), len(table)) == (25, 25, 256)


def test_gold_is_the_sum_of_the_true_credit_of_each_symbol():
    [good] = [(a, b) for a, row in enumerate(bigrams.rewards()) for b, r in enumerate(row) if r == 1][:1]
    one, two = (bigrams.SYMBOLS[place] for place in good)
    assert bigrams.credit(f"{two} {one}", two) == [1]
    assert bigrams.gold([one, one], [two, ""]) == [1, 0]


def test_no_walk_beats_the_best_and_one_reaches_it():
    draw_, prompts = random.Random(0), [" ".join(bigrams.walk(random.Random(i), bigrams.PROMPT)) for i in range(20)]
    walks = [" ".join(bigrams.walk(draw_, bigrams.RESPONSE)) for _ in prompts]
    assert sum(bigrams.gold(prompts, walks)) / 20 <= bigrams.best(prompts)

    def greedy(at, left):
        """The most that can still be had, by trying all: on a short walk."""
        if not left:
            return 0
        return max(bigrams.rewards()[at][b] + greedy(b, left - 1) for b in range(bigrams.NUM_SYMBOLS))

    values = [0] * bigrams.NUM_SYMBOLS
    for _ in range(3):
        values = [max(r + v for r, v in zip(row, values, strict=True)) for row in bigrams.rewards()]
    assert values == [greedy(at, 3) for at in range(bigrams.NUM_SYMBOLS)]


def test_the_tokenizer_has_a_token_a_symbol_and_some_close_a_sentence(tmp_path):
    from rto_megatron.data.tokenizer import load_tokenizer

    bigrams.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = " ".join(bigrams.walk(random.Random(3), 9))
    ids = tokenizer.encode(text)
    assert len(ids) == 9
    assert tokenizer.decode(ids) == text
    assert tokenizer.render([{"role": "user", "content": text}])[-9:] == ids
    assert sum(tokenizer.decode([i]).endswith(".") for i in range(tokenizer.vocab_size)) == 4


def test_labels_follow_gold_with_noise_and_equal_or_empty_answers_make_no_pair(tmp_path):
    task = TASKS["bigrams"]()
    [(a, b)] = [(a, b) for a, row in enumerate(bigrams.rewards()) for b, r in enumerate(row) if r == 1][:1]
    worse = next(c for c, r in enumerate(bigrams.rewards()[a]) if r == 0)
    prompt, good, bad = (bigrams.SYMBOLS[place] for place in (a, b, worse))
    rows = [(good, bad)] * 4000 + [(good, good), ("", good)]
    answers = [{"prompt": prompt, "response": text} for pair in rows for text in pair]
    bigrams.write_rows(tmp_path / "answers.jsonl", answers)
    label_pairs(task, tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl", seed=0)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 4000
    right = sum(pair["chosen"] == good for pair in pairs) / 4000
    assert right == pytest.approx(1 / (1 + np.exp(-1 / task.noise)), abs=0.03)


def test_of_several_answers_those_with_most_and_least_gold_become_the_pair(tmp_path):
    task = replace(TASKS["bigrams"](), copies=4, noise=0.01, gold=lambda _, texts: [float(text) for text in texts])
    rows = [{"prompt": "p", "response": text} for text in ("2", "5", "-3", "4", "1", "1", "1.0", "0.5")]
    bigrams.write_rows(tmp_path / "answers.jsonl", rows)
    label_pairs(task, tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl", seed=0)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("5", "-3"), ("1", "0.5")]


def test_a_task_with_one_start_makes_it_once_for_all_seeds(tmp_path):
    task = replace(TASKS["bigrams"](), one_start=True)
    [ppo] = [method for method in task.methods if method.name == "ppo"]
    study = Study(task, tmp_path, range(10, 12), [ppo], points={"ppo": 0})
    assert [job.seed for job in study.starts()] == [0]
    assert {job.start for job in study.tests()} == {tmp_path / "seed-0"}
    write(tmp_path / "records", record(0, "start", 0.0))
    for seed in study.seeds:
        assert study.is_due(study.starts()[0])
        write(tmp_path / "records", record(seed, "ppo", 1.0, (*ppo.words, *ppo.settings()[0])))
    assert not study.is_due(study.starts()[0])


def test_praise_counts_once_and_is_clipped(tmp_path, monkeypatch):
    scorer = {"bias": -0.5, "weights": {"good": 1.5, "bad": -2.0, "don't": 0.25, "great": 9}}
    (tmp_path / "gold_unigram_lr.json").write_text(json.dumps(scorer))
    monkeypatch.setenv(sentiment.DATA, str(tmp_path))
    texts = ["Good, GOOD good!", "a bad film", "don't", "", "great"]
    assert sentiment.gold([""] * 5, texts) == [1.0, -2.5, -0.25, -0.5, 4.0]


def test_a_seed_has_its_own_prompts_for_training_and_shares_all_else(tmp_path, monkeypatch):
    monkeypatch.setenv(sentiment.DATA, str(tmp_path))
    for split in ("train", "eval"):
        rows = [
            {"prompt": f"{split} {i}", "reference": f"goes on {i}"} for i in range(4000 if split == "train" else 400)
        ]
        bigrams.write_rows(tmp_path / f"imdb_prompts_{split}.jsonl", rows)
    names = ("sft", "to_answer", "train", "validation", "test")
    seen = {}
    for seed in (0, 1):
        sentiment.prepare(tmp_path / str(seed), seed)
        seen[seed] = {
            name: [
                json.loads(line)["prompt"] for line in (tmp_path / str(seed) / f"{name}.jsonl").read_text().splitlines()
            ]
            for name in names
        }
    for mine in seen.values():
        assert mine["to_answer"][:: sentiment.COPIES] == mine["to_answer"][1 :: sentiment.COPIES]
        assert sum(map(len, (set(mine[name]) for name in names))) == len(set().union(*map(set, mine.values())))
    assert seen[0]["train"] != seen[1]["train"]
    for name in set(names) - {"train"}:
        assert seen[0][name] == seen[1][name]


@pytest.mark.parametrize("name", TASKS)
def test_every_method_has_a_grid_of_one_size_whose_settings_its_stage_takes(name):
    task = TASKS[name]()
    assert {len(method.settings()) for method in task.methods} == {4}
    for method, words in ((m, words) for m in task.methods for words in m.settings()):
        if method.stage == "dpo":
            needs = ["--run_dir=a", "--start=b", "--data.train=c", *task.pairs]
        else:
            roles = [f"--{role}={role}" for role in ("policy", "reference", "dpo", "reward_model")]
            needs = ["--run_dir=a", *roles, "--data.train=c", *task.samples, *task.answers]
        config = load_run(method.stage, None, [*needs, *method.words, *words])
        if method.stage != "dpo":
            samples = config.prompts_per_step * config.samples_per_prompt
            assert samples == task.samples_per_step


def test_a_band_is_of_means_of_resampled_seeds():
    found = band([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert 1.5 < found.low < 2.0 < 4.0 < found.high < 4.5
    assert band([2.0, 2.0]) == band([2.0] * 2)
    assert band([0.1, 0.2, 0.3] * 2).excludes_zero
    assert not band([-0.1, 0.2, 0.3] * 2).excludes_zero
    assert not band([0.1, 0.2, 0.3]).excludes_zero  # by chance one time in four


def test_a_level_is_first_reached_on_the_line_between_two_evaluations():
    assert first_reach([0, 100, 200], [0, 2, 6], 4) == 150
    assert first_reach([0, 100, 200], [0, 5, 3], 4) == 80
    assert first_reach([0, 100], [0, 1], 4) is None
    assert first_reach([0, 100], [5, 1], 4) == 0


def test_resamples_that_never_get_there_make_the_band_open():
    curves = np.array([[0.0, 1.0], [0.0, 9.0], [0.0, 9.0]])
    found = band_of(lambda seeds: first_reach([0, 100], curves[seeds].mean(0).tolist(), 5.0), 3)
    assert found.mean == pytest.approx(100 * 5 / (19 / 3))
    assert found.high == np.inf


def test_the_page_says_who_leads_and_where_the_proxy_was_hacked():
    base = {
        "samples": True,
        "chosen": ("--a=1",),
        "tried": [{"words": ("--a=1",), "gold": [1.0, 2.0]}],
        "steps": [0, 1, 2],
    }
    shape = {name: [[0.0, 1.0, 2.0]] * 6 for name in ("kl", "win_rate", "length", "return")}
    found = {
        "ppo": base
        | shape
        | {"title": "PPO", "gold": [[0, 3, 2], [0, 3.5, 2], [0, 4, 2]] * 2, "score": [[0, 1, 2]] * 6},
        "rto": base | shape | {"title": "RTO", "gold": [[0, 4, 6], [0, 5, 6], [0, 4, 7]] * 2, "score": [[0, 1, 2]] * 6},
    }
    start = {"reward_accuracy": [0.6] * 6, "dpo_accuracy": [0.7] * 6, "gold": [0.0] * 6}
    results = {"task": "t", "seeds": [*range(6)], "samples_per_step": 10, "best": 9.0, "start": start, "methods": found}
    found["ddpo"] = found["rto"] | {"title": "DDPO", "gold": [[0, 1, 6], [0, 2, 6], [0, 3, 7]] * 2}
    text = page(results | {"summary": summarise(found, 10), "contrasts": contrasts(found)})
    assert "| RTO - DDPO | 0.00 (0.00 to 0.00) ? | 1.17 (0.83 to 1.50) | the same DPO reward" in text
    assert "| RTO | **a=1** | 1.50 | 1.00, 2.00 |" in text
    assert "At equal samples RTO is above PPO by gold: lead 4.33 (4.00 to 4.67)." in text
    assert "RTO's mean reaches PPO's final gold after 0.23" in text  # 2 of 4.33 on the way to 10 of 20 samples
    assert (
        "| PPO | -1.50 (-1.83 to -1.17) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 0 of 6 | proxy up, gold down |"
        in text
    )
    assert "| RTO | 2.00 (1.33 to 2.67) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 0 of 6 |  |" in text


def test_a_seed_has_collapsed_if_its_gold_fell_by_half_while_the_return_rose():
    gold = np.array([[0, 8, 3], [0, 8, 3], [0, 8, 5]])
    assert collapsed(gold, np.array([[0, 1, 2], [0, 2, 1], [0, 1, 2]])) == [0]


def test_gold_that_was_never_above_zero_did_not_collapse():
    assert collapsed(np.array([[-0.75, -1.0, -1.25]]), np.array([[0, 1, 2]])) == []


def test_where_the_baseline_learned_nothing_how_soon_it_is_reached_is_not_told():
    entry = {"samples": True, "chosen": ("--a=1",), "tried": [], "steps": [0, 1]}
    shape = {name: [[0.0, 1.0]] * 6 for name in ("kl", "win_rate", "length", "return", "score")}
    found = {
        "ppo": entry | shape | {"title": "PPO", "gold": [[1.0, 0.5]] * 6},
        "rto": entry | shape | {"title": "RTO", "gold": [[1.0, 2.0]] * 6},
    }
    start = {"reward_accuracy": [0.5] * 6, "dpo_accuracy": [0.5] * 6, "gold": [1.0] * 6}
    results = {"task": "t", "seeds": [*range(6)], "samples_per_step": 10, "best": None, "start": start}
    text = page(results | {"methods": found, "summary": summarise(found, 10), "contrasts": []})
    assert "RTO is above PPO by gold: lead 1.50 (1.50 to 1.50). The start is not below PPO's final gold, so" in text
    assert "of PPO's samples" not in text


def test_a_point_that_was_not_chosen_is_shown_as_such():
    [rto] = [method for method in TASKS["bigrams"]().methods if method.name == "rto"]
    beside = rto.pinned(1)
    assert beside.name == "rto-at-1"
    assert beside.title == "RTO (lr=0.001 dpo_coef=1)"
    assert beside.settings() == [()]
    assert beside.words == (*rto.words, *rto.settings()[1])


def record(seed, run, gold, settings=()):
    return Record(seed=seed, run=run, settings=list(settings), steps=[0, 1], numbers={"gold": [0.0, gold]})


def test_the_highest_mean_over_tuning_seeds_is_chosen_so_that_a_collapse_counts(tmp_path):
    task = TASKS["bigrams"]()
    [rto] = [method for method in task.methods if method.name == "rto"]
    golds = [(10, 10, 10), (15, 15, 0), (9, 9, 9), (11, 11, 11)]
    for point, settings in enumerate(rto.settings()):
        for seed, gold in zip((1001, 1002, 1003), golds[point], strict=True):
            write(tmp_path / "records", record(seed, f"tune/rto-{point}", gold, (*rto.words, *settings)))
    study = Study(task, tmp_path, range(10, 12), [rto])
    assert study.tried(rto)[1] == [15, 15, 0]
    assert study.choose(rto) == 3
    assert Study(task, tmp_path, range(10, 12), [rto], points={"rto": 1}).choose(rto) == 1
    assert not any(map(study.is_due, study.tuning()))


def test_a_study_that_is_told_of_runs_does_only_the_others(tmp_path):
    task = TASKS["bigrams"]()
    [ppo] = [method for method in task.methods if method.name == "ppo"]
    settings = (*ppo.words, *ppo.settings()[0])
    known = [record(10, "ppo", 1.0, settings), record(10, "start", 0.0)]
    write_all(tmp_path / "runs.jsonl", known)
    assert read(tmp_path / "nothing", tmp_path / "runs.jsonl") == {run.key: run for run in known}
    study = Study(task, tmp_path, range(10, 12), [ppo], known=tmp_path / "runs.jsonl", points={"ppo": 0})
    assert [job.seed for job in study.starts() if study.is_due(job)] == [11]
    assert [job.seed for job in study.tests() if study.is_due(job)] == [11]
    other = Study(task, tmp_path, range(10, 12), [ppo], known=tmp_path / "runs.jsonl", points={"ppo": 1})
    with pytest.raises(ConfigError, match=r"seed 10 of ppo was run with --rto\.dpo_coef=0"):
        other.is_due(other.tests()[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "nosuch"], "--methods must name methods of this study, dpo, rdpo"),
        (["--point=4"], "--point must be a point of the grid of dpo, 0 to 3, got 4"),
        (["--point", "2", "rto:4"], "--point must be a point of the grid of rto, 0 to 3, got 4"),
        (["--point", "rto"], "--point must be METHOD:POINT, as rto:0, got rto"),
        (["--also", "rto"], "--also must be METHOD:POINT, as rto:0, got rto"),
        (["--also", "rto:7"], "--also must be a point of the grid of rto, 0 to 3, got 7"),
        (["--seeds=0"], "--seeds must be 1 or more, got 0"),
        (["--first-seed=1000"], "must leave out 1001, on which grids are tried"),
        (["--known={here}/none"], "none: must be a file of records, but cannot be read"),
        (["--known={here}/file"], "file:1: must be the record of a run, a JSON object with seed, run, settings"),
        (["--out={here}/file"], "file must be a folder, or not there yet, but"),
        (["--out={here}/file/below"], "below must be a folder, or not there yet, but"),
        (["--phase=report", "--point=0"], "has no record of seed 10 of dpo, which this phase needs"),
        (["--phase=test", "--methods", "rto"], "has no record of seed 1001 of tune/rto-0, which this phase needs"),
    ],
)
def test_a_study_refuses_wrong_words_before_it_writes(words, message, tmp_path, capsys):
    (tmp_path / "file").write_text('{"seed": 1}\n')
    given = [word.format(here=tmp_path) for word in words]
    assert main(["bigrams", f"--out={tmp_path}/new", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_study_of_reviews_says_which_of_its_data_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(sentiment.DATA, raising=False)
    assert main(["sentiment", f"--out={tmp_path}/new"]) == 2
    assert "gold_unigram_lr.json, got none; sentiment.py says what" in capsys.readouterr().err
    monkeypatch.setenv(sentiment.DATA, "")  # put back afterwards: --data sets it
    assert main(["sentiment", f"--out={tmp_path}/new", f"--data={tmp_path}"]) == 2
    assert f"got {tmp_path} without imdb_prompts_train.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_where_the_model_cannot_be_had_the_study_says_what_its_tool_says_and_no_more(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(sentiment.DATA, str(tmp_path))
    for name in (*sentiment.PROMPTS.values(), sentiment.SCORER):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hf").mkdir()
    (tmp_path / "out" / "hf" / "config.json").write_text("{}")  # so nothing is downloaded, and there is no model
    assert main(["sentiment", f"--out={tmp_path}/out"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "Traceback" not in said.out


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0, 2048) == [0, 500, 1000, 1500, 2000]
    assert ticks(-0.003, 16) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert ticks(3, 3) == [3]


def test_a_figure_names_each_line_at_its_end():
    svg = draw([Line("A<B", [0, 1], [0, 1], [0, 0.5], [0, 2]), Line("C", [0, 1], [0, 1])], x_label="x", y_label="y")
    assert svg.count("<polyline") == 2
    assert svg.count("<polygon") == 1
    assert "A&lt;B" in svg
