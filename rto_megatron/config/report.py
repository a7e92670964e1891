"""What a run of RTO tells about itself beside its metrics."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """The token credit that each evaluation stores and draws: RUN_DIR/credit/ and RUN_DIR/credit.html."""

    responses: int = 200
    """Held-out responses of which it is kept, from the first on (fewer if they are long); 0 turns it off."""

    def __post_init__(self) -> None:
        if self.responses < 0:
            raise ValueError(f"credit.responses must be 0 or more, got {self.responses}; 0 stores no token credit")


@dataclass(frozen=True, kw_only=True)
class AlarmsConfig:
    """When a run warns that it goes wrong; each limit may be null, which turns its alarm off.

    An alarm begins once its limit is broken for `patience` steps in a row, and ends once it is kept for as many.
    """

    patience: int = 3
    """Steps in a row."""
    min_term_share: float | None = 0.01
    """Least share of the return that the DPO term and the score term must have, each if its coefficient is not 0."""
    max_kl_share: float | None = 0.5
    """Largest share of the return that the KL term may have."""
    max_dpo_clip_frac: float | None = 0.3
    """Largest share of tokens whose DPO reward rto.dpo_clip may cut."""
    max_score_clip_frac: float | None = 0.1
    """Largest share of responses whose score rto.score_clip may cut."""
    max_ppo_clip_frac: float | None = 0.3
    """Largest share of tokens on which ppo.clip may decide."""
    max_sign_share: float | None = 0.95
    """Largest share of tokens whose DPO reward may have one sign."""
    max_length_correlation: float | None = 0.8
    """Largest size of the correlation of score and length, over the responses of a step (16 or more)."""
    max_repetition: float | None = 0.3
    """Largest mean share of a response's trigrams that it has had before."""
    min_entropy_share: float | None = 0.2
    """Least entropy of the policy, as a share of what it was in the run's first step."""
    min_dpo_accuracy: float | None = 0.5
    """Least share of held-out pairs whose chosen side must earn more DPO reward than the rejected one."""
    min_explained_variance: float | None = -0.1
    """Least share of the variance of returns that the critic must explain."""
    max_decode_difference: float | None = 0.05
    """Largest mean difference of a token's log-prob in decoding and in the training forward, nats."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"alarms.patience must be 1 or more, got {self.patience}")
        for name, value in vars(self).items():
            if name == "patience" or value is None:
                continue
            least = -math.inf if name == "min_explained_variance" else 0
            most = math.inf if name == "max_decode_difference" else 1
            if not least <= value <= most:
                between = f"{least:g} and {most:g}"
                raise ValueError(f"alarms.{name} must lie between {between}, got {value}; null turns the alarm off")
