"""Study (b): SmolLM2-135M continues film reviews; gold is a sentiment scorer that no method trains on.

The folder `--data` has `imdb_prompts_train.jsonl` and `imdb_prompts_eval.jsonl`, rows of `prompt`, the beginning of a
real review, and `reference`, how it goes on; and `gold_unigram_lr.json` with `bias` and `weights`, word -> log-odds of
praise.
"""

import json
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from examples.study.bigrams import write_rows
from rto_megatron.errors import ConfigError

DATA = "STUDY_DATA"
"""Environment variable with the folder: a grader is a function that is named, and takes no settings."""
PROMPTS = {split: f"imdb_prompts_{split}.jsonl" for split in ("train", "eval")}
SCORER = "gold_unigram_lr.json"
CLIP = 4.0
NOISE = 0.5
"""A pair's label is drawn with log-odds of the lead in gold over this."""
SFT, PAIRS, TRAIN, VALIDATION, TEST = 128, 384, 128, 64, 64
"""Rows and prompts of each kind."""
COPIES = 4
"""Answers to a prompt, of which two become a pair: two at random differ by less gold than words are worth by chance."""


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The grader: log-odds of praise, every distinct word once, so that repeating one earns nothing; clipped."""
    bias, weights = _scorer(os.environ[DATA])
    return [
        max(-CLIP, min(CLIP, bias + sum(weights.get(word, 0.0) for word in words_of(response))))
        for response in responses
    ]


def words_of(text: str) -> list[str]:
    """Distinct words in lower case, in a fixed order: sums must not depend on it."""
    return sorted(set(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())))


@cache
def _scorer(folder: str) -> tuple[float, dict[str, float]]:
    scorer = json.loads((Path(folder) / SCORER).read_text(encoding="utf-8"))
    return scorer["bias"], scorer["weights"]


def prepare(folder: Path, seed: int) -> None:
    """Other reviews for SFT, pairs and training, where only those of training are the seed's own."""
    train, held_out = map(_rows, PROMPTS.values())
    random.Random("reviews").shuffle(train)
    random.Random("held out").shuffle(held_out)
    write_rows(folder / "sft.jsonl", [{"prompt": r["prompt"], "response": r["reference"]} for r in train[:SFT]])
    asked = [{"prompt": row["prompt"]} for row in train[SFT:]]
    write_rows(folder / "to_answer.jsonl", [row for row in asked[:PAIRS] for _ in range(COPIES)])
    rest = asked[PAIRS:]
    random.Random(f"train {seed}").shuffle(rest)
    write_rows(folder / "train.jsonl", rest[:TRAIN])
    prompts = [{"prompt": row["prompt"]} for row in held_out]
    write_rows(folder / "validation.jsonl", prompts[:VALIDATION])
    write_rows(folder / "test.jsonl", prompts[VALIDATION : VALIDATION + TEST])


def get_base(out: Path) -> int:
    """SmolLM2 as a run folder, OUT/base; 0, or the exit code of the command that failed and has said why.

    Raises:
        ConfigError: the study's data are not there.
    """
    folder = Path(os.environ.get(DATA, ""))
    missing = [name for name in (*PROMPTS.values(), SCORER) if DATA not in os.environ or not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"--data must be a folder with {', '.join((*PROMPTS.values(), SCORER))}, got "
            f"{f'{folder} without {missing[0]}' if DATA in os.environ else 'none'}; sentiment.py says what is in them"
        )
    if (out / "base" / "checkpoints" / "latest.txt").exists():
        return 0
    get = [sys.executable, "tools/get_smollm2.py", "--out", str(out / "hf")]
    convert = [sys.executable, "-m", "rto_megatron", "convert", f"--source={out}/hf", f"--out={out}/base"]
    return subprocess.run(get, check=False).returncode or subprocess.run(convert, check=False).returncode


def _rows(name: str) -> list[dict]:
    path = Path(os.environ[DATA]) / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
