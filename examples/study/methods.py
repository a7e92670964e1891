"""The methods that the study compares, and the settings that each may choose from: as many for every method."""

from dataclasses import dataclass, replace
from itertools import product


@dataclass(frozen=True)
class Method:
    """A way to get a policy out of the same start, pairs and samples."""

    name: str
    title: str
    stage: str
    """`dpo` learns from the pairs alone; `rto` and `ppo` sample."""
    words: tuple[str, ...] = ()
    """Settings that make it what it is."""
    grid: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Setting -> values; all combinations are tried on the validation prompts."""

    def settings(self) -> list[tuple[str, ...]]:
        """The words of each point of the grid."""
        names = [name for name, _ in self.grid]
        return [
            tuple(f"--{name}={value:g}" for name, value in zip(names, point, strict=True))
            for point in product(*(values for _, values in self.grid))
        ]

    def pinned(self, point: int) -> "Method":
        """The method with a point of its grid that was not chosen: shown beside it, as what it is."""
        words = self.settings()[point]
        title = f"{self.title} ({' '.join(map(_short, words))})"
        return replace(self, name=f"{self.name}-at-{point}", title=title, words=(*self.words, *words), grid=())


def _short(word: str) -> str:
    """`--section.name=value` without its section."""
    name, _, value = word.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def methods(rates: tuple[float, float], *, dpo_rates: tuple[float, float]) -> list[Method]:
    """All of them, with a grid of six points each: two learning rates, and three values of what the method adds.

    Args:
        rates: of the policy in PPO and its kin.
        dpo_rates: of DPO and its kin.
    """
    rate, kl = ("optimizer.lr", rates), ("rto.kl_coef", (0.01, 0.05, 0.2))
    dense = (rate, ("rto.dpo_coef", (0.05, 0.3, 1)))
    free = ("--rto.dpo_clip=null",)  # the larger coefficient would be cut to the smaller one
    plain, no_critic = ("--rto.dpo_coef=0",), ("--advantage.estimator=reinforce_pp",)
    dpo_rate = ("optimizer.lr", dpo_rates)
    return [
        Method("dpo", "DPO", "dpo", (), (dpo_rate, ("dpo.beta", (0.1, 0.3, 0.03)))),
        Method("rdpo", "R-DPO", "dpo", ("--dpo.loss=rdpo",), (dpo_rate, ("dpo.length_coef", (0.01, 0.05, 0.2)))),
        Method("simpo", "SimPO", "dpo", ("--dpo.loss=simpo", "--dpo.margin=0.5"), (dpo_rate, ("dpo.beta", (2, 5, 10)))),
        Method("ppo", "PPO", "ppo", plain, (rate, kl)),
        Method("rto", "RTO", "rto", free, dense),
        Method("semi_rto", "Semi-RTO", "rto", (*free, "--rto.shaping=sentence"), dense),
        Method("ddpo", "DDPO", "rto", (*free, "--rto.shaping=terminal"), dense),
        Method("rs_ppo", "RS-PPO", "rto", (*free, "--rto.shaping=shaping_only"), dense),
        Method("rpp", "REINFORCE++", "ppo", (*plain, *no_critic), (rate, kl)),
        Method("rpp_token", "REINFORCE++, token rewards", "rto", (*free, *no_critic), dense),
    ]
