"""The certificate: its table, as Markdown for people and as JSON for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rto_megatron.metrics import format_number
from rto_megatron.parity.lines import LINES, Difference, tolerance

EXPLAINED = """
*max rel* is relative to the largest size of the line in one process; for gradients and updated weights, to the sum of
sizes of the tensor's gradient and step. *used* is the share of the tolerance; above 1 the line fails. Each part of the
step begins with the numbers of the one process - its responses, its signals - so a line that fails tells of its own
part, and the first one is nearest to the fault; only a later minibatch follows from the optimizer steps before it.
"""

COLUMNS = ("line", "max abs", "max rel", "used", "worst at", "verdict")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was compared, and what came out."""

    about: dict[str, object]
    """Layout, versions, weights: name -> value."""
    dtype: str
    """The arithmetic, which sets the tolerances."""
    found: dict[str, Difference]
    """Line -> the worst of all ranks, in the order of LINES."""

    @property
    def failed(self) -> list[str]:
        """Lines beyond their tolerance."""
        return [line for line, difference in self.found.items() if not difference.passed]

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if not self.failed:
            return f"PASS: all {len(self.found)} lines are within their tolerance"
        return f"FAIL: {len(self.failed)} of {len(self.found)} lines, the first of them {self.failed[0]}"

    def rows(self) -> list[list[object]]:
        """The table, as in COLUMNS."""
        return [
            [line, off.max_abs, off.max_rel, off.used, off.where, "pass" if off.passed else "FAIL"]
            for line, off in self.found.items()
        ]

    def markdown(self) -> str:
        """For people."""
        columns = [*COLUMNS, "tolerance", "what"]
        rows = [[*row, tolerance(str(row[0]), self.dtype), LINES[str(row[0])][1]] for row in self.rows()]
        about = [["", ""], ["---"] * 2, *self.about.items()]
        table = [columns, ["---"] * len(columns), *([format_number(cell) for cell in row] for row in rows)]
        text = ["# Parity with one process", "", f"**{self.verdict}.**", "", *map(_row, about), "", *map(_row, table)]
        return "\n".join(text) + "\n" + EXPLAINED

    def json(self) -> str:
        """For programs; null where a number is not finite."""
        lines = [
            {
                "line": line,
                "what": LINES[line][1],
                "passed": off.passed,
                **{
                    name: x if not isinstance(x, float) or math.isfinite(x) else None for name, x in asdict(off).items()
                },
                "tolerance": asdict(tolerance(line, self.dtype)),
            }
            for line, off in self.found.items()
        ]
        content = {"passed": not self.failed, "verdict": self.verdict, "about": self.about, "lines": lines}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
