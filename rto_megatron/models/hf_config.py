"""Hugging Face's config.json to a ModelConfig and back, for the families that Megatron's GPT can be."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rto_megatron.config.model import ModelConfig, RopeScaling
from rto_megatron.errors import CheckpointError

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the class name alone says about an architecture."""

    model_type: str
    """transformers' name of the config class."""
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Of a config.json that does not say; null is hidden_size / heads."""
    sliding_window: int | None = None
    """Likewise, in tokens; null is full attention."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a value model's config.json says besides its architecture.

    transformers' classes have no bias on the head: what they score, plus `bias`, is our score. A reward is
    (score - mean) / std.
    """

    bias: float = 0.0
    """Of the head, in reward-model units."""
    mean: float = 0.0
    """Of our scores."""
    std: float = 1.0
    """Likewise."""
    pad_id: int | None = None
    """transformers reads the score from the last token that is not this one."""


FAMILIES = {
    "LlamaForCausalLM": Family(model_type="llama"),
    "MistralForCausalLM": Family(model_type="mistral", sliding_window=4096),
    "Qwen2ForCausalLM": Family(model_type="qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family(model_type="qwen3", qk_norm=True, head_dim=128),
}
"""Hugging Face class -> what sets it apart."""

CAUSAL_LM, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
"""How the class of a policy ends, and that of a reward model or critic of the same family."""


def config_from_hf(folder: Path) -> ModelConfig:
    """The architecture that a Hugging Face folder's config.json describes, a policy's or a value model's.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for what Megatron's GPT here cannot do.
    """
    return _interpret(folder, _model_config)


def scoring_from_hf(folder: Path) -> Scoring | None:
    """How a value model's scores are to be read; None where the folder holds a policy.

    Raises:
        CheckpointError: as `config_from_hf`; or the model gives more than one number.
    """
    return _interpret(folder, _scoring)


def _interpret(folder: Path, reading: Callable[[Json], T]) -> T:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; give a folder that transformers' save_pretrained wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be readable JSON, got: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(raw).__name__}")
    try:
        return reading(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: describes no model that can be built: {error}") from None


def _model_config(raw: Json) -> ModelConfig:
    architecture = _class_of(raw).replace(CLASSIFIER, CAUSAL_LM)
    family = FAMILIES[architecture]
    _refuse_unsupported(raw, architecture, family)
    theta, scaling = _rope(raw)
    return ModelConfig(
        num_layers=_need(raw, "num_hidden_layers"),
        hidden_size=_need(raw, "hidden_size"),
        ffn_hidden_size=_need(raw, "intermediate_size"),
        num_attention_heads=_need(raw, "num_attention_heads"),
        # only the first Llamas, which have no groups, leave it out
        num_query_groups=raw.get("num_key_value_heads") or _need(raw, "num_attention_heads"),
        head_dim=raw.get("head_dim") or family.head_dim or raw["hidden_size"] // raw["num_attention_heads"],
        vocab_size=_need(raw, "vocab_size"),
        max_length=_need(raw, "max_position_embeddings"),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        norm_epsilon=_need(raw, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        init_std=raw.get("initializer_range", 0.02),
        architecture=architecture,
    )


def _class_of(raw: Json) -> str:
    """The Hugging Face class; one of a family that is here."""
    name = (raw.get("architectures") or [None])[0]
    if isinstance(name, str) and name.replace(CLASSIFIER, CAUSAL_LM) in FAMILIES:
        return name
    experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if raw.get(key)), None)
    raise CheckpointError(
        f"architectures must name one of {', '.join(FAMILIES)} or the {CLASSIFIER} of such a family, got {name}"
        + (f", a mixture of experts ({experts} {raw[experts]}): only dense models can be converted" if experts else "")
    )


def _scoring(raw: Json) -> Scoring | None:
    if not _class_of(raw).endswith(CLASSIFIER):
        return None
    # a config.json that says nothing means two labels to transformers
    num_labels = raw.get("num_labels") or len(raw.get("id2label") or (0, 1))
    if num_labels != 1:
        raise CheckpointError(
            f"num_labels (the entries of id2label) must be 1, which is a score, got {num_labels}: "
            "a classifier is no reward model"
        )
    scoring = Scoring(
        bias=float(raw.get("score_bias", 0.0)),
        mean=float(raw.get("score_mean", raw.get("mean", 0.0))),  # OpenRLHF writes `mean` and `std`
        std=float(raw.get("score_std", raw.get("std", 1.0))),
        pad_id=raw.get("pad_token_id"),
    )
    for name in ("bias", "mean", "std"):
        if not math.isfinite(getattr(scoring, name)):
            raise CheckpointError(f"score_{name} must be a finite number, got {getattr(scoring, name)}")
    if scoring.std <= 0:
        raise CheckpointError(f"score_std must be positive, got {scoring.std}")
    return scoring


def _need(raw: Json, key: str) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"needs {key}, found only {', '.join(sorted(raw))}")
    return raw[key]


def _refuse_unsupported(raw: Json, architecture: str, family: Family) -> None:
    """Raise for each setting that would change the output and that the model here has no place for."""
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config is set: weights must be float32, bfloat16 or float16, not quantized")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act must be silu, got {raw['hidden_act']}")
    if raw.get("attention_bias", False):
        raise CheckpointError(f"attention_bias must be false on {architecture} (there is no output bias), got true")
    if raw.get("mlp_bias", False):
        raise CheckpointError("mlp_bias must be false, got true")
    # Qwen names a window in every config and says beside it whether it is used
    uses_window = raw.get("use_sliding_window", not architecture.startswith("Qwen"))
    window = raw.get("sliding_window", family.sliding_window) if uses_window else None
    longest = _need(raw, "max_position_embeddings")
    if window is not None and window < longest:
        raise CheckpointError(
            f"sliding_window must be null or at least max_position_embeddings {longest}, got {window}; to stay within "
            f"one window, set max_position_embeddings to {window}"
        )


def _rope(raw: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 has both in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise CheckpointError(f"partial_rotary_factor must be 1, got {partial}")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"rope_type must be default, linear or llama3, got {kind}")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_need(rope, "factor"))
    return theta, RopeScaling(
        kind="llama3",
        factor=_need(rope, "factor"),
        low_freq_factor=_need(rope, "low_freq_factor"),
        high_freq_factor=_need(rope, "high_freq_factor"),
        original_max_length=_need(rope, "original_max_position_embeddings"),
    )


def config_to_hf(
    config: ModelConfig,
    *,
    dtype: str,
    eos_id: int | list[int] | None = None,
    bos_id: int | None = None,
    pad_id: int | None = None,
    scoring: Scoring | None = None,
) -> dict[str, Any]:
    """What to write as config.json, for transformers 5 and for older ones.

    Args:
        dtype: of the weights beside it: float32, bfloat16.
        eos_id: the tokenizer's, like bos_id and pad_id.
        scoring: of a value model; None writes a policy.
    """
    family = _family_of(config)
    scaling = _rope_to_hf(config.rope_scaling)
    return {
        "architectures": [hf_class(config, scoring)],
        "model_type": family.model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        # version 4 reads these three, version 5 the two after them
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "dtype": dtype,
        **(_scoring_to_hf(scoring) if scoring else {}),
    }


def hf_class(config: ModelConfig, scoring: Scoring | None) -> str:
    """The Hugging Face class of a policy (no scoring) or of a value model."""
    return config.architecture.replace(CAUSAL_LM, CLASSIFIER) if scoring else config.architecture


def _scoring_to_hf(scoring: Scoring) -> dict[str, Any]:
    return {
        "id2label": {"0": "score"},  # transformers takes the number of labels from here
        "label2id": {"score": 0},
        "problem_type": "regression",  # vLLM would put a sigmoid on the score of a classifier with one label
        "score_bias": scoring.bias,
        "score_mean": scoring.mean,
        "score_std": scoring.std,
    }


def _family_of(config: ModelConfig) -> Family:
    if config.architecture not in FAMILIES:
        raise CheckpointError(f"model.architecture must be one of {', '.join(FAMILIES)}, got {config.architecture}")
    family = FAMILIES[config.architecture]
    if (config.qkv_bias, config.qk_norm) != (family.qkv_bias, family.qk_norm):
        fits = [name for name, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == (config.qkv_bias, config.qk_norm)]
        raise CheckpointError(
            f"model.architecture {config.architecture} has no place for qkv_bias {config.qkv_bias} with qk_norm "
            f"{config.qk_norm}; what has: {', '.join(fits) or 'none that is supported'}"
        )
    return family


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }
