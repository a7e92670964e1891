"""AdamW and its learning-rate schedule."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, then a cosine down to a fraction of the peak."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr_frac: float = 0.1
    """Where the cosine ends, as a share of `lr`; 1 keeps the rate constant."""
    warmup_frac: float = 0.03
    """Share of all optimizer steps that climb linearly to the peak; 0 has none."""
    weight_decay: float = 0.0
    """Decoupled, per step and unit of learning rate; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the running mean of its square."""
    eps: float = 1e-8
    """Added to the square root of the latter."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    distributed: bool = True
    """Cut optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {self.lr}")
        for name in ("min_lr_frac", "warmup_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must be 0 or more, got {getattr(self, name)}")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps must be positive, got {self.eps}")
