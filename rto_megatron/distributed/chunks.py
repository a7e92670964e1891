"""The model of a pipeline rank that holds several blocks of layers, far apart in the model, as one module."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule


class ChunkedModel(MegatronModule):
    """This rank's chunks of an interleaved pipeline: rank r of P has in chunk c the block c * P + r of all blocks.

    One module for whoever asks for weights: checkpoints, refits, conversion. What runs a model runs its chunks.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        super().__init__(config=chunks[0].config)
        self.chunks = torch.nn.ModuleList(chunks)
        self.pg_collection = chunks[0].pg_collection

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """All chunks' weights: under this module's names, each with the checkpoint's key, which knows no chunks."""
        return {
            f"{prefix}chunks.{number}.{name}": value
            for number, chunk in enumerate(model_chunks(self))
            for name, value in chunk.sharded_state_dict(prefix, sharded_offsets, metadata).items()
        }


def model_chunks(model: MegatronModule) -> list[Any]:
    """The blocks of layers that this rank holds of a model, first one first; nearly always one, the model itself."""
    return list(model.chunks) if isinstance(model, ChunkedModel) else [model]


def named_weights(model: MegatronModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's weights by the names that they have in a model in one piece.

    With tied embeddings the last of several stages keeps a copy of the first's.
    """
    for chunk in model_chunks(model):
        places = [f"decoder.layers.{layer.layer_number - 1}." for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
                name = places[int(layer[1])] + name[layer.end() :]
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield name, parameter
