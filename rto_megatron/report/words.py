"""What the commands that draw pages have in common: run folders and options in, a file out."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from rto_megatron.config.load import print_options, split_options
from rto_megatron.errors import ConfigError, writing
from rto_megatron.metrics import Console


def read_words(options_class: type, words: list[str], usage: str) -> tuple[list[Path], Any]:
    """The run folders that come first, and the options behind them.

    Raises:
        ConfigError: a word is neither.
    """
    if "-h" in words or "--help" in words:
        print_options(options_class, usage)
    runs = list(takewhile(lambda word: not word.startswith("-"), words))
    options, rest = split_options(options_class, words[len(runs) :])
    if rest:
        raise ConfigError(f"report takes run folders and then its own options, got {rest[0]!r} too: {usage}")
    return list(map(Path, runs)), options


def one_run(runs: list[Path], usage: str) -> Path:
    """The only one; ConfigError if there is another number of them."""
    if len(runs) != 1:
        got = f"{len(runs)}: {', '.join(map(str, runs))}" if runs else "none"
        raise ConfigError(f"report needs one run folder here, got {got}: {usage}")
    return runs[0]


def write_page(out: Path, text: str) -> None:
    """Write a page and print where it is.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing("out", out):
        out.write_text(text, encoding="utf-8")
    Console().say(str(out))
