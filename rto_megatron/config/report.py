"""What a run of RTO tells about itself beside its metrics."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """The token credit that each evaluation stores and draws: RUN_DIR/credit/ and RUN_DIR/credit.html."""

    responses: int = 200
    """Held-out responses of which it is kept, from the first on (fewer if they are long); 0 turns it off."""

    def __post_init__(self) -> None:
        if self.responses < 0:
            raise ValueError(f"credit.responses must be 0 or more, got {self.responses}; 0 stores no token credit")
