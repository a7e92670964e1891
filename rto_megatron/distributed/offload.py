"""Frozen weights that live in host memory and come to the device to score.

A pass over the roles goes role by role. While one computes, the weights of the next are on their way; when the last
microbatch of a role has been launched, its weights go. So the device holds two roles at most, and none between passes.
Nothing is copied back: frozen weights do not change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.distributed.runtime import HostCopies
from rto_megatron.distributed.stream import Part


class HostWeights:
    """The weights of frozen models on this rank's host."""

    def __init__(self, device: torch.device) -> None:
        """None yet."""
        self._copies = HostCopies(device)
        self._host: dict[int, tuple[torch.nn.Parameter, Tensor]] = {}
        """By the parameter's id; a parameter that several models share is here once."""
        self.peak_bytes = 0
        """Most that has been on the device at one time."""

    def take(self, model: MegatronModule) -> None:
        """Move a frozen model's weights to the host; until a pass brings them back it cannot be computed with."""
        for parameter in model.parameters():
            assert not parameter.requires_grad
            if id(parameter) not in self._host:
                self._host[id(parameter)] = parameter, self._copies.to_host(parameter.data)
                _empty(parameter)

    def give_back(self, model: MegatronModule) -> None:
        """Leave on the device for good what a model that learns has in common with frozen ones."""
        found = [self._host.pop(id(parameter)) for parameter in model.parameters() if id(parameter) in self._host]
        self._bring(found)
        self._copies.wait()

    @contextmanager
    def staying(self, model: MegatronModule) -> Iterator[None]:
        """Inside, a model's weights are on the device, for what is no pass over the roles: it writes."""
        found = [self._host[id(parameter)] for parameter in model.parameters() if id(parameter) in self._host]
        self._bring(found)
        self._copies.wait()
        yield
        for parameter, _ in found:
            _empty(parameter)

    def bytes_of(self, parameter: torch.nn.Parameter) -> int:
        """Of a weight in host memory; 0 of one that stays on the device."""
        return self._host[id(parameter)][1].nbytes if id(parameter) in self._host else 0

    def visits(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of a pass that goes through one after the other, each with its weights there in time.

        The first one's way begins here.
        """
        needs = [[self._host[id(p)] for p in _weights_of(part) if id(p) in self._host] for part in parts]
        visitors = [number for number, wanted in enumerate(needs) if wanted]
        here = set(visitors[:1])
        if visitors:
            self._bring(needs[visitors[0]])

        def arrive(number: int) -> None:
            self._copies.wait()
            if later := [other for other in visitors if other > number]:
                here.add(later[0])
                self._bring(needs[later[0]])

        def leave(number: int) -> None:
            here.discard(number)
            kept = {id(parameter) for other in here for parameter, _ in needs[other]}
            for parameter, _ in needs[number]:
                if id(parameter) not in kept:
                    _empty(parameter)
            for chunk in parts[number].chunks:
                _forget_quantized(chunk)

        return [
            replace(part, forward_step=_between(part, number, arrive, leave)) if needs[number] else part
            for number, part in enumerate(parts)
        ]

    def _bring(self, wanted: Sequence[tuple[torch.nn.Parameter, Tensor]]) -> None:
        absent = [(parameter, host) for parameter, host in wanted if not parameter.numel()]
        for (parameter, _), copy in zip(absent, self._copies.start([host for _, host in absent]), strict=True):
            parameter.data = copy
        on_device = sum(parameter.nbytes for parameter, _ in self._host.values())
        self.peak_bytes = max(self.peak_bytes, on_device)


def _between(
    part: Part, number: int, arrive: Callable[[int], None], leave: Callable[[int], None]
) -> Callable[..., tuple[Tensor, Callable]]:
    """A part's forward step, with `arrive` before the first microbatch and `leave` after the last."""
    done = 0

    def forward_step(*arguments: Any) -> tuple[Tensor, Callable]:
        nonlocal done
        if done == 0:
            arrive(number)
        outcome = part.forward_step(*arguments)
        done += 1
        if done == len(part.micros) * len(part.chunks):
            leave(number)
        return outcome

    return forward_step


def _weights_of(part: Part) -> list[torch.nn.Parameter]:
    """Those of all its chunks."""
    return [parameter for chunk in part.chunks for parameter in chunk.parameters()]


def _forget_quantized(model: MegatronModule) -> None:
    """Let go of the 8-bit copies of weights that Transformer Engine keeps; a pass's first microbatch makes new ones."""
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


def _empty(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)
