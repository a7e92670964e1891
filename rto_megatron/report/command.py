"""`python -m rto_megatron report PAGE ...`: pages drawn from run folders."""

import importlib
from pathlib import Path

from rto_megatron.errors import ConfigError

PAGES = {
    "timeline": "what ran when, on every rank",
    "credit": "what every token of held-out responses earned, at the start and now",
    "curves": "metrics of several runs over one another, with bands over seeds",
}
"""Page -> what it shows; `report/PAGE_command.py` draws it."""

USAGE = f"""usage: python -m rto_megatron report PAGE RUN_DIR [--option=value ...]

pages:
{chr(10).join(f"  {name:10}{what}" for name, what in PAGES.items())}
`report PAGE --help` lists the options of a page.
"""


def main(path: Path | None, words: list[str]) -> int:
    """Draw a page and print where it is; 0."""
    if path is None and ("-h" in words or "--help" in words):
        print(USAGE, end="")
        return 0
    name = str(path)
    if name not in PAGES:
        got = "none" if path is None else repr(name)
        raise ConfigError(f"report needs the name of a page, one of {', '.join(PAGES)}, got {got}; see report --help")
    importlib.import_module(f"rto_megatron.report.{name}_command").main(words)
    return 0
