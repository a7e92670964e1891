"""The words of `report credit`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """What report credit takes beside a run folder."""

    before: int | None = None
    """Step of the evaluation on the left; null takes the run's first."""
    after: int | None = None
    """Step of the evaluation on the right; null takes the run's last."""
    responses: int | None = None
    """Show the first so many; null shows all that were stored, up to 3 MB."""
    checkpoint: Path | None = None
    """Instead of a run folder: the run whose policy reads `text`."""
    text: Path | None = None
    """A JSONL file of rows with `prompt` (or `messages`) and `response`, or a plain text file: one response."""
    prompt: str | None = None
    """What a plain text file answers."""
    reference: Path | None = None
    """The SFT run; null takes that of the checkpoint's rto run."""
    dpo: Path | None = None
    """The DPO run; null takes that of the checkpoint's rto run."""
    reward_model: Path | None = None
    """The reward run; null takes that of the checkpoint's rto run, else there is no score."""
    critic: Path | None = None
    """The run that holds the critic; null takes the checkpoint's own, else there are no values."""
    out: Path | None = None
    """File for the page; null writes RUN_DIR/credit.html, or TEXT.credit.html."""

    def __post_init__(self) -> None:
        if (self.checkpoint is None) != (self.text is None):
            given = "checkpoint" if self.text is None else "text"
            raise ValueError(f"checkpoint and text belong together, got only {given}; name a run and a file for it")
        if self.responses is not None and self.responses < 1:
            raise ValueError(f"responses must be 1 or more or null, got {self.responses}; null shows all")
