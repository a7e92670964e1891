"""Are the data readable, what is dropped, and are held-out rows really held out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rto_megatron.config.run import EvaluateRun, GenerateRun, RTORun, SFTRun
from rto_megatron.data.readers import Dropped, read_preferences, read_prompts, read_sft
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.doctor.findings import Section
from rto_megatron.errors import DataError, UserError
from rto_megatron.stages.course import check_enough
from rto_megatron.stages.supervised import num_steps

SHOWN = 5
"""Bad rows that are shown of a source."""

MANY_DROPPED = 0.2
"""Share of dropped rows above which it is a warning."""


@dataclass(frozen=True)
class Rows:
    """What was read for a run."""

    train: list[Any] = field(default_factory=list)
    """Or the prompts of generate and evaluate."""
    held_out: list[Any] = field(default_factory=list)


def check_data(found: Section, config: Any, tokenizer: Tokenizer) -> Rows:
    """Read all rows as the run would, and tell every bad one."""
    if isinstance(config, GenerateRun | EvaluateRun):
        return Rows(_read(found, "prompts", config.prompts, config, tokenizer))
    rows = Rows(
        _read(found, "data.train", config.data.train, config, tokenizer),
        _read(found, "data.eval", config.data.eval, config, tokenizer) if config.data.eval else [],
    )
    if rows.train:
        count = len(rows.train)
        check: Any = partial(check_enough, rows.train) if isinstance(config, RTORun) else partial(num_steps, count)
        found.attempt(partial(check, config), why="every step takes a whole batch of different rows")
        _look_for_copies(found, rows.train)
    if config.data.eval is None:
        found.note(
            "data.eval is null: nothing is held out",
            why="a run that learns its rows by heart, or games its reward, looks as good as one that learns",
            way_out="set data.eval to rows that are not in data.train",
        )
    elif rows.held_out:
        _look_for_a_leak(found, config, rows)
    return rows


def _read(found: Section, name: str, source: str, config: Any, tokenizer: Tokenizer) -> list[Any]:
    refused: list[DataError] = []
    try:
        rows, dropped = read_as_the_run_does(source, config, tokenizer, refused)
    except (UserError, ImportError) as error:
        rows, dropped = [], None
        if not refused:  # else it follows from them
            found.refused(error, why=f"{name} cannot be read", way_out="give another file, or mend this one")
    for error in refused[:SHOWN]:
        found.refused(error, why="a run stops at its first bad row", way_out="mend the row or take it out")
    if len(refused) > SHOWN:
        found.error(
            f"{name} {source}: {len(refused) - SHOWN} more rows are bad",
            why="a run stops at its first bad row",
            way_out="mend them or take them out",
        )
    if dropped is not None:
        _look_at_lengths(found, name, dropped)
    return rows


def read_as_the_run_does(
    source: str, config: Any, tokenizer: Tokenizer, refused: list[DataError]
) -> tuple[list[Any], Dropped]:
    """Rows by the reader and with the limits of the run's stage; bad rows go to `refused`."""
    if isinstance(config, RTORun | GenerateRun | EvaluateRun):
        too_long = config.data.too_long if isinstance(config, RTORun) else config.too_long
        limit = config.rollout.max_prompt_tokens
        return read_prompts(source, tokenizer, max_prompt_tokens=limit, too_long=too_long, refuse=refused.append)
    read = read_sft if isinstance(config, SFTRun) else read_preferences
    limits = {"max_length": config.data.max_length, "too_long": config.data.too_long}
    return read(source, tokenizer, **limits, refuse=refused.append)


def _look_at_lengths(found: Section, name: str, dropped: Dropped) -> None:
    lengths = sorted(dropped.lengths)
    at = [lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.05, 0.5, 0.95)]
    shown = f"tokens: 5 % below {at[0]}, half below {at[1]}, 95 % below {at[2]}, at most {lengths[-1]}"
    if not dropped.num_too_long:
        found.ok(f"{name} {dropped}; {shown}")
        return
    share = dropped.num_too_long / dropped.num_read
    why = "long rows are not like the others: what they would have taught is missing"
    way_out = f"raise the limit of {dropped.max_tokens} tokens, or shorten the rows"
    if share > MANY_DROPPED:
        found.warning(f"{name} {dropped}, {share:.0%} of them; {shown}", why=why, way_out=way_out)
    else:
        found.note(f"{name} {dropped}; {shown}", why=why, way_out=way_out)


def _look_for_copies(found: Section, rows: Sequence[Any]) -> None:
    copies = len(rows) - len(set(map(_identity, rows)))
    if copies:
        found.note(
            f"data.train holds {copies} copies of other rows",
            why="they count as often as they are there",
            way_out="take them out unless that is meant",
        )


def _look_for_a_leak(found: Section, config: Any, rows: Rows) -> None:
    known = {tuple(row.prompt_ids) for row in rows.train}
    prompts = Counter(tuple(row.prompt_ids) for row in rows.held_out)
    leaked = sum(count for prompt, count in prompts.items() if prompt in known)
    if leaked:
        found.warning(
            f"{leaked} of the {len(rows.held_out)} held-out rows have a prompt that data.train has too",
            why="what is measured on them says nothing about prompts that the model has not seen",
            way_out=f"take these prompts out of data.train or out of data.eval ({config.data.eval})",
        )
    else:
        found.ok("no held-out prompt is in data.train")


def _identity(row: Any) -> tuple:
    """All token ids of a row."""
    return tuple(tuple(value) for value in vars(row).values() if isinstance(value, list))
