"""What is kept of a run of the study: a small record, from which the page is written and on which a study goes on.

A run folder is needed no more once its record is there. `results/TASK/runs.jsonl` of the repository has those of the
runs that its page is about: a study that is told of them (`--known`) does not do them again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rto_megatron.errors import DataError

NUMBERS = {"gold": "eval/grade", "kl": "eval/kl", "score": "eval/score", "win_rate": "eval/grade_win_rate",
           "length": "eval/response_length"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came out of a run, or of a seed's start."""

    seed: int
    run: str
    """`start`, `tune/METHOD-POINT`, or the method."""
    settings: list[str]
    """Words that tell it from other runs of its name: a record is of no use where they differ."""
    steps: list[int]
    """Before which it was evaluated; empty where only the end was."""
    numbers: dict[str, list[float]]
    """As NUMBERS, one for each evaluation; `return` where it sampled; of a start, what its models have learned."""

    @property
    def key(self) -> tuple[int, str]:
        """What it is found by."""
        return self.seed, self.run

    @property
    def final_gold(self) -> float:
        """At the end of the run."""
        return self.numbers["gold"][-1]


Records = dict[tuple[int, str], Record]


def read(folder: Path, known: Path | None = None) -> Records:
    """The records of a study, and those it was told of, which give way to its own.

    Raises:
        DataError: a file cannot be read, or what it holds is no record.
    """
    told = enumerate(_text(known).splitlines(), 1) if known else ()
    own = [(str(path), _text(path)) for path in sorted(folder.glob("seed-*/**/*.json"))]
    found = [_record(text, where) for where, text in (*((f"{known}:{line}", text) for line, text in told), *own)]
    return {record.key: record for record in found}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a file of records, but cannot be read ({error})") from None


def _record(text: str, where: str) -> Record:
    try:
        record = Record(**json.loads(text))
        if not (isinstance(record.seed, int) and isinstance(record.run, str) and isinstance(record.numbers, dict)):
            raise TypeError
        return record
    except (TypeError, ValueError):
        names = ", ".join(field.name for field in fields(Record))
        raise DataError(
            f"{where}: must be the record of a run, a JSON object with {names}, got {text[:60]!r}; `runs.jsonl` beside "
            "a study's page has such lines"
        ) from None


def write(folder: Path, record: Record) -> None:
    """Written beside and renamed: a killed study leaves no half of one."""
    path = folder / f"seed-{record.seed}" / f"{record.run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(_rounded(asdict(record))), encoding="utf-8")
    beside.rename(path)


def write_all(path: Path, records: Iterable[Record]) -> None:
    """As lines of one file, to be kept and told to other studies."""
    lines = [json.dumps(_rounded(asdict(record))) for record in sorted(records, key=lambda record: record.key)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def of_start(seed: int, settings: Sequence[str], folder: Path) -> Record:
    """How well a seed's pairs were learned."""
    accuracy = {
        "reward_accuracy": [_last(folder / "reward", "reward_model/eval_accuracy")],
        "dpo_accuracy": [_last(folder / "dpo-0", "dpo/eval_accuracy")],
    }
    return Record(seed=seed, run="start", settings=list(settings), steps=[], numbers=accuracy)


def of_pairs(seed: int, run: str, settings: Sequence[str], evaluation: Path) -> Record:
    """Of a policy that did not sample: the second row of an evaluation beside the start."""
    row = json.loads(evaluation.read_text(encoding="utf-8"))["rows"][1]
    names = {"gold": "grade", "win_rate": "grade_win_rate"}
    numbers = {number: [row[names.get(number, number)]] for number in NUMBERS}
    return Record(seed=seed, run=run, settings=list(settings), steps=[], numbers=numbers)


def of_samples(seed: int, run: str, settings: Sequence[str], run_dir: Path) -> Record:
    """Of a policy that sampled: its evaluations, and what it maximised on the way.

    `return` is a response's rewards in all, in the step that each evaluation precedes (the last one: follows).
    """
    rows = _rows(run_dir)
    evaluations = [row for row in rows if "eval/grade" in row]
    totals = {row["step"]: row["reward/total_sum"] for row in rows if "reward/total_sum" in row}
    steps = [int(row["step"]) for row in evaluations]
    numbers = {number: [row[metric] for row in evaluations] for number, metric in NUMBERS.items()}
    numbers["return"] = [totals[min(step, max(totals))] for step in steps]
    return Record(seed=seed, run=run, settings=list(settings), steps=steps, numbers=numbers)


def _rounded(record: dict) -> dict:
    """As it is kept everywhere, so that a page comes out the same from own runs and from those that were told."""
    numbers = {name: [round(value, 5) for value in values] for name, values in record["numbers"].items()}
    return record | {"numbers": numbers}


def _rows(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "tensorboard" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _last(run_dir: Path, metric: str) -> float:
    return [row[metric] for row in _rows(run_dir) if metric in row][-1]
