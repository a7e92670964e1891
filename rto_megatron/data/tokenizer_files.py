"""A tokenizer as the files that transformers, and with it vLLM and SGLang, read beside weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rto_megatron.data.sentencepiece_json import tokenizer_json
from rto_megatron.data.tokenizer import (
    GENERATION_FILE,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from rto_megatron.errors import CheckpointError

SETTINGS_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, *, names_pad: bool) -> None:
    """Write tokenizer, chat template, special tokens and generation_config.json.

    A Hugging Face tokenizer's files stay as they are but for what would contradict ours: another chat template and,
    where asked, another pad token.

    Args:
        names_pad: whether readers must fill rows with our pad id. A sequence classifier's score is read from the last
            token that is not its config's pad id; a tokenizer that fills with another would have its filling scored.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _correct(folder / SETTINGS_FILE, _settings_to_correct(tokenizer, folder, names_pad))
        if names_pad and (folder / NAMES_FILE).exists():
            _correct(folder / NAMES_FILE, {"pad_token": tokenizer.token(tokenizer.pad_id)})
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.json").write_text(
            tokenizer_json((folder / SENTENCEPIECE_FILE).read_bytes()), encoding="utf-8"
        )
        _write_json(folder / SETTINGS_FILE, _settings_of(tokenizer))
    _write_json(folder / GENERATION_FILE, generation_settings(tokenizer))


def check_tokenizer_files(tokenizer: Tokenizer, folder: Path, texts: Sequence[str], *, names_pad: bool) -> None:
    """Raise CheckpointError unless transformers' AutoTokenizer reads a written folder as we read the tokenizer."""
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(f"{folder}: transformers cannot read the tokenizer: {error}") from None
    for text in texts:
        got, want = theirs.encode(text, add_special_tokens=False), tokenizer.encode(text)
        if got != want:
            start = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), 0)
            raise CheckpointError(
                f"{folder}: transformers' {type(theirs).__name__} must cut texts as the model's tokenizer does, but "
                f"{text[:30]!r}... becomes {got[start : start + 5]} from token {start} on, not "
                f"{want[start : start + 5]}; it picks the class by config.json's model_type: Qwen2's ignores what "
                "other tokenizer.json files say"
            )
    wanted = {"eos_token_id": tokenizer.eos_id} | ({"pad_token_id": tokenizer.pad_id} if names_pad else {})
    if isinstance(tokenizer, HuggingFaceTokenizer | SentencePieceTokenizer):
        wanted |= {"chat_template": tokenizer.template.text}
    for name, value in wanted.items():
        got = getattr(theirs, name)
        got = got.get("default") if isinstance(got, dict) else got
        if got != value:
            raise CheckpointError(f"{folder}: the {name} that transformers reads must be {value!r}, got {got!r}")


def generation_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """What generation_config.json says: the source's own settings, with the ids that our tokenizer has."""
    kept = dict(tokenizer.generation) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    for of_the_writer in ("_from_model_config", "transformers_version"):
        kept.pop(of_the_writer, None)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_ids(tokenizer), "pad_token_id": tokenizer.pad_id}
    return kept | ids


def eos_ids(tokenizer: Tokenizer) -> int | list[int]:
    """The id that closes our responses, and with it the others at which the source's model stops (Llama 3 has two)."""
    named = tokenizer.generation.get("eos_token_id") if isinstance(tokenizer, HuggingFaceTokenizer) else None
    others = named if isinstance(named, list) else [] if named is None else [named]
    ids = list(dict.fromkeys([tokenizer.eos_id, *others]))
    return ids[0] if len(ids) == 1 else ids


def _settings_of(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a sentencepiece model."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as tokenizer.json says, whatever the model beside it is
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.template.text,
        **{name: tokenizer.token(id) for name, id in ids.items() if id is not None},
    }


def _settings_to_correct(tokenizer: HuggingFaceTokenizer, folder: Path, names_pad: bool) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted: dict[str, Any] = {}
    if isinstance(found.get("chat_template"), str):  # older readers take it from here, newer ones from its own file
        wanted["chat_template"] = tokenizer.template.text
    if names_pad:
        wanted["pad_token"] = tokenizer.token(tokenizer.pad_id)
    return {name: value for name, value in wanted.items() if found.get(name) != value}


def _correct(path: Path, changes: dict[str, Any]) -> None:
    if changes:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _write_json(path, found | changes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
