"""`convert` in both directions, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.config.run import ConvertRun
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import UserError
from rto_megatron.models.hf_check import TEXTS
from tests.data.tokenizers import smollm2
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def convert(*runs):
    """Do several conversions in one process; what each says if it is refused, else None."""
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=1)
    from rto_megatron.stages.convert import run

    said = []
    for config in runs:
        try:
            run(config, runtime)
            said.append(None)
        except UserError as error:
            said.append(str(error))
    return said


def write_hugging_face_model(folder, rows_beyond=3):
    """A Llama with random weights, and a tokenizer with `rows_beyond` fewer tokens than its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab_size = load_tokenizer(smollm2(folder)).vocab_size + rows_beyond
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weights_of(folder):
    return {name: tensor for part in folder.glob("*.safetensors") for name, tensor in load_file(part).items()}


def test_a_hugging_face_folder_comes_back_with_the_same_bits_and_tokens(tmp_path):
    source = write_hugging_face_model(tmp_path / "hf")
    pipeline = ParallelConfig(pipeline=2)
    inward = ConvertRun(source=source, out=tmp_path / "run", parallel=pipeline)
    outward = ConvertRun(source=tmp_path / "run", out=tmp_path / "again", parallel=pipeline)
    assert run_ranks(convert, 2, inward, outward)[0] == [None, None]

    before, after = weights_of(source), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = load_tokenizer(tmp_path / "run" / "checkpoints" / "step_00000000" / "tokenizer")
    assert load_tokenizer(tmp_path / "again").digest() == stored.digest()
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2  # <|im_end|>


def test_a_model_from_scratch_is_written_for_transformers(chain, tmp_path):
    out = tmp_path / "hf"
    assert run_ranks(convert, 1, ConvertRun(source=chain / "sft", out=out)) == [[None]]
    model = AutoModelForCausalLM.from_pretrained(out)
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    messages = [{"role": "user", "content": "Where is the cat?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.render(messages)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == ours.eos_id


def test_the_folder_holds_what_servers_read(chain, tmp_path):
    """vLLM and SGLang take the class, the sizes, the ids and the template from these files."""
    out = tmp_path / "hf"
    run = ConvertRun(source=chain / "sft", out=out, compute=ComputeConfig(dtype="bfloat16"))
    assert run_ranks(convert, 1, run) == [[None]]
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    config, generation, settings = (
        json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config", "tokenizer_config")
    )
    tokenizer = load_tokenizer(chain / "tokenizer")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    wanted = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, "vocab_size": 320}
    assert config.items() >= (wanted | ids | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}).items()
    assert generation == ids
    assert settings["chat_template"] == (out / "chat_template.jinja").read_text() == tokenizer.template.text
    assert (settings["eos_token"], settings["pad_token"]) == ("<|end|>", "<pad>")
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.bfloat16}


def misled(fault, *runs):
    """`convert`, with a mistake of the converter's own."""
    from rto_megatron.models import gpt, hf_export

    if fault == "config":
        described = hf_export.config_to_hf
        hf_export.config_to_hf = lambda *args, **kwargs: described(*args, **kwargs) | {"rms_norm_eps": 1e-3}
    else:
        frequencies = gpt.rope_frequencies
        gpt.rope_frequencies = lambda config: frequencies(config) * 1.1
    return convert(*runs)


def test_a_folder_that_is_another_model_does_not_get_its_name(chain, tmp_path):
    out = tmp_path / "hf"
    run = ConvertRun(source=chain / "sft", out=out)
    (wrong, again), _ = run_ranks(misled, 2, "config", run, run)
    assert re.search(
        "draft: config.json says norm_epsilon 0.001, the live model has 1e-05; out .*/hf is not written, its draft is",
        wrong,
    )
    assert re.search(r"out .*/hf: its draft .*/hf.draft is left from a conversion that did not end well; look", again)
    assert not out.exists() and (tmp_path / "hf.draft" / "model.safetensors").exists()
    unchecked = ConvertRun(source=chain / "sft", out=tmp_path / "unchecked", verify=False)
    assert run_ranks(misled, 1, "config", unchecked) == [[None]]


