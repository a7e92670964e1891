"""What sft, dpo and reward share: reading rows, and the loop of optimizer steps and evaluations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.run import ConvertRun, DPORun, RewardRun, SFTRun
from rto_megatron.data.readers import Dropped
from rto_megatron.data.sampler import batch_rows
from rto_megatron.data.shares import deal, imbalance
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, Manifest
from rto_megatron.distributed.collectives import gather_over_data
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.runtime import rank, world_size
from rto_megatron.distributed.step import Forward, Loss, score, train_step
from rto_megatron.distributed.watchdog import Watchdog
from rto_megatron.errors import DataError
from rto_megatron.models.gpt import Kind
from rto_megatron.schedule.pace import Seen, save_seconds
from rto_megatron.stages.resume import Checkpoints, Progress, digests
from rto_megatron.stages.roles import base_of, bases_of
from rto_megatron.stages.run import Clock, Run
from rto_megatron.stages.update import learning_rate

Row = TypeVar("Row")
SupervisedRun = SFTRun | DPORun | RewardRun

FIRST_SECONDS = 120.0
"""Predicted for an update or an evaluation before one has been seen."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned from a batch of rows."""

    group: str
    """Of the metric names."""
    collate: Callable[[Sequence[Any]], Any]
    """Rows -> a record on this rank's device."""
    forward: Forward
    make_loss: Callable[[Any], Loss]
    """The whole minibatch, before it is cut -> the loss of a microbatch of it."""
    num_sums: int
    """Length of what the loss reports."""
    summarise: Callable[[Tensor], dict[str, float]]
    """[num_sums] summed over anything -> metrics by name."""
    rows_per_item: int = 1
    """2 for pairs, whose two rows stay together."""


def read_rows(
    read: Callable[..., tuple[list[Any], Dropped]],
    config: SupervisedRun,
    tokenizer: Tokenizer,
) -> tuple[list[Any], list[Any], str]:
    """Training rows, held-out rows, and what to say of them.

    Args:
        read: `read_sft` or `read_preferences`.
    """
    data = config.data
    limits = {"max_length": data.max_length, "too_long": data.too_long}
    rows, dropped = read(data.train, tokenizer, **limits)
    held_out, eval_dropped = read(data.eval, tokenizer, **limits) if data.eval else ([], "none")
    return rows, held_out, f"train: {dropped}; held out: {eval_dropped}"


def num_steps(num_rows: int, config: SupervisedRun) -> int:
    """Optimizer steps of the whole training.

    Raises:
        DataError: there are fewer rows than one batch takes.
    """
    if num_rows < config.train.batch_size:
        raise DataError(
            f"data.train {config.data.train}: {num_rows} rows are left, fewer than train.batch_size "
            f"{config.train.batch_size}; bring more rows or take smaller batches"
        )
    steps = config.train.num_epochs * num_rows // config.train.batch_size
    return min(steps, config.train.max_steps or steps)


def manifest_of(
    stage: str,
    kind: Kind,
    config: SupervisedRun,
    architecture: ModelConfig,
    tokenizer: Tokenizer,
    rows: Sequence[Any],
    held_out: Sequence[Any],
    parents: Mapping[str, Checkpoint],
) -> Manifest:
    """What the checkpoints of a run say of themselves.

    Args:
        parents: the run that it starts from, if any, by the name under which it is recorded.
    """
    starts = [base_of(parent, kind, config.lora, config.run_dir) for parent in parents.values()]
    return Manifest(
        stage=stage,
        step=num_steps(len(rows), config),
        models={kind: architecture},
        tokenizer=tokenizer.digest(),
        parents={name: parent.id for name, parent in parents.items()},
        bases=bases_of(*((kind, base) for base in starts)),
        data=digests(rows, held_out),
    )


def size_table(config: SupervisedRun, num_rows: int, num_eval_rows: int, num_data: int) -> list[tuple[str, object]]:
    """The start table: what follows from the config."""
    per_rank = config.train.batch_size // num_data
    return [
        ("rows", num_rows),
        ("held-out rows", num_eval_rows),
        ("rows per optimizer step", config.train.batch_size),
        ("of these per replica, on average", per_rank),
        ("optimizer steps", num_steps(num_rows, config)),
    ]


