"""Traces of a few rows, written by hand."""

import json

ROW = {"group": 0, "rank": 0, "kind": "decode", "role": "", "step": 0, "lane": 0, "number": 0, "start": 0.0, "end": 1.0}


def row(**changed):
    return ROW | changed


def write(run_dir, rank, rows, *, tail=""):
    """The file of one rank, with `tail` after its last whole line."""
    path = run_dir / "trace" / f"rank_{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(found) + "\n" for found in rows) + tail)
    return path


def two_ranks(run_dir):
    """Rank 0 writes 6 s and rank 1 trains 2 s while it does; each step ends with an optimizer step of rank 1.

    0    2    4    6    8    10 s
    DDDDDDDDDDDDDDD               rank 0
         TTTTT          o    o    rank 1, one second each o
    """
    write(run_dir, 0, [row(start=0.0, end=6.0, tokens=40)])
    trainer = {"rank": 1, "group": 1, "lane": -1, "role": "policy"}
    write(run_dir, 1, [
        row(**trainer, kind="train", start=2.0, end=4.0),
        row(**trainer, kind="optimizer", start=7.0, end=8.0),
        row(**trainer, kind="optimizer", step=1, start=9.0, end=10.0, num_bytes=5),
    ])  # fmt: skip
