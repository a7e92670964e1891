"""What an evaluation stores, worked by hand, and files that are read back or refused."""

import json

import pytest
import torch

from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.algorithm import AdvantageConfig, RTOConfig
from rto_megatron.credit.record import describe, file_of, num_stored, read_evaluation, stored_steps, write_evaluation
from rto_megatron.errors import DataError
from tests.credit.evaluations import HOSTILE, evaluation, response
from tests.data.tokenizers import ours


def judged(tokenizer):
    """A response of two tokens and EOS, after a prompt of two."""
    ids = [*tokenizer.encode("I am")[:2], tokenizer.eos_id]
    tokens = torch.tensor([[5, 6, *ids, 0]])
    mask = torch.tensor([[False, False, True, True, True, False]])
    shape = {"tokens": tokens, "num_tokens": torch.tensor([5])}
    rollout = Rollout(**shape, response_mask=mask, decode_log_probs=torch.zeros(1, 6), truncated=torch.tensor([False]))
    signals = Signals(
        **shape,
        policy_log_probs=torch.tensor([[0, 0, -1.0, -2.0, -0.5, 9.0]]),
        forward_log_probs=torch.tensor([[0, 0, -1.0, -2.0, -0.5, 9.0]]),
        checked=torch.tensor([True]),
        ref_log_probs=torch.tensor([[0, 0, -1.5, -1.0, -0.5, 9.0]]),
        dpo_log_probs=torch.tensor([[0, 0, -0.5, -5.0, -0.5, 9.0]]),
        values=torch.tensor([[0, 0, 0.25, 0.5, 1.0, 0]]),
        raw_scores=torch.tensor([4.0]),
        scores=torch.tensor([2.0]),
    )
    return rollout, signals


def described(rto, *, has_critic=True, estimator="gae"):
    tokenizer = ours()
    advantage = AdvantageConfig(estimator=estimator, lam=1.0)
    return describe(
        *judged(tokenizer), [(7, "Hi?")], tokenizer, rto, advantage, kl_coef=rto.kl_coef, has_critic=has_critic
    )[0]


def test_credit_is_worked_by_hand():
    found = described(RTOConfig(dpo_coef=0.1, kl_coef=0.01, score_coef=0.5, dpo_clip=0.3))
    assert (found.index, found.prompt, found.score, found.truncated) == (7, "Hi?", 2.0, False)
    assert found.specials == [2] and found.pieces[2] == "<|end|>"
    # DPO: 0.1 * (1, -4, 0), the second one clipped. KL: -0.01 * (0.5, -1, 0). Score: 0.5 * 2 at the end.
    # Advantage at lambda 1: the sum of rewards from here on, less the value: 0.805 - 0.25, 0.71 - 0.5, 1 - 1.
    assert found.columns == {
        "dpo": [0.1, -0.3, 0],
        "kl": [-0.005, 0.01, 0],
        "reward": [0.095, -0.29, 1],
        "value": [0.25, 0.5, 1],
        "advantage": [pytest.approx(0.555), pytest.approx(0.21), 0],
        "dpo_log_ratio": [1, -4, 0],
        "log_ratio": [0.5, -1, 0],
        "log_prob": [-1, -2, -0.5],
    }


def test_what_a_run_does_not_have_is_not_stored():
    found = described(RTOConfig(dpo_coef=0, kl_coef=0, score_coef=0), has_critic=False, estimator="reinforce_pp")
    assert list(found.columns) == ["reward", "advantage", "log_ratio", "log_prob"]
    assert found.score is None


def test_a_file_is_read_back(tmp_path):
    responses = [response(i, prompt=text, pieces=[text, "\n"]) for i, text in enumerate(HOSTILE)]
    stored = evaluation(12, responses)
    write_evaluation(file_of(tmp_path, 12), stored)
    assert read_evaluation(file_of(tmp_path, 12)) == stored
    assert len(file_of(tmp_path, 12).read_bytes().splitlines()) == 1 + len(HOSTILE)
    assert stored_steps(tmp_path) == [12]


def test_a_number_that_is_none_is_null(tmp_path):
    columns = {"reward": [None, 1.0, 2.0]}
    write_evaluation(file_of(tmp_path, 0), evaluation(0, [response(columns=columns)]))
    assert read_evaluation(file_of(tmp_path, 0)).responses[0].columns == columns


def test_drafts_and_other_files_are_no_evaluations(tmp_path):
    write_evaluation(file_of(tmp_path, 100_000_000), evaluation())
    for name in ("step_00000001.jsonl.tmp", "step_1.jsonl", "notes.jsonl"):
        (tmp_path / "credit" / name).write_text("")
    assert stored_steps(tmp_path) == [100_000_000]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = file_of(tmp_path, 0)
    write_evaluation(path, evaluation())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_evaluation(path, evaluation(0, [response(score=float("nan"))]))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "{}", "must be the head of a token credit file of format 1, got '{}'"),
        (1, '{"format":99}', "must be the head of a token credit file of format 1"),
        (2, '{"index"', "must be a JSON object"),
        (2, "[" * 100_000, "must be a JSON object"),
        (2, "[]", "must be a JSON object"),
        (2, json.dumps(vars(response()) | {"columns": {"dpo": [1.0]}}), "with 3 numbers each, one a piece, got 1"),
        (2, json.dumps(vars(response()) | {"columns": {"dpo": 3}}), "must be lists of numbers"),
        (2, json.dumps(vars(response()) | {"columns": {"dpo": ["<b>", 1, 2]}}), "must be lists of numbers"),
        (2, json.dumps(vars(response()) | {"more": 1}), "must hold the fields of an evaluation"),
    ],
)  # fmt: skip
def test_damage_is_told_with_file_and_line(tmp_path, number, line, message):
    path = file_of(tmp_path, 0)
    write_evaluation(path, evaluation())
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as refused:
        read_evaluation(path)
    assert str(refused.value).startswith(str(path)) and message in str(refused.value)


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(DataError, match=r"x\.jsonl: must hold an evaluation's token credit, but it is empty"):
        read_evaluation(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("prompts", "most", "window", "stored"),
    [(52, 200, 40, 52), (900, 200, 40, 200), (900, 200, 1000, 50), (9, 5, 10**6, 1)],
)
def test_a_file_is_bounded(prompts, most, window, stored):
    assert num_stored(prompts, most, window) == stored
