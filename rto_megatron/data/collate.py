"""Rows of ids -> right-padded batches."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from rto_megatron.algorithms.sequences import join_rows
from rto_megatron.batch import PreferenceBatch, PromptBatch, SFTBatch
from rto_megatron.data.readers import PreferenceRow, PromptRow, SFTRow


def collate_sft(rows: Sequence[SFTRow], pad_id: int) -> SFTBatch:
    """Stack SFT rows, padded to the longest."""
    return SFTBatch(**_stack([(row.prompt_ids, row.response_ids) for row in rows], pad_id))


def collate_preferences(rows: Sequence[PreferenceRow], pad_id: int) -> PreferenceBatch:
    """Stack pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""
    sides = [(row.prompt_ids, side) for row in rows for side in (row.chosen_ids, row.rejected_ids)]
    return PreferenceBatch(**_stack(sides, pad_id))


def prompt_batch(rows: Sequence[PromptRow], *, samples_per_prompt: int = 1) -> PromptBatch:
    """Prompts of a rollout, each as often as it is answered.

    A prompt that comes twice, as it may where one epoch ends and the next begins, gets other samples the second time.
    """
    repeated = [row for row in rows for _ in range(samples_per_prompt)]
    counts: Counter[int] = Counter()
    sample_ids = []
    for row in repeated:
        sample_ids.append(counts[row.index])
        counts[row.index] += 1
    return PromptBatch(
        ids=tuple(tuple(row.prompt_ids) for row in repeated),
        prompt_ids=tuple(row.index for row in repeated),
        sample_ids=tuple(sample_ids),
    )


def _stack(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pairs of (prompt, response) -> the three tensors that both batches have."""
    tokens, num_tokens, response_mask = join_rows(
        [prompt for prompt, _ in rows], [response for _, response in rows], pad_id=pad_id
    )
    return {"tokens": tokens, "num_tokens": num_tokens, "response_mask": response_mask}