def fit(
    trainable: Trainable,
    task: Task,
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    config: SupervisedRun,
    mesh: Mesh,
    run: Run,
    *,
    checkpoints: Checkpoints,
    own: Checkpoint | None,
) -> None:
    """Train on `rows`, evaluate and save now and then, and say how the last evaluation went.

    Args:
        own: the run's own checkpoint to go on from, if there is one.
    """
    total, held_out, extra = checkpoints.num_steps, {}, {}
    at = checkpoints.take_up(own, Progress())
    watchdog = Watchdog(rank=rank(), world=world_size())
    size = sum(weight.numel() for weight in trainable.model.parameters()) * mesh.tensor.size * mesh.pipeline.size
    clock = Clock(watch=partial(_watched, watchdog, Seen(), at, save_seconds(size)))
    with watchdog.watching(), run.console.progress(task.group, total=total, start=at.step) as progress:
        for step in range(at.step, total):
            numbers, told, num_tokens = _take_step(
                trainable, task, rows, config, mesh, clock, step=step, num_steps=total
            )
            last = step + 1 == total
            due = eval_rows and (last or (config.train.eval_every and (step + 1) % config.train.eval_every == 0))
            if due:
                with clock.phase("evaluate"):
                    held_out = evaluate(trainable, task, eval_rows, config, mesh)
            eval_numbers = _with_prefix(f"{task.group}/eval_", held_out) if due else {}
            seconds = clock.take()
            run.log.write(
                step,
                _with_prefix(f"{task.group}/", numbers)
                | eval_numbers
                | told
                | {"speed/tokens_per_second": num_tokens / seconds["time/step_seconds"]}
                | seconds
                | extra,
            )
            progress.done(step, numbers)
            at.step = step + 1
            with clock.phase("save"):
                extra = checkpoints.after(at, held_out=eval_numbers)
    run.log.write(total, extra | clock.take())
    run.console.say(f"checkpoint: {checkpoints.last_folder}")
    if held_out:
        run.console.say(f"held out: {'  '.join(f'{name} {value:.4g}' for name, value in held_out.items())}")


def _take_step(
    trainable: Trainable,
    task: Task,
    rows: Sequence[Row],
    config: SupervisedRun,
    mesh: Mesh,
    clock: Clock,
    *,
    step: int,
    num_steps: int,
) -> tuple[dict[str, float], dict[str, float], int]:
    """An optimizer step on the rows whose turn it is: the task's metrics, what else is told of it, and its tokens."""
    picked = batch_rows(len(rows), config.train.batch_size, seed=config.seed, step=step)
    batch = task.collate([rows[i] for i in picked])
    tokens, lr = batch.num_tokens.tolist(), learning_rate(config.optimizer, step, num_steps)
    shares = deal(tokens, mesh.data.size, unit=task.rows_per_item)
    with clock.phase("update"):
        result = train_step(
            trainable,
            batch.rows(shares[mesh.data.rank]),
            task.forward,
            task.make_loss(batch),
            mesh,
            cut=config.compute.cut,
            lr=lr,
            num_sums=task.num_sums,
            unit=task.rows_per_item,
        )
    told = {
        "optimizer/grad_norm": result.grad_norm,
        "optimizer/learning_rate": lr,
        "speed/token_imbalance": imbalance(tokens, shares),
    }
    return task.summarise(result.sums), told, sum(tokens)


def _with_prefix(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


@contextmanager
def _watched(watchdog: Watchdog, seen: Seen, at: Progress, save: float, name: str) -> Iterator[None]:
    """Around a phase of a step, which all ranks do together; a save is given at least `save` seconds."""
    latest = [seconds for seconds, _ in seen.latest(name)]
    # most saves have nothing to do, which says nothing of the others
    seconds = max([save, *latest] if name == "save" else latest or [FIRST_SECONDS])
    with seen.timed(name):
        watchdog.enter(name, f"of step {at.step}", seconds=seconds, with_ranks=range(world_size()))
        yield
    watchdog.leave()


def evaluate(
    trainable: Trainable, task: Task, rows: Sequence[Row], config: SupervisedRun, mesh: Mesh
) -> dict[str, float]:
    """The task's metrics on held-out rows, each counted once."""
    batch = task.collate(rows)
    outputs = score_rows(trainable.model, batch, task.forward, config, mesh, unit=task.rows_per_item)
    return task.summarise(task.make_loss(batch)(outputs, batch)[1].double())


def score_rows(
    model: Any, batch: Any, forward: Forward, config: SupervisedRun | ConvertRun, mesh: Mesh, *, unit: int = 1
) -> Tensor:
    """`forward` of all rows, shared out over the replicas; all rows on every rank."""
    # pairs enough for every replica: the last one may be scored more than once
    num_rows = max(len(batch), unit * mesh.data.size)
    index = [min(row, len(batch) - unit + row % unit) for row in range(num_rows)]
    lengths = batch.num_tokens.tolist()
    shares = deal([lengths[row] for row in index], mesh.data.size, unit=unit)
    mine = [index[row] for row in shares[mesh.data.rank]]
    local = score(model, batch.rows(mine), forward, mesh, cut=config.compute.score_cut)
    most = max(map(len, shares))
    whole = local.new_zeros(most, batch.tokens.shape[1], *local.shape[2:])
    whole[: len(mine), : local.shape[1]] = local[:, : whole.shape[1]]
    gathered = gather_over_data(whole, mesh)
    place = {row: most * rank + i for rank, share in enumerate(shares) for i, row in enumerate(share)}
    return gathered[[place[row] for row in range(len(batch))]]
