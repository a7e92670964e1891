"""`parity`: one step of a run on its layout against the same step in one process, line by line."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from subprocess import Popen, TimeoutExpired

from torch import Tensor

from rto_megatron import __version__
from rto_megatron.config.load import dump_run, load_any, print_help
from rto_megatron.config.run import RTORun, stage_of
from rto_megatron.distributed.collectives import barrier, broadcast_object, gather_objects
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import Runtime, is_main, start_runtime, stop_runtime, world_size
from rto_megatron.distributed.shards import Shard
from rto_megatron.errors import NOT_PROVEN, ConfigError, UserError
from rto_megatron.metrics import Console
from rto_megatron.parity import one_process
from rto_megatron.parity.certificate import COLUMNS, Certificate
from rto_megatron.parity.leg import Leg, read_weight, walk
from rto_megatron.parity.lines import (
    LINES,
    NOTHING,
    Difference,
    Tolerance,
    copy_differences,
    difference,
    gradient_difference,
    shard_difference,
    step_difference,
    token_differences,
    tolerance,
)
from rto_megatron.stages.rto import Setup, prepare
from rto_megatron.stages.rules import check_run
from rto_megatron.stages.run import check_writable, write_text

POLL_SECONDS = 5.0
"""Between two words of rank 0 to the ranks that wait: far below a collective's timeout, however long the leg takes."""
LAST_LINES = 15
"""Of what the one process said, where it fails."""


def main(path: Path | None, words: list[str]) -> int:
    """Take one step both ways, print and write the certificate; 0 if every line passes, 3 if not.

    Raises:
        UserError: the config is not that of an rto or ppo run, or a leg could not take its step.
    """
    if "-h" in words or "--help" in words:
        print_help("rto")  # its settings are those of the run
    stage, config = load_any(path, words)
    if not isinstance(config, RTORun):
        raise ConfigError(f"parity takes the config of an rto or ppo run, got one of {stage}")
    runtime = start_runtime(threads=config.compute.threads, deterministic=config.compute.deterministic)
    certificate = certify(config, runtime)
    stop_runtime()
    return NOT_PROVEN if certificate.failed else 0


def certify(config: RTORun, runtime: Runtime) -> Certificate:
    """The run's first step both ways, compared, printed and written to RUN_DIR/parity; every rank must call."""
    folder, console = config.run_dir / "parity", Console(is_main())
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_run(config, mesh.data.size)  # now, rather than when the one process is done
    check_writable("run_dir", folder / "parity.json")
    console.say(f"parity: one process takes the step first, then the {world_size()} of this layout")
    with taken_alone(config, folder / "one_process") as reference:
        setup, _ = prepare(config, runtime)
        certificate = compare(setup, config, reference)
    if is_main():
        write_text("run_dir", folder / "parity.md", certificate.markdown())
        write_text("run_dir", folder / "parity.json", certificate.json())
    console.table(f"parity: {folder}", ("what", "value"), list(certificate.about.items()))
    console.table("against one process", COLUMNS, certificate.rows())
    console.say(f"\n{certificate.verdict}\n{folder / 'parity.md'}, {folder / 'parity.json'}")
    return certificate


@contextmanager
def taken_alone(config: RTORun, folder: Path) -> Iterator[Path]:
    """The folder with the leg of one process, which goes when the block ends; every rank must call.

    Raises:
        UserError: that process failed; with the last lines of what it said.
    """
    child = None
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
        child = one_process.start(config, folder)
    try:
        problem = _wait(child, folder)
        if problem is None:
            yield folder
    finally:
        if child is not None:
            child.kill()
            child.wait()
            shutil.rmtree(folder, ignore_errors=True)
    if problem is not None:
        barrier()  # until the files are gone: torchrun ends all ranks soon after the first one that ends
        raise UserError(problem)


