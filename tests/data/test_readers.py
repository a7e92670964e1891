"""Readers: the formats they take, and one message for each kind of bad row."""

import json
from pathlib import Path

import pytest

from rto_megatron.data.chat import ChatTemplate
from rto_megatron.data.readers import read_preferences, read_prompts, read_sft
from rto_megatron.errors import DataError
from tests.data.tokenizers import ours

USER = {"role": "user", "content": "Where is the cat?"}
ANSWER = {"role": "assistant", "content": "The cat sat on the mat."}
OTHER = {"role": "assistant", "content": "I am fine."}


@pytest.fixture(scope="module")
def tokenizer():
    return ours()


def write(path: Path, *rows) -> str:
    """Write rows as JSON lines, text as it is; the path as a source."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def sft(source, tokenizer, max_length=1000, too_long="drop"):
    return read_sft(source, tokenizer, max_length=max_length, too_long=too_long)


def pairs(source, tokenizer, max_length=1000, too_long="drop"):
    return read_preferences(source, tokenizer, max_length=max_length, too_long=too_long)


def prompts(source, tokenizer, max_prompt_tokens=1000, too_long="drop"):
    return read_prompts(source, tokenizer, max_prompt_tokens=max_prompt_tokens, too_long=too_long)


READERS = {"sft": sft, "pairs": pairs, "prompts": prompts}

SFT_FORMATS = {
    "prompt and response": {"prompt": USER["content"], "response": ANSWER["content"]},
    "messages and response": {"messages": [USER], "response": ANSWER["content"]},
    "a conversation": {"messages": [USER, ANSWER]},
    "prompt as messages": {"prompt": [USER], "response": ANSWER["content"]},
}


@pytest.mark.parametrize("case", SFT_FORMATS)
def test_sft_formats_say_the_same(case, tokenizer, tmp_path):
    (row,), dropped = sft(write(tmp_path / "a.jsonl", SFT_FORMATS[case]), tokenizer)
    assert row.prompt_ids == tokenizer.render([USER])
    assert row.response_ids == [*tokenizer.encode("The cat sat on the mat."), tokenizer.eos_id]
    assert str(dropped) == f"{tmp_path}/a.jsonl: 1 of 1 rows"


PAIR_FORMATS = {
    "text": {"prompt": USER["content"], "chosen": ANSWER["content"], "rejected": OTHER["content"]},
    "messages": {"messages": [USER], "chosen": ANSWER["content"], "rejected": OTHER["content"]},
    "answers as messages": {"prompt": USER["content"], "chosen": [ANSWER], "rejected": [OTHER]},
    "UltraFeedback": {
        "prompt": USER["content"],
        "messages": [USER, ANSWER],
        "chosen": [USER, ANSWER],
        "rejected": [USER, OTHER],
        "score_chosen": 8.0,
    },
}


@pytest.mark.parametrize("case", PAIR_FORMATS)
def test_preference_formats_say_the_same(case, tokenizer, tmp_path):
    (row,), _ = pairs(write(tmp_path / "a.jsonl", PAIR_FORMATS[case]), tokenizer)
    assert row.prompt_ids == tokenizer.render([USER])
    assert row.chosen_ids == [*tokenizer.encode("The cat sat on the mat."), tokenizer.eos_id]
    assert row.rejected_ids == [*tokenizer.encode("I am fine."), tokenizer.eos_id]


@pytest.mark.parametrize("case", PAIR_FORMATS)
def test_preference_rows_serve_as_prompts(case, tokenizer, tmp_path):
    (row,), _ = prompts(write(tmp_path / "a.jsonl", PAIR_FORMATS[case]), tokenizer)
    assert (row.prompt_ids, row.text, row.index) == (tokenizer.render([USER]), "Where is the cat?", 0)


def test_a_conversation_is_shown_with_its_roles(tokenizer, tmp_path):
    (row,), _ = prompts(write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER, USER]}), tokenizer)
    assert row.text == "user: Where is the cat?\nassistant: The cat sat on the mat.\nuser: Where is the cat?"


def test_blank_lines_and_line_separators_inside_text_are_no_rows(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", '{"prompt": "one\u2028line"}', "", {"prompt": "two"})
    rows, dropped = prompts(source, tokenizer)
    assert [row.text for row in rows] == ["one\u2028line", "two"]
    assert dropped.num_read == 2


def test_long_rows_are_dropped_and_counted_and_keep_their_index(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "cat " * 50}, {"prompt": "cat"}, {"prompt": "the cat"})
    rows, dropped = prompts(source, tokenizer, max_prompt_tokens=10)
    assert [row.index for row in rows] == [1, 2]
    assert str(dropped) == f"{source}: 2 of 3 rows; 1 dropped, over 10 tokens"


def test_the_window_of_a_pair_holds_its_longer_side(tokenizer, tmp_path):
    row = {"prompt": "cat", "chosen": "a", "rejected": "a b c d e f"}
    source = write(tmp_path / "a.jsonl", row)
    longest = len(tokenizer.render([{"role": "user", "content": "cat"}])) + len(tokenizer.encode("a b c d e f")) + 1
    assert len(pairs(source, tokenizer, max_length=longest)[0]) == 1
    with pytest.raises(DataError, match=f"the shortest has {longest}"):
        pairs(source, tokenizer, max_length=longest - 1)


GOOD_PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}

BAD_ROWS = {
    "broken JSON": ("prompts", '{"prompt": ', r"must be one JSON object, but column 11 breaks it: Expecting value"),
    "a number of 5000 digits": (
        "prompts",
        '{"prompt": ' + "9" * 5000 + "}",
        r"must be one JSON object that Python can",
    ),
    "half an emoji": (
        "prompts",
        '{"prompt": "a \\ud83d"}',
        r"needs whole characters in 'prompt', but character 3 is half of one, '\\ud83d', found keys",
    ),
    "half an emoji in a message": (
        "prompts",
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        r"needs whole characters in 'messages', but character 1 is half",
    ),
    "no object": ("prompts", "[1]", r"must be one JSON object, found a list"),
    "no prompt": ("prompts", {"question": "x"}, r"needs a non-empty 'prompt' or 'messages', found keys \['question'\]"),
    "an empty prompt": (
        "prompts",
        {"prompt": " "},
        r"needs a non-empty 'prompt' or 'messages', found keys \['prompt'\]",
    ),
    "a prompt that is no text": ("prompts", {"prompt": 3}, r"needs text in 'prompt', got 3, found keys"),
    "messages that are no list": (
        "prompts",
        {"messages": "hi"},
        r"needs a non-empty list of messages in 'messages', got 'hi'",
    ),
    "no messages": ("prompts", {"messages": []}, r"needs a non-empty list of messages in 'messages', got \[\]"),
    "a message without content": (
        "prompts",
        {"messages": [{"role": "user"}]},
        r"needs a 'role' and a text 'content' in every message, got \{'role': 'user'\} in 'messages'",
    ),
    "an empty message": (
        "prompts",
        {"messages": [{"role": "user", "content": ""}]},
        r"needs a non-empty 'content' in every message, but 'messages' 1 is empty",
    ),
    "an unknown role": (
        "prompts",
        {"messages": [{"role": "human", "content": "x"}]},
        r"needs a role out of system, user, assistant, got 'human' in 'messages' 1",
    ),
    "no user turn": ("prompts", {"messages": [ANSWER]}, r"needs a user turn before the answer in 'messages'"),
    "no response": ("sft", {"prompt": "x"}, r"needs a non-empty 'response', or 'messages' .*found keys \['prompt'\]"),
    "an empty response": ("sft", {"prompt": "x", "response": ""}, r"needs a non-empty 'response', or 'messages'"),
    "messages without an answer": (
        "sft",
        {"messages": [USER]},
        r"needs a 'response', or 'messages' that end with an assistant",
    ),
    "no rejected": (
        "pairs",
        {"prompt": "p", "chosen": "a"},
        r"needs a non-empty 'rejected', found keys \['chosen', 'prompt'\]",
    ),
    "an empty chosen": ("pairs", {**GOOD_PAIR, "chosen": ""}, r"needs a non-empty 'chosen'"),
    "a rejected that is no text": ("pairs", {**GOOD_PAIR, "rejected": 1.5}, r"needs text in 'rejected', got 1\.5"),
    "equal sides": ("pairs", {**GOOD_PAIR, "rejected": "a "}, r"needs a pair whose sides differ, both are 'a'"),
    "answers that end with a user turn": (
        "pairs",
        {**GOOD_PAIR, "chosen": [USER]},
        r"needs 'chosen' messages that end with an assistant turn",
    ),
    "answers to different messages": (
        "pairs",
        {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Who?"}, OTHER]},
        r"needs 'chosen' and 'rejected' that answer the same messages",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_names_file_line_and_rule(case, tokenizer, tmp_path):
    kind, row, message = BAD_ROWS[case]
    good = {"messages": [USER, ANSWER], "chosen": "a", "rejected": "b"}
    source = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: " + message) as caught:
        READERS[kind](source, tokenizer)
    assert "\n" not in str(caught.value)


LIMITS = [("sft", "data.max_length"), ("pairs", "data.max_length"), ("prompts", "rollout.max_prompt_tokens")]


@pytest.mark.parametrize(("kind", "limit"), LIMITS)
def test_a_long_row_may_be_an_error_with_its_token_count(kind, limit, tokenizer, tmp_path):
    row = {"messages": [USER], "response": "a", "chosen": "a", "rejected": "b"}
    source = write(tmp_path / "rows.jsonl", row)
    message = rf"rows\.jsonl:1: needs at most 3 tokens \({limit}\), has \d+; raise {limit}, or set too_long to drop"
    with pytest.raises(DataError, match=message):
        READERS[kind](source, tokenizer, 3, "error")
    with pytest.raises(
        DataError, match=rf"none of its 1 rows has at most 3 tokens \({limit}\), the shortest has \d+; raise"
    ):
        READERS[kind](source, tokenizer, 3, "drop")


def test_an_answer_with_the_end_of_text_token_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_id", tokenizer.encode("a")[0])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: needs answers without the tokenizer's end-of-text token"):
        sft(write(tmp_path / "rows.jsonl", {"prompt": "x", "response": "a"}), tokenizer)


def test_an_answer_with_the_pad_token_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "pad_id", tokenizer.encode("a")[0])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: needs answers without the tokenizer's pad token"):
        sft(write(tmp_path / "rows.jsonl", {"prompt": "x", "response": "a"}), tokenizer)


def test_a_pair_that_becomes_the_same_tokens_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text: [9])
    with pytest.raises(DataError, match="needs a pair whose sides differ, but both become the same tokens"):
        pairs(write(tmp_path / "rows.jsonl", GOOD_PAIR), tokenizer)


BAD_TEMPLATES = {
    "refuses": ("{# our rule #}\n{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "breaks": ("\n{% macro f() %}{{ 1 + 'a' }}{% endmacro %}\n\n{{ f() }}", "unsupported operand"),
    "is no template": ("{% if true %}\n{% endfor %}", "Encountered unknown tag 'endfor'"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_what_a_template_cannot_render_names_its_line_and_the_rows(case, tokenizer, tmp_path, monkeypatch):
    text, reason = BAD_TEMPLATES[case]
    monkeypatch.setattr(tokenizer, "template", ChatTemplate(text, source="chat.jinja"))
    message = rf"rows\.jsonl:1: the chat template chat\.jinja, line 2, cannot render these messages: {reason}"
    with pytest.raises(DataError, match=message):
        prompts(write(tmp_path / "rows.jsonl", {"prompt": "x"}), tokenizer)


def test_a_template_that_renders_nothing_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "template", ChatTemplate("{# nothing #}", source="chat.jinja"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: needs a prompt of at least one token"):
        prompts(write(tmp_path / "rows.jsonl", {"prompt": "x"}), tokenizer)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_a_missing_file_is_named(name, tokenizer, tmp_path):
    with pytest.raises(DataError, match=rf"{name}: there is no such data file; paths are relative to the working"):
        prompts(str(tmp_path / name), tokenizer)


def test_an_empty_file_is_named(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: needs at least one row, found none"):
        prompts(str(tmp_path / "empty.jsonl"), tokenizer)


def test_a_line_that_is_not_utf8_is_named(tokenizer, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: must be UTF-8 text, but byte 16 of the line breaks it"):
        prompts(str(tmp_path / "latin.jsonl"), tokenizer)


def test_a_folder_in_place_of_a_file_is_named(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl: must be a readable file of JSON lines, got: Is a directory"):
        prompts(str(tmp_path / "rows.jsonl"), tokenizer)
