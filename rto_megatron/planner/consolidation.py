"""What consolidation would save: a fluid estimate on top of a simulated run, since the schedule moves no response.

Once few responses are unfinished, few of the engines go on with them; the others score what has ended.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rto_megatron.schedule.rooflines import Roofline
from rto_megatron.schedule.trace import Load, Row
from rto_megatron.schedule.workload import Workload

KEPT = 0.2
"""Share of the responses that are unfinished then, and of the engines that are kept, rounded up."""


def tail_gain(rows: Sequence[Row], cost: Roofline, workload: Workload, *, samples: int) -> float:
    """Seconds of a step that consolidation saves where all ranks do all, a mean over steps; never below 0.

    Args:
        rows: simulated, with one group that does all.
        samples: responses of a step.
    """
    engines = cost.layout.engine_ranks // cost.layout.engine_tensor
    kept = math.ceil(KEPT * engines)
    if kept >= engines:
        return 0.0
    few = Roofline(
        cost.model,
        cost.gpu,
        cost.placement,
        replace(cost.layout, engine_ranks=kept * cost.layout.engine_tensor),
        roles=cost.roles,
        efficiency=cost.efficiency,
    )
    steps = sorted({row.step for row in rows})
    return sum(
        _gain([row for row in rows if row.step == step], cost, few, workload, samples=samples, freed=1 - kept / engines)
        for step in steps
    ) / len(steps)


def _gain(
    rows: Sequence[Row], cost: Roofline, few: Roofline, workload: Workload, *, samples: int, freed: float
) -> float:
    lengths = sorted(workload.lengths(rows[0].step, samples))
    written = 1  # the prefill draws the first token
    ended = waiting = spent = saved = 0.0
    for row in sorted((row for row in rows if row.kind == "decode"), key=lambda row: row.start):
        written += row.num_steps
        now = sum(length <= written for length in lengths)
        waiting += _score_seconds(cost, [workload.prompt_tokens + length for length in lengths[int(ended) : now]])
        ended = now
        if row.samples > KEPT * samples:
            continue
        slower = few.decode(num_steps=row.num_steps, tokens=row.tokens, context=row.context)
        scored = min(waiting, freed * slower)
        waiting, spent, saved = waiting - scored, spent + slower - row.seconds, saved + scored
    return max(0.0, saved - spent)


def _score_seconds(cost: Roofline, totals: list[int]) -> float:
    return cost.score(Load(totals), cost.layout.engine_ranks)
