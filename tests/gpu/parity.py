"""How far two legs may be apart."""

import functools

import torch

from tests.gpu.device import TIMEOUT
from tests.gpu.legs import hidden, train
from tests.ranks import run_ranks

EXACT = {"log_prob": 1e-4, "mean": 1e-5, "norm": 1e-4}
"""float32 on two devices: the same sums in another order."""
BFLOAT16 = {"log_prob": 0.25, "mean": 0.03, "norm": 0.05}
"""bfloat16 against float32: 8 bits of a number are kept through four layers."""
FP8 = {"log_prob": 1.0, "mean": 0.12, "norm": 0.15}
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


def assert_close(found, expected, *, log_prob, mean, norm):
    """Log-probs, entropies and values each and on average, in nats and units; gradient norms relative."""
    for kind in ("policy", "value"):
        for when in ("scores", "after"):
            apart = (found[f"{kind} {when}"].float() - expected[f"{kind} {when}"].float()).abs()
            assert apart.max() <= log_prob, f"{kind} {when}: {apart.max()} at most"
            assert apart.mean() <= mean, f"{kind} {when}: {apart.mean()} on average"
        relative = (found[f"{kind} norms"] / expected[f"{kind} norms"] - 1).abs().max()
        assert relative <= norm, f"{kind} gradient norms {found[f'{kind} norms']}, not {expected[f'{kind} norms']}"


def assert_same_bits(found, expected):
    """All of it."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name
