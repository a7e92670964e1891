"""`python -m rto_megatron doctor RUN.yaml`: every check, one after the other, and the report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.config.load import load_despite_mistakes, print_options, split_options
from rto_megatron.config.run import RTORun
from rto_megatron.distributed.runtime import inspect_hardware, is_main
from rto_megatron.doctor.findings import Report
from rto_megatron.doctor.machine import Place, check_machine
from rto_megatron.errors import ConfigError, writing
from rto_megatron.metrics import Console
from rto_megatron.schedule.cast import least_ranks


@dataclass(frozen=True, kw_only=True)
class Options:
    """What doctor takes beside the settings of the run."""

    ranks: int | None = None
    """How many would be started; null takes what torchrun says, else the fewest that the config can run on."""
    nodes: int = 1
    """Machines that they are spread over."""
    memory: float | None = None
    """GiB that a rank can have; null takes this machine's."""
    hashes: bool = False
    """Compare all files of checkpoints with their hashes, however long it takes."""
    json: Path | None = None
    """File for the report as JSON."""

    def __post_init__(self) -> None:
        for name in ("ranks", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory must be positive, got {self.memory} GiB")


def main(path: Path | None, words: list[str]) -> int:
    """Check the run that a YAML file and words describe, print the report; 0, or 2 if it would be refused or fail."""
    if "-h" in words or "--help" in words:
        print_options(Options, "python -m rto_megatron doctor RUN.yaml [--section.field=value ...]")
    options, words = split_options(Options, words)
    if path is None and not words:
        raise ConfigError("doctor needs the YAML file of a run: python -m rto_megatron doctor RUN.yaml")
    report = examine(path, words, options)
    report.show(Console(is_main()))
    if options.json is not None and is_main():
        with writing("json", options.json):
            options.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return report.exit_code


def examine(path: Path | None, words: list[str], options: Options) -> Report:
    """Every check of the run that the file and the words describe."""
    report = Report()
    stage, config, mistakes = load_despite_mistakes(path, words)
    found = report.section(f"config: {stage or 'stage unknown'}")
    for mistake in mistakes:
        found.refused(
            mistake, why="a setting that is not what was meant changes the run", way_out="set it to a value that fits"
        )
    if config is None:
        found.note("nothing else was checked", why="the settings do not say enough", way_out="mend them and ask again")
        return report
    if mistakes:
        found.note("what follows was checked with the default in place of each wrong setting", why="it is not known")
    else:
        found.ok("all settings can be read and fit each other")
    started = os.environ.get("WORLD_SIZE")
    least = least_ranks(config) if isinstance(config, RTORun) else config.parallel.replica
    ranks = options.ranks or (int(started) if started else least)
    if options.nodes > ranks:
        raise ConfigError(f"nodes must be at most the {ranks} ranks, got {options.nodes}; give --ranks too")
    place = Place(
        hardware=inspect_hardware(), ranks=ranks, ranks_here=-(-ranks // options.nodes), memory=options.memory
    )
    found = report.section("machine")
    if check_machine(found, config.compute, place):
        # Not before: these import Megatron, and take seconds.
        from rto_megatron.doctor.run import examine_run

        examine_run(report, config, place, hashes=options.hashes)
    else:
        found.note("nothing else was checked", why="every other check needs megatron-core")
    return report
