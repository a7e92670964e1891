"""No float32 tensor over the vocabulary is larger than a chunk, in training, scoring or generation."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rto_megatron.config.load import load_run
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of

CHUNK = 5
"""Of compute.log_prob_chunk; the decode batch holds 3 rows."""


class Largest(TorchDispatchMode):
    """Watches every tensor that any operation makes, those of the backward pass included."""

    def __init__(self, sizes, hidden):
        super().__init__()
        self.sizes, self.hidden, self.rows, self.made_by = sizes, hidden, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            wide = [size for size in x.shape if size in self.sizes]
            # the embedding itself, its gradient and its optimizer state are as large as they are
            if not wide or (x.dim() == 2 and set(x.shape) == {wide[0], self.hidden}):
                continue
            if x.numel() // wide[0] > self.rows:
                self.rows, self.made_by = x.numel() // wide[0], f"{func} made {tuple(x.shape)}"
        return out


def watched(folder, chunk):
    """The largest number of rows over the vocabulary: in an SFT run with evaluation, and in a step of RTO."""
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=1)
    from rto_megatron.stages.rto import prepare, take_step
    from rto_megatron.stages.run import Clock

    words = [f"--compute.log_prob_chunk={chunk}"]
    config = load_run("rto", None, words_of("rto", folder) + words)
    setup, _ = prepare(config, runtime)
    weight = setup.actors.policy.model.output_weight()
    sizes = {weight.shape[0], setup.actors.policy.model.true_vocab}
    found = []
    with Largest(sizes, weight.shape[1]) as rto:
        take_step(setup, config, step=0, kl_coef=0.1, clock=Clock())
    with Largest(sizes, weight.shape[1]) as sft:
        run_stage("sft", folder, [*words, f"--run_dir={folder}/watched-{chunk}", "--train.max_steps=1"])
    found += [(rto.rows, rto.made_by), (sft.rows, sft.made_by)]
    return found


def test_no_float_tensor_over_the_vocabulary_has_more_rows_than_a_chunk(chain):
    for rows, made_by in run_ranks(watched, 1, chain, CHUNK)[0]:
        assert rows == CHUNK, made_by  # less would say that nothing was watched
    for rows, made_by in run_ranks(watched, 1, chain, 1000)[0]:
        assert rows > CHUNK, f"a larger chunk is not seen: {made_by}"
