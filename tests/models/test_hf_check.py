"""What the comparison with transformers finds: planted faults, each named."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rto_megatron.config.parallel import ComputeConfig, Cut, ParallelConfig
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import is_main, start_runtime
from rto_megatron.errors import CheckpointError
from rto_megatron.models import gpt, hf_tables
from rto_megatron.models.gpt import build_model
from rto_megatron.models.hf_check import check_hf
from rto_megatron.models.hf_config import config_from_hf, scoring_from_hf
from rto_megatron.models.hf_export import save_hf
from rto_megatron.models.hf_weights import load_hf
from tests.data.tokenizers import smollm2
from tests.ranks import run_ranks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # as many as heads: a swap of queries and keys changes no shape
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama, a Qwen2 and a Llama reward model with random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config
    from transformers import Qwen2ForCausalLM as Qwen2

    made = {}
    for name, config_class, model_class in (
        ("llama", LlamaConfig, LlamaForCausalLM),
        ("qwen2", Qwen2Config, Qwen2),
        ("value", LlamaConfig, LlamaForSequenceClassification),
    ):
        torch.manual_seed(0)
        folder = smollm2(tmp_path_factory.mktemp("hf") / name)
        score = {"num_labels": 1, "pad_token_id": 0} if name == "value" else {}
        config = config_class(vocab_size=load_tokenizer(folder).vocab_size + 3, tie_word_embeddings=False, **SIZES)
        config.update(score)
        model = model_class(config)
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "norm" in parameter_name:  # else 0 and 1: they would prove nothing
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        made[name] = folder
    return made


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(tensors, layer):
    q, k = (f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def no_fault(folder):
    pass


def no_fault_in_a_value_model(folder):
    pass


def swapped_projections(folder):
    edit_weights(folder, lambda tensors: swap(tensors, layer=2))


def dropped_bias(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.bias"))


def wrong_theta(folder):
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})


def wrong_score_bias(folder):
    edit_config(folder, score_bias=0.5)


def unknown_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.bias": torch.ones(48)}))


FAULTS = {
    no_fault: ("llama", None),
    no_fault_in_a_value_model: ("value", None),
    swapped_projections: (
        "llama",
        r"model.layers.2.self_attn.q_proj.weight is the first tensor that differs from the live model's, by up to \d",
    ),
    dropped_bias: ("qwen2", "model.layers.1.self_attn.v_proj.bias, which the live model has, is not there"),
    wrong_theta: ("llama", "config.json says rope_theta 20000.0, the live model has 10000.0"),
    wrong_score_bias: ("value", "score.bias is the first tensor that differs from the live model's, by up to 0.25"),
    unknown_tensor: ("llama", "transformers has no place for model.layers.3.mlp.up_proj.bias, and would leave it out"),
}


def what_it_says(folders, folder, parallel, dtype):
    """What each planted fault makes the comparison say, by the fault's name; None where it finds none."""
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    said = {}
    for fault, (name, _) in FAULTS.items():
        model, config, tokenizer = live_model(folders[name], mesh, parallel, dtype)
        if name == "value" and model.post_process:
            model.value_head.bias.data.fill_(0.25)
        out = folder / fault.__name__
        save_hf(model, config, out, tokenizer, scoring=scoring_from_hf(folders[name]))
        if is_main():
            fault(out)
        said[fault.__name__] = compare(model, config, out, tokenizer, mesh)
    return said


def live_model(folder, mesh, parallel, dtype="float32"):
    config, kind = config_from_hf(folder), "value" if scoring_from_hf(folder) else "policy"
    compute = ComputeConfig(dtype=dtype)
    model = build_model(config, mesh, kind=kind, parallel=parallel, compute=compute, seed=None).eval()
    load_hf(model, folder, config)
    return model, config, load_tokenizer(folder)


def compare(model, config, folder, tokenizer, mesh):
    try:
        check_hf(model, config, folder, tokenizer, mesh, cut=Cut(rows=4))
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        (ParallelConfig(tensor=2, sequence=True), "float32"),
        (ParallelConfig(pipeline=2), "float32"),
        (ParallelConfig(pipeline=2), "bfloat16"),
    ],
    ids=["tensor", "pipeline", "bfloat16"],
)
def test_a_fault_in_the_folder_is_named(folders, tmp_path, parallel, dtype):
    first, second = run_ranks(what_it_says, 2, folders, tmp_path, parallel, dtype)
    assert first == second
    for fault, (_, words) in FAULTS.items():
        message = first[fault.__name__]
        assert message is None if words is None else re.search(words, message or ""), (fault.__name__, message)


def forwards_that_differ(folder, parallel):
    """What is said of models whose every tensor and setting is right, and which compute something else."""
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    said = {}

    table = hf_tables.TABLES["LlamaForCausalLM"]
    name = "decoder.layers.{i}.self_attention.linear_qkv.weight"
    right = table[name]
    # the same mistake on the way in and on the way out
    table[name] = hf_tables._grouped(*(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "kqv"))
    said["swapped in the table"] = compare(*with_folder(live_model(folder, mesh, parallel), folder), mesh)
    table[name] = right

    frequencies = gpt.rope_frequencies
    gpt.rope_frequencies = lambda config: frequencies(config) / 1.01
    said["rotary frequencies"] = compare(*with_folder(live_model(folder, mesh, parallel), folder), mesh)
    gpt.rope_frequencies = frequencies

    model, config, tokenizer = live_model(folder, mesh, parallel)
    for layer in model.decoder.layers:
        if layer.layer_number == 3:
            layer.mlp.register_forward_hook(lambda _module, _inputs, out: (out[0] * 1.01, *out[1:]))
    said["third layer"] = compare(model, config, folder, tokenizer, mesh)

    model, config, tokenizer = live_model(folder, mesh, parallel)
    if model.post_process:
        model.output_layer.register_forward_hook(lambda _module, _inputs, out: (out[0] * 1.01, *out[1:]))
    said["output layer"] = compare(model, config, folder, tokenizer, mesh)
    return said


def with_folder(live, folder):
    model, config, tokenizer = live
    return model, config, folder, tokenizer


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)], ids=["tensor", "pipeline"]
)
def test_the_first_layer_that_computes_something_else_is_named(folders, parallel):
    said = run_ranks(forwards_that_differ, 2, folders["llama"], parallel)[0]
    for fault, where in {
        "swapped in the table": "model.layers.0",
        "rotary frequencies": "model.layers.0",
        "third layer": "model.layers.2",
        "output layer": "the head",
    }.items():
        words = rf"transformers gives other logits .* by up to .*, allowed is .*; .* is that of {re.escape(where)}$"
        assert said[fault] and re.search(words, said[fault]), (fault, said[fault])


def save_a_broken_model(folder, out):
    mesh = build_mesh(ParallelConfig(pipeline=2), start_runtime(threads=1), seed=0)
    model, config, tokenizer = live_model(folder, mesh, ParallelConfig(pipeline=2))
    for layer in model.decoder.layers:
        if layer.layer_number == 4:
            layer.mlp.linear_fc1.weight.data[-1, 0] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        save_hf(model, config, out, tokenizer)
    return str(caught.value)


def test_a_model_that_is_not_finite_is_not_written(folders, tmp_path):
    first, second = run_ranks(save_a_broken_model, 2, folders["llama"], tmp_path / "out")
    assert first == second
    assert re.match(r"model\.layers\.3\.mlp\.up_proj\.weight holds NaN or infinity: the run diverged", first)
    assert not (tmp_path / "out").exists()
