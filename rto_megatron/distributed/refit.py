"""Weights of one model into another that lies on other ranks in another layout, proven to have arrived.

megatron-core plans who holds which slice of whose weights. It moves them with a barrier of the whole world at the end,
and most of the world is busy with other work: so the copying is ours, one message a pair of ranks and direction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding.planner import build_centralized_reshard_plan
from megatron.core.resharding.utils import TransferOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.distributed.chunks import named_weights
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.shards import Shard, shards

CUTS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}
"""End of a weight's name -> the axis that tensor ranks divide; all others have it whole."""

DIGEST_CHUNK = 1 << 24
"""Elements that are digested at once: each takes 8 bytes meanwhile."""


@dataclass(frozen=True, order=True)
class Piece:
    """A block of one weight, wherever it lies."""

    name: str
    offset: tuple[int, ...]
    """Where it begins in the full tensor."""
    shape: tuple[int, ...]

    def within(self, shard: Shard) -> Tensor | None:
        """What a shard of the same weight holds of this piece, and None if nothing."""
        if shard.name != self.name:
            return None
        starts, ends = self.common(shard)
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return None
        inside = zip(starts, ends, shard.offset, strict=True)
        return shard.data[tuple(slice(start - own, end - own) for start, end, own in inside)]

    def common(self, shard: Shard) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the overlap with a shard begins and ends in the full tensor."""
        starts = tuple(max(pair) for pair in zip(self.offset, shard.offset, strict=True))
        mine = (start + size for start, size in zip(self.offset, self.shape, strict=True))
        its = (start + size for start, size in zip(shard.offset, shard.data.shape, strict=True))
        return starts, tuple(min(pair) for pair in zip(mine, its, strict=True))


class Refit:
    """Weights of one model into another of the same architecture, whatever their layouts and ranks."""

    def __init__(self, source: MegatronModule | None, target: MegatronModule | None) -> None:
        """Plan; all ranks of the world must call.

        Args:
            source: this rank's part of the model that is copied; None where it has none.
            target: this rank's part of the model that is written.

        Raises:
            ValueError: the models differ in a weight's shape or type.
        """
        self._source, self._target = source, target
        mine = [Piece(shard.name, shard.offset, tuple(shard.data.shape)) for shard in _shards(target)]
        told = gather_objects((mine, _described(source), _described(target)))
        _check_same(*({name: what for each in told for name, what in each[side].items()} for side in (1, 2)))
        parts: Any = _Part(source), _Part(target)
        plan = build_centralized_reshard_plan(*parts)
        self._sends, self._receives = _moves(plan.send_ops, source), _moves(plan.recv_ops, target)
        self.ranks = tuple(rank for rank, (_, has, wants) in enumerate(told) if has or wants)
        self._pieces = sorted({piece for pieces, _, _ in told for piece in pieces})
        self._group = _group_of(self.ranks)

    def run(self) -> int:
        """Copy, on all of `ranks` and on no others; the number of bytes that this rank received.

        Raises:
            RuntimeError: a weight arrived with other bits than it was sent with.
        """
        me = dist.get_rank()
        here = {move.task: move.view for move in self._sends if move.peer == me}
        outgoing = {peer: _packed(moves) for peer, moves in _by_peer(self._sends).items() if peer != me}
        incoming = {peer: _buffer(moves) for peer, moves in _by_peer(self._receives).items() if peer != me}
        _exchange(outgoing, incoming, self._group)
        for peer, moves in _by_peer(self._receives).items():
            if peer == me:
                for move in moves:
                    move.view.copy_(here[move.task])
            else:
                _unpack(incoming[peer], moves)
        self._verify()
        return sum(buffer.numel() for buffer in incoming.values())

    def _verify(self) -> None:
        """Compare a digest of every piece that a target rank holds with that of the same elements of the source.

        What several source ranks hold is digested on each: it must be the same there.
        """
        device = next(
            p.device for model in (self._source, self._target) if model is not None for p in model.parameters()
        )
        index = {piece: i for i, piece in enumerate(self._pieces)}
        sent = torch.zeros(len(index), dtype=torch.int64, device=device)
        by_name = _by(self._pieces, lambda piece: piece.name)
        held = [
            (index[Piece(s.name, s.offset, tuple(s.data.shape))], digest(s.data, s.offset))
            for s in _shards(self._target)
        ]
        for shard in _shards(self._source):
            for piece in by_name.get(shard.name, []):
                part = piece.within(shard)
                if part is None:
                    continue
                if shard.is_main:
                    sent[index[piece]] += digest(part, piece.common(shard)[0])
                elif tuple(part.shape) == piece.shape:
                    held.append((index[piece], digest(part, piece.offset)))
        dist.all_reduce(sent, group=self._group)  # wraps around, as the digest itself does
        wrong = torch.zeros(1, dtype=torch.int64, device=device)
        if held:
            which, found = torch.tensor([i for i, _ in held], device=device), torch.stack([d for _, d in held])
            where = (sent[which] != found).nonzero()
            if len(where):
                wrong[0] = 1 + dist.get_rank() * len(index) + which[where[0, 0]]
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX, group=self._group)
        if wrong.item():
            rank, i = divmod(int(wrong.item()) - 1, len(index))
            raise RuntimeError(
                f"refit: {self._pieces[i].name} from {self._pieces[i].offset} on has other bits on rank {rank} than in "
                "the model that it was copied from; a bug or faulty hardware, and the weights there are unusable"
            )


@torch.no_grad()
def digest(data: Tensor, offset: tuple[int, ...]) -> Tensor:
    """A sum that knows each element's bits and its place in the full tensor, and not how the tensor is cut.

    The elements' raw bits as integers, each times an odd number of its index along every axis, modulo 2^64: pieces
    may be added up, and one changed bit changes it.

    Args:
        data: a block of a weight.
        offset: where the block begins in the full tensor.

    Returns:
        int64 scalar.
    """
    bits = data.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[data.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    start = offset[0]
    for rows in bits.split(max(1, DIGEST_CHUNK // max(1, bits[:1].numel()))):
        starts, part = (start, *offset[1:]), rows.long()
        for axis in reversed(range(part.dim())):
            part = (part * multipliers(starts[axis], part.shape[axis], axis, data.device)).sum(-1)
        total += part
        start += len(rows)
    return total


def multipliers(start: int, size: int, axis: int, device: torch.device) -> Tensor:
    """[size] odd int64: a well-mixed number of each index along an axis."""
    x = torch.arange(start + 1, start + size + 1, device=device) + (axis << 40)
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):  # of splitmix64, as signed numbers
        x = x * factor
        x = x ^ (x >> 29)
    return x | 1


@dataclass(frozen=True)
class _Move:
    """A slice of a weight that goes to, or comes from, another rank or this one."""

    parameter: torch.nn.Parameter
    index: tuple[slice, ...]
    peer: int
    task: int
    """The same at both ends."""

    @property
    def view(self) -> Tensor:
        """Of the live weight; asked for anew each time, for DDP moves weights into its buffers."""
        return self.parameter.data[self.index]


def _moves(operations: list[TransferOp], model: MegatronModule | None) -> list[_Move]:
    if model is None:
        assert not operations
        return []
    weights = dict(named_weights(model))
    return [_Move(weights[op.param_name], op.my_slice, op.peer_rank, op.task_id or 0) for op in operations]


def _by(items: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _by_peer(moves: list[_Move]) -> dict[int, list[_Move]]:
    """Each peer's moves, in the order in which both ends put them into one message; none is empty.

    Wide types first, so that every slice begins at a multiple of its own width.
    """
    wanted = [move for move in moves if move.view.numel()]
    wanted.sort(key=lambda move: (-move.view.element_size(), move.task))
    return _by(wanted, lambda move: move.peer)


def _buffer(moves: list[_Move]) -> Tensor:
    num_bytes = sum(move.view.numel() * move.view.element_size() for move in moves)
    return torch.empty(num_bytes, dtype=torch.uint8, device=moves[0].view.device)


def _slots(buffer: Tensor, moves: list[_Move]) -> Iterator[tuple[Tensor, Tensor]]:
    """(live slice, its place in the message), of the slice's shape."""
    start = 0
    for move in moves:
        end = start + move.view.numel() * move.view.element_size()
        yield move.view, buffer[start:end].view(move.view.dtype).view(move.view.shape)
        start = end