def test_a_model_that_computes_something_else_is_not_brought_in(tmp_path):
    hf, out = write_hugging_face_model(tmp_path / "hf"), tmp_path / "run"
    (message,), _ = run_ranks(misled, 2, "forward", ConvertRun(source=hf, out=out))
    assert re.search("transformers gives other logits than the live model: .* is that of model.layers.0", message)
    assert not out.exists()


def command(*words):
    """The exit code and the output of tools/convert.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "convert.py", *words], capture_output=True, text=True, env=os.environ
    )
    return done.returncode, done.stdout + done.stderr


def test_the_tool_takes_the_flags_of_the_stage(tmp_path):
    hf = write_hugging_face_model(tmp_path / "hf")
    code, said = command(f"--source={hf}", f"--out={tmp_path}/run", "--parallel.pipeline=1")
    assert code == 0, said
    assert re.search("transformers agrees: every tensor is equal, and the logits of 6 texts differ by at most", said)
    assert (tmp_path / "run" / "checkpoints" / "latest.txt").exists()
    code, said = command("--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert (code, "Traceback" in said) == (2, False)
    assert re.search("error: source .*/nowhere: there is no such folder", said)


SMOLLM2 = Path(os.environ.get("SMOLLM2", ROOT / "runs" / "smollm2" / "hf"))
"""As tools/get_smollm2.py writes it, or another copy."""


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="python tools/get_smollm2.py gets the model")
def test_smollm2_comes_back_with_the_same_bits(tmp_path):
    pipeline = ParallelConfig(pipeline=2)  # its 9 heads and 3 key-value heads can be cut by 3 only
    inward = ConvertRun(source=SMOLLM2, out=tmp_path / "run", parallel=pipeline)
    outward = ConvertRun(source=tmp_path / "run", out=tmp_path / "again", parallel=pipeline)
    assert run_ranks(convert, 2, inward, outward, timeout=600)[0] == [None, None]
    before, after = weights_of(SMOLLM2), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder) for folder in (SMOLLM2, tmp_path / "again"))
    ids = torch.tensor([load_tokenizer(SMOLLM2).encode(TEXTS[0])])
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(chain, tmp_path):
    hf = write_hugging_face_model(tmp_path / "hf")
    misfit = write_hugging_face_model(tmp_path / "misfit", rows_beyond=-1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "template.jinja").write_text("x")
    lame = write_hugging_face_model(tmp_path / "lame")
    (lame / "model.safetensors").write_bytes(b"not weights")
    out = tmp_path / "out"
    refused = {
        "source .*/nowhere: there is no such folder": ConvertRun(source=tmp_path / "nowhere", out=out),
        "source .*/empty: must be a Hugging Face folder .* or a run folder .*, found an empty folder": ConvertRun(
            source=tmp_path / "empty", out=out
        ),
        "out .*/hf: must not exist, and does": ConvertRun(source=hf, out=hf),
        "the tokenizer does not fit the weights: it has .* tokens and": ConvertRun(source=misfit, out=out),
        "lame/model.safetensors: must be a complete safetensors file": ConvertRun(source=lame, out=out),
        "must hold the role policy to write it out, holds value": ConvertRun(
            source=chain / "reward", out=out, role="policy"
        ),
        "role must be null where a Hugging Face folder is brought in": ConvertRun(source=hf, out=out, role="policy"),
        "chat_template must be null where a run is written out": ConvertRun(
            source=chain / "sft", out=out, chat_template=tmp_path / "template.jinja"
        ),
    }
    for words, message in zip(refused, run_ranks(convert, 1, *refused.values())[0], strict=True):
        assert message and re.search(words, message), f"wanted {words!r}, got {message!r}"
    assert not out.exists() and not (tmp_path / "out.draft").exists()
