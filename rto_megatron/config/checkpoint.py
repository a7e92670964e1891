"""When a run saves its state, how many of these it keeps, and what it takes up again."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of a run; the last step is always saved."""

    save_every: int = 0
    """Steps (sft, dpo, reward: optimizer steps) between checkpoints; 0 saves at the end only."""
    keep_last: int | None = 2
    """How many of the newest to keep; null keeps all."""
    keep_best: bool = False
    """Keep the best one too, by `best_metric`. Where two saves share an evaluation, the newer one does not count as
    better. `checkpoints/best.txt` names it."""
    best_metric: str | None = None
    """The held-out metric by which the best is known, such as `eval/grade` or `dpo/eval_accuracy`; null takes the loss
    (sft, dpo, reward) or the score (rto). Of losses, KL, lengths and truncation the lowest is the best, else the
    highest."""
    optimizer_at_end: bool = True
    """Save optimizer states with the last step too, so that the run can be made longer: 12 bytes a trained parameter.
    Earlier checkpoints always hold them."""
    background: bool = True
    """Train on while bytes are written: a second copy of the state in host memory for that time, never two."""
    resume: Literal["all", "weights"] = "all"
    """What a run that finds its own checkpoint takes up: `all` is exact; `weights` begins with fresh optimizers."""

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise ValueError(f"checkpoint.save_every must be 0 or more, got {self.save_every}; 0 saves at the end only")
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be 1 or more or null, got {self.keep_last}; null keeps all")
