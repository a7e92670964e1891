"""Records over data-parallel ranks: cut into shares, and put together again in order."""

from dataclasses import fields, replace
from typing import TypeVar

import torch

from rto_megatron.batch import Rollout, Signals, pad_columns
from rto_megatron.distributed.collectives import gather_over_data
from rto_megatron.distributed.mesh import Mesh

Record = TypeVar("Record", Rollout, Signals)


def share_of(num_items: int, mesh: Mesh) -> list[int]:
    """This replica's items of any number of them; the last item is repeated until all shares are equal.

    Gathered in rank order and cut to `num_items`, the shares are the items again.
    """
    size = -(-num_items // mesh.data.size)
    return [min(i, num_items - 1) for i in range(mesh.data.rank * size, (mesh.data.rank + 1) * size)]


def gather_rows(record: Record, mesh: Mesh) -> Record:
    """All replicas' rows in rank order, on every rank, as wide as the widest replica's.

    Token ids and a few floats a token are little beside activations. With every row at hand, whitening,
    minibatches and metrics do not depend on the number of replicas.
    """
    if mesh.data.size == 1:
        return record
    shapes = gather_over_data(torch.tensor([record.tokens.shape], device=mesh.device), mesh).tolist()
    most, width = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
    keep = torch.cat([torch.arange(rows) + i * most for i, (rows, _) in enumerate(shapes)]).to(record.tokens.device)
    gathered = {}
    for field in fields(record):
        value = getattr(record, field.name)
        padded = pad_columns(value, width) if value.dim() == 2 else value
        padded = torch.cat((padded, padded.new_zeros(most - len(padded), *padded.shape[1:])))
        gathered[field.name] = gather_over_data(padded, mesh)[keep]
    return replace(record, **gathered)
