"""Low-rank adapters on a frozen model."""

from dataclasses import dataclass

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""A layer's matrices, by Megatron's names: query, key, value; attention's output; into the SwiGLU layer; out of it."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train only low-rank corrections of a layer's matrices: W + alpha / rank * B A (arXiv 2106.09685).

    The rest is frozen, has neither gradient nor optimizer state, and is held once for all roles of a run that come
    from the same checkpoint. A checkpoint holds the adapters and names the run that they belong to.
    """

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The correction is scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """The matrices that have adapters: any of linear_qkv, linear_proj, linear_fc1, linear_fc2."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be 1 or more, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")
        wrong = [name for name in self.targets if name not in TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets must be some of {', '.join(TARGETS)}, each once, got {', '.join(self.targets) or 'none'}"
            )

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank
