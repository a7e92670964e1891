"""What a check says, and the report of all that were made."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from rto_megatron.errors import UserError
from rto_megatron.metrics import Console

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
"""From nothing to do, to a run that would be refused or fail."""

WIDTH = 112
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    why: str = ""
    """Why it matters."""
    way_out: str = ""

    def lines(self) -> list[str]:
        """As the report prints it."""
        parts = (f"{self.level:<8} ", self.what), (" " * 9 + "why: ", self.why), (" " * 9 + "way out: ", self.way_out)
        return [
            line
            for start, text in parts
            if text
            for line in textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * 9)
        ]


@dataclass(frozen=True)
class Table:
    """Numbers that follow from the config."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass
class Section:
    """All that was found out about one subject."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def ok(self, what: str) -> None:
        """As it should be."""
        self.findings.append(Finding(level="ok", what=what))

    def note(self, what: str, *, why: str, way_out: str = "") -> None:
        """Good to know; nothing is wrong."""
        self.findings.append(Finding(level="note", what=what, why=why, way_out=way_out))

    def warning(self, what: str, *, why: str, way_out: str) -> None:
        """The run would start, and probably not do what is wanted."""
        self.findings.append(Finding(level="warning", what=what, why=why, way_out=way_out))

    def error(self, what: str, *, why: str, way_out: str) -> None:
        """The run would be refused, or fail."""
        self.findings.append(Finding(level="error", what=what, why=why, way_out=way_out))

    def attempt(self, check: Callable[[], Result], *, why: str, way_out: str = "") -> Result | None:
        """What a check of the run itself returns; None where it raises, and its message becomes a finding.

        Args:
            way_out: for messages that name none; those that do have it after their last semicolon.
        """
        try:
            return check()
        except (UserError, ImportError) as error:
            self.refused(error, why=why, way_out=way_out)
        return None

    def refused(self, error: Exception, *, why: str, way_out: str = "") -> None:
        """An error that the run itself would stop with."""
        what, semicolon, remedy = str(error).rpartition("; ")
        if semicolon:
            self.error(what, why=why, way_out=remedy)
        else:
            self.error(remedy, why=why, way_out=way_out)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        self.tables.append(Table(title, columns, rows))


class Report:
    """Sections in the order in which they were looked at."""

    def __init__(self) -> None:
        self.sections: list[Section] = []

    def section(self, name: str) -> Section:
        """A new section."""
        self.sections.append(Section(name))
        return self.sections[-1]

    @property
    def findings(self) -> list[Finding]:
        """Of all sections."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def exit_code(self) -> int:
        """2 if the run would be refused or fail, else 0."""
        return 2 if any(finding.level == "error" for finding in self.findings) else 0

    def show(self, console: Console) -> None:
        """Print the sections, the worst findings of each first, and the count."""
        for section in self.sections:
            if not section.findings and not section.tables:
                continue
            console.say(f"\n{section.name.upper()}")
            for finding in sorted(section.findings, key=lambda f: -LEVELS.index(f.level)):
                console.say("\n".join(finding.lines()))
            for table in section.tables:
                console.say()
                console.table(table.title, table.columns, table.rows)
        counts = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        verdict = "this run would be refused or fail" if counts["error"] else "this run would start"
        told = [_counted(counts[level], level) for level in ("error", "warning", "note")]
        console.say(f"\n{verdict}: {', '.join(told)}, {_counted(counts['ok'], 'check')} passed")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"exit_code": self.exit_code, "sections": [asdict(section) for section in self.sections]}


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
