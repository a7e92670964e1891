"""A minibatch cut into microbatches, and each as a model sees it: padded rows, or one row of them packed together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.sequences import position_ids
from rto_megatron.config.parallel import Cut
from rto_megatron.data.shares import cut_by_length


class Batch(Protocol):
    """Rows of tokens: any record of `rto_megatron.batch`."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def num_tokens(self) -> Tensor: ...

    @property
    def response_mask(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def rows(self, index: Any, *, multiple: int = 1) -> Any: ...


@dataclass
class PackedRows(PackedSeqParams):
    """Where rows begin and end in what is packed, and which tokens are asked about."""

    lengths: tuple[int, ...] = ()
    """Tokens of each row, as `cu_seqlens_q` says on the device: who must know them need not wait for it."""
    read: Tensor | None = None
    """[n] int64: places whose hidden states leave a model's last layer, which may spare itself the others; None for
    all."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Some rows of a batch: what a loss is about, and what a model is given."""

    record: Any
    """The rows, [B, T]; T is that of the longest."""
    tokens: Tensor
    """[B, T] int64; packed [1, N], the rows without their padding one after another."""
    position_ids: Tensor
    """Likewise: each token's place in its own row."""
    response_mask: Tensor
    """Likewise bool: True where the model is asked for the log-prob of a token."""
    packed_seq_params: PackedRows | None = None
    """Where rows begin and end in N; None where they are padded."""
    places: Tensor | None = None
    """[n] int64, n <= N: where each packed token stands in the record, counted row by row."""

    @property
    def predicting(self) -> PackedRows | None:
        """Packed, to be read where a token of `response_mask` is predicted: one place before it."""
        return self._read(self.response_mask[0, 1:])

    @property
    def ending(self) -> PackedRows | None:
        """Packed, to be read where a row ends."""
        if self.places is None:
            return None
        ends = torch.zeros_like(self.response_mask[0])
        ends[self.record.num_tokens.cumsum(0) - 1] = True
        return self._read(ends)

    def _read(self, where: Tensor) -> PackedRows | None:
        packed = self.packed_seq_params
        return None if packed is None else replace(packed, read=where.nonzero()[:, 0])

    def unpack(self, output: Tensor) -> Tensor:
        """What a model says of its tokens, [B, T, ...] or packed [1, N, ...], as [B, T, ...]; 0 on padding."""
        if self.places is None:
            return output
        shape = self.record.tokens.shape
        said = output[0, : len(self.places)]
        return said.new_zeros(shape.numel(), *said.shape[1:]).index_copy(0, self.places, said).unflatten(0, shape)


def cut_rows(batch: Batch, cut: Cut, *, unit: int = 1) -> list[list[int]]:
    """Row numbers of each microbatch: see `cut_by_length`."""
    return cut_by_length(batch.num_tokens.tolist(), cut, unit=unit)


def make_microbatches(
    batch: Batch, cuts: Sequence[Sequence[int]], *, packed: bool, multiple: int = 1
) -> list[Microbatch]:
    """The microbatches of `cut_rows`.

    Args:
        multiple: of what a model sees of a sequence: sequence parallelism cuts it over the tensor ranks.
    """
    if packed:
        return [pack(batch.rows(rows), multiple=multiple) for rows in cuts]
    return [pad(batch.rows(rows, multiple=multiple)) for rows in cuts]


def pad(record: Any) -> Microbatch:
    """Rows as they are, padded on the right."""
    return Microbatch(
        record=record,
        tokens=record.tokens,
        position_ids=position_ids(record.tokens),
        response_mask=record.response_mask,
    )


def pack(record: Any, *, multiple: int = 1) -> Microbatch:
    """Rows without their padding as one row, whose tokens see their own row alone."""
    lengths, width = record.num_tokens.tolist(), record.tokens.shape[1]
    places = torch.cat([torch.arange(length) + row * width for row, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    more = -len(places) % multiple
    lengths[-1] += more  # on the right of the last row, where no token of it can see them
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(record.tokens.device)
    places, positions = (x.to(record.tokens.device) for x in (places, positions))
    # nothing predicts the first token of a row, and least of all the last one of the row before
    asked = record.response_mask.flatten()[places] & (positions > 0)
    tokens, positions, asked = (F.pad(x, (0, more))[None] for x in (record.tokens.flatten()[places], positions, asked))
    return Microbatch(
        record=record,
        tokens=tokens,
        position_ids=positions,
        response_mask=asked,
        packed_seq_params=PackedRows(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths), lengths=tuple(lengths),
        ),
        places=places,
    )  # fmt: skip
