"""The learning-rate schedule."""

import math


def cosine_with_min_lr(step: int, *, peak: float, min_lr_frac: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate after `step` optimizer steps: up in a line, down in half a cosine.

        step < warmup:  peak * step / warmup
        after:          peak * (m + (1 - m) * (1 + cos(pi * p)) / 2),   p = (step - warmup) / (num_steps - warmup)

    with m = min_lr_frac, the share of the peak that remains at the end and stays after it.
    The same numbers as `cosine_with_min_lr` of transformers. Callers ask for the step that they are about to
    complete, 1 for the first: at step 0 the rate may be 0, and the step would be lost.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (min_lr_frac + (1 - min_lr_frac) * (1 + math.cos(math.pi * progress)) / 2)
