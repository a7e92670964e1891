"""`report credit` on the command line: a run's evaluations, and a text of the user's own."""

import json
from dataclasses import replace

import pytest

from rto_megatron.__main__ import main
from rto_megatron.config.load import dump_run, load_run
from rto_megatron.credit.record import QUANTITIES, file_of, write_evaluation
from rto_megatron.data.readers import SFTRow
from rto_megatron.distributed.checkpoint import open_checkpoint
from rto_megatron.report.credit_options import Options
from rto_megatron.report.credit_text import config_for
from tests.credit.evaluations import evaluation, response
from tests.credit.test_page import data_of
from tests.ranks import run_ranks
from tests.report.test_command import refused
from tests.stages.chain import words_of


@pytest.fixture
def run_dir(tmp_path):
    """A run with evaluations at steps 0, 4 and 8."""
    for step in (0, 4, 8):
        write_evaluation(file_of(tmp_path, step), evaluation(step, [response(i) for i in range(3)]))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "sides"),
    [
        ([], ["step 0", "step 8"]),
        (["--before=4"], ["step 4", "step 8"]),
        (["--after=4"], ["step 0", "step 4"]),
        (["--before=8", "--after=8"], ["step 8"]),
    ],
)
def test_a_run_is_drawn_from_what_it_stored(run_dir, capsys, words, sides):
    assert main(["report", "credit", str(run_dir), *words]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'credit.html'}\n"
    assert [side["name"] for side in data_of((run_dir / "credit.html").read_text())["sides"]] == sides


def test_the_first_so_many_can_be_shown(run_dir):
    assert main(["report", "credit", str(run_dir), "--responses=2", f"--out={run_dir / 'x.html'}"]) == 0
    assert [item["index"] for item in data_of((run_dir / "x.html").read_text())["items"]] == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--before=3"], "before must be a step of an evaluation of"),
        (["--after=9"], "0, 4, 8; got 9"),
        (["--responses=0"], "responses must be 1 or more or null, got 0"),
        (["--text=x.txt"], "checkpoint and text belong together, got only text"),
        (["--checkpoint=x", "--text=x.txt"], "report credit takes a run folder or --checkpoint, got"),
        (["--colour=red"], "got '--colour=red' too"),
    ],
)
def test_wrong_options_are_refused(run_dir, capsys, words, message):
    assert message in refused(capsys, "credit", run_dir, *words)


def test_runs_without_credit_are_told_what_stores_it(tmp_path, capsys):
    assert "there is no such run folder" in refused(capsys, "credit", tmp_path / "gone")
    assert "which needs data.eval and credit.responses above 0" in refused(capsys, "credit", tmp_path)


def test_credit_must_not_be_negative():
    with pytest.raises(ValueError, match=r"credit\.responses must be 0 or more, got -1"):
        load_run("rto", None, ["--credit.responses=-1", "--run_dir=a", "--policy=b", "--reference=c", "--data.train=d"])


def report(words):
    """In a rank process, since a page of a text starts the runtime."""
    return main(["report", "credit", *words])


def test_a_text_may_be_longer_or_shorter_than_what_the_runs_cache_is_for(chain, tmp_path):
    cache = ["--rollout.kv_block_tokens=300", "--rollout.max_new_tokens=400", "--rollout.kv_blocks=2"]
    (tmp_path / "run.yaml").write_text(dump_run(load_run("rto", None, [*words_of("rto", chain), *cache])))
    trained = open_checkpoint(chain / "dpo")
    trained = replace(
        trained, folder=tmp_path / "checkpoints" / "step", manifest=replace(trained.manifest, stage="rto")
    )
    for length in (10, 999):
        row = SFTRow(prompt_ids=[1] * 9, response_ids=[2] * length)
        options = Options(checkpoint=tmp_path, text=tmp_path / "mine.txt")
        assert config_for(options, trained, None, [row]).rollout.longest == 9 + length


def test_a_text_of_ones_own_is_read_by_the_roles(chain, tmp_path, capsys):
    texts = tmp_path / "mine.jsonl"
    rows = [{"prompt": "Where is the cat?", "response": "I am fine \U0001f600"}, {"prompt": "Hm?", "response": "no"}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    roles = [f"--reference={chain}/sft", f"--dpo={chain}/dpo"]
    more = [f"--reward_model={chain}/reward", f"--critic={chain}/reward", f"--out={tmp_path}/page.html"]
    assert run_ranks(report, 1, [f"--checkpoint={chain}/dpo", f"--text={texts}", *roles, *more]) == [0]
    items = data_of((tmp_path / "page.html").read_text())["items"]
    assert [item["prompt"] for item in items] == ["Where is the cat?", "Hm?"]
    side = items[0]["sides"][0]
    assert data_of((tmp_path / "page.html").read_text())["ratio"] == "log-ratio", "the policy did not write it: no KL"
    assert "".join(side["pieces"]) == "I am fine \U0001f600<|end|>"
    assert list(side["columns"]) == list(QUANTITIES)
    assert side["columns"]["log_ratio"] == side["columns"]["dpo_log_ratio"], "the policy is the DPO policy"
    assert any(side["columns"]["dpo"]) and any(side["columns"]["value"]) and side["score"] is not None
    # and a plain text, without critic and reward model
    (tmp_path / "mine.txt").write_text("I am fine\n")
    words = [f"--checkpoint={chain}/dpo", f"--text={tmp_path}/mine.txt", "--prompt=How are you?", *roles]
    assert run_ranks(report, 1, words) == [0]
    side = data_of((tmp_path / "mine.txt.credit.html").read_text())["items"][0]["sides"][0]
    assert "".join(side["pieces"]) == "I am fine<|end|>"
    assert "value" not in side["columns"] and side["score"] is None


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("mine.txt", [], "prompt must say what the text in"),
        ("mine.txt", ["--prompt=Hm?"], "reference must name a run, got null"),
        ("mine.jsonl", ["--prompt=Hm?"], "whose rows have their own; delete it"),
        ("gone.jsonl", [], "there is no such data file"),
        ("bad.txt", ["--prompt=Hm?"], "must be a readable UTF-8 text file"),
    ],
)
def test_what_a_text_needs_is_told(chain, tmp_path, capsys, name, words, message):
    (tmp_path / "mine.txt").write_text("I am fine")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Hm?", "response": "no"}\n')
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert message in refused(capsys, "credit", f"--checkpoint={chain}/dpo", f"--text={tmp_path / name}", *words)


def test_a_row_that_is_longer_than_a_role_sees_is_named_and_rows_that_fit_are_not_added_up(chain, tmp_path, capsys):
    roles = [f"--reference={chain}/sft", f"--dpo={chain}/dpo"]
    texts = tmp_path / "mine.jsonl"
    rows = [{"prompt": "a", "response": "no " * 15}, {"prompt": "a " * 15, "response": "no"}]
    words = [f"--checkpoint={chain}/dpo", f"--text={texts}", *roles]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_ranks(report, 1, words) == [0]
    rows.append({"prompt": "a", "response": "no " * 70})
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 3 must have at most the 64 tokens that the reference" in refused(capsys, "credit", *words)
