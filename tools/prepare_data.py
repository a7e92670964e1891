"""Cut the quickstart's data out of a folder of rows from public repositories.

    python tools/prepare_data.py PACK examples/quickstart/data

PACK holds `hh_preferences_{train,eval}.jsonl` (HH-RLHF pairs with `messages`, `chosen`, `rejected`) and `sft.jsonl`
(rows with `prompt`, `response`, `source`). Only rows under the MIT licence are taken; see the README of the result.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

GSM8K = "openai/grade-school-math train"
HH = "anthropics/hh-rlhf harmless-base/test"

MAX_GSM8K_CHARS = 400
"""Of question and answer together: the short half, so that a small model sees whole problems."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """Cut the quickstart's data out of a folder of rows from public repositories."""

    pack: tyro.conf.Positional[Path]
    """Folder with hh_preferences_train.jsonl, hh_preferences_eval.jsonl and sft.jsonl."""
    out: tyro.conf.Positional[Path]
    """Folder to write into."""


def preferences(rows: Iterable[Row]) -> Iterator[Row]:
    """Human preferences; the flat transcript goes, the messages say the same."""
    for row in rows:
        if row["source"] == HH:
            yield {name: row[name] for name in ("id", "messages", "chosen", "rejected")}


def chosen_answers(pairs: Iterable[Row]) -> Iterator[Row]:
    """The preferred side of each pair, as an answer to imitate."""
    for pair in pairs:
        yield {"messages": pair["messages"], "response": pair["chosen"], "source": HH}


def short_problems(rows: Iterable[Row]) -> Iterator[Row]:
    """Grade-school problems with worked answers."""
    for row in rows:
        if row["source"] == GSM8K and len(row["prompt"]) + len(row["response"]) <= MAX_GSM8K_CHARS:
            yield {name: row[name] for name in ("prompt", "response", "source")}


def read(path: Path) -> list[Row]:
    """All rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[Row]) -> None:
    """Write a JSONL file and say how much it is."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Read the pack, write the four files."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held_out = (list(preferences(read(arguments.pack / f"hh_preferences_{s}.jsonl"))) for s in ("train", "eval"))
    write(arguments.out / "preferences_train.jsonl", train)
    write(arguments.out / "preferences_eval.jsonl", held_out)
    problems = list(short_problems(read(arguments.pack / "sft.jsonl")))
    write(arguments.out / "sft_train.jsonl", [*chosen_answers(train), *problems])
    write(arguments.out / "sft_eval.jsonl", list(chosen_answers(held_out)))


if __name__ == "__main__":
    main()
