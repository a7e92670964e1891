"""How far two legs may be apart."""

import functools

import torch

from tests.gpu.device import TIMEOUT
from tests.gpu.legs import hidden, train
from tests.ranks import run_ranks

EXACT = {"most": 1e-4, "mean": 1e-5, "change": 1e-3, "norm": 1e-4}
"""float32 on two devices: the same sums in another order."""
BFLOAT16 = {"most": 0.3, "mean": 0.04, "change": 0.05, "norm": 0.05}
"""bfloat16 against float32: 8 bits of a number are kept through four layers."""
FP8 = {"most": 1.5, "mean": 0.2, "change": 0.2, "norm": 0.15}
"""8 bits against float32: 3 or 2 bits of a number's fraction are kept in each product."""


@functools.cache
def on_cpu():
    """What the CPU says in float32, once for all tests."""
    (found,) = run_ranks(hidden, 1, train, timeout=TIMEOUT)
    return found


def on_device(num, *args, **named):
    """A leg of training on so many ranks of the device; what the first one says, which all others must say too."""
    found = run_ranks(_train, num, args, named, timeout=TIMEOUT)
    for other in found[1:]:
        for name in ("policy scores", "value scores", "policy after", "value after"):
            assert torch.equal(found[0][name], other[name]), name
    return found[0]


def _train(args, named):
    return train(*args, **named)


def assert_close(found, expected, *, most, mean, change, norm):
    """Log-probs, entropies and values each and on average, in nats and units; relative, how they changed and norms.

    Not each of the changes: Adam's first step is as large where a gradient is rounding noise as where it is not.
    """
    for kind in ("policy", "value"):
        before, other = found[f"{kind} scores"], expected[f"{kind} scores"]
        apart = (before - other).abs()
        assert apart.max() <= most, f"{kind} scores: {apart.max()} at most"
        assert apart.mean() <= mean, f"{kind} scores: {apart.mean()} on average"
        learned, expects = found[f"{kind} after"] - before, expected[f"{kind} after"] - other
        share = (learned - expects).abs().mean() / expects.abs().mean()
        assert share <= change, f"{kind}: what was learned is {share} off"
        relative = (found[f"{kind} norms"] / expected[f"{kind} norms"] - 1).abs().max()
        assert relative <= norm, f"{kind} gradient norms {found[f'{kind} norms']}, not {expected[f'{kind} norms']}"


def assert_same_bits(found, expected):
    """All of it."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name
