"""Study (a): a task of which the best credit of every token is known.

A text is a walk over 16 symbols. A tenth of the 256 bigrams earn 1, another tenth cost 1, and the gold of a response
is the sum over its bigrams, the first with the prompt's last symbol. So a token's true reward is that of the bigram it
closes, and dynamic programming gives the best that any policy can do.
"""

import json
import random
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

NUM_SYMBOLS = 16
PROMPT, RESPONSE = 4, 16
"""Symbols."""
NOISE = 1.0
"""A pair's label is drawn with log-odds of the lead in gold over this."""

SYMBOLS = [f"{a}{b}" for a in "bdgklmnp" for b in "aeiou"][:NUM_SYMBOLS]
for place in range(0, NUM_SYMBOLS, 4):  # what closes a sentence, for Semi-RTO
    SYMBOLS[place] += "."
PLACE = {symbol: place for place, symbol in enumerate(SYMBOLS)}


@cache
def rewards() -> list[list[int]]:
    """[from][to] reward of each bigram: 25 are 1, 25 are -1."""
    places = [(a, b) for a in range(NUM_SYMBOLS) for b in range(NUM_SYMBOLS)]
    random.Random("rewards").shuffle(places)
    table, tenth = [[0] * NUM_SYMBOLS for _ in range(NUM_SYMBOLS)], len(places) // 10
    for number, (a, b) in enumerate(places[: 2 * tenth]):
        table[a][b] = 1 if number < tenth else -1
    return table


@cache
def chances() -> list[list[float]]:
    """[from][to] probability in the texts that SFT learns: uneven, and blind to the rewards."""
    draw = random.Random("chances")
    rows = [[draw.expovariate(1) for _ in range(NUM_SYMBOLS)] for _ in range(NUM_SYMBOLS)]
    return [[weight / sum(row) for weight in row] for row in rows]


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The grader: sum of bigram rewards of each response."""
    return [sum(credit(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def credit(prompt: str, response: str) -> list[int]:
    """True reward of each symbol of a response."""
    walk = [PLACE[symbol] for symbol in [*prompt.split()[-1:], *response.split()]]
    return [rewards()[a][b] for a, b in pairwise(walk)]


def best(prompts: Iterable[str]) -> float:
    """Mean gold of the best policy, by dynamic programming."""
    values = [0] * NUM_SYMBOLS
    for _ in range(RESPONSE):
        values = [max(r + v for r, v in zip(row, values, strict=True)) for row in rewards()]
    lasts = [PLACE[prompt.split()[-1]] for prompt in prompts]
    return sum(values[last] for last in lasts) / len(lasts)


def walk(draw: random.Random, length: int) -> list[str]:
    """A text of the kind that SFT learns."""
    at = draw.randrange(NUM_SYMBOLS)
    symbols = [SYMBOLS[at]]
    while len(symbols) < length:
        [at] = draw.choices(range(NUM_SYMBOLS), chances()[at])
        symbols.append(SYMBOLS[at])
    return symbols


def write_prompts(path: Path, name: str, count: int, *, copies: int = 1) -> None:
    """`count` prompts, the same for the same name, each `copies` times in a row."""
    draw = random.Random(name)
    rows = [{"prompt": " ".join(walk(draw, PROMPT))} for _ in range(count)]
    write_rows(path, [row for row in rows for _ in range(copies)])


def write_texts(path: Path, name: str, count: int) -> None:
    """SFT rows, longer than the window: where a text ends is not the task."""
    draw = random.Random(name)
    texts = [walk(draw, PROMPT + 2 * RESPONSE) for _ in range(count)]
    write_rows(path, [{"prompt": " ".join(t[:PROMPT]), "response": " ".join(t[PROMPT:])} for t in texts])


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face folder: a token a symbol."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *SYMBOLS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names[:4])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": "{{ bos_token }} {{ messages[-1]['content'] }} ",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
