"""What an evaluation says of every token of its responses: made from the roles' signals, stored as JSON lines.

The first line of a file is about the evaluation, each other one about a response, so that pages can be drawn again
without models, tokenizer or torchrun.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.algorithm import AdvantageConfig, RTOConfig
from rto_megatron.credit.pieces import cut_pieces
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.errors import DataError
from rto_megatron.rollout.experience import make_experience

FORMAT = 1
FOLDER = "credit"
"""In a run folder: one file an evaluation."""
MOST_TOKENS = 50_000
"""Tokens that a file may hold, if every response fills its window; about 3 MB."""
DIGITS = 4
"""Significant digits of a number that is stored."""

Number = float | None
"""None where it is no finite number: JSON has none for it."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response and what each of its tokens earned."""

    index: int
    """Of the prompt in its source: the same in all evaluations of a run."""
    prompt: str
    pieces: list[str]
    """Text of each token; see `cut_pieces`."""
    specials: list[int]
    """Places of tokens that are no text."""
    score: Number
    """Normalised, of the reward model; None without one."""
    truncated: bool
    columns: dict[str, list[Number]]
    """Quantity -> one number a token; the names are those of `QUANTITIES`, less what the run does not have."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is stored of one evaluation."""

    name: str
    """For people: `step 12`, or which checkpoint."""
    step: int
    coefs: dict[str, float]
    """`dpo_coef`, `kl_coef` and `score_coef` of the token rewards."""
    num_prompts: int
    """Prompts of the evaluation; fewer may be stored."""
    sampled: bool = True
    """Whether the policy wrote the responses: only then is the sum of a log-ratio a sample of the KL."""
    responses: list[Response] = field(default_factory=list)


QUANTITIES = {
    "dpo": (
        "DPO reward",
        "reward units",
        "dpo_coef * (log pi_dpo - log pi_ref), clipped and placed as the run does it",
    ),
    "kl": ("KL term", "reward units", "-kl_coef * (log pi - log pi_ref)"),
    "reward": ("token reward", "reward units", "DPO + KL + score: all that the token is paid"),
    "value": ("value", "reward units", "what the critic expects to come, before it sees the token"),
    "advantage": ("advantage", "reward units", "how much better than expected, before whitening"),
    "dpo_log_ratio": ("DPO log-ratio", "nats", "log pi_dpo - log pi_ref, without clip or coefficient"),
    "log_ratio": ("log-ratio", "nats", "log pi - log pi_ref; its sum over what the policy wrote is a sample of the KL"),
    "log_prob": ("log-prob", "nats", "log pi of the token"),
}
"""Column -> its name, unit and meaning, in the order in which a page offers them."""


def num_stored(num_prompts: int, most: int, window: int) -> int:
    """Responses that are stored of each evaluation: the first so many, the same prompts each time.

    Args:
        most: what the user allows.
        window: tokens that a response may have.
    """
    return min(num_prompts, most, max(1, MOST_TOKENS // window))


def describe(
    rollout: Rollout,
    signals: Signals,
    prompts: Sequence[tuple[int, str]],
    tokenizer: Tokenizer,
    rto: RTOConfig,
    advantage: AdvantageConfig,
    *,
    kl_coef: float,
    has_critic: bool,
    sentence_ends: Tensor | None = None,
) -> list[Response]:
    """Each row of a rollout as it is stored, credit as training would compute it.

    Args:
        prompts: index and text of each row's prompt.
        kl_coef: of this step.
        has_critic: whether `signals.values` are a critic's; without one there is no value, and the advantage is that
            of the run's estimator with values of 0.
        sentence_ends: [V] bool; for `rto.shaping: sentence` only.
    """
    experience, credit = make_experience(rollout, signals, rto, advantage, kl_coef=kl_coef, sentence_ends=sentence_ends)
    columns = {"dpo": credit.rewards.dpo} if rto.dpo_coef else {}
    columns |= {"kl": credit.rewards.kl} if kl_coef else {}
    columns |= {"reward": credit.rewards.total}
    columns |= {"value": experience.old_values} if has_critic else {}
    columns |= {"advantage": credit.raw_advantages}
    columns |= {"dpo_log_ratio": signals.dpo_log_probs - signals.ref_log_probs} if rto.dpo_coef else {}
    columns |= {
        "log_ratio": signals.policy_log_probs - signals.ref_log_probs,
        "log_prob": signals.policy_log_probs,
    }
    found = []
    for row, (index, prompt) in enumerate(prompts):
        mask = rollout.response_mask[row]
        pieces = cut_pieces(tokenizer, rollout.tokens[row][mask].tolist())
        found.append(
            Response(
                index=index,
                prompt=prompt,
                pieces=pieces.texts,
                specials=pieces.specials,
                score=_short(signals.scores[row].item()) if rto.score_coef else None,
                truncated=bool(rollout.truncated[row]),
                columns={name: list(map(_short, values[row][mask].tolist())) for name, values in columns.items()},
            )
        )
    return found


def file_of(run_dir: Path, step: int) -> Path:
    """Where the evaluation before `step` is stored."""
    return run_dir / FOLDER / f"step_{step:08d}.jsonl"


def stored_steps(run_dir: Path) -> list[int]:
    """Steps whose evaluation is stored, in order."""
    found = (re.fullmatch(r"step_(\d{8,})\.jsonl", path.name) for path in (run_dir / FOLDER).glob("step_*.jsonl"))
    return sorted(int(match[1]) for match in found if match)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write a file that is complete or not there: beside, synced, renamed.

    Raises:
        OSError: it cannot be written.
    """
    head = {"format": FORMAT, **{name: value for name, value in vars(evaluation).items() if name != "responses"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("w", encoding="ascii") as file:
            for row in (head, *map(asdict, evaluation.responses)):
                file.write(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        DataError: the file is missing or damaged; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable text file, got: {error}") from None
    if not lines:
        raise DataError(f"{path}: must hold an evaluation's token credit, but it is empty; restore or remove it")
    head, *rows = (_parse(path, number, line) for number, line in enumerate(lines, 1))
    if head.pop("format", None) != FORMAT:
        raise DataError(f"{path}:1: must be the head of a token credit file of format {FORMAT}, got {_cut(lines[0])}")
    try:
        evaluation = Evaluation(**head, responses=[Response(**row) for row in rows])
    except TypeError as error:
        raise DataError(f"{path}: must hold the fields of an evaluation and its responses ({error})") from None
    for number, response in enumerate(evaluation.responses, 2):
        for name, values in response.columns.items():
            if not isinstance(values, list) or not all(
                value is None or type(value) in (int, float) for value in values
            ):
                raise DataError(f"{path}:{number}: columns must be lists of numbers, got {name}; restore the file")
            if name not in QUANTITIES or len(values) != len(response.pieces):
                raise DataError(
                    f"{path}:{number}: columns must be of {', '.join(QUANTITIES)} with {len(response.pieces)} numbers "
                    f"each, one a piece, got {len(values)} of {name}; restore or remove the file"
                )
    return evaluation


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: must be a JSON object, got {_cut(line)}; restore or remove the file")
    return row


def _cut(line: str) -> str:
    return repr(line[:60])


def _short(value: float) -> Number:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
