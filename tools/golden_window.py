"""The golden files' inputs and layout: raw rows of a generator against our own rows.

Golden rows are a prompt padded on the left and a response window [B, A] on the right; ours are prompt,
response, padding. What the released code does and we on purpose do not is imitated in functions named
`released_*`, here and in the files beside, never in the package.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.sequences import join_rows, overwrite_eos, position_ids

Fields = dict[str, Any]
"""Names of a case's `in` or `out` and what they hold."""


class Inputs:
    """A case's `in`, as tensors of the case's dtype."""

    def __init__(self, fields: Fields, dtype: str) -> None:
        self.fields = fields
        self.dtype = torch.float32 if dtype == "float32" else torch.float64

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def floats(self, name: str) -> Tensor:
        return torch.tensor(self.fields[name], dtype=self.dtype)

    def leaf(self, name: str) -> Tensor:
        return self.floats(name).requires_grad_()

    def ints(self, name: str) -> Tensor:
        return torch.tensor(self.fields[name], dtype=torch.int64)

    def mask(self, name: str) -> Tensor:
        return self.ints(name).bool()


@dataclass(frozen=True)
class Window:
    """Raw rows of a generator, closed: golden layout (prompt padded on the left, response window on the right)."""

    sequences: Tensor
    """[B, S] ids, EOS written where the window filled."""
    attention_mask: Tensor
    """[B, S] bool."""
    position_ids: Tensor
    """[B, S], the filler 1 outside the attention mask."""
    action_mask: Tensor
    """[B, A] bool, with the released hole after a sampled pad id."""
    response_mask: Tensor
    """[B, A] bool, ours: no holes."""

    @property
    def num_holes(self) -> Tensor:
        """[B] tokens of each response that the released mask leaves out."""
        return (self.response_mask & ~self.action_mask).sum(-1)


def close_window(x: Inputs) -> Window:
    """Our own rows (prompt, response, padding) of a case's raw `sequences`, laid out as the golden files are."""
    raw, num_prompt, pad_id, eos_id = x.ints("sequences"), x["input_len"], x["pad_id"], x["eos_id"]
    special = (raw == pad_id) | (raw == eos_id)
    starts = (~special).int().argmax(-1)
    is_eos = raw[:, num_prompt:] == eos_id
    truncated = ~is_eos.any(-1)
    lengths = torch.where(truncated, is_eos.shape[1], is_eos.int().argmax(-1) + 1)  # up to the first EOS and with it
    prompts = [row[start:num_prompt].tolist() for row, start in zip(raw, starts, strict=True)]
    responses = [row[num_prompt : num_prompt + n].tolist() for row, n in zip(raw, lengths, strict=True)]
    tokens, num_tokens, response_mask = join_rows(prompts, responses, pad_id=pad_id)
    tokens = overwrite_eos(tokens, response_mask=response_mask, truncated=truncated, eos_id=eos_id)

    attended = torch.zeros_like(raw, dtype=torch.bool)
    sequences, positions, actions = raw.clone(), torch.ones_like(raw), torch.zeros_like(attended)
    for i, (start, n) in enumerate(zip(starts.tolist(), num_tokens.tolist(), strict=True)):
        here = slice(start, start + n)
        attended[i, here] = True
        sequences[i, here] = tokens[i, :n]
        positions[i, here] = position_ids(tokens)[i, :n]
        actions[i, here] = response_mask[i, :n]
    mask = actions[:, num_prompt:]
    return Window(sequences, attended, positions, released_holes(mask, special[:, num_prompt:]), mask)


def released_holes(action_mask: Tensor, special: Tensor) -> Tensor:
    """The released code masks out the token after a sampled pad id; in our rollouts none can be sampled."""
    after_special = F.pad(special[:, :-1], (1, 0))
    return action_mask & ~after_special


def released_strip(window: Window, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row without padding: ids, action mask, and which actions. A hole costs it its last tokens."""
    drop = int(window.num_holes[row])
    ids = window.sequences[row][window.attention_mask[row]]
    width = int(window.response_mask[row].sum()) - drop
    first = row * window.action_mask.shape[1]
    return ids[: len(ids) - drop], window.action_mask[row, :width], torch.arange(first, first + width)


def pad_left(rows: list[Tensor], fill: float = 0) -> Tensor:
    """Rows of any lengths as one tensor, padded on the left."""
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_full((width - len(row),), fill), row]) for row in rows])


def sequences(x: Inputs) -> Fields:
    window = close_window(x)
    num_actions = window.action_mask.shape[1]
    stripped = [released_strip(window, row) for row in range(len(window.sequences))]
    column = torch.arange(num_actions)
    return {
        "sequences": window.sequences,
        "attention_mask": window.attention_mask,
        "action_mask": window.action_mask,
        "position_ids": window.position_ids,
        "eos_index_in_action": (column * window.response_mask).amax(-1),
        "stripped_sequences": [ids for ids, _, _ in stripped],
        "stripped_action_mask": [actions for _, actions, _ in stripped],
        "stripped_flat_action_index": [index for _, _, index in stripped],
        "recollated_sequences": pad_left([ids for ids, _, _ in stripped]),
        "recollated_attention_mask": pad_left([torch.ones_like(ids) for ids, _, _ in stripped]),
        "recollated_action_mask": pad_left([actions for _, actions, _ in stripped]),
    }
