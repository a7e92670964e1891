"""The quickstart's files read back, and the tool that cut them keeps to its rules."""

import json
from pathlib import Path

import pytest

from rto_megatron.data.readers import read_preferences, read_prompts, read_sft
from rto_megatron.data.tokenizer import SentencePieceTokenizer
from tools.prepare_data import GSM8K, HH, chosen_answers, preferences, short_problems
from tools.train_tokenizer import texts_of, train

DATA = Path(__file__).parents[2] / "examples/quickstart/data"


@pytest.fixture(scope="module")
def tokenizer():
    texts = texts_of((DATA / "sft_train.jsonl", DATA / "preferences_train.jsonl"))
    return SentencePieceTokenizer(train(texts, 2048), None, name="quickstart")


@pytest.mark.parametrize(("split", "num_pairs", "num_sft"), [("train", 564, 922), ("eval", 76, 76)])
def test_the_quickstart_files_read_without_a_drop(split, num_pairs, num_sft, tokenizer):
    source = str(DATA / f"preferences_{split}.jsonl")
    assert len(read_preferences(source, tokenizer, max_length=384, too_long="error")[0]) == num_pairs
    assert len(read_prompts(source, tokenizer, max_prompt_tokens=256, too_long="error")[0]) == num_pairs
    source = str(DATA / f"sft_{split}.jsonl")
    assert len(read_sft(source, tokenizer, max_length=384, too_long="error")[0]) == num_sft


def test_no_held_out_prompt_is_trained_on():
    def prompts(name):
        rows = map(json.loads, (DATA / name).read_text(encoding="utf-8").strip().split("\n"))
        return {json.dumps(row.get("messages", row.get("prompt"))).lower() for row in rows}

    assert prompts("preferences_eval.jsonl") == prompts("sft_eval.jsonl")
    assert not prompts("preferences_eval.jsonl") & (prompts("preferences_train.jsonl") | prompts("sft_train.jsonl"))


def test_only_rows_of_the_two_mit_sources_are_taken():
    pair = {"id": "1", "prompt": "flat", "messages": [], "chosen": "a", "rejected": "b", "source": HH, "judge": "human"}
    taken = list(preferences([pair, {**pair, "source": "elsewhere"}]))
    assert taken == [{"id": "1", "messages": [], "chosen": "a", "rejected": "b"}]
    assert list(chosen_answers(taken)) == [{"messages": [], "response": "a", "source": HH}]
    problem = {"prompt": "1 + 1?", "response": "2", "source": GSM8K}
    long = {**problem, "response": "2" * 395}
    assert list(short_problems([problem, {**problem, "source": "elsewhere"}, long])) == [problem]
