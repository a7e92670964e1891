"""How prompts and responses become rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import last_response_token


def join_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay prompts and responses in rows: prompt, then response, then padding.

    Returns:
        tokens [B, T] int64, num_tokens [B] int64, and response_mask [B, T] bool.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    num_tokens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    num_prompt = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    width = max((len(row) for row in rows), default=0)
    tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(
        len(rows), width
    )
    column = torch.arange(width)
    return tokens, num_tokens, (column >= num_prompt[:, None]) & (column < num_tokens[:, None])


def overwrite_eos(tokens: Tensor, *, response_mask: Tensor, truncated: Tensor, eos_id: int) -> Tensor:
    """Replace the last token of truncated responses by EOS, as the released code does (`truncation: overwrite_eos`).

    Args:
        tokens: [B, T] int64.
        response_mask: [B, T] bool.
        truncated: [B] bool.
    """
    return torch.where(last_response_token(response_mask) & truncated[:, None], eos_id, tokens)


def position_ids(tokens: Tensor) -> Tensor:
    """Position of each token in its row; [B, T] -> [B, T] int64. Rows are padded on the right, so it is the column."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
