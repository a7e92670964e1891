"""`convert` in both directions, and what it refuses."""

import json
import re

import torch
from safetensors.torch import load_file

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import ConvertRun
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import UserError
from tests.data.tokenizers import smollm2
from tests.ranks import run_ranks


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "hf"
    assert run_ranks(convert, 1, ConvertRun(source=chain / "sft", out=out)) == [[None]]
    model = AutoModelForCausalLM.from_pretrained(out)
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    messages = [{"role": "user", "content": "Where is the cat?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.render(messages)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == ours.eos_id


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
    assert not out.exists() and not (tmp_path / "out.tmp").exists()
