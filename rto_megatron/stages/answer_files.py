"""Answers in the formats that AlpacaEval 2 and Arena-Hard read, so that their judges can compare policies."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rto_megatron.data.readers import PromptRow
from rto_megatron.data.sources import open_source


def labels_of(source: str, prompts: Sequence[PromptRow]) -> list[dict[str, str]]:
    """What the rows of `source` that became `prompts` say of themselves: `question_id` and `dataset`, as text.

    A row without question_id gets one from its text: equal in every run. The data set is else the source's name.
    """
    wanted = {prompt.index: prompt for prompt in prompts}
    labels: dict[int, dict[str, str]] = {}
    for index, row in enumerate(open_source(source)):
        if index in wanted:
            labels[index] = {
                "question_id": str(row.values.get("question_id", _hash(wanted[index].text))),
                "dataset": str(row.values.get("dataset", Path(source).stem)),
            }
    return [labels[prompt.index] for prompt in prompts]


def alpaca_eval(
    name: str, prompts: Sequence[PromptRow], labels: Sequence[dict[str, str]], responses: Sequence[str]
) -> str:
    """`--model_outputs` of AlpacaEval: a JSON list of instruction, output, generator and dataset.

    Args:
        name: of the policy.
        labels: of `labels_of`.
        responses: text, one a prompt.
    """
    rows = [
        {"instruction": prompt.text, "output": response, "generator": name, "dataset": label["dataset"]}
        for prompt, label, response in zip(prompts, labels, responses, strict=True)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def arena_hard(name: str, labels: Sequence[dict[str, str]], responses: Sequence[str], num_tokens: Sequence[int]) -> str:
    """data/BENCH/model_answer/NAME.jsonl of Arena-Hard: an answer a line, by question_id.

    Args:
        num_tokens: of each response, by the policy's own tokenizer; Arena-Hard shows their mean. What its style control
            reads, `conv_metadata`, is made from the answers by a script of its own.
    """
    now = time.time()
    rows = [
        {
            "question_id": label["question_id"],
            "answer_id": _hash(f"{name}\n{label['question_id']}\n{response}"),
            "model_id": name,
            "choices": [{"index": 0, "turns": [{"content": response, "token_len": tokens}]}],
            "tstamp": now,
        }
        for label, response, tokens in zip(labels, responses, num_tokens, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:22]
