"""Small tokenizers of each kind, trained in a moment on a few sentences."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rto_megatron.data.tokenizer import SentencePieceTokenizer
from tools.train_tokenizer import train

SENTENCES = ["How are you today?", "The cat sat on the mat.", "I am fine, thank you.", "Where is the cat?"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ours() -> SentencePieceTokenizer:
    """A tokenizer as `tools/train_tokenizer.py` makes them: 320 pieces."""
    return SentencePieceTokenizer(train(iter(SENTENCES), vocab_size=320), None, name="test")


def write_llama2_model(path: Path) -> Path:
    """A sentencepiece model without our chat symbols: `<unk>`, `<s>`, `</s>`, no padding piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=320,
        byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def write_hugging_face_folder(
    folder: Path, *, specials: list[str], template: str | None = CHATML, **names: str
) -> Path:
    """A byte-level BPE tokenizer folder; `specials` get ids 0, 1, ... and `names` are eos_token and the like."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def smollm2(folder: Path) -> Path:
    """A folder with the special tokens of SmolLM2: it pads with its EOS."""
    return write_hugging_face_folder(
        folder, specials=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
    )  # fmt: skip
