"""How a benchmark starts ranks, what it says of where it ran, and how its results are kept."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def launch(num_ranks: int, *words: str, threads: int = 1) -> None:
    """Start ranks of so many threads each, and wait for them."""
    command = [sys.executable, "-m", "rto_megatron.launch", "--standalone", f"--nproc-per-node={num_ranks}", *words]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=subprocess.STDOUT
        )
        if done.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{log.read()[-4000:]}")


def machine(*packages: str) -> dict[str, Any]:
    """Processor, its load, and versions: of torch, megatron-core and `packages`."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", *packages)},
    }


def resident_bytes() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, and of how many."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "number": len(values)}


def save(name: str, found: dict[str, Any]) -> None:
    """As benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path}")


def save_table(name: str, header: Sequence[str], rows: Sequence[str], where: dict[str, Any]) -> None:
    """As benchmarks/results/NAME.md, with the machine below."""
    versions = ", ".join(
        f"{key} {value}" for key, value in where.items() if isinstance(value, str) and key != "processor"
    )
    load = where["load_average_before"][0]
    about = f"{where['processor']}, {where['cores']} cores, load average before: {load:.2f}; {versions}"
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join([*header, *rows, "", f"By `python -m benchmarks.{name}` on {about}.", ""]))
    print(f"written to {path}")
