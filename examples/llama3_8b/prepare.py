#!/usr/bin/env python
"""UltraFeedback as JSON lines: pairs for DPO and the reward model, prompts for RTO.

    python examples/llama3_8b/prepare.py --out runs/llama3_8b/data

Pairs: HuggingFaceH4/ultrafeedback_binarized, its splits train_prefs and test_prefs. Prompts: weqweasdas/ultra_train,
whose column context_messages the paper's script reads; the held-out ones are the prompts of test_prefs. One node reads
the hub once, and all ranks then read the same bytes. Rows that no stage would take are left out and counted.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rto_megatron.data.rows import Row
from rto_megatron.data.sources import open_source
from rto_megatron.errors import DataError

PAIRS = "HuggingFaceH4/ultrafeedback_binarized"
PROMPTS = "weqweasdas/ultra_train"
PROMPT_COLUMN = "context_messages"


def pairs(rows: Iterator[Row]) -> Iterator[dict[str, Any] | None]:
    """{"messages", "chosen", "rejected"} of each row; None for one that is no pair."""
    for row in rows:
        try:
            prompt, chosen, rejected = row.pair()
        except DataError:
            yield None
        else:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompts(rows: Iterator[Row], column: str) -> Iterator[dict[str, Any] | None]:
    """{"messages"} of each row; None where there is nothing to answer."""
    for row in rows:
        try:
            yield {"messages": Row({"messages": row.values.get(column)}, row.place).prompt()}
        except DataError:
            yield None


def write(path: Path, rows: Iterator[Mapping[str, Any] | None]) -> None:
    """Write what is not None, and say how many were left out."""
    kept = left_out = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            if row is None:
                left_out += 1
            else:
                kept += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {kept} rows, {left_out} left out")


def main() -> None:
    """Read both data sets and write four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", default=PAIRS, help="name for the `datasets` library, or a folder with its files")
    parser.add_argument("--prompts", default=PROMPTS, help="likewise")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        write(options.out / f"pairs_{split}.jsonl", pairs(open_source(f"{options.pairs}:{split}_prefs")))
    write(options.out / "prompts_train.jsonl", prompts(open_source(f"{options.prompts}:train"), PROMPT_COLUMN))
    held_out = (dict(row, messages=row["prompt"]) for row in pairs(open_source(f"{options.pairs}:test_prefs")) if row)
    write(options.out / "prompts_test.jsonl", ({"messages": row["messages"]} for row in held_out))


if __name__ == "__main__":
    main()
