"""Tokens to pieces of text that read right, with every kind of tokenizer."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_megatron.credit.pieces import HALF, cut_pieces
from rto_megatron.data.tokenizer import load_tokenizer
from tests.data.tokenizers import CHATML, ours, smollm2, write_llama2_model

TEXTS = [
    "I am fine, thank you.",
    "  two  spaces\n\n\ta new line ",
    "emoji \U0001f600 and \U0001f469\u200d\U0001f469\u200d\U0001f467!",
    "na\u00efve caf\u00e9 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d",
    "</script><b> \0 \u202e",
]


@pytest.fixture(scope="module", params=["ours", "llama 2", "byte-level BPE"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "ours":
        return ours()
    if request.param == "llama 2":
        (folder / "template.jinja").write_text(CHATML)
        return load_tokenizer(write_llama2_model(folder / "tokenizer.model"), folder / "template.jinja")
    return load_tokenizer(smollm2(folder / "smollm2"))


def put_together(pieces):
    return "".join(text for place, text in enumerate(pieces.texts) if place not in pieces.specials)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(tokenizer, text):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    pieces = cut_pieces(tokenizer, ids)
    assert put_together(pieces) == tokenizer.decode(ids)
    assert len(pieces.texts) == len(ids)
    assert pieces.specials == [len(ids) - 1]
    assert pieces.texts[-1] == tokenizer.token(tokenizer.eos_id)


def test_a_character_of_several_tokens_is_whole_and_in_the_first_of_them(tokenizer):
    ids = tokenizer.encode("a \U0001f600!")
    pieces = cut_pieces(tokenizer, ids)
    place = pieces.texts.index("\U0001f600")
    assert pieces.texts[place + 1 : place + 4] == ["", "", ""]  # the letters are rare, so that each byte is a token
    assert pieces.texts[place + 4] == "!"


def test_a_character_that_is_cut_off_is_shown_as_broken(tokenizer):
    ids = tokenizer.encode("a \U0001f600")[:-1]
    assert HALF in put_together(cut_pieces(tokenizer, ids))


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_is_sampled_reads_as_the_decoder_reads_it(tokenizer, data):
    """But for the number of signs that stand for broken bytes, which depends on where a decoder starts."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    pieces = cut_pieces(tokenizer, ids)
    assert len(pieces.texts) == len(ids)
    broken = re.compile(f"{HALF}+")
    assert broken.sub(HALF, put_together(pieces)) == broken.sub(HALF, tokenizer.decode(ids))
