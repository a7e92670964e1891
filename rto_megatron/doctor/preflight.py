"""`preflight RUN.yaml`: are the machines of a run equal, and do they reach each other? One process a node.

    python -m rto_megatron.launch --nnodes=8 --nproc-per-node=1 ... -m rto_megatron preflight RUN.yaml

That it starts at all shows that the nodes find their meeting point. Then each looks at itself, all tell all, and what
differs is named with the nodes that differ. A minute before a run, in place of a failure an hour into it.
"""

import hashlib
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import rto_megatron
from rto_megatron.config.load import dump_run, load_any, print_options, split_options
from rto_megatron.distributed.bandwidth import bytes_per_second_to_next
from rto_megatron.distributed.collectives import barrier, gather_objects
from rto_megatron.distributed.runtime import (
    Hardware,
    check_gpus,
    inspect_hardware,
    is_main,
    rank,
    start_runtime,
    stop_runtime,
)
from rto_megatron.doctor.findings import Report, Section
from rto_megatron.doctor.machine import OPTIONAL, REQUIRED, installed
from rto_megatron.doctor.run_folder import existing
from rto_megatron.errors import ConfigError, UserError
from rto_megatron.metrics import Console, in_units
from rto_megatron.schedule.links import connect

JOIN_TIMEOUT = timedelta(minutes=2)
"""How long a node waits for the others."""
CLOCK_SECONDS = 2.0
"""Clocks that differ by more are warned of: times of files and traces are compared across nodes."""
LEAST_FREE = 2**30
"""Bytes below which a file system is as good as full."""
LEAST_FILES = 4096
"""Open files: sockets to all ranks, checkpoint shards, data."""
SLOW_SHARE = 0.5
"""A node that sends at less than this share of the median is named."""
INPUTS = ("start", "policy", "reference", "dpo", "reward_model", "critic", "checkpoint", "source")
"""Settings that name a folder which every node reads."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What preflight takes beside the settings of the run."""

    ranks: int | None = None
    """Ranks that the run will have on a node; null takes as many as there are GPUs."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ranks must be 1 or more, got {self.ranks}")


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine says of itself."""

    host: str
    hardware: Hardware
    python: str
    versions: Mapping[str, str]
    """Of libraries; empty where one is not installed."""
    code: str
    """sha256 of this package's files."""
    problem: str = ""
    """Why the settings cannot be read there."""
    config: str = ""
    """sha256 of the resolved settings."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Folder or file that the run reads -> what is there, in a word."""
    written: str = ""
    """Why nothing can be written to the run folder; empty where it can."""
    free: Mapping[str, int] = field(default_factory=dict)
    """File system -> free bytes."""
    open_files: int = 0
    """How many a process may have."""
    seen: frozenset[str] = frozenset()
    """Nodes whose mark in the run folder it sees."""
    clock: float = 0.0
    """Seconds since 1970, right after all have met."""
    rate: float = 0.0
    """Bytes a second to the next node."""


def main(path: Path | None, words: list[str]) -> int:
    """Look at this node, compare all nodes, print the report on the first; 0, or 2 if the run would fail."""
    if "-h" in words or "--help" in words:
        print_options(Options, "python -m rto_megatron preflight RUN.yaml [--section.field=value ...]")
    options, words = split_options(Options, words)
    if path is None and not words:
        raise ConfigError("preflight needs the YAML file of a run: python -m rto_megatron preflight RUN.yaml")
    runtime = start_runtime(threads=1, timeout=JOIN_TIMEOUT)
    config, node = _look(path, words)
    folder = getattr(config, "run_dir", None)
    marks = folder / ".preflight" if folder is not None else None
    written = _mark(marks, node.host) if marks else ""
    barrier()
    clock = time.time()
    seen = frozenset(mark.name.partition("-")[2] for mark in marks.glob("*")) if marks else frozenset()
    # a connection from every node to every other, at ports that the kernel chooses, as the schedule makes them
    connect(rank(), [[other] for other in range(len(gather_objects(None)))], gather_objects).close()
    rate = bytes_per_second_to_next(runtime)
    nodes = gather_objects(replace(node, written=written, seen=seen, clock=clock, rate=rate))
    barrier()
    if marks and is_main():
        shutil.rmtree(marks, ignore_errors=True)
    report = Report()
    compare(report, nodes, ranks=options.ranks, shared=folder)
    report.show(Console(is_main()))
    stop_runtime()
    return report.exit_code


