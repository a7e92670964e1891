"""Run golden files against the package: `python tools/check_golden.py FOLDER`.

Prints a line for each case that fails, with the field and the largest difference, and ends with
`N passed, M failed`. Exit code 0 if none failed, 1 if any did, 2 if the folder cannot be checked.
The format and its tolerances are described in tests/golden/README.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed checks itself

import torch
from golden_cases import ADAPTERS, dpo_token_reward
from golden_pipeline import pipeline
from golden_window import Fields, Inputs, close_window


class GoldenError(ValueError):
    """The folder, or a file in it, is not golden data."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference: atol + rtol * |expected|."""

    rtol: float
    atol: float


FLOAT64 = Tolerance(1e-11, 1e-12)
FLOAT32 = Tolerance(2e-5, 3e-6)

AFTER_WHITENING = {"normalized_advantages", "policy_loss", "grad_new_logp_collated"}
"""Fields of `pipeline` that follow the released whitening, which works in float32 whatever the input."""


def tolerance(stem: str, field: str, case: Fields) -> Tolerance:
    """How close a floating-point field must come; integers are always exact."""
    if case["dtype"] == "float32":
        return FLOAT32
    in_float32 = (
        stem == "advantage_whitening"
        or (stem == "reward_and_value_heads" and case["in"]["normalize_reward"])
        or (stem == "pipeline" and field in AFTER_WHITENING)
    )
    return FLOAT32 if in_float32 else FLOAT64


def plain(value: object) -> object:
    """Tensors as nested lists, with masks as 0 and 1, so that they compare with JSON."""
    if isinstance(value, torch.Tensor):
        return (value.int() if value.dtype == torch.bool else value).tolist()
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def pairs(ours: object, theirs: object, name: str) -> Iterator[tuple[str, object, object]]:
    """Leaves of `ours` and `theirs` side by side; a difference in structure is one pair that cannot be equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in theirs:
            yield from pairs(plain(ours.get(key, "nothing")), theirs[key], f"{name}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            yield name, f"{len(ours)} items", f"{len(theirs)} items"
        else:
            for mine, yours in zip(ours, theirs, strict=True):
                yield from pairs(mine, yours, name)
    else:
        yield name, ours, theirs


def compare(stem: str, case: Fields, ours: Fields) -> list[str]:
    """What differs between `ours` and the case's `out`: a line a field, empty if nothing does."""
    complaints = []
    for field, expected in case["out"].items():
        limit, worst, problem = tolerance(stem, field, case), 0.0, ""
        got = plain(ours[field]) if field in ours else "nothing"
        for name, mine, yours in pairs(got, expected, field):
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (mine, yours))
            if not numbers:
                problem = problem if mine is yours else f"{name}: expected {yours}, got {mine}"
                continue
            diff = abs(mine - yours)
            allowed = 0.0 if isinstance(mine, int) else limit.atol + limit.rtol * abs(yours)
            if not diff <= allowed:  # written so that NaN fails
                worst = math.inf if math.isnan(diff) else max(worst, diff)
                problem = f"{name}: max diff {worst:.3g}"
        if problem:
            complaints.append(problem)
    return complaints


def deviations(stem: str, case: Fields, inputs: Inputs) -> list[str]:
    """Where we differ from the released code on purpose, `case` must show it: complaints if it does not.

    - A DPO coefficient of 0 or less: the released code takes it for 1. Ours means what it says, so that
      0 is plain PPO; the config refuses a negative one.
    - A pad id sampled inside a response: the released code leaves a hole in its mask. Ours are banned
      from sampling; were one there, it would count as a token like any other.
    """
    scale = inputs.fields.get("dpo_reward_scale")
    has_dpo = stem == "dpo_token_reward" or (stem == "pipeline" and inputs["logits_dpo"] is not None)
    if has_dpo and scale is not None and scale <= 0:
        ours = (pipeline if stem == "pipeline" else dpo_token_reward)(inputs, released=False)["token_reward"]
        if scale == 0 and ours.any():
            return ["token_reward: a coefficient of 0 must give exactly 0"]
        return ["token_reward: equals the released quirk"] if plain(ours) == case["out"]["token_reward"] else []
    if stem == "sequences":
        window = close_window(inputs)
        if window.num_holes.any() and plain(window.response_mask) == case["out"]["action_mask"]:
            return ["action_mask: equals ours, but was expected to have a hole after a sampled pad id"]
    return []


def check_case(stem: str, case: Fields) -> list[str]:
    """Complaints about one case; empty if it passes."""
    inputs = Inputs(case["in"], case["dtype"])
    try:
        return compare(stem, case, ADAPTERS[stem](inputs)) + deviations(stem, case, inputs)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        return [f"does not run: {type(error).__name__}: {error}"]


def read_golden(folder: Path) -> list[tuple[str, Fields]]:
    """(file stem, case) of every case in the folder's JSON files, in order."""
    if not folder.is_dir():
        raise GoldenError(f"{folder}: must be a folder of golden JSON files, found no such folder")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise GoldenError(f"{folder}: must hold golden JSON files, found none")
    cases = []
    for path in paths:
        if path.stem not in ADAPTERS:
            raise GoldenError(f"{path}: the file name must be one of {', '.join(sorted(ADAPTERS))}, got '{path.stem}'")
        try:
            found = json.loads(path.read_text())["cases"]
            cases += [(path.stem, {name: case[name] for name in ("id", "dtype", "in", "out")}) for case in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise GoldenError(f"{path}: must be JSON with 'cases' of id, dtype, in and out; {what}") from error
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description="Run golden files against the package's functions.")
    parser.add_argument("folder", type=Path, help="folder of golden JSON files, for example tests/golden")
    torch.set_num_threads(1)
    try:
        cases = read_golden(parser.parse_args().folder)
    except GoldenError as error:
        print(error, file=sys.stderr)
        return 2
    num_failed = 0
    for stem, case in cases:
        complaints = check_case(stem, case)
        num_failed += bool(complaints)
        if complaints:
            print(f"FAILED {stem}/{case['id']}: {'; '.join(complaints)}")
    print(f"{len(cases) - num_failed} passed, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
