"""Where text comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a model that starts from scratch; a checkpoint brings its own."""

    path: Path | None = None
    """A sentencepiece `.model` file, or a Hugging Face folder; null takes the start checkpoint's."""
    chat_template: Path | None = None
    """A Jinja file that renders messages; null takes the tokenizer's own, or the built-in one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows to train and evaluate on: a JSONL file, or `name[:split]` for the `datasets` library."""

    train: str
    """JSONL path or data-set name."""
    eval: str | None = None
    """The same for held-out rows; null skips evaluation."""
    max_length: int = 512
    """Tokens of prompt and response together."""
    too_long: Literal["drop", "error"] = "drop"
    """A row over max_length is dropped and counted, or an error."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be 2 or more, got {self.max_length}")


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompts to answer: JSONL files, or `name[:split]` for the `datasets` library."""

    train: str
    """JSONL path or data-set name."""
    eval: str | None = None
    """The same for held-out prompts; null skips evaluation."""
    too_long: Literal["drop", "error"] = "drop"
    """A prompt over rollout.max_prompt_tokens is dropped and counted, or an error."""
