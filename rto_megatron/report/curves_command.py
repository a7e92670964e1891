"""`report curves RUN...`: metrics of several runs over one another, with bands over seeds."""

from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import ConfigError
from rto_megatron.metrics import Console
from rto_megatron.report.curves import SEED, groups_of, names_of, page, read_curves
from rto_megatron.report.words import read_words, write_page

USAGE = "python -m rto_megatron report curves RUN_DIR ... [--group=REGEX] [--metric=NAME] [--out=FILE]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What report curves takes beside the run folders."""

    group: str | None = SEED
    """Regular expression: runs whose names are the same without what it matches are one group, drawn as a mean with a
    band; null draws each run alone."""
    metric: str | None = None
    """The metric that is shown first; null picks one. The page has all of them."""
    out: Path = Path("curves.html")
    """File for the page."""


def main(words: list[str]) -> None:
    """Draw the page, print where it is and what was left out."""
    runs, options = read_words(Options, words, USAGE)
    if not runs:
        raise ConfigError(f"report curves needs at least one run folder, got none: {USAGE}")
    names = names_of(runs)
    found = [read_curves(run, name) for run, name in zip(runs, names, strict=True)]
    write_page(options.out, page(found, groups_of(names, options.group), metric=options.metric))
    for run in found:
        for note in run.notes:
            Console().say(f"note: {note}")
