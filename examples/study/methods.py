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
    """All of them, with a grid of four points each: two learning rates, and two values of what the method adds.

    Of these two one is the paper's or the default, and DRTO adds to RTO at its default coefficient.

    Args:
        rates: of the policy in PPO and its kin.
        dpo_rates: of DPO and its kin.
    """

    def of_pairs(name: str, title: str, setting: str, *values: float, words: tuple[str, ...] = ()) -> Method:
        own = () if name == "dpo" else (f"--dpo.loss={name}",)
        return Method(name, title, "dpo", (*own, *words), (("optimizer.lr", dpo_rates), (setting, values)))

    def sampling(
        name: str, title: str, *values: float, setting: str = "rto.dpo_coef", words: tuple[str, ...] = ()
    ) -> Method:
        # unclipped: the larger coefficient would be cut to the smaller one
        kind, own = ("ppo", "--rto.dpo_coef=0") if setting == "rto.kl_coef" else ("rto", "--rto.dpo_clip=null")
        return Method(name, title, kind, (own, *words), (("optimizer.lr", rates), (setting, values)))

    no_critic = ("--advantage.estimator=reinforce_pp",)
    return [
        of_pairs("dpo", "DPO", "dpo.beta", 0.1, 0.03),
        of_pairs("rdpo", "R-DPO", "dpo.length_coef", 0.01, 0.2),
        of_pairs("simpo", "SimPO", "dpo.beta", 2, 5, words=("--dpo.margin=0.5",)),
        of_pairs("tdpo2", "TDPO", "dpo.drift_coef", 0.2, 0.5),
        of_pairs("una", "UNA", "dpo.beta", 0.1, 0.03),
        sampling("ppo", "PPO", 0.01, 0.05, setting="rto.kl_coef"),
        sampling("rto", "RTO", 0.05, 1),
        sampling("semi_rto", "Semi-RTO", 0.05, 1, words=("--rto.shaping=sentence",)),
        sampling("ddpo", "DDPO", 0.05, 0.3, words=("--rto.shaping=terminal",)),
        sampling("rs_ppo", "RS-PPO", 0.05, 1, words=("--rto.shaping=shaping_only",)),
        sampling("drto", "DRTO", 0.02, 0.1, setting="drto.radius", words=("--drto.span_tokens=4",)),
        sampling("rpp", "REINFORCE++", 0.01, 0.05, setting="rto.kl_coef", words=no_critic),
        sampling("rpp_token", "REINFORCE++, token rewards", 0.05, 1, words=no_critic),
    ]
