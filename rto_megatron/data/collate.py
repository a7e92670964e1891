"""Rows of ids -> right-padded batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_megatron.batch import PreferenceBatch, SFTBatch
from rto_megatron.data.readers import PreferenceRow, SFTRow


def collate_sft(rows: Sequence[SFTRow], pad_id: int) -> SFTBatch:
    """Stack SFT rows, padded to the longest."""
    return SFTBatch(**_stack([(row.prompt_ids, row.response_ids) for row in rows], pad_id))


def collate_preferences(rows: Sequence[PreferenceRow], pad_id: int) -> PreferenceBatch:
    """Stack pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""
    sides = [(row.prompt_ids, side) for row in rows for side in (row.chosen_ids, row.rejected_ids)]
    return PreferenceBatch(**_stack(sides, pad_id))


def _stack(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pairs of (prompt, response) -> the three tensors that both batches have."""
    num_tokens = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    tokens = torch.full((len(rows), int(num_tokens.max())), pad_id)
    response_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        tokens[i, : num_tokens[i]] = torch.tensor(prompt + response)
        response_mask[i, len(prompt) : num_tokens[i]] = True
    return {"tokens": tokens, "num_tokens": num_tokens, "response_mask": response_mask}
