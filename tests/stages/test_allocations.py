"""No float32 tensor over the vocabulary is larger than a chunk, in training, scoring or generation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rto_megatron.config.load import load_run
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of

CHUNK = 5
"""Of compute.log_prob_chunk."""


class Largest(TorchDispatchMode):
    """Watches every tensor that any operation makes, those of the backward pass included."""

    def __init__(self, sizes, hidden):
        super().__init__()
        self.sizes, self.hidden, self.rows, self.made_by = sizes, hidden, 0, ""
        self.as_large_as_the_layer = set()
        """What made tensors of the output layer's shape that are no views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            wide = [size for size in x.shape if size in self.sizes]
            # the embedding itself, its gradient and its optimizer state are as large as they are
            if not wide or (x.dim() == 2 and set(x.shape) == {wide[0], self.hidden}):
                given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
                if wide and x.untyped_storage().data_ptr() not in given:  # no view
                    self.as_large_as_the_layer.add(str(func))
                continue
            if x.numel() // wide[0] > self.rows:
                self.rows, self.made_by = x.numel() // wide[0], f"{func} made {tuple(x.shape)}"
        return out


def watched_step(folder, words):
    """A step of RTO."""
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=1)
    from rto_megatron.stages.rto import prepare, take_step
    from rto_megatron.stages.run import Clock

    config = load_run("rto", None, words_of("rto", folder) + words)
    setup, _ = prepare(config, runtime)
    weight = setup.actors.policy.model.output_weight()
    with Largest({weight.shape[0], setup.actors.policy.model.true_vocab}, weight.shape[1]) as seen:
        take_step(setup, config, step=0, kl_coef=0.1, clock=Clock())
    return seen


def watched(folder, chunk):
    """The largest number of rows over the vocabulary: in an SFT run with evaluation, and in a step of RTO."""
    words = [f"--compute.log_prob_chunk={chunk}"]
    rto = watched_step(folder, words)
    with Largest(rto.sizes, rto.hidden) as sft:
        run_stage("sft", folder, [*words, f"--run_dir={folder}/watched-{chunk}", "--train.max_steps=1"])
    return [(rto.rows, rto.made_by), (sft.rows, sft.made_by)]


def watched_adapters(folder, more):
    """The same in a step of RTO, and what made tensors as large as the output layer."""
    seen = watched_step(folder, ["--compute.log_prob_chunk=2", *more])
    return seen.rows, seen.made_by, seen.as_large_as_the_layer


def test_no_float_tensor_over_the_vocabulary_has_more_rows_than_a_chunk(chain):
    for rows, made_by in run_ranks(watched, 1, chain, CHUNK)[0]:
        assert rows == CHUNK, made_by  # less would say that nothing was watched
    for rows, made_by in run_ranks(watched, 1, chain, 1000)[0]:
        assert rows > CHUNK, f"a larger chunk is not seen: {made_by}"


@pytest.mark.parametrize("world", [1, 2])
def test_sampling_is_chunked_too_and_a_frozen_output_layer_has_no_gradient(chain, world):
    """Two rows at a time, where three responses are written together."""
    adapters = [f"--parallel.tensor={world}", "--lora.rank=2", "--critic_lora.rank=2"]
    for rows, made_by, large in run_ranks(watched_adapters, world, chain, adapters):
        assert rows == 2, made_by
        assert not large