def _look(path: Path | None, words: list[str]) -> tuple[Any, Node]:
    hardware, problem, config = inspect_hardware(), "", None
    try:
        _, config = load_any(path, words)
    except UserError as error:
        problem = str(error)
    folder = existing(getattr(config, "run_dir", Path.cwd()))
    places = {"run folder": folder, "temporary files": Path(tempfile.gettempdir()), "shared memory": Path("/dev/shm")}
    return config, Node(
        host=socket.gethostname(),
        hardware=hardware,
        python=platform.python_version(),
        versions={name: installed(name) for name in (*REQUIRED, *OPTIONAL)},
        code=_digest_of_code(),
        problem=problem,
        config=hashlib.sha256(dump_run(config).encode()).hexdigest() if config is not None else "",
        inputs=_inputs(config),
        free={name: shutil.disk_usage(place).free for name, place in places.items() if place.exists()},
        open_files=_open_files(),
    )


def _digest_of_code() -> str:
    root, digest = Path(rto_megatron.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _inputs(config: Any) -> dict[str, str]:
    """What the run reads and what this node sees of it: the newest checkpoint of a run, the size of a file."""
    found = {str(getattr(config, name)) for name in INPUTS if isinstance(getattr(config, name, None), Path)}
    found |= set(map(str, getattr(config, "checkpoints", ())))
    data = [getattr(getattr(config, "data", None), name, None) for name in ("train", "eval")]
    found |= {source for source in (*data, getattr(config, "prompts", None)) if source and source.endswith(".jsonl")}
    return {name: _seen_of(Path(name).expanduser()) for name in sorted(found)}


def _seen_of(path: Path) -> str:
    with suppress(OSError):
        if path.is_file():
            return f"{path.stat().st_size} bytes"
        tracker = path / "checkpoints" / "latest.txt"
        return tracker.read_text().strip() if tracker.is_file() else f"{len(list(path.iterdir()))} entries"
    return "missing"


def _open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _mark(folder: Path, host: str) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{rank()}-{host}").write_text(f"{time.time()}\n")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def compare(report: Report, nodes: Sequence[Node], *, ranks: int | None, shared: Path | None) -> None:
    """Say what is not the same on all nodes, or not good enough on one.

    Args:
        nodes: in rank order.
        ranks: that the run will have on a node; None takes each node's GPUs.
        shared: the run folder.
    """
    _show(report.section(f"nodes: {len(nodes)}"), nodes)
    found = report.section("software")
    for node in nodes:
        if node.problem:
            found.error(
                f"{node.host}: {node.problem}",
                why="each rank reads the settings itself",
                way_out="mend it there, or start from a folder that all nodes share",
            )
    readable = not any(node.problem for node in nodes)
    if readable:
        _same(found, nodes, "settings", [node.config for node in nodes], "a collective that not all call hangs")
    _same(found, nodes, "code of rto_megatron", [node.code for node in nodes], "ranks would do different things")
    _same(found, nodes, "Python", [node.python for node in nodes], "objects that ranks exchange may not be read")
    for name in nodes[0].versions:
        differs = "kernels and collectives of other versions give other numbers, or hang"
        _same(found, nodes, name, [node.versions[name] or "missing" for node in nodes], differs, quiet=True)
    if not found.findings or all(one.level == "ok" for one in found.findings):
        found.ok(f"{len(nodes[0].versions)} libraries have the same versions everywhere")
    _check_machines(report.section("machines"), nodes, ranks)
    if readable:
        _check_files(report.section("files"), nodes, shared)
    _check_network(report.section("network"), nodes)


def _show(found: Section, nodes: Sequence[Node]) -> None:
    first = min(node.clock for node in nodes)
    rows = []
    for number, node in enumerate(nodes):
        hardware, rate = node.hardware, f"{node.rate / 1e9:.2f} GB/s" if node.rate else ""
        free = in_units(node.free.get("run folder", 0))
        rows.append((number, node.host, hardware.device, hardware.driver, free, f"+{node.clock - first:.2f} s", rate))
    found.table("as they see themselves", ("rank", "host", "device", "driver", "free", "clock", "to the next"), rows)


def _same(
    found: Section, nodes: Sequence[Node], what: str, values: Sequence[str], why: str, *, quiet: bool = False
) -> None:
    """All nodes have one value; else an error that names those which differ from most."""
    usual = max(values, key=lambda value: (values.count(value), value))
    others = [(node.host, value) for node, value in zip(nodes, values, strict=True) if value != usual]
    if others:
        said = ", ".join(f"{host} has {value[:60] or 'none'}" for host, value in others)
        found.error(
            f"{what}: {said}; the other {len(nodes) - len(others)} have {usual[:60] or 'none'}",
            why=why,
            way_out="start all nodes from one environment and one checkout, or leave these nodes out",
        )
    elif not quiet:
        found.ok(f"{what}: the same on all nodes")


def _check_machines(found: Section, nodes: Sequence[Node], ranks: int | None) -> None:
    slowest = "the slowest rank sets the pace, and a driver of another version may not speak with the others"
    _same(found, nodes, "GPUs", [node.hardware.device for node in nodes], slowest)
    _same(found, nodes, "GPU driver", [node.hardware.driver for node in nodes], slowest)
    for node in nodes:
        if ranks is not None and node.hardware.num_gpus:
            alone = "two ranks on one GPU wait for each other for ever"
            found.attempt(lambda node=node: check_gpus(ranks, node.hardware.num_gpus), why=f"{node.host}: {alone}")
        if node.open_files < LEAST_FILES:
            found.warning(
                f"{node.host}: a process may open {node.open_files} files",
                why="each rank keeps connections to the others, beside files of data and checkpoints",
                way_out=f"ulimit -n {LEAST_FILES} or more, in the job's script or by who runs the cluster",
            )


def _check_files(found: Section, nodes: Sequence[Node], shared: Path | None) -> None:
    for node in nodes:
        if node.written:
            found.error(
                f"{node.host}: run_dir {shared}: cannot be written ({node.written})",
                why="every rank writes its part of a checkpoint",
                way_out="set a run_dir on a file system that all nodes mount for writing",
            )
        unseen = [other.host for other in nodes if not other.written and other.host not in node.seen]
        if shared is not None and unseen:
            found.error(
                f"{node.host}: does not see in run_dir {shared} what was written on {', '.join(unseen)}",
                why="a checkpoint whose parts lie on several disks cannot be read",
                way_out="set a run_dir on a file system that all nodes share",
            )
        for place, free in node.free.items():
            if free < LEAST_FREE:
                found.error(
                    f"{node.host}: {in_units(free)} are free for the {place}",
                    why="a run that cannot write stops",
                    way_out="make room there, or leave this node out",
                )
    for name in sorted({name for node in nodes for name in node.inputs}):
        values = [node.inputs.get(name, "missing") for node in nodes]
        if set(values) == {"missing"}:
            found.error(f"{name}: there is no such file or folder", why="the run reads it", way_out="mend the setting")
        else:
            _same(found, nodes, name, values, "ranks would read different things", quiet=True)
    if not found.findings:
        found.ok("all nodes write to the run folder, see what the others write, and read the same inputs")


def _check_network(found: Section, nodes: Sequence[Node]) -> None:
    clocks = [node.clock for node in nodes]
    if max(clocks) - min(clocks) > CLOCK_SECONDS:
        late = max(nodes, key=lambda node: abs(node.clock - median(clocks)))
        found.warning(
            f"{late.host}: its clock differs by {late.clock - median(clocks):+.1f} s from the others'",
            why="traces and times of files are compared across nodes",
            way_out="have the cluster's clocks set by NTP or chrony",
        )
    else:
        found.ok(f"clocks agree within {max(clocks) - min(clocks):.2f} s")
    found.ok("every node has a connection to every other, at ports of the kernel's choice")
    usual = median(node.rate for node in nodes)
    for number, node in enumerate(nodes):
        if node.rate < SLOW_SHARE * usual:
            other = nodes[(number + 1) % len(nodes)].host
            found.warning(
                f"{node.host} sends {node.rate / 1e9:.2f} GB/s to {other}; "
                f"half of the nodes send {usual / 1e9:.2f} or more",
                why="every collective waits for its slowest link",
                way_out="look at the network of these two nodes, or leave one of them out",
            )