def _packed(moves: list[_Move]) -> Tensor:
    buffer = _buffer(moves)
    for view, slot in _slots(buffer, moves):
        slot.copy_(view)
    return buffer


def _unpack(buffer: Tensor, moves: list[_Move]) -> None:
    for view, slot in _slots(buffer, moves):
        view.copy_(slot)


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor], group: dist.ProcessGroup) -> None:
    """Send and receive one message a peer (global rank), all at once."""
    calls = [dist.P2POp(dist.isend, buffer, peer, group) for peer, buffer in sorted(outgoing.items())]
    calls += [dist.P2POp(dist.irecv, buffer, peer, group) for peer, buffer in sorted(incoming.items())]
    if calls:
        for work in dist.batch_isend_irecv(calls):
            work.wait()


@dataclass(frozen=True)
class _Part:
    """A rank's part of a model, as far as Megatron's planner asks; one without weights where there is no model."""

    model: MegatronModule | None

    @property
    def pg_collection(self) -> Any:
        return self.model.pg_collection if self.model is not None else self

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Weights, each saying how tensor ranks divide it.

        Megatron 0.16 leaves that out where it does not draw the weights itself; and the first matrix of a gated MLP is
        two blocks a rank, gates and values, not one.
        """
        if self.model is None:
            return
        for name, parameter in named_weights(self.model):
            weight: Any = parameter.detach()  # what is said of it is for the planner alone
            axis = next((axis for end, axis in CUTS.items() if name.endswith(end)), None)
            weight.tensor_model_parallel = axis is not None
            if axis is not None:
                weight.partition_dim = axis
                weight.partition_stride = 2 if "linear_fc1" in name and self.model.config.gated_linear_unit else 1
            yield name, weight

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """For the numbers of layers, which the names here have already."""
        return iter(())


def _shards(model: MegatronModule | None) -> Iterator[Shard]:
    return iter(()) if model is None else shards(model)


def _described(model: MegatronModule | None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {shard.name: (shard.full_shape, shard.data.dtype) for shard in _shards(model)}


def _check_same(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name in sorted(source.keys() | target.keys()):
        if source.get(name) != target.get(name):
            raise ValueError(
                f"refit: {name} is {source.get(name, 'absent')} in the source and {target.get(name, 'absent')} in the "
                "target; both must have one architecture and one dtype"
            )


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A group of these ranks; all ranks of the world must ask, and who asks again gets the same one.

    Its first collective is at once: NCCL's messages in pairs may not be a group's first.
    """
    if ranks not in _groups:
        group: Any = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            dist.barrier(group)
        _groups[ranks] = group
    return _groups[ranks]


_groups: dict[tuple[int, ...], Any] = {}
