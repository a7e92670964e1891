"""Weights that several ranks hold: what has drifted apart is named, and not saved."""

import pytest
import torch

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed.copies import CHUNK, check_copies, checksum
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import rank, start_runtime
from rto_megatron.errors import CheckpointError
from rto_megatron.models.gpt import build_model
from tests.ranks import run_ranks

SHAPE = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, vocab_size=60, num_attention_heads=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 2 * CHUNK + 3])
def test_one_changed_bit_or_two_swapped_numbers_change_the_sum(size, dtype):
    data = torch.arange(size).to(dtype)
    changed, swapped = data.clone(), data.flip(0)
    changed.view(torch.uint8)[-1] ^= 1
    assert checksum(data) == checksum(data.clone())
    assert checksum(data) != checksum(changed)
    assert size == 1 or checksum(data) != checksum(swapped)


def messages(layout, damage):
    """What is said of a model as it was built, and after the last bit of a weight was changed on some ranks."""
    parallel = ParallelConfig(**layout)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    model = build_model(SHAPE, mesh, kind="policy", parallel=parallel, compute=ComputeConfig(), seed=1)
    check_copies({"policy": model})
    found = []
    for weight, ranks in damage:
        parameter = dict(model.named_parameters()).get(weight)
        if rank() in ranks:
            parameter.data.view(torch.int32).view(-1)[-1] ^= 1
        with pytest.raises(CheckpointError) as raised:
            check_copies({"critic": None, "policy": model})
        found.append(str(raised.value))
        if rank() in ranks:
            parameter.data.view(torch.int32).view(-1)[-1] ^= 1
    return found


FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        (
            {"tensor": 2},
            [("decoder.final_layernorm.weight", (1, 3)), (FC2, (2,))],
            [
                "policy decoder.final_layernorm.weight differs between tensor ranks, rank 0 against rank 1",
                f"policy {FC2} differs between data ranks, rank 0 against rank 2",
            ],
        ),
        ({"context": 2}, [(FC2, (1, 2))], [f"policy {FC2} differs between data and context ranks, "
                                           "ranks 0 and 3 against ranks 1 and 2"]),
        ({"pipeline": 2}, [("output_layer.weight", (1,))],
         ["policy embedding.word_embeddings.weight differs between first and last pipeline ranks, "
          "rank 0 against rank 1"]),
    ],
    ids=["tensor 2 x data 2", "context 2 x data 2", "pipeline 2, tied"],
)  # fmt: skip
def test_a_weight_that_differs_is_named_with_its_ranks_on_all_of_them(layout, damage, said):
    for found in run_ranks(messages, 2 if "pipeline" in layout else 4, layout, damage):
        assert len(found) == len(said)
        for message, start in zip(found, said, strict=True):
            assert message.startswith(start)
