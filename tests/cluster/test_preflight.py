"""Before a run: nodes that differ are named, and what they read, write and send is looked at."""

from dataclasses import replace
from pathlib import Path

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.distributed.runtime import Hardware
from rto_megatron.doctor.findings import Report
from rto_megatron.doctor.preflight import Node, _inputs, compare
from tests.ranks import run_ranks
from tests.stages.chain import words_of

GPUS = Hardware(
    device="8 x H100", num_gpus=8, gpu_bytes=0, driver="570.1", torch_build="", backend="nccl", has_backend=True
)
NAMES = ("a", "b", "c")
GOOD = [
    Node(
        host=name,
        hardware=GPUS,
        python="3.11.7",
        versions={"torch": "2.13.0", "apex": ""},
        code="c0de",
        config="c0ffee",
        inputs={"runs/sft": "step_00000010"},
        free={"run folder": 2**40},
        open_files=65536,
        seen=frozenset(NAMES),
        clock=1000.0,
        rate=20e9,
    )
    for name in NAMES
]


def said(nodes, ranks=8):
    report = Report()
    compare(report, nodes, ranks=ranks, shared=Path("runs/rto"))
    found = [finding for section in report.sections for finding in section.findings]
    return report.exit_code, [f"{one.level}: {one.what}" for one in found if one.level != "ok"]


def test_equal_nodes_pass():
    assert said(GOOD) == (0, [])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"config": "dead"}, "error: settings: b has dead; the other 2 have c0ffee"),
        ({"code": "old"}, "error: code of rto_megatron: b has old; the other 2 have c0de"),
        ({"versions": {"torch": "2.12.0", "apex": ""}}, "error: torch: b has 2.12.0; the other 2 have 2.13.0"),
        ({"versions": {"torch": "2.13.0", "apex": "1"}}, "error: apex: b has 1; the other 2 have missing"),
        ({"hardware": replace(GPUS, driver="550")}, "error: GPU driver: b has 550; the other 2 have 570.1"),
        ({"inputs": {"runs/sft": "missing"}}, "error: runs/sft: b has missing; the other 2 have step_00000010"),
        ({"written": "Read-only file system"}, "error: b: run_dir runs/rto: cannot be written (Read-only file system)"),
        ({"seen": frozenset("b")}, "error: b: does not see in run_dir runs/rto what was written on a, c"),
        ({"free": {"run folder": 2**20}}, "error: b: 1.0 MiB are free for the run folder"),
        ({"open_files": 1024}, "warning: b: a process may open 1024 files"),
        ({"clock": 1009.5}, "warning: b: its clock differs by +9.5 s from the others'"),
        ({"rate": 1e9}, "warning: b sends 1.00 GB/s to c; half of the nodes send 20.00 or more"),
        ({"problem": "lr: must be positive"}, "error: b: lr: must be positive"),
    ],
)
def test_a_node_that_differs_is_named(change, what):
    code, found = said([GOOD[0], replace(GOOD[1], **change), GOOD[2]])
    assert found == [what]
    assert code == (2 if what.startswith("error") else 0)


def test_fewer_gpus_than_ranks_are_an_error():
    few = [replace(node, hardware=replace(GPUS, device="4 x H100", num_gpus=4)) for node in GOOD]
    code, found = said(few)
    assert code == 2
    assert found == ["error: each rank needs a GPU of its own, got 8 ranks on a machine with 4"] * 3


@pytest.mark.parametrize(
    ("stage", "words", "inputs"),
    [
        ("dpo", ["--start=sft", "--data.train=pairs.jsonl"], {"sft", "pairs.jsonl"}),
        ("generate", ["--checkpoint=rto", "--prompts=p.jsonl", "--out=o.jsonl"], {"rto", "p.jsonl"}),
        (
            "evaluate",
            ["--checkpoints", "sft", "rto", "--reference=sft", "--reward_model=reward", "--prompts=p.jsonl"],
            {"sft", "rto", "reward", "p.jsonl"},
        ),
    ],
)
def test_what_a_stage_reads_is_looked_for_on_each_node(stage, words, inputs):
    words = words if stage == "generate" else ["--run_dir=run", *words]
    assert _inputs(load_run(stage, None, words)) == dict.fromkeys(inputs, "missing")


def look(words, other):
    from rto_megatron.distributed.runtime import rank
    from rto_megatron.doctor.preflight import main

    return main(None, [*words, *(other if rank() == 1 else [])])


def test_nodes_tell_each_other(chain, tmp_path):
    words = [*words_of("rto", chain), f"--run_dir={tmp_path}/run"]
    assert run_ranks(look, 2, words, []) == [0, 0]
    assert not list((tmp_path / "run").iterdir()), "nothing is left behind"
    assert run_ranks(look, 2, words, ["--seed=7"]) == [2, 2], "each rank has its own settings"
    assert run_ranks(look, 2, words, ["--seed=x"]) == [2, 2], "and one that cannot read them does not hang the others"
