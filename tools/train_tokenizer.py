"""Train a sentencepiece tokenizer with our chat symbols on the text of JSONL files.

    python tools/train_tokenizer.py --data a.jsonl b.jsonl --out tokenizer.model --vocab-size=2048

The same files and size give the same bytes.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tyro

from rto_megatron.data.chat import CHAT_SYMBOLS


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a sentencepiece tokenizer with our chat symbols on the text of JSONL files."""

    data: tuple[Path, ...]
    """JSONL files; every text under prompt, response, chosen, rejected and messages counts."""
    out: Path
    """The .model file to write."""
    vocab_size: int = 2048
    """Pieces: 2 special ones, the chat symbols and 256 bytes included."""


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """Fit byte-pair pieces to the texts; the model gives every text back exactly.

    No normalisation, no dummy space in front (a turn inside a conversation is cut like one alone), and bytes
    for what is not in the vocabulary, so no text is unknown. Pad is id 0. There is no BOS or EOS piece besides
    the chat symbols: <|end|> closes a turn.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        control_symbols=list(CHAT_SYMBOLS),
        pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def texts_of(paths: tuple[Path, ...]) -> Iterator[str]:
    """Every text of the rows, in file order, each distinct one once."""
    seen: set[str] = set()
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for text in (text for line in lines for text in _texts(json.loads(line)) if text not in seen):
                seen.add(text)
                yield text


def _texts(row: dict[str, Any]) -> Iterator[str]:
    for name in ("prompt", "response", "chosen", "rejected"):
        if isinstance(row.get(name), str):
            yield row[name]
    for message in row.get("messages", ()):
        yield message["content"]


def main() -> None:
    """Train and write the model."""
    arguments = tyro.cli(Arguments, description=__doc__)
    model = train(texts_of(arguments.data), arguments.vocab_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(model)
    print(f"{arguments.out}: {arguments.vocab_size} pieces")


if __name__ == "__main__":
    main()
