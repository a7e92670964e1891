"""Text to token ids and back, from a sentencepiece model or a Hugging Face folder."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rto_megatron.data.chat import BUILT_IN_TEMPLATE, CHAT_SYMBOLS, ChatTemplate, Message
from rto_megatron.errors import ConfigError

SENTENCEPIECE_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
"""How a Hugging Face model is meant to be sampled; kept with its tokenizer, since it names more ids that end a text."""

HUGGING_FACE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", SENTENCEPIECE_FILE,
)  # fmt: skip
"""Files of a Hugging Face folder that belong to its tokenizer."""

MOST_UNUSED_ROWS = 1024
"""Embedding rows that a checkpoint may have beyond its tokenizer: many are padded (Qwen2.5-7B by 399)."""


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    vocab_size: int
    """Ids are below this."""
    eos_id: int
    """Closes every response."""
    pad_id: int
    """Fills rows on the right; never sampled, and never eos_id."""
    bos_id: int | None
    """Opens a text, if the chat template says so."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        ...

    def token(self, id: int) -> str:
        """The name of one id, as templates and tokenizer files write it: `<|end|>`."""
        ...

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation by the chat template, up to where the assistant answers."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` reads back with the same digest."""
        ...

    def digest(self) -> str:
        """sha256 over the tokenizer's files and its chat template."""
        ...


