"""What benchmarks ask of transformers' models beyond their own code: lengths known beforehand, ids that never come."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LengthController:
    """Ends each row at a length of its own; transformers pads the row from there on."""

    eos_token_id = None
    """That the name is there tells `generate` that rows may end one by one."""

    def __init__(self, prompt_width: int, lengths: Sequence[int]) -> None:
        self._ends = prompt_width + torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[B, width so far] -> [B] bool: rows that have ended."""
        return self._ends.to(input_ids.device) <= input_ids.shape[1]


def ban(model: Any, ids: Sequence[int]) -> None:
    """Give some ids of a transformers model probability 0, by a bias of its output layer: it costs no pass."""
    old = model.get_output_embeddings()
    new = torch.nn.Linear(old.in_features, old.out_features, bias=True)
    new.weight = old.weight
    bias = torch.zeros(old.out_features, dtype=old.weight.dtype)
    bias[list(ids)] = -1e9
    new.bias = torch.nn.Parameter(bias, requires_grad=False)
    model.set_output_embeddings(new)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, widest] ids and mask, as `generate` wants them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def scalar_model(folder: Any, *, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
    """A value model that `convert` wrote, its outputs shifted and scaled: our heads have a bias, theirs has none."""
    import json
    from pathlib import Path

    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    bias = json.loads((Path(folder) / "config.json").read_text())["score_bias"]
    head = torch.nn.Linear(model.score.in_features, 1, bias=True, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_((bias - mean) / std)
    model.score = head
    return model


def prompt_lengths(prompts: Tensor, pad_id: int) -> Tensor:
    """[B] tokens of left-padded prompts [B, widest]."""
    return (prompts != pad_id).sum(1)