def _wait(child: Popen | None, folder: Path) -> str | None:
    """Wait for rank 0's child, on every rank; why it failed, or None."""
    code = None
    while code is None:
        if child is not None:
            with suppress(TimeoutExpired):
                code = child.wait(POLL_SECONDS)
        code = broadcast_object(code)
    if code == 0:
        return None
    problem = None
    if child is not None:
        lines = (folder / one_process.LOG).read_text(errors="replace").strip().splitlines()
        problem = "\n".join([f"the one process of parity ended with exit code {code}:", *lines[-LAST_LINES:]])
    return broadcast_object(problem)


def compare(setup: Setup, config: RTORun, folder: Path) -> Certificate:
    """Take the step on this layout and compare it with that of one process, kept in `folder`; every rank must call."""
    one, dtype = Leg.load(folder), config.compute.dtype
    found: dict[str, Difference] = {}

    def check(line: str, pieces: Iterable[Shard]) -> None:
        if line.endswith("/copies"):
            found[line] = copy_differences(pieces)
            return
        found[line] = NOTHING
        for piece in pieces:
            found[line] = found[line].worst(_piece_difference(line, piece, tolerance(line, dtype), folder))

    own = walk(setup, config, check, one=one)
    found |= token_differences(own.rollout, one.rollout, dtype)
    for line, x in own.lines.items():
        found[line] = difference(x, one.lines[line], tolerance(line, dtype), _axes(line, x))
    everywhere = _over_ranks(found)
    return Certificate(
        about=_about(setup, config, one), dtype=dtype, found={line: everywhere[line] for line in LINES if line in found}
    )


def _axes(line: str, x: Tensor) -> tuple[str, ...]:
    if x.dim() == 2:
        return "row", "token"
    return ("row",) if line.startswith("signal/") else ("minibatch",)


def _piece_difference(line: str, piece: Shard, allowed: Tolerance, folder: Path) -> Difference:
    one = read_weight(folder, line, piece.name)
    role, _, what = line.partition("/")
    if what == "gradient":
        return gradient_difference(piece, one, allowed)
    if what == "weights":
        start = read_weight(folder, f"start/{role}_weights", piece.name)
        gradient = read_weight(folder, f"{role}/gradient", piece.name)
        return step_difference(piece, start=start, one=one, gradient=gradient, allowed=allowed)
    return shard_difference(piece, one, allowed)


def _over_ranks(found: dict[str, Difference]) -> dict[str, Difference]:
    """The worst of all ranks, and on which of them it is."""
    worst = dict.fromkeys(found, NOTHING)
    for number, theirs in enumerate(gather_objects(found)):
        for line, off in theirs.items():
            # copies are compared between ranks, so they are of none
            at = f", rank {number}" if off.where and world_size() > 1 and not line.endswith("/copies") else ""
            worst[line] = worst[line].worst(replace(off, where=off.where + at))
    return worst


def _about(setup: Setup, config: RTORun, one: Leg) -> dict[str, object]:
    mesh = setup.mesh
    layout = f"{config.parallel.sizes} x data {mesh.data.size}"
    layout += f", {config.parallel.virtual_stages} virtual stages" if config.parallel.virtual_stages > 1 else ""
    layout += ", sequence parallel" if config.parallel.sequence else ""
    layers = "Transformer Engine" if mesh.runtime.has_fused_layers(config.compute.dtype) else "local"
    return {
        "layout": layout if world_size() > 1 else "one process: a check of the check; start the layout with torchrun",
        "ranks": f"{world_size()} x {mesh.device.type}, {config.compute.dtype}, {layers} layers",
        "step": f"{len(one.rollout)} responses, {int(one.rollout.response_mask.sum())} tokens, "
        f"{len(one.lines['policy/loss'])} minibatches",
        "config": f"{stage_of(config)}, sha256 {hashlib.sha256(dump_run(config).encode()).hexdigest()[:16]}",
        "roles": ", ".join(f"{role} {parent.id}" for role, parent in setup.actors.parents.items()),
        "versions": ", ".join(
            [f"rto_megatron {__version__}", *(f"{name} {version(name)}" for name in ("torch", "megatron-core"))]
        ),
    }
