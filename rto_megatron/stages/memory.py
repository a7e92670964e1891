"""What each role of a run takes on this rank, measured, beside what its architecture foretold.

    parameters   of the device; weights that several roles have in common are those of the first
    host         the same in host memory: frozen roles with compute.offload_frozen
    gradients, optimizer
    activations  most that autograd kept at one time for the backward pass, in the first step of this start

Sizes are those of tensors, so they are exact on a CPU too. The peak of the process is the device's own count: of a GPU
what torch has given out, of a CPU all that was resident.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.offload import HostWeights
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.runtime import peak_bytes
from rto_megatron.metrics import Console
from rto_megatron.models.footprint import Model, hosted_bytes, kept_bytes, model_bytes
from rto_megatron.stages.actors import Judges
from rto_megatron.stages.roles import models_of
from rto_megatron.stages.rules import roles_of

JUDGES = ("reference", "dpo", "reward_model")
"""The frozen roles."""
PARTS = ("parameters", "host", "gradients", "optimizer", "activations")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Held:
    """A role on this rank."""

    role: str
    model: Any
    trainable: Trainable | None
    """None where it is frozen."""
    plan: Model
    """What its checkpoint and config say of it."""
    parallel: ParallelConfig
    mesh: Mesh


class ActivationMeter:
    """Counts what autograd keeps of a model's forward passes, each storage once and weights not at all."""

    def __init__(self, model: Any) -> None:
        """Count from now on, until `stop`."""
        self.peak_bytes = 0
        self.most_tokens = 0
        """Of a microbatch so far, padding included."""
        self._now, self._kept = 0, dict[int, list[int]]()
        """Storage -> [how often it is kept, its bytes]."""
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(partial(_Kept, self), lambda kept: kept.tensor)
        self._inside = False
        self._handles = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """The model is as it was before."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, _model: Any, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self.most_tokens = max(self.most_tokens, inputs[0].numel())
            self._inside = True
            self._hooks.__enter__()

    def _leave(self, *_: Any) -> None:
        if self._inside:
            self._inside = False
            self._hooks.__exit__(None, None, None)

    def add(self, tensor: Tensor) -> int | None:
        """Autograd keeps a tensor; the key of its storage."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._weights or key == 0:
            return None
        entry = self._kept.setdefault(key, [0, storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            self._now += entry[1]
            self.peak_bytes = max(self.peak_bytes, self._now)
        return key

    def remove(self, key: int) -> None:
        """It keeps it no longer."""
        self._kept[key][0] -= 1
        if self._kept[key][0] == 0:
            self._now -= self._kept.pop(key)[1]


class _Kept:
    """A tensor as long as autograd keeps it."""

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.tensor, self._meter = tensor, meter
        self._key = meter.add(tensor)

    def __del__(self) -> None:
        if self._key is not None:
            self._meter.remove(self._key)


class MemoryReport:
    """Measures the roles of a run at its start and its end. Every method is called by all ranks of the world."""

    def __init__(
        self, held: Sequence[Held], compute: ComputeConfig, host: HostWeights | None, *, micro_tokens: int
    ) -> None:
        """Begin to count activations of the roles that learn.

        Args:
            held: what this rank has, in the order in which it was loaded.
            host: where frozen roles live.
            micro_tokens: of the largest microbatch that is trained on.
        """
        self._held, self._compute, self._host, self._micro_tokens = held, compute, host, micro_tokens
        self._meters = {role.role: ActivationMeter(role.model) for role in held if role.trainable is not None}
        self.is_counting = True
        """Whether the first step is not over."""

    def measure(self) -> dict[str, dict[str, int]]:
        """Role -> part -> bytes on this rank now."""
        found: dict[str, dict[str, int]] = {}
        seen: set[int] = set()
        for role in self._held:
            sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
            for parameter in role.model.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    on_host = self._host.bytes_of(parameter) if self._host else 0
                    sizes["host" if on_host else "parameters"] += on_host or parameter.nbytes
            if role.trainable is not None:
                sizes["gradients"] = sum(buffer.grad_data.nbytes for buffer in _buffers(role.trainable))
                sizes["optimizer"] = sum(tensor.nbytes for tensor in _optimizer_tensors(role.trainable))
                sizes["activations"] = self._meters[role.role].peak_bytes
            found[role.role] = sizes
        return found

    def predict(self) -> dict[str, dict[str, int]]:
        """The same from architecture, layout and config; activations of the largest microbatch that came.

        Before one came, of the largest that may come.
        """
        found = {}
        for role in self._held:
            parallel, stage = role.parallel, role.mesh.pipeline.rank
            told = model_bytes(role.plan, parallel, self._compute, stage=stage, num_data=role.mesh.data.size)
            hosted = kept = 0
            if self._host is not None and role.role in JUDGES:
                hosted = hosted_bytes(role.plan, parallel, self._compute, stage=stage)
            if role.trainable is not None:
                tokens = self._meters[role.role].most_tokens or self._micro_tokens
                kept = kept_bytes(role.plan.architecture, parallel, self._compute, tokens=tokens)
            found[role.role] = {
                "parameters": told.weights - hosted,
                "host": hosted,
                "gradients": told.gradients,
                "optimizer": told.optimizer,
                "activations": kept,
            }
        return found

    def numbers(self) -> dict[str, float]:
        """`memory/*`: of each role and part the most that any rank has, and what was foretold there."""
        if self.is_counting:
            self.is_counting = False
            for meter in self._meters.values():
                meter.stop()
        told = gather_objects((self.measure(), self.predict(), peak_bytes()))
        numbers: dict[str, float] = {"memory/peak_bytes": max(peak for _, _, peak in told)}
        for side, name in ((0, ""), (1, "predicted_")):
            for role, sizes in [item for own in told for item in own[side].items()]:
                for part, size in sizes.items():
                    key = f"memory/{role}_{name}{part}_bytes"
                    numbers[key] = max(numbers.get(key, 0), size)
        return numbers

    def show(self, console: Console, when: str) -> None:
        """A table: measured over foretold, of the rank whose roles take most."""
        told = gather_objects((self.measure(), self.predict(), peak_bytes()))
        fullest = max(range(len(told)), key=lambda rank: sum(sum(sizes.values()) for sizes in told[rank][0].values()))
        measured, foretold, peak = told[fullest]
        parts = [part for part in PARTS if part != "host" or self._host is not None]
        rows = [
            (role, *(f"{measured[role][part] / MIB:.4g} / {foretold[role][part] / MIB:.4g}" for part in parts))
            for role in measured
        ]
        console.table(f"memory at the {when}, MiB measured / foretold, rank {fullest}", ("role", *parts), rows)
        console.say(f"most that this rank has had: {peak / MIB:.4g} MiB")


def _buffers(trainable: Trainable) -> list[Any]:
    ddps: list[Any] = trainable.ddps  # their `buffers` is a list, where torch's modules have a method
    return [buffer for ddp in ddps for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]


def _optimizer_tensors(trainable: Trainable) -> list[Tensor]:
    """Moments, and float32 copies of weights that are not float32 themselves."""
    found: list[Tensor] = []
    for part in trainable.optimizers:
        inner = part.optimizer
        if inner is None:  # nothing to train on this rank
            continue
        found += [x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()]
        if trainable.model.config.params_dtype != torch.float32:
            found += [parameter for group in inner.param_groups for parameter in group["params"]]
    return found


def report_of(
    config: RTORun,
    parents: Mapping[str, Checkpoint],
    judges: Judges | None,
    trained: Mapping[str, tuple[Trainable | None, Mesh | None, ParallelConfig]],
    copies: Mapping[str, tuple[Any | None, Mesh, ParallelConfig]],
    mesh: Mesh,
) -> MemoryReport:
    """Of what this rank holds.

    Args:
        trained: policy and critic.
        copies: of these, by the role's name and a word: `policy engine`.
        mesh: of the frozen roles.
    """
    plans = {plan.name: plan for plan in models_of(roles_of(config), parents)}
    models: list[tuple[str, Any, Trainable | None, Mesh | None, ParallelConfig]] = []
    if judges is not None:
        frozen = judges.reference, judges.dpo, judges.reward.model if judges.reward else None
        models += [(role, model, None, mesh, config.parallel) for role, model in zip(JUDGES, frozen, strict=True)]
    models += [(role, its[0].model if its[0] else None, *its) for role, its in trained.items()]
    models += [(role, model, None, where, cut) for role, (model, where, cut) in copies.items()]
    held = []
    for role, model, trainable, where, parallel in models:
        if model is not None and where is not None:
            plan = plans[role.split()[0]]
            plan = plan if role in plans else replace(plan, optimizer=None)
            role = role.replace(" ", "_")
            held.append(Held(role=role, model=model, trainable=trainable, plan=plan, parallel=parallel, mesh=where))
    window = config.rollout.longest
    host = judges.host if judges is not None else None
    return MemoryReport(held, config.compute, host, micro_tokens=config.compute.cut.most_tokens(window))
