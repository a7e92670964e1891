"""From prompts to a Rollout: requests to the engine, and its answers as rows."""

from collections.abc import Sequence

import torch

from rto_megatron.algorithms.sequences import join_rows, overwrite_eos
from rto_megatron.batch import PromptBatch, Rollout
from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.rollout.engine import Completion, Request, RolloutEngine
from rto_megatron.rollout.sampling import request_seed


def generate(
    model: PolicyModel,
    prompts: PromptBatch,
    config: RolloutConfig,
    *,
    eos_id: int,
    pad_id: int,
    seed: int,
    step: int,
) -> Rollout:
    """One response to each prompt; row i answers prompt i, whatever order they finish in.

    Args:
        prompts: this replica's rows.
        seed, step: with a prompt's id and sample id, the key of its random stream.
    """
    engine = make_engine(model, config, eos_id=eos_id)
    done = {completion.uid: completion for completion in engine.generate(requests_of(prompts, config, seed, step))}
    rollout = rollout_of(prompts, [done[row] for row in range(len(prompts))], config, eos_id=eos_id, pad_id=pad_id)
    return rollout.to(next(model.parameters()).device)


def make_engine(model: PolicyModel, config: RolloutConfig, *, eos_id: int) -> RolloutEngine:
    """An engine for sequences of the config's size."""
    return RolloutEngine(
        model,
        max_slots=config.max_slots,
        max_length=config.longest,
        eos_ids=(eos_id,),
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        recorded=config.cuda_graphs,
        kv_block_tokens=config.kv_block_tokens,
        kv_blocks=config.kv_blocks,
    )


def requests_of(prompts: PromptBatch, config: RolloutConfig, seed: int, step: int) -> list[Request]:
    """One request a prompt, named by its row."""
    return [
        Request(
            uid=row,
            prompt=prompts.ids[row],
            max_new_tokens=config.max_new_tokens,
            seed=request_seed(seed, step, prompts.prompt_ids[row], prompts.sample_ids[row]),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        for row in range(len(prompts))
    ]


def rollout_of(
    prompts: PromptBatch, done: Sequence[Completion], config: RolloutConfig, *, eos_id: int, pad_id: int
) -> Rollout:
    """Prompts and their completions, in the same order, as rows on the CPU."""
    tokens, num_tokens, mask = join_rows(prompts.ids, [c.tokens for c in done], pad_id=pad_id)
    truncated = torch.tensor([c.truncated for c in done])
    if config.truncation == "overwrite_eos":
        tokens = overwrite_eos(tokens, response_mask=mask, truncated=truncated, eos_id=eos_id)
    log_probs = torch.zeros(tokens.shape).masked_scatter(mask, torch.tensor([p for c in done for p in c.log_probs]))
    return Rollout(
        tokens=tokens, num_tokens=num_tokens, response_mask=mask, decode_log_probs=log_probs, truncated=truncated
    )
