"""What the watchdog is told of a run of RTO: the items of its schedule, and the phases of its steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rto_megatron.distributed.watchdog import Watchdog
from rto_megatron.schedule.cast import Cast
from rto_megatron.schedule.pace import Pace
from rto_megatron.schedule.work import Item
from rto_megatron.stages.course import Course
from rto_megatron.stages.held_out import HeldOut


@contextmanager
def watched_item(watchdog: Watchdog, pace: Pace, cast: Cast, item: Item | None, queues: str) -> Iterator[None]:
    """Around an item of the schedule, or around waiting for one."""
    if item is None:
        watchdog.enter("waiting", "for work", queues=queues)
        yield
    else:
        lane = f"of lane {item.lane}" if item.lane >= 0 else ""
        name = " ".join(filter(None, (item.role, str(item.number), lane, f"of step {item.step}")))
        ranks = [member for group in item.groups for member in cast.groups[group]]
        with pace.item(item) as predicted:
            watchdog.enter(item.kind, name, seconds=predicted, with_ranks=ranks, queues=queues)
            yield
    watchdog.leave()


@contextmanager
def watched_phase(
    watchdog: Watchdog, pace: Pace, ranks: Sequence[int], course: Course, held_out: HeldOut, name: str
) -> Iterator[None]:
    """Around a phase of a step that all `ranks` go through: of the sequential run, or at a boundary."""
    if name == "evaluate" and not held_out.is_due(course.at.step):
        yield
        return
    with pace.phase(name) as predicted:
        together = () if name in ("generate", "advantage") else ranks  # in these a replica waits for no other
        watchdog.enter(name, f"of step {course.at.step}", seconds=predicted, with_ranks=together)
        yield
    watchdog.leave()
