"""What is said of the machine, of memory and of the disk, against what there is."""

import math
import sys
from dataclasses import replace

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.config.parallel import ComputeConfig
from rto_megatron.distributed import runtime
from rto_megatron.distributed.runtime import Hardware, inspect_hardware
from rto_megatron.doctor.command import Options, examine
from rto_megatron.doctor.findings import Report, Section
from rto_megatron.doctor.machine import OPTIONAL, REQUIRED, Place, check_machine, numbers
from rto_megatron.metrics import in_units
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of

CPU = Hardware(device="CPU", num_gpus=0, gpu_bytes=0, torch_build="CPU", backend="gloo", has_backend=True)


def said(section, level):
    return [finding.what for finding in section.findings if finding.level == level]


def machine_with(tmp_path, monkeypatch, package, content):
    """The machine's section where a package of this content is found first."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    runtime.check_transformer_engine.cache_clear()
    section = Section("machine")
    usable = check_machine(section, ComputeConfig(), Place(hardware=CPU, ranks=1, ranks_here=1))
    runtime.check_transformer_engine.cache_clear()
    sys.modules.pop(package, None)
    return usable, section


def test_a_broken_transformer_engine_is_an_error_and_nothing_else_is_tried(tmp_path, monkeypatch):
    usable, section = machine_with(tmp_path, monkeypatch, "transformer_engine", "raise OSError('no libcudnn')")
    assert not usable
    [error] = [finding for finding in section.findings if finding.level == "error"]
    assert "transformer-engine is installed but cannot be imported" in error.what and "no libcudnn" in error.what
    assert error.way_out.startswith("run 'pip uninstall transformer-engine")


def test_a_broken_transformer_engine_is_told_on_gpus_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.doctor.test_places.CPU", replace(CPU, num_gpus=8))
    usable, section = machine_with(tmp_path, monkeypatch, "transformer_engine", "raise OSError('no libcudnn')")
    assert not usable
    assert ["no libcudnn" in what for what in said(section, "error")] == [True]


def test_the_apex_of_pypi_is_told_from_nvidia_s(tmp_path, monkeypatch):
    usable, section = machine_with(tmp_path, monkeypatch, "apex", "")
    assert usable
    [warning] = said(section, "warning")
    assert warning == f"the installed apex is not NVIDIA's: {tmp_path}/apex"


def test_every_library_of_setup_has_a_line_that_says_what_it_is_for():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "setup.py").read_text()
    listed = text.partition("install_requires=[")[2].partition("],")[0]
    names = {line.strip().strip('",').partition(">")[0] for line in listed.splitlines() if line.strip().startswith('"')}
    assert names == set(REQUIRED)
    assert set(OPTIONAL) == {"transformer-engine", "apex"}


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        ({}, "compute.fp8 hybrid needs an NVIDIA GPU, and this rank runs on a CPU"),
        ({"num_gpus": 1, "capability": (8, 0)}, "compute.fp8 hybrid with compute.fp8_recipe tensorwise needs a GPU of"),
    ],
)
def test_8_bits_are_refused_where_they_cannot_be(hardware, said):
    section, compute = Section("machine"), ComputeConfig(dtype="bfloat16", fp8="hybrid")
    check_machine(section, compute, Place(hardware=replace(CPU, **hardware), ranks=1, ranks_here=1))
    [error] = [finding.what for finding in section.findings if finding.level == "error"]
    assert error.startswith(said)


def test_this_machine_runs_megatron():
    section = Section("machine")
    assert check_machine(section, ComputeConfig(), Place(hardware=inspect_hardware(), ranks=1, ranks_here=1))
    assert said(section, "error") == []


def test_gpus_are_compared_with_ranks_and_memory(chain, monkeypatch, tmp_path):
    gpus = Hardware(
        device="2 x Some GPU", num_gpus=2, gpu_bytes=3 << 20, torch_build="it", backend="nccl", has_backend=False
    )
    monkeypatch.setattr("rto_megatron.doctor.command.inspect_hardware", lambda: gpus)
    words = ["--stage=rto", *words_of("rto", chain), f"--run_dir={tmp_path}", "--parallel.tensor=2"]
    report = examine(None, words, Options(ranks=4))
    errors = [finding.what for finding in report.findings if finding.level == "error"]
    assert "each rank needs a GPU of its own, got 4 ranks on a machine with 2" in errors
    assert "torch was built without nccl" in errors
    [warning] = [f.what for f in report.findings if f.what.startswith("a rank needs about")]
    assert warning.endswith("and has 3.0 MiB (2 x Some GPU)")
    report = examine(None, words, Options(ranks=4, nodes=2))
    assert not [finding for finding in report.findings if finding.what.startswith("each rank needs a GPU")]


def bytes_of_a_checkpoint(folder):
    """Of all tensors in each folder of a checkpoint."""
    from megatron.core import dist_checkpointing

    sizes = {}
    for part in folder.iterdir():
        if (part / ".metadata").exists():
            tensors = dist_checkpointing.load_tensors_metadata(str(part)).values()
            sizes[part.name] = sum(t.dtype.itemsize * math.prod(t.global_shape) for t in tensors)
    return sizes


def trained_size(chain, folder, words):
    run_stage("rto", chain, [f"--run_dir={folder}", "--num_steps=1", *words])
    from rto_megatron.distributed.checkpoint import open_checkpoint

    return bytes_of_a_checkpoint(open_checkpoint(folder).folder)


@pytest.mark.parametrize(
    "words",
    [[], ["--optimizer.distributed=false", "--critic_optimizer.distributed=false"], ["--compute.dtype=bfloat16"]],
)
def test_a_checkpoint_takes_what_was_foretold(words, chain, tmp_path):
    from rto_megatron.doctor.roles import check_roles
    from rto_megatron.doctor.run_folder import check_disk

    [sizes] = run_ranks(trained_size, 1, chain, tmp_path, words)
    config = load_run("rto", None, [*words_of("rto", chain), f"--run_dir={tmp_path}", *words])
    models = check_roles(Section("roles"), config, hashes=False).models
    section = Section("disk")
    check_disk(section, config, models, num_steps=1)
    told = dict(section.tables[0].rows)
    weights = sizes["policy"] + sizes["critic"]
    optimizers = sizes["policy_optimizer"] + sizes["critic_optimizer"]
    assert (told["weights"], told["optimizer states"]) == (in_units(weights), in_units(optimizers))


def test_checkpoints_are_compared_with_the_disk(chain, tmp_path):
    from rto_megatron.doctor.roles import check_roles
    from rto_megatron.doctor.run_folder import check_disk

    words = ["--checkpoint.save_every=1", "--checkpoint.keep_last=3", "--checkpoint.keep_best=true"]
    config = load_run("rto", None, [*words_of("rto", chain), f"--run_dir={tmp_path}", "--eval_every=1", *words])
    models = check_roles(Section("roles"), config, hashes=False).models

    def levels(free):
        section = Section("disk")
        check_disk(section, config, models, num_steps=10, free=free)
        return dict(section.tables[0].rows), [finding.level for finding in section.findings]

    table, found = levels(free=1 << 40)
    assert (table["checkpoints that are saved"], table["of these kept"], found) == (10, 4, ["ok"])
    assert levels(free=5 << 20)[1] == ["warning"]
    assert levels(free=1 << 20)[1] == ["error"]


def test_versions_are_compared_as_numbers():
    assert numbers("0.16.1") < numbers("0.19.0rc1") and numbers("0.9.0") < numbers("0.16.1+cpu")


def test_a_message_is_cut_where_its_way_out_begins():
    section = Section("x")
    section.refused(ValueError("a: must be b; c, got d; do e"), why="f", way_out="g")
    section.refused(ValueError("a: must be b, got d"), why="f", way_out="g")
    assert [(f.what, f.way_out) for f in section.findings] == [
        ("a: must be b; c, got d", "do e"),
        ("a: must be b, got d", "g"),
    ]


def test_the_exit_code_is_that_of_the_worst_finding():
    report = Report()
    section = report.section("x")
    section.warning("a", why="b", way_out="c")
    assert report.exit_code == 0
    section.error("a", why="b", way_out="c")
    assert report.exit_code == 2


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 bytes"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 29, "2.50 GiB")]
)
def test_bytes_are_shown_in_units(size, shown):
    assert in_units(size) == shown
