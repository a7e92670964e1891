"""The records that cross module boundaries: PromptBatch -> Rollout -> Signals -> Experience.

Every per-token tensor is `[B, T]` and aligned to `tokens`: column t is about the token in column t.
Rows are prompt, then response, then padding on the right; column 0 of anything predicted is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F


class _Rows:
    """What all records share: their tensors have one row a sequence, and check their own shapes."""

    tokens: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        if self.tokens.dtype != torch.int64 or len(shape) != 2:
            raise ValueError(f"{type(self).__name__}.tokens must be [B, T] int64, got {shape} {self.tokens.dtype}")
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            want = shape if value.dim() == 2 else shape[:1]
            if tuple(value.shape) != want:
                raise ValueError(
                    f"{type(self).__name__}.{field.name} must match tokens {shape}, got {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor | Sequence[int], *, multiple: int = 1) -> Self:
        """The rows at `index`, as wide as the longest of them, rounded up to a multiple."""
        index = torch.as_tensor(index, dtype=torch.long)
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self)}  # type: ignore[arg-type]
        longest = max(2, int(picked["num_tokens"].max())) if len(index) else 2
        width = -(-longest // multiple) * multiple
        return replace(self, **{k: _to_width(v, width) if v.dim() == 2 else v for k, v in picked.items()})  # type: ignore

    def to(self, device: torch.device) -> Self:
        """The same rows on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})  # type: ignore


def pad_columns(x: Tensor, width: int) -> Tensor:
    """Append zero columns (False for masks) until `x` [B, T] has `width` of them."""
    return F.pad(x, (0, width - x.shape[1]))


def _to_width(x: Tensor, width: int) -> Tensor:
    return x[:, :width] if x.shape[1] >= width else pad_columns(x, width)


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts of one rollout; row i is answered by row i of the Rollout."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids, chat template applied, up to where the response begins."""
    prompt_ids: tuple[int, ...]
    """Index of each prompt in its data set: part of the key of its randomness."""
    sample_ids: tuple[int, ...]
    """0 and up: tells apart several responses to one prompt."""

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.prompt_ids) == len(self.sample_ids):
            raise ValueError(
                f"PromptBatch needs one prompt_id and sample_id a row, got {len(self.ids)}, "
                f"{len(self.prompt_ids)} and {len(self.sample_ids)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Sequence[int]) -> "PromptBatch":
        """The prompts at `index`."""
        return PromptBatch(
            ids=tuple(self.ids[i] for i in index),
            prompt_ids=tuple(self.prompt_ids[i] for i in index),
            sample_ids=tuple(self.sample_ids[i] for i in index),
        )


@dataclass(frozen=True, kw_only=True)
class SFTBatch(_Rows):
    """Rows whose response tokens are to be learned."""

    tokens: Tensor
    """[B, T] int64: prompt, then response with its EOS, then padding."""
    num_tokens: Tensor
    """[B] int64: tokens before the padding."""
    response_mask: Tensor
    """[B, T] bool: True on response tokens."""


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(_Rows):
    """Pairs as rows: row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""

    tokens: Tensor
    """[2P, T] int64: prompt, then response with its EOS, then padding."""
    num_tokens: Tensor
    """[2P] int64: tokens before the padding."""
    response_mask: Tensor
    """[2P, T] bool: True on response tokens."""


@dataclass(frozen=True, kw_only=True)
class DPOBatch(PreferenceBatch):
    """Pairs with what the reference says of them."""

    ref_log_probs: Tensor
    """[2P] nats: log-prob of each whole response under the reference."""


@dataclass(frozen=True, kw_only=True)
class Rollout(_Rows):
    """Sampled responses."""

    tokens: Tensor
    """[B, T] int64: prompt, then response, then padding."""
    num_tokens: Tensor
    """[B] int64: tokens before the padding."""
    response_mask: Tensor
    """[B, T] bool: True on sampled tokens, the closing EOS included."""
    decode_log_probs: Tensor
    """[B, T] nats, under the policy while it sampled (the KV-cache forward)."""
    truncated: Tensor
    """[B] bool: True where the window filled before an EOS."""


@dataclass(frozen=True, kw_only=True)
class Signals(_Rows):
    """What the five roles say about a rollout."""

    tokens: Tensor
    """[B, T] int64, the rollout's."""
    num_tokens: Tensor
    """[B] int64: tokens before the padding."""
    policy_log_probs: Tensor
    """[B, T] nats, under the policy that sampled: the training forward's, or decoding's where these are reused."""
    forward_log_probs: Tensor
    """[B, T] nats, the training forward's; 0 in rows that are not `checked`."""
    checked: Tensor
    """[B] bool: rows that the training forward of the policy was asked about."""
    ref_log_probs: Tensor
    """[B, T] nats, under the frozen SFT model."""
    dpo_log_probs: Tensor
    """[B, T] nats, under the frozen DPO policy; the reference's where there is none."""
    values: Tensor
    """[B, T] reward units: column t is the critic's value of the state before token t; 0 without a critic."""
    raw_scores: Tensor
    """[B] the reward model's own units; 0 without a reward model."""
    scores: Tensor
    """[B] the same, normalised and clipped; what the score term is made of."""


@dataclass(frozen=True, kw_only=True)
class Experience(_Rows):
    """What PPO learns from: one row a response, one column a token."""

    tokens: Tensor
    """[B, T] int64: prompt, then response, then padding."""
    num_tokens: Tensor
    """[B] int64: tokens before the padding."""
    response_mask: Tensor
    """[B, T] bool: True on sampled tokens, the closing EOS included."""
    old_log_probs: Tensor
    """[B, T] nats, under the policy that sampled."""
    old_values: Tensor
    """[B, T] reward units, from the critic before the update."""
    advantages: Tensor
    """[B, T] reward units, whitened over all response tokens of the step."""
    returns: Tensor
    """[B, T] reward units: the critic's target."""
