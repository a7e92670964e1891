"""Tokenizers: text comes back, templates become ids, saved folders read back, and misfits are named."""

import pytest
from transformers import AutoTokenizer

from rto_megatron.data.tokenizer import check_vocabulary, load_tokenizer
from rto_megatron.errors import ConfigError, DataError
from tests.data.tokenizers import SENTENCES, ours, smollm2, write_hugging_face_folder, write_llama2_model
from tools.train_tokenizer import train

TALK = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Where is the cat?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return ours()


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    return smollm2(tmp_path_factory.mktemp("hub") / "smollm2")


@pytest.mark.parametrize("text", ["How are you?", "  two  spaces\n\nlines ", "ünï 漢字 😀", "<|end|> is text here", ""])
def test_decode_gives_back_what_was_encoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_symbol_in_plain_text_is_text(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("<|end|>")


def test_built_in_template_wraps_turns_in_symbols(tokenizer):
    # <pad> 0, <unk> 1, <|system|> 2, <|user|> 3, <|assistant|> 4, <|end|> 5
    turns = [tokenizer.encode(message["content"]) for message in TALK]
    assert tokenizer.render(TALK) == [3, *turns[0], 5, 4, *turns[1], 5, 3, *turns[2], 5, 4]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 5, None)


def test_decode_skips_special_tokens(tokenizer):
    assert tokenizer.decode([0, 3, *tokenizer.encode("cat"), 5, 0]) == "cat"


def test_training_twice_gives_the_same_bytes():
    assert train(iter(SENTENCES), 320) == train(iter(SENTENCES), 320)


def test_a_saved_sentencepiece_folder_reads_back_with_its_digest(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.digest(), again.render(TALK)) == (tokenizer.digest(), tokenizer.render(TALK))


def test_the_chat_template_is_part_of_the_digest(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[-1].content }}")
    other = load_tokenizer(tmp_path / "saved", template)
    assert other.digest() != tokenizer.digest()
    assert other.render(TALK) == tokenizer.encode("Where is the cat?")
    other.save(tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").digest() == other.digest()


def test_a_foreign_sentencepiece_model_works_with_its_own_template(tmp_path):
    path = write_llama2_model(tmp_path / "llama2.model")
    template = tmp_path / "llama2.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(path, template)
    # <unk> 0, <s> 1, </s> 2; padding falls to <unk>, which byte fallback keeps out of text
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.render([TALK[0]]) == [1, *tokenizer.encode("[How are you?]")]


def test_a_foreign_sentencepiece_model_needs_a_template(tmp_path):
    with pytest.raises(
        ConfigError, match=r"llama2\.model: the built-in chat template needs the symbols <\|system\|> .*chat_template"
    ):
        load_tokenizer(write_llama2_model(tmp_path / "llama2.model"))


def test_hugging_face_renders_as_transformers_does(hub_folder):
    theirs = AutoTokenizer.from_pretrained(hub_folder)
    want = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(hub_folder).render(TALK) == want


def test_hugging_face_text_comes_back(hub_folder):
    tokenizer = load_tokenizer(hub_folder)
    assert tokenizer.decode([*tokenizer.encode("Where is the cat? 漢"), tokenizer.eos_id]) == "Where is the cat? 漢"
    assert tokenizer.vocab_size == 297  # 3 special tokens, 256 bytes, 38 merges


def test_pad_is_not_eos_even_if_the_tokenizer_says_so(hub_folder):
    tokenizer = load_tokenizer(hub_folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)  # <|endoftext|>, its unk


def test_pad_falls_to_a_reserved_token_before_bos(tmp_path):
    specials = ["<bos>", "<eos>", "<reserved_7>"]
    folder = write_hugging_face_folder(tmp_path / "t", specials=specials, bos_token="<bos>", eos_token="<eos>")
    assert load_tokenizer(folder).pad_id == 2
    folder = write_hugging_face_folder(tmp_path / "u", specials=specials[:2], bos_token="<bos>", eos_token="<eos>")
    assert load_tokenizer(folder).pad_id == 0


def test_no_token_to_pad_with_is_an_error(tmp_path):
    folder = write_hugging_face_folder(tmp_path / "t", specials=["<eos>"], eos_token="<eos>")
    with pytest.raises(ConfigError, match="needs a pad token that is not its EOS, found none; set pad_token"):
        load_tokenizer(folder)


def test_a_saved_hugging_face_folder_reads_back_with_its_digest(hub_folder, tmp_path):
    tokenizer = load_tokenizer(hub_folder)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.digest(), again.render(TALK)) == (tokenizer.digest(), tokenizer.render(TALK))


