"""A function of the user's that grades held-out answers: a gold reward, a verifier, a call to a judge."""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rto_megatron.errors import ConfigError

Grader = Callable[[list[str], list[str]], list[float]]
"""Prompts and the responses to them -> a finite number for each, the higher the better; any device, any speed."""


def load_grader(name: str | None) -> Grader | None:
    """The function `package.module:function`, looked for where Python imports from, the working directory too.

    What it gives is checked: ConfigError if it fails, or gives anything but a finite number a response.

    Raises:
        ConfigError: there is no such function.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"grader {name}: cannot be imported: {error}; give module:function, from {_here()}") from None
    if callable(found):
        return partial(_grade, found, name)
    raise ConfigError(f"grader {name}: must name a function as module:function")


def _grade(grader: Callable[..., Any], name: str, prompts: list[str], responses: list[str]) -> list[float]:
    try:
        grades = [float(grade) for grade in grader(prompts, responses)]
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"grader {name}: failed with {type(error).__name__}: {error}") from error
    if len(grades) != len(responses):
        raise ConfigError(f"grader {name}: must give {len(responses)} numbers, one a response, gave {len(grades)}")
    if bad := [grade for grade in grades if not math.isfinite(grade)]:
        raise ConfigError(f"grader {name}: must give finite numbers, gave {bad[0]}")
    return grades


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of places at which we have more; a tie counts half."""
    wins = sum((a > b) + (a == b) / 2 for a, b in zip(ours, theirs, strict=True))
    return wins / len(ours)


def _here() -> str:
    return "the folder that the command is started in, or an installed package"
