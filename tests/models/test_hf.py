"""Hugging Face folders: the same logits as transformers in every layout, the same bits back, and clear refusals."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rto_megatron.algorithms.reward_model import sequence_scores
from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.step import head_outputs, score, token_log_probs
from rto_megatron.errors import CheckpointError
from rto_megatron.models.gpt import build_model
from rto_megatron.models.hf_check import token_logits
from rto_megatron.models.hf_config import Scoring, config_from_hf, config_to_hf, scoring_from_hf
from rto_megatron.models.hf_export import save_hf
from rto_megatron.models.hf_weights import load_hf
from tests.ranks import run_ranks

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB,  # odd, so that ours is padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOLERANCE = 5e-5
"""Of logits and nats in float32, where logits go up to 5; measured: below 9e-6 in all layouts."""
TOKENS = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))  # 0 is the pad id


def hf_configs():
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    return {
        "llama_untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
        "llama_tied_llama3_rope": LlamaConfig(
            **SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
        ),
        "llama_linear_rope": LlamaConfig(**SIZES, rope_parameters=linear),
        "llama_one_kv_head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
        "mistral": MistralConfig(**SIZES, sliding_window=None),
        "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3_untied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    }


def value_configs():
    """Of models with one score a sequence; their bias is in config.json, where transformers passes over it."""
    score = {"num_labels": 1, "pad_token_id": 0, "score_bias": 0.75}
    kept = ("llama_tied_llama3_rope", "mistral", "qwen2_tied", "qwen3_untied")
    configs = {f"{name}_value": hf_configs()[name] for name in kept}
    for config in configs.values():
        config.update(score)
    return configs


def hf_outputs(model):
    """Logits [3, 40, V], or scores [3] with the bias that transformers does not know."""
    with torch.no_grad():
        logits = model(TOKENS).logits
    return logits.squeeze(-1) + model.config.score_bias if logits.dim() == 2 else logits


def open_hf(folder):
    """A folder's model in transformers, as whatever its config.json says it is."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if scoring_from_hf(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager").float().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> Hugging Face folder and transformers' logits or scores of TOKENS."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    made = {}
    for name, config in (hf_configs() | value_configs()).items():
        torch.manual_seed(0)
        auto = AutoModelForSequenceClassification if name.endswith("value") else AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").float().eval()
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "norm" in parameter_name:  # else 0 and 1: they would prove nothing
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="50KB" if name == "qwen2_tied" else "5GB")
        made[name] = folder, hf_outputs(model)
    return made


class NoTokenizer:
    """Stands where an export asks for a tokenizer."""

    eos_id, bos_id, pad_id = 2, 1, 0

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def load_and_save(paths, parallel):
    """For each Hugging Face folder: logits and log-probs, or scores; written again beside."""
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    rows = SFTBatch(
        tokens=TOKENS,
        num_tokens=torch.tensor([40, 40, 40]),
        response_mask=(torch.arange(40) > 0).expand(3, 40),
    )
    results = {}
    for name, path in paths.items():
        config = config_from_hf(path)
        scoring = scoring_from_hf(path)
        kind = "value" if scoring else "policy"
        model = build_model(config, mesh, kind=kind, parallel=parallel, compute=ComputeConfig(), seed=7).eval()
        load_hf(model, path, config)
        out = path.with_name(f"{path.name}-{mesh.tensor.size}{mesh.pipeline.size}{parallel.sequence}")
        save_hf(model, config, out, NoTokenizer(), scoring=scoring, part_bytes=20_000)
        if scoring:
            own = sequence_scores(score(model, rows, head_outputs, mesh, cut=Cut(rows=2)), rows.num_tokens), None
        else:
            log_probs = score(model, rows, token_log_probs, mesh, cut=Cut(rows=2))[..., 0]
            own = score(model, rows, token_logits(config), mesh, cut=Cut(rows=2)), log_probs
        results[name] = *own, out
    return results


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor=2)),
        (2, ParallelConfig(tensor=2, sequence=True)),
        (2, ParallelConfig(pipeline=2)),
        (4, ParallelConfig(tensor=2, pipeline=2, virtual_stages=2)),
    ],
    ids=["one_rank", "tensor_2", "sequence", "pipeline_2", "tensor_2_pipeline_2_virtual_2"],
)
def test_weights_go_in_and_out_in_every_layout(folders, world, parallel):
    paths = {name: path for name, (path, _) in folders.items()}
    results = run_ranks(load_and_save, world, paths, parallel)[0]
    for name, (outputs, log_probs, out) in results.items():
        path, want = folders[name]
        assert (outputs - want).abs().max() < TOLERANCE, name
        if log_probs is not None:
            want_log_probs = want[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
            assert (log_probs[:, 1:] - want_log_probs).abs().max() < TOLERANCE, name
        assert len(list(out.glob("model-*.safetensors"))) > 1, (
            "part_bytes should have cut the export into several files"
        )
        saved, original = tensors_of(out), tensors_of(path)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[k], original[k]) for k in original), name
        assert torch.equal(hf_outputs(open_hf(out)), want), f"{name}: transformers gives other numbers for our export"