def test_a_hugging_face_folder_takes_another_template(hub_folder, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(hub_folder, template)
    assert tokenizer.render(TALK) == tokenizer.encode("How are you?")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").digest() == tokenizer.digest()


def test_the_date_of_a_template_does_not_move(tmp_path, hub_folder):
    template = tmp_path / "dated.jinja"
    template.write_text("{% if strftime_now is defined %}today{% else %}26 Jul 2024{% endif %}")
    tokenizer = load_tokenizer(hub_folder, template)
    assert tokenizer.decode(tokenizer.render(TALK)) == "26 Jul 2024"


def test_generation_marks_render_as_their_body(tmp_path, hub_folder):
    template = tmp_path / "marked.jinja"
    template.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    tokenizer = load_tokenizer(hub_folder, template)
    assert tokenizer.decode(tokenizer.render(TALK[:2])) == "How are you?Fine."


def test_a_template_may_refuse_messages(tmp_path, hub_folder):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"template .*/strict\.jinja, line 1, cannot render these .*: no system role"):
        load_tokenizer(hub_folder, template).render(TALK)


def test_a_template_is_called_by_the_file_it_is_in(tokenizer, hub_folder, tmp_path):
    tokenizer.save(tmp_path / "ours")
    load_tokenizer(hub_folder).save(tmp_path / "theirs")
    assert load_tokenizer(hub_folder).template.source == f"{hub_folder}/tokenizer_config.json"
    for folder in ("ours", "theirs"):
        assert load_tokenizer(tmp_path / folder).template.source == f"{tmp_path}/{folder}/chat_template.jinja"


BAD_FOLDERS = {
    "absent": (lambda path: path, "there is no such file or folder; give a .model file or a tokenizer folder"),
    "empty": (lambda path: path.mkdir(), "needs tokenizer.json or tokenizer.model, found an empty folder"),
    "not a model": (
        lambda path: path.write_text("hello"),
        "must be a sentencepiece model, the file does not parse as one",
    ),
    "no template": (
        lambda path: write_hugging_face_folder(path, specials=["<eos>", "<pad>"], template=None, eos_token="<eos>"),
        "needs a chat template, found none; set tokenizer.chat_template to a Jinja file",
    ),
    "no eos": (
        lambda path: write_hugging_face_folder(path, specials=["<pad>"], pad_token="<pad>"),
        "needs an eos_token, found none; set it in tokenizer_config.json",
    ),
    "broken": (
        lambda path: (path.mkdir(), (path / "tokenizer_config.json").write_text("{")),
        "transformers cannot read it: ",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_tokenizer_is_named_with_the_way_out(case, tmp_path):
    make, message = BAD_FOLDERS[case]
    make(tmp_path / "tok")
    with pytest.raises(ConfigError, match=f"tokenizer .*tok: {message}"):
        load_tokenizer(tmp_path / "tok")


def test_a_missing_template_file_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template .*absent\.jinja: must be a readable text file"):
        load_tokenizer(tmp_path / "saved", tmp_path / "absent.jinja")


def test_the_vocabulary_of_the_weights_may_be_a_little_larger(tokenizer):
    check_vocabulary(tokenizer, 320)
    check_vocabulary(tokenizer, 384)


@pytest.mark.parametrize("vocab_size", [319, 49152])
def test_a_tokenizer_that_does_not_fit_the_weights_is_an_error(tokenizer, vocab_size):
    message = (
        f"the tokenizer does not fit the weights: it has 320 tokens and the model's vocabulary .* has {vocab_size}; use"
    )
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(tokenizer, vocab_size)
