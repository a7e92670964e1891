"""What an exported tokenizer's files make transformers read: the same ids, template and special tokens."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.data.tokenizer_files import check_tokenizer_files, eos_ids, write_tokenizer_files
from rto_megatron.errors import CheckpointError
from tests.data.tokenizers import SENTENCES, ours, smollm2, write_hugging_face_folder

TEXTS = [
    *SENTENCES,
    "  two spaces\n\nand line ends  ",
    "é ü 道可道，非常道。",  # noqa: RUF001 - as it is written
    "def f(x):\n\treturn x",
    "the the  the",
    "ﬁ Ⅷ",
    "",
]
TALK = [
    {"role": "user", "content": "How are\n you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Where is the cat?"},
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def sentencepiece_tokenizer(folder, **options):
    """A sentencepiece model that is no tokenizer of ours, with a template."""
    folder.mkdir()
    model = io.BytesIO()
    # enough text that pieces overlap
    texts = [*SENTENCES * 20, *(f"{a} {b}" for a in SENTENCES for b in TEXTS if b.isascii())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, num_threads=1, minloglevel=2, **options
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder / "tokenizer.model", folder / "template.jinja")


KINDS = {
    "like Llama 2": {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "normalizing": {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True},
    "unigram": {"model_type": "unigram", "vocab_size": 330, "byte_fallback": True, "hard_vocab_limit": False},
    "user-defined piece": {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "user_defined_symbols": ["<think>"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
}


def export(tokenizer, folder, *, model_type="llama", names_pad=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_tokenizer_files(tokenizer, folder, names_pad=names_pad)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["ours", *KINDS])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_transformers_reads_a_sentencepiece_model_as_we_do(tmp_path, name, model_type):
    tokenizer = ours() if name == "ours" else sentencepiece_tokenizer(tmp_path / "own", **KINDS[name])
    theirs = export(tokenizer, tmp_path / "out", model_type=model_type)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == tokenizer.render(TALK)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert theirs.encode("How are you today?") == tokenizer.encode("How are you today?")  # nothing is put around it
    check_tokenizer_files(tokenizer, tmp_path / "out", TEXTS, names_pad=True)


def test_a_user_defined_piece_stays_whole(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path / "own", **KINDS["user-defined piece"])
    theirs = export(tokenizer, tmp_path / "out")
    piece = tokenizer.encode("<think>")
    assert len(piece) == 1 and piece[0] in tokenizer.encode("the <think> cat")
    assert tokenizer.encode("the <think> cat") == theirs.encode("the <think> cat")


def test_a_class_that_ignores_tokenizer_json_is_named(tmp_path):
    """transformers 5 takes every Qwen2 model for one with Qwen2's own pre-tokenizer."""
    theirs = export(ours(), tmp_path / "out", model_type="qwen2")
    if type(theirs).__name__ == "Qwen2Tokenizer":
        with pytest.raises(
            CheckpointError, match=r"transformers' Qwen2Tokenizer must cut texts as .* but 'How are you"
        ):
            check_tokenizer_files(ours(), tmp_path / "out", TEXTS, names_pad=False)


def test_a_hugging_face_tokenizer_keeps_its_files(tmp_path):
    source = smollm2(tmp_path / "source")
    export(load_tokenizer(source), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(tmp_path / "out").digest() == load_tokenizer(source).digest()


def test_a_value_model_fills_rows_with_the_id_that_its_config_names(tmp_path):
    tokenizer = load_tokenizer(smollm2(tmp_path / "source"))
    assert export(tokenizer, tmp_path / "policy").pad_token_id == tokenizer.eos_id  # as it came
    assert export(tokenizer, tmp_path / "value", names_pad=True).pad_token_id == tokenizer.pad_id
    check_tokenizer_files(tokenizer, tmp_path / "value", TEXTS, names_pad=True)
    with pytest.raises(CheckpointError, match=r"the pad_token_id that transformers reads must be 0, got 2"):
        check_tokenizer_files(tokenizer, tmp_path / "policy", TEXTS, names_pad=True)


def test_another_chat_template_is_the_one_that_readers_find(tmp_path):
    source, template = smollm2(tmp_path / "source"), tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    tokenizer = load_tokenizer(source, template)
    theirs = export(tokenizer, tmp_path / "out")
    assert theirs.chat_template == template.read_text()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == template.read_text()  # where older readers look
    assert settings["eos_token"] == "<|im_end|>"


def test_all_ids_at_which_the_source_stops_are_kept(tmp_path):
    source = write_hugging_face_folder(
        tmp_path / "source",
        specials=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|pad|>"],
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )
    settings = {"eos_token_id": [0, 1, 2], "temperature": 0.6, "transformers_version": "4.40.0"}
    (source / "generation_config.json").write_text(json.dumps(settings))
    stored = Path(tmp_path / "stored")
    load_tokenizer(source).save(stored)  # as a run keeps it
    tokenizer = load_tokenizer(stored)
    assert eos_ids(tokenizer) == [2, 0, 1]
    export(tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 0, 1], "temperature": 0.6, "bos_token_id": None, "pad_token_id": 3,
    }  # fmt: skip
    (source / "generation_config.json").unlink()
    assert load_tokenizer(source).digest() == tokenizer.digest(), "it is about sampling, not about tokens"
    assert eos_ids(load_tokenizer(source)) == 2
