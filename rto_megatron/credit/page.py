"""The page: responses of one or two evaluations with what each token earned, put into `page.html`, which draws them."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rto_megatron.credit.record import QUANTITIES, Evaluation, Number, Response, file_of, read_evaluation, stored_steps
from rto_megatron.pages.render import render, visible

PAGE = "credit.html"
"""In a run folder."""
MOST_BYTES = 3_000_000
"""Of a page: beyond it, responses that earned least are left out."""
MOST_SHOWN = 4000
"""Tokens of one response that are shown."""
DIGITS = 3
"""Significant digits of a number on the page."""
SATURATED = 0.98
"""Share of tokens whose colour is not at its strongest."""


def draw_run(run_dir: Path, step: int) -> str:
    """The page of a run after the evaluation before `step`: its first one beside this one."""
    first = min(stored_steps(run_dir))
    evaluations = [read_evaluation(file_of(run_dir, number)) for number in sorted({first, step})]
    return draw(run_dir.resolve().name, evaluations)


def draw(name: str, evaluations: Sequence[Evaluation], notes: Iterable[str] = ()) -> str:
    """The whole page; all text is escaped, and shown so that nothing in it hides.

    Args:
        evaluations: one, or two that are compared: the earlier, then the later.
    """
    found = _items(evaluations)
    kept = _within(found)
    notes = list(map(visible, notes))
    if len(kept) < len(found):
        notes.append(
            f"{len(kept)} of {len(found)} prompts are shown: those with most credit, as many as fit into "
            f"{MOST_BYTES / 1e6:g} MB"
        )
    stored, asked = len(evaluations[-1].responses), evaluations[-1].num_prompts
    if stored < asked:
        notes.append(f"the evaluation had {asked} prompts, of which the first {stored} were stored")
    return render(
        Path(__file__).with_name("page.html"),
        name=visible(name),
        sides=[visible(evaluation.name) for evaluation in evaluations],
        tiles=tiles(evaluations),
        notes=notes,
        data={
            "sides": [{"name": visible(e.name), "coefs": e.coefs} for e in evaluations],
            "quantities": quantities(evaluations),
            "ratio": _ratio(evaluations),
            "items": kept,
        },
    )


def quantities(evaluations: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """What tokens can be coloured by: all columns that any response has, and the number at which colour is strongest.

    Both sides have one scale, so that a colour means the same in both.
    """
    values: dict[str, list[float]] = {}
    for evaluation in evaluations:
        for response in evaluation.responses:
            for name, column in response.columns.items():
                values.setdefault(name, []).extend(abs(value) for value in column if value is not None)
    return [
        {"key": key, "name": name, "unit": unit, "meaning": meaning, "scale": _scale(values[key])}
        for key, (name, unit, meaning) in QUANTITIES.items()
        if key in values
    ]


def _scale(sizes: Sequence[float]) -> float:
    """The size that SATURATED of the sizes do not exceed; the largest where that is 0."""
    ordered = sorted(sizes)
    if not ordered:
        return 1.0
    return _short(ordered[int(SATURATED * (len(ordered) - 1))]) or _short(ordered[-1]) or 1.0


def tiles(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Means over all stored responses: name, and one number a side."""
    rows: dict[str, list[float | None]] = {
        "score": [_mean(r.score for r in e.responses) for e in evaluations],
        "DPO reward": [_mean(_total(r, "dpo") for r in e.responses) for e in evaluations],
        f"{_ratio(evaluations)}, nats": [_mean(_total(r, "log_ratio") for r in e.responses) for e in evaluations],
        "tokens": [_mean(len(r.pieces) for r in e.responses) for e in evaluations],
        "truncated": [_mean(float(r.truncated) for r in e.responses) for e in evaluations],
    }
    return [
        {"name": name, "numbers": ["-" if number is None else f"{number:.3g}" for number in numbers]}
        for name, numbers in rows.items()
        if any(number is not None for number in numbers)
    ]


def _ratio(evaluations: Sequence[Evaluation]) -> str:
    """What a response's log-ratios add up to."""
    return "KL" if all(evaluation.sampled for evaluation in evaluations) else "log-ratio"


def _mean(values: Iterable[Number]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _total(response: Response, column: str) -> float | None:
    """Of a response; None without the column."""
    if column not in response.columns:
        return None
    return sum(value for value in response.columns[column] if value is not None)


def _items(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Prompts with their response on each side, None where one side has none; in the order of the last side."""
    sides = [{response.index: response for response in evaluation.responses} for evaluation in evaluations]
    order = dict.fromkeys(index for side in reversed(sides) for index in side)
    found = []
    for index in order:
        responses = [side.get(index) for side in sides]
        prompt = next(response.prompt for response in reversed(responses) if response is not None)
        found.append(
            {
                "index": index,
                "prompt": visible(prompt),
                "sides": [None if response is None else _shown(response) for response in responses],
            }
        )
    return found


def _shown(response: Response) -> dict[str, Any]:
    is_cut = len(response.pieces) > MOST_SHOWN
    return {
        "score": response.score,
        "truncated": response.truncated,
        "length": len(response.pieces),
        "pieces": [visible(piece) for piece in response.pieces[:MOST_SHOWN]],
        "specials": [place for place in response.specials if place < MOST_SHOWN],
        "columns": {name: [_short(v) for v in values[:MOST_SHOWN]] for name, values in response.columns.items()},
        # of all tokens, where the page cannot add up what it does not have
        "sums": {name: _short(_total(response, name)) for name in response.columns} if is_cut else {},
    }


def _within(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items that fit into a page, those with most credit first among equals of none; their order stays."""
    sizes = [len(json.dumps(item, separators=(",", ":"))) for item in items]
    if sum(sizes) <= MOST_BYTES:
        return items
    room, kept = MOST_BYTES, set()
    for place in sorted(range(len(items)), key=lambda place: (-_credit(items[place]), place)):
        if not kept or sizes[place] <= room:
            kept.add(place)
            room -= sizes[place]
    return [item for place, item in enumerate(items) if place in kept]


def _credit(item: dict[str, Any]) -> float:
    """Size of all that the tokens were paid: by the DPO policy, else in all."""
    last = next(side for side in reversed(item["sides"]) if side is not None)
    column = last["columns"].get("dpo") or last["columns"]["reward"]
    return sum(abs(value) for value in column if value is not None)


def _short(value: Number) -> Number:
    """A number with the digits of the page; whole where it is whole, which is shorter."""
    if value is None:
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded == int(rounded) else rounded
