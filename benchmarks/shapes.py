"""Models and lengths that the benchmarks share: told by a few numbers, drawn from fixed seeds."""

import math
import random
from pathlib import Path
from typing import Any

from rto_megatron.config.model import ModelConfig

MODELS: dict[str, dict[str, Any]] = {
    "1M": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2,
    },
    "8M": {
        "num_layers": 6, "hidden_size": 320, "ffn_hidden_size": 864, "num_attention_heads": 5, "num_query_groups": 5,
    },
    "32M": {
        "num_layers": 10, "hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8, "num_query_groups": 4,
    },
    "1B": {
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
        "num_query_groups": 8,
    },
}  # fmt: skip
"""Llama-style shapes by about how many parameters their layers have."""
VOCAB = {"1M": 512, "8M": 8192, "32M": 16384, "1B": 32768}
"""Of 8M and 32M, so that the output layer is a quarter of the parameters, as it is of Llama 3.2 1B; of 1B, whose layers
are those of Llama 3.2 1B, as many as a tokenizer can be made for in seconds."""
MAX_LENGTH = 512
SIGMA = 0.7
"""Of log-normal response lengths: the spread that published traces of RLHF have."""
LONGEST = 2.3
"""Response lengths are cut off at this many times their mean."""


def model_config(name: str, *, max_length: int = MAX_LENGTH) -> ModelConfig:
    """The architecture `name`, with its vocabulary."""
    return ModelConfig(**MODELS[name], vocab_size=VOCAB[name], max_length=max_length)


def drawn_lengths(number: int, *, mean: int, seed: int) -> list[int]:
    """Log-normal lengths of mean about `mean`, each at least 2 and at most LONGEST times it."""
    stream, middle = random.Random(seed), math.log(mean) - SIGMA**2 / 2
    return [max(2, min(round(LONGEST * mean), round(stream.lognormvariate(middle, SIGMA)))) for _ in range(number)]


def drawn_prompts(number: int, lengths: tuple[int, int], *, vocab: range, seed: int) -> list[list[int]]:
    """Prompts of random ids of `vocab`, of lengths from the first to the second of `lengths`."""
    stream = random.Random(seed)
    return [[stream.choice(vocab) for _ in range(stream.randint(*lengths))] for _ in range(number)]


def hugging_face_folder(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A folder with a fresh model of shape `name` as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rto_megatron.models.hf_config import config_to_hf

    torch.manual_seed(seed)
    # weights larger than usual, so that the model prefers some tokens as a trained one does
    told = config_to_hf(model_config(name), dtype="float32") | {"initializer_range": 0.06}
    LlamaForCausalLM(LlamaConfig(**told)).save_pretrained(folder)
    return folder
