"""Every golden case passes, every field is really compared, and the tool says what is wrong."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import check_golden  # noqa: E402
import golden_cases  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = check_golden.read_golden(GOLDEN)
NAMES = [f"{stem}/{case['id']}" for stem, case in CASES]


def one_case(stem, name):
    return copy.deepcopy(next(case for s, case in CASES if s == stem and case["id"] == name))


@pytest.mark.parametrize(("stem", "case"), CASES, ids=NAMES)
def test_golden(stem, case):
    assert check_golden.check_case(stem, case) == []


def test_every_file_with_an_adapter_is_there():
    assert {stem for stem, _ in CASES} == set(golden_cases.ADAPTERS)


def nudge_first(value):
    """`value` with one number in it made wrong: by 1 if an integer, by a thousandth if not."""
    if isinstance(value, dict):
        name = next(iter(value))
        return {**value, name: nudge_first(value[name])}
    if isinstance(value, list):
        return [nudge_first(value[0]), *value[1:]]
    return value + 1 if isinstance(value, int) else value * 1.001 + math.copysign(1e-4, value)


@pytest.mark.parametrize(("stem", "case"), CASES, ids=NAMES)
def test_one_wrong_number_in_any_field_fails(stem, case):
    for field, value in case["out"].items():
        if value is None:
            continue
        planted = {**case, "out": {**case["out"], field: nudge_first(value)}}
        complaints = check_golden.check_case(stem, planted)
        assert [c.split(":")[0].split(".")[0] for c in complaints] == [field]


def test_a_field_that_we_do_not_compute_fails():
    case = one_case("gae", "ends_g1.0_l1.0_float64")
    case["out"]["surprise"] = [1.0]
    assert check_golden.check_case("gae", case) == ["surprise: expected [1.0], got nothing"]


def test_a_field_of_another_shape_fails():
    case = one_case("gae", "ends_g1.0_l1.0_float64")
    case["out"]["returns"].append([0.0])
    assert check_golden.check_case("gae", case) == ["returns: expected 3 items, got 2 items"]


def test_nan_never_passes():
    case = one_case("policy_loss", "left_pad_float64")
    case["out"]["loss"] = float("nan")
    assert check_golden.check_case("policy_loss", case) == ["loss: max diff inf"]


@pytest.mark.parametrize("scale", [0, -1])
def test_a_scale_of_zero_or_less_differs_from_the_released_code_on_purpose(scale):
    case = one_case("dpo_token_reward", "quirk_s0.0_c0_float64")
    case["in"]["dpo_reward_scale"] = scale
    assert check_golden.check_case("dpo_token_reward", case) == []
    ours = golden_cases.dpo_token_reward(check_golden.Inputs(case["in"], "float64"), released=False)["token_reward"]
    assert ours.tolist() != case["out"]["token_reward"]
    assert bool(ours.any()) == (scale != 0)


def test_following_the_released_quirk_would_be_noticed(monkeypatch):
    followed = golden_cases.dpo_token_reward
    monkeypatch.setattr(check_golden, "dpo_token_reward", lambda inputs, released: followed(inputs, released=True))
    complaints = check_golden.check_case("dpo_token_reward", one_case("dpo_token_reward", "quirk_s0.0_c0_float64"))
    assert complaints == ["token_reward: a coefficient of 0 must give exactly 0"]


MISTAKES = {
    "gae": ("gae", lambda right: lambda **k: right(**{**k, "lam": k["lam"] * 0.99 + 0.005})),
    "value_loss": ("value_loss", lambda right: lambda **k: right(**{**k, "clip": 0.1})),
    "token_level_reward": ("normalise_scores", lambda right: lambda s, **k: right(s, **{**k, "clip": None})),
    "lr_schedule": ("cosine_with_min_lr", lambda right: lambda step, **k: right(step + 1, **k)),
    "lm_ptx_loss": ("loss_count", lambda right: lambda mask, mean: right(mask, "sequence")),
}


@pytest.mark.parametrize("stem", MISTAKES)
def test_a_mistake_planted_in_a_formula_fails(stem, monkeypatch):
    name, wrong = MISTAKES[stem]
    monkeypatch.setattr(golden_cases, name, wrong(getattr(golden_cases, name)))
    assert any(check_golden.check_case(s, case) for s, case in CASES if s == stem)


def run_tool(folder):
    done = subprocess.run([sys.executable, TOOLS / "check_golden.py", folder], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_tool_names_the_case_that_fails_and_exits_with_1(tmp_path):
    case = one_case("kl_controller", "t6.0_h10000")
    wrong = copy.deepcopy(case)
    wrong["out"]["fixed"][0] = 0.5
    (tmp_path / "kl_controller.json").write_text(json.dumps({"cases": [case, {**wrong, "id": "planted"}]}))
    code, out, _ = run_tool(tmp_path)
    assert code == 1
    assert out == "FAILED kl_controller/planted: fixed: max diff 0.49\n1 passed, 1 failed\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, None, "must be a folder of golden JSON files, found no such folder"),
        ("notes.txt", "", "must hold golden JSON files, found none"),
        ("gea.json", "{}", "the file name must be one of action_logprobs, .*, got 'gea'"),
        ("gae.json", "{", "must be JSON with 'cases' of id, dtype, in and out; JSONDecodeError: .* line 1 column 2"),
        ("gae.json", '{"cases": [{"id": "a"}]}', "must be JSON with 'cases' .*; KeyError: 'dtype'"),
    ],
)
def test_a_folder_that_cannot_be_checked_is_named(tmp_path, name, text, message):
    if name is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(check_golden.GoldenError, match=message):
        check_golden.read_golden(tmp_path if name is not None else tmp_path / "missing")


def test_the_tool_exits_with_2_for_a_missing_folder(tmp_path):
    code, _, err = run_tool(tmp_path / "missing")
    assert code == 2
    assert err == f"{tmp_path / 'missing'}: must be a folder of golden JSON files, found no such folder\n"


def test_a_case_with_a_missing_input_fails_and_says_which():
    case = one_case("gae", "ends_g1.0_l1.0_float64")
    del case["in"]["gamma"]
    assert check_golden.check_case("gae", case) == ["does not run: KeyError: 'gamma'"]