def tensors_of(folder):
    return {name: tensor for part in folder.glob("*.safetensors") for name, tensor in load_file(part).items()}


def edited_config(folder, tmp_path, **changes):
    """A folder with `folder`'s config.json, some keys changed or REMOVED."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value != "REMOVED"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_untied", {"architectures": ["GPT2LMHeadModel"]}, "must name one of LlamaForCausalLM, .*, got GPT2"),
        (
            "llama_untied",
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            r"got MixtralForCausalLM, a mixture of experts \(num_local_experts 8\): only dense",
        ),
        ("llama_untied", {"architectures": "REMOVED"}, "architectures must name one of .*, got None"),
        ("llama_untied", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be .*, got yarn"),
        ("llama_untied", {"rope_parameters": {"rope_type": "longrope"}}, "got longrope"),
        ("llama_untied", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got dynamic"),
        ("llama_untied", {"rope_parameters": {"rope_type": "linear"}}, "needs factor"),
        ("llama_untied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ("llama_untied", {"attention_bias": True}, "attention_bias must be false on LlamaForCausalLM"),
        ("qwen3_untied", {"attention_bias": True}, "attention_bias must be false on Qwen3ForCausalLM"),
        ("llama_untied", {"mlp_bias": True}, "mlp_bias must be false"),
        ("llama_untied", {"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ("llama_untied", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ("mistral", {"sliding_window": 64}, "must be null or at least max_position_embeddings 128, got 64"),
        ("mistral", {"sliding_window": "REMOVED", "max_position_embeddings": 8192}, "at least .* 8192, got 4096"),
        ("qwen2_tied", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window must be null"),
        ("llama_untied", {"hidden_size": "REMOVED"}, "needs hidden_size, found only architectures"),
        ("llama_untied", {"num_key_value_heads": 3}, "model.num_query_groups must divide num_attention_heads 4, got 3"),
        ("llama_untied", {"num_hidden_layers": "four"}, "describes no model that can be built"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(folders, tmp_path, name, changes, message):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        config_from_hf(edited_config(folders[name][0], tmp_path, **changes))


def test_a_window_that_is_never_left_is_no_window(folders, tmp_path):
    config = config_from_hf(edited_config(folders["mistral"][0], tmp_path, sliding_window=128))
    assert config == config_from_hf(folders["mistral"][0])


def test_a_missing_or_broken_config_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: is missing; give a folder"):
        config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: must be readable JSON"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize("name", list(hf_configs()))
def test_what_we_write_as_config_reads_back_the_same(folders, tmp_path, name):
    config = config_from_hf(folders[name][0])
    written = config_to_hf(config, dtype="float32")
    for removed in ((), ("rope_parameters", "dtype"), ("rope_scaling", "rope_theta", "torch_dtype")):  # all; 4's; 5's
        kept = {key: value for key, value in written.items() if key not in removed}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        assert config_from_hf(tmp_path) == config


def test_what_is_written_of_scores_reads_back_the_same(folders, tmp_path):
    config = config_from_hf(folders["qwen2_tied_value"][0])
    scoring = Scoring(bias=0.1, mean=-2.5, std=3.0, pad_id=0)
    written = config_to_hf(config, dtype="float32", pad_id=0, scoring=scoring)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert (config_from_hf(tmp_path), scoring_from_hf(tmp_path)) == (config, scoring)
    openrlhf = {"mean": written.pop("score_mean"), "std": written.pop("score_std")}
    (tmp_path / "config.json").write_text(json.dumps(written | openrlhf))
    assert scoring_from_hf(tmp_path) == scoring


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id2label": {"0": "bad", "1": "good"}},
            "must be 1, which is a score, got 2: a classifier is no reward model",
        ),
        ({"id2label": "REMOVED"}, "must be 1, .* got 2"),  # what transformers makes of it
        ({"score_std": 0}, "score_std must be positive, got 0"),
    ],
)
def test_a_model_without_one_score_is_refused(folders, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        scoring_from_hf(edited_config(folders["mistral_value"][0], tmp_path, **changes))


def test_an_architecture_without_a_hugging_face_class_is_not_written():
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no place for qkv_bias True.*what has: Qwen2"):
        config_to_hf(ModelConfig(vocab_size=8, qkv_bias=True), dtype="float32")
    with pytest.raises(CheckpointError, match=r"model\.architecture must be one of LlamaForCausalLM, .*, got Other"):
        config_to_hf(ModelConfig(vocab_size=8, architecture="Other"), dtype="float32")


def damaged(folder, tmp_path, change):
    """A copy of a Hugging Face folder whose tensors `change` has edited."""
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def messages(paths):
    """What load_hf says about each folder, with pipeline rank 1 holding some of the weights."""
    parallel = ParallelConfig(pipeline=2)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    said = {}
    for name, path in paths.items():
        config = config_from_hf(path)
        model = build_model(config, mesh, kind="policy", parallel=parallel, compute=ComputeConfig())
        with pytest.raises(CheckpointError) as caught:
            load_hf(model, path, config)
        said[name] = str(caught.value)
    return said


def test_weights_that_do_not_fit_are_refused_on_all_ranks(folders, tmp_path):
    source = folders["llama_untied"][0]

    def make(name, change):
        (tmp_path / name).mkdir()
        return damaged(source, tmp_path / name, change)

    paths = {
        "missing": make("missing", lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        "no_head": make("no_head", lambda t: t.pop("lm_head.weight")),
        "left": make("left", lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)})),
        "vocabulary": make("vocabulary", lambda t: t.update({"model.embed_tokens.weight": torch.zeros(130, 32)})),
        "shape": make("shape", lambda t: t.update({"model.layers.3.self_attn.k_proj.weight": torch.zeros(32, 32)})),
        "cut": make("cut", lambda t: None),
        "empty": make("empty", lambda t: None),
        "part": make("part", lambda t: None),
        "nan": make("nan", lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan)),
        "int8": make("int8", lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
    }
    with open(paths["cut"] / "model.safetensors", "r+b") as file:
        file.truncate(50_000)
    (paths["empty"] / "model.safetensors").rename(paths["empty"] / "pytorch_model.bin")
    where = dict.fromkeys(load_file(source / "model.safetensors"), "model-00001-of-00001.safetensors")
    (paths["part"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    first, second = run_ranks(messages, 2, paths)
    assert first == second
    for name, words in {
        "missing": "lacks model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM with 4 layers needs",
        "no_head": "lacks lm_head.weight, .*; set tie_word_embeddings",
        "left": "has model.layers.4.mlp.up_proj.weight, which LlamaForCausalLM with 4 layers has no place for",
        "vocabulary": r"model.embed_tokens.weight must have the shape \[131, 32\] by config.json, got \[130, 32\]",
        "shape": r"layers.3.self_attn.k_proj.weight must have the shape \[16, 32\] by config.json, got \[32, 32\]",
        "cut": "model.safetensors: must be a complete safetensors file",
        "empty": r"needs weights as \*.safetensors, found config.json, pytorch_model.bin",
        "part": "model-00001-of-00001.safetensors: is missing, and model.safetensors.index.json names it",
        "nan": r"up_proj.weight must be finite, 32 of its 1536 numbers are NaN or infinite",
        "int8": "model.norm.weight must be of float32, bfloat16 or float16, got I8: quantized weights cannot",
    }.items():
        assert re.search(words, first[name]), f"{name}: {first[name]}"
