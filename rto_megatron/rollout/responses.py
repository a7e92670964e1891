"""From prompts to a Rollout: requests to the engine, and its answers as rows."""

import torch

from rto_megatron.algorithms.sequences import join_rows, overwrite_eos
from rto_megatron.batch import PromptBatch, Rollout
from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.rollout.engine import Request, RolloutEngine
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
    engine = RolloutEngine(
        model,
        max_slots=config.max_slots,
        max_length=config.max_prompt_tokens + config.max_new_tokens,
        eos_ids=(eos_id,),
    )
    requests = [
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
    done = sorted(engine.generate(requests), key=lambda completion: completion.uid)
    tokens, num_tokens, mask = join_rows(prompts.ids, [c.tokens for c in done], pad_id=pad_id)
    truncated = torch.tensor([c.truncated for c in done])
    if config.truncation == "overwrite_eos":
        tokens = overwrite_eos(tokens, response_mask=mask, truncated=truncated, eos_id=eos_id)
    log_probs = torch.zeros(tokens.shape).masked_scatter(mask, torch.tensor([p for c in done for p in c.log_probs]))
    return Rollout(
        tokens=tokens, num_tokens=num_tokens, response_mask=mask, decode_log_probs=log_probs, truncated=truncated
    ).to(next(model.parameters()).device)
