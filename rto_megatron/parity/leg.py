"""One step of a run with all that it makes kept for comparison: a leg of parity, on any layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.run import RTORun
from rto_megatron.data.sampler import shard
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.rows import gather_rows
from rto_megatron.distributed.shards import Shard, optimizer_shards, shards
from rto_megatron.stages.rto import Setup, Step, judge, learn, roll_out
from rto_megatron.stages.run import Clock

CPU = torch.device("cpu")
FILE = "leg.safetensors"

SIGNALS = ("policy_log_probs", "ref_log_probs", "dpo_log_probs", "values", "raw_scores", "scores")
REPORTED = {
    "policy/loss": "ppo/loss",
    "policy/entropy": "ppo/entropy",
    "policy/grad_norm": "optimizer/policy_grad_norm",
    "policy/learning_rate": "optimizer/policy_learning_rate",
    "critic/loss": "critic/loss",
    "critic/grad_norm": "optimizer/critic_grad_norm",
    "critic/learning_rate": "optimizer/critic_learning_rate",
}
"""Line -> the metric of each minibatch that it compares."""

Keep = Callable[[str, Iterable[Shard]], None]
"""Takes the pieces of a line of weights that this rank holds: one process writes them down, a layout compares them."""

Record = TypeVar("Record", Rollout, Signals)


@dataclass(frozen=True, kw_only=True)
class Leg:
    """What a step made, weights apart; all rows, on the CPU, the same on every rank if the layout is right."""

    rollout: Rollout
    """The responses that this leg sampled."""
    signals: Signals
    """What its roles said, of its own responses or of the one process's."""
    lines: dict[str, Tensor]
    """Line -> [B, T], [B] or [minibatches]: of the signals, and of all that came after them."""

    def save(self, folder: Path) -> None:
        """Write all of it into one file of `folder`."""
        tensors = _named("rollout", self.rollout) | _named("signals", self.signals) | self.lines
        # clones, because safetensors takes no two names of one storage
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Leg":
        """Read what `save` wrote."""
        found = load_file(folder / FILE)
        return cls(rollout=_take("rollout", Rollout, found), signals=_take("signals", Signals, found), lines=found)


def _named(prefix: str, record: Rollout | Signals) -> dict[str, Tensor]:
    return {f"{prefix}.{field.name}": getattr(record, field.name) for field in fields(record)}


def _take(prefix: str, kind: type[Record], found: dict[str, Tensor]) -> Record:
    return kind(**{field.name: found.pop(f"{prefix}.{field.name}") for field in fields(kind)})


def walk(setup: Setup, config: RTORun, keep: Keep, *, one: Leg | None = None) -> Leg:
    """The first step of the run on this process's layout.

    Args:
        keep: is told of every line of weights, on every rank, in one order.
        one: the leg of one process. The roles are then asked about its responses rather than about this leg's own,
            and the update learns from its signals: each part of the step begins with the same numbers as in one
            process, so a line that is off tells of its own part.
    """
    mesh, roles = setup.mesh, [role for role in (setup.actors.policy, setup.actors.critic) if role is not None]
    for role in roles:
        keep(f"start/{role.name}_weights", shards(role.model))
    sampled = roll_out(setup, config, step=0)
    asked = _share(one.rollout, mesh) if one else sampled
    rollout, signals = judge(setup, config, asked, step=0)
    step = learn(
        setup,
        config,
        rollout,
        one.signals.to(mesh.device) if one else signals,
        step=0,
        kl_coef=config.rto.kl_coef,
        clock=Clock(),
    )
    for role in roles:
        kept = optimizer_shards(role)
        keep(f"{role.name}/gradient", kept["exp_avg"])
        # a bfloat16 weight often does not move at all in one step; its float32 master does
        keep(f"{role.name}/weights", kept["master"] if role.model.config.bf16 else shards(role.model))
        keep(f"{role.name}/copies", shards(role.model))
    _, after = judge(setup, config, asked, step=0)
    lines = {f"signal/{name}": getattr(signals, name) for name in SIGNALS} | _lines_of(step)
    lines["after/policy_log_probs"] = after.policy_log_probs
    if setup.actors.critic:
        lines["after/values"] = after.values
    return Leg(
        rollout=gather_rows(sampled, mesh).to(CPU),
        signals=signals.to(CPU),
        lines={name: x.to(CPU) for name, x in lines.items()},
    )


def _share(rollout: Rollout, mesh: Mesh) -> Rollout:
    """This replica's rows."""
    return rollout.rows(shard(len(rollout), rank=mesh.data.rank, world=mesh.data.size)).to(mesh.device)


def _lines_of(step: Step) -> dict[str, Tensor]:
    rewards, experience = step.credit.rewards, step.experience
    reported = {
        line: torch.tensor([report[metric].value for report in step.updates], dtype=torch.float64)
        for line, metric in REPORTED.items()
        if metric in step.updates[0]
    }
    return {
        **{f"reward/{name}": getattr(rewards, name) for name in ("dpo", "kl", "score", "total")},
        "advantage/raw": step.credit.raw_advantages,
        "advantage/returns": experience.returns,
        "advantage/whitened": experience.advantages,
        **reported,
    }


def write_weights(folder: Path) -> Keep:
    """Write whole tensors, one a file so that no reader holds more; for one process, which has every piece."""

    def keep(line: str, pieces: Iterable[Shard]) -> None:
        if line.endswith("/copies"):  # of which one process has one
            return
        held: dict[str, list[Shard]] = {}
        for piece in pieces:
            held.setdefault(piece.name, []).append(piece)
        (folder / line).mkdir(parents=True)
        for name, parts in held.items():
            whole = torch.empty(parts[0].full_shape, dtype=parts[0].data.dtype)
            for part in parts:
                whole[part.slices] = part.data.to(CPU)
            save_file({"whole": whole}, _weight_file(folder, line, name))

    return keep


def read_weight(folder: Path, line: str, name: str) -> Tensor:
    """A whole tensor that `write_weights` wrote."""
    return load_file(_weight_file(folder, line, name))["whole"]


def _weight_file(folder: Path, line: str, name: str) -> Path:
    return folder / line / f"{name}.safetensors"
