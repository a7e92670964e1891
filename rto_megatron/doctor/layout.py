"""Does the layout divide the ranks, the batches and the models; what follows from the batch sizes."""

import math
from functools import partial
from typing import Any

from rto_megatron.config.run import RTORun
from rto_megatron.distributed.mesh import check_seed
from rto_megatron.doctor.data import Rows
from rto_megatron.doctor.findings import Section
from rto_megatron.doctor.memory import longest_of
from rto_megatron.errors import UserError
from rto_megatron.schedule.cast import cast_of
from rto_megatron.stages import course, supervised
from rto_megatron.stages.rules import size_rules
from rto_megatron.stages.update import plan_updates


def check_layout(found: Section, config: Any, *, ranks: int) -> int | None:
    """Check what needs no model; the data-parallel size, None where the layout does not divide the ranks."""
    if hasattr(config, "seed"):
        found.attempt(partial(check_seed, config.seed), why="each stage adds to it, and torch takes 63 bits")
    why = "every rank belongs to one tensor, one pipeline and one data group"
    if isinstance(config, RTORun) and config.schedule.map == "split":
        cast = found.attempt(partial(cast_of, config, ranks), why=why)
        if cast is None:
            return None
        num_data = cast.policy.num_replicas
        found.ok(cast.describe())
    else:
        num_data = found.attempt(partial(config.parallel.data, ranks), why=why)
        if num_data is None:
            return None
        found.ok(f"{ranks} ranks = {config.parallel.sizes} x data {num_data}")
    broken = len(found.findings)
    for rule in size_rules(config, num_data):
        found.attempt(rule.check, why=rule.why)
    if len(found.findings) == broken:
        _look_at_microbatches(found, config, num_data)
    return num_data


def _look_at_microbatches(found: Section, config: Any, num_data: int) -> None:
    rows = _rows_per_step(config)
    if not rows:
        return
    mine, cut = rows // num_data, config.compute.cut
    size = cut.rows
    if size is not None and size > mine:
        found.note(
            f"compute.micro_batch_size {size} is more than the {mine} rows of a replica's optimizer step",
            why=f"a microbatch holds those {mine}; the number does not bound memory any lower",
        )
    longest = longest_of(config)
    stages, count = config.parallel.pipeline, -(-mine // max(1, cut.most_tokens(longest) // longest))
    if stages > 1 and count < 4 * stages:
        idle = (stages - 1) / (config.parallel.virtual_stages * count + stages - 1)
        found.note(
            f"{count} microbatches (fewer if rows are short) fill a pipeline of {stages} stages: each waits {idle:.0%} "
            "of a step",
            why="a stage has nothing to do until the first microbatch comes and after the last one went",
            way_out="make compute.micro_batch_tokens smaller, the batch larger, or parallel.virtual_stages more",
        )
    if isinstance(config, RTORun):
        samples = config.prompts_per_step * config.samples_per_prompt // num_data
        if config.rollout.max_slots > samples:
            found.note(
                f"rollout.max_slots {config.rollout.max_slots} is more than the {samples} samples of a replica's step",
                why="only as many slots as there are samples are made",
            )


def _rows_per_step(config: Any) -> int:
    if isinstance(config, RTORun):
        return config.samples_per_optimizer_step
    return config.train.batch_size if hasattr(config, "train") else 0


def check_sizes(found: Section, config: Any, rows: Rows, num_data: int | None) -> int | None:
    """The table that a training stage prints when it starts; its number of steps, None where that is not known."""
    try:
        steps = config.num_steps if isinstance(config, RTORun) else supervised.num_steps(len(rows.train), config)
    except UserError:  # too few rows, which is told where they are read
        return None
    if rows.train and num_data is not None:
        count = len(rows.train)
        sizes = (
            course.size_table(config, count, num_data)
            if isinstance(config, RTORun)
            else supervised.size_table(config, count, len(rows.held_out), num_data)
        )
        found.table("what follows from the batch sizes", ("size", "value"), sizes)
    _look_at_rates(found, config, steps)
    return steps


def _look_at_rates(found: Section, config: Any, steps: int) -> None:
    updates = plan_updates(config).num_optimizer_steps if isinstance(config, RTORun) else steps
    for name in ("optimizer", "critic_optimizer"):
        optimizer = getattr(config, name, None)
        if optimizer is None:
            continue
        warmup = math.ceil(optimizer.warmup_frac * updates)
        if warmup >= updates and optimizer.warmup_frac > 0:
            found.warning(
                f"{name}: {warmup} of {updates} optimizer steps are warm-up",
                why="the learning rate reaches its peak with the last step, if at all",
                way_out=f"lower {name}.warmup_frac, or take more steps",
            )
        else:
            found.ok(f"{name}: {updates} optimizer steps, of which {warmup} warm up to {optimizer.lr:g}")