def load_tokenizer(path: Path, chat_template: Path | None = None) -> Tokenizer:
    """Open a sentencepiece `.model` file, a folder that `Tokenizer.save` wrote, or a Hugging Face folder.

    Args:
        path: the file or folder; nothing is downloaded.
        chat_template: a Jinja file to use in place of the tokenizer's own template.
    """
    if not path.exists():
        raise ConfigError(
            f"tokenizer {path}: there is no such file or folder; give a .model file or a tokenizer folder"
        )
    template = _read_template(chat_template) if chat_template else None
    if path.is_dir() and any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return HuggingFaceTokenizer(path, template)
    model = path / SENTENCEPIECE_FILE if path.is_dir() else path
    if not model.exists():
        raise ConfigError(f"tokenizer {path}: needs tokenizer.json or {SENTENCEPIECE_FILE}, found {_names(path)}")
    if template is None and path.is_dir() and (path / TEMPLATE_FILE).exists():
        template = _read_template(path / TEMPLATE_FILE)
    return SentencePieceTokenizer(model.read_bytes(), template, name=str(model))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError unless the ids of `tokenizer` are rows of an embedding with `vocab_size` true rows."""
    unused = vocab_size - tokenizer.vocab_size
    if unused < 0 or unused > MOST_UNUSED_ROWS:
        raise ConfigError(
            f"the tokenizer does not fit the weights: it has {tokenizer.vocab_size} tokens and the model's vocabulary "
            f"(model.vocab_size) has {vocab_size}; use the tokenizer that the weights were trained with"
        )


class SentencePieceTokenizer:
    """A sentencepiece model with a chat template."""

    bos_id: int | None

    def __init__(self, model: bytes, template: ChatTemplate | None, *, name: str) -> None:
        # Here and below: imports of seconds, only for who needs that kind of tokenizer.
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ConfigError(
                f"tokenizer {name}: must be a sentencepiece model, the file does not parse as one"
            ) from None
        pieces = self._pieces
        self.vocab_size = pieces.vocab_size()
        self._special = {piece: pieces.piece_to_id(piece) for piece in map(pieces.id_to_piece, range(self.vocab_size))
                         if pieces.is_control(pieces.piece_to_id(piece)) or piece in CHAT_SYMBOLS}  # fmt: skip
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        missing = [symbol for symbol in CHAT_SYMBOLS if symbol not in self._special]
        if template is None and missing:
            raise ConfigError(
                f"tokenizer {name}: the built-in chat template needs the symbols {' '.join(missing)}, which it lacks; "
                "set tokenizer.chat_template to a Jinja file that fits it"
            )
        self.template = template or BUILT_IN_TEMPLATE
        # Turns of the built-in template close with <|end|>, so a response does too.
        self.eos_id = pieces.eos_id() if missing else self._special["<|end|>"]
        self.bos_id = pieces.bos_id() if pieces.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise ConfigError(f"tokenizer {name}: needs an end-of-text piece, found none; train it with one")
        # Llama 2 and its kin have no padding piece; <unk> never occurs in their text (byte fallback).
        self.pad_id = pieces.pad_id() if pieces.pad_id() >= 0 else pieces.unk_id()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added."""
        return self._pieces.encode(text)

    def token(self, id: int) -> str:
        """The name of one id, as templates and tokenizer files write it: `<|end|>`."""
        return self._pieces.id_to_piece(id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        special = {*self._special.values(), self.pad_id}
        return self._pieces.decode([int(i) for i in ids if int(i) not in special])

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation by the chat template, up to where the assistant answers."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        text = self.template.render(
            messages, {k: self._pieces.id_to_piece(v) for k, v in names.items() if v is not None}
        )
        ids: list[int] = []
        # sentencepiece reads control pieces in text as plain characters, so they are cut out first.
        for part in filter(None, self._split.split(text)):
            ids += [self._special[part]] if part in self._special else self._pieces.encode(part)
        return ids

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` reads back with the same digest."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self._model)
        (folder / TEMPLATE_FILE).write_text(self.template.text, encoding="utf-8")

    def digest(self) -> str:
        """sha256 over the tokenizer's files and its chat template."""
        return _digest({SENTENCEPIECE_FILE: self._model}, self.template.text)


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library, from a local folder."""

    def __init__(self, folder: Path, template: ChatTemplate | None) -> None:
        from transformers import AutoTokenizer

        # Kept as bytes and written back as they came: a library that saves them anew may change them.
        self._files = {n: (folder / n).read_bytes() for n in HUGGING_FACE_FILES if (folder / n).exists()}
        self.generation = _read_generation(folder / GENERATION_FILE)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"tokenizer {folder}: transformers cannot read it: {reason}") from None
        self.template = template or self._own_template(folder)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {folder}: needs an eos_token, found none; set it in tokenizer_config.json")
        self.vocab_size = len(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.pad_id = self._choose_pad(folder)

    def _own_template(self, folder: Path) -> ChatTemplate:
        own = self._tokenizer.chat_template
        text = own.get("default") if isinstance(own, dict) else own
        if not text:
            raise ConfigError(
                f"tokenizer {folder}: needs a chat template, found none; set tokenizer.chat_template to a Jinja file"
            )
        holder = folder / (TEMPLATE_FILE if (folder / TEMPLATE_FILE).exists() else "tokenizer_config.json")
        return ChatTemplate(text, source=str(holder))

    def _choose_pad(self, folder: Path) -> int:
        """A token that text never needs: the pad token, <unk>, a reserved one, or the one that opens texts.

        The pad id is never sampled, so where a tokenizer pads with EOS (SmolLM2 does) another one is needed:
        otherwise no response would ever end.
        """
        tokenizer = self._tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        spare = [token for token in special if "pad" in token or "reserved" in token]
        ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(spare), self.bos_id]
        for candidate in ids:
            if candidate is not None and candidate != self.eos_id:
                return candidate
        raise ConfigError(
            f"tokenizer {folder}: needs a pad token that is not its EOS, found none; "
            "set pad_token in tokenizer_config.json"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def token(self, id: int) -> str:
        """The name of one id, as templates and tokenizer files write it: `<|end|>`."""
        return self._tokenizer.convert_ids_to_tokens(id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation by the chat template, up to where the assistant answers."""
        names = {k: v for k, v in self._tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return self.encode(self.template.render(messages, names))

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` reads back with the same digest."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        (folder / TEMPLATE_FILE).write_text(self.template.text, encoding="utf-8")
        if self.generation:
            (folder / GENERATION_FILE).write_text(json.dumps(self.generation, indent=2) + "\n", encoding="utf-8")

    def digest(self) -> str:
        """sha256 over the tokenizer's files and its chat template."""
        return _digest(self._files, self.template.text)


def _digest(files: Mapping[str, bytes], template: str) -> str:
    total = hashlib.sha256()
    for name, content in [*sorted(files.items()), (TEMPLATE_FILE, template.encode())]:
        # Lengths keep "a" + "bc" and "ab" + "c" apart.
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()


def _read_template(path: Path) -> ChatTemplate:
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer.chat_template {path}: must be a readable text file, got: {error}") from None


def _read_generation(path: Path) -> dict[str, Any]:
    """The settings of a generation_config.json; none where there is no such file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {path}: must be readable JSON, got: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"tokenizer {path}: must hold a JSON object, found {type(settings).__name__}")
    return settings


def _names(path: Path) -> str:
    return ", ".join(sorted(child.name for child in path.iterdir())[:10]) or "an empty folder"
