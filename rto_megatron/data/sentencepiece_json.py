"""A sentencepiece model as a tokenizer.json, which cuts texts the same way.

transformers 5 converts such models by the class that it takes the tokenizer for; of models that are not a plain
Llama 2 it then reads other ids. With a tokenizer.json beside the model there is nothing left to guess.
"""

from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of pieces, as sentencepiece numbers them."""
BPE = 2
"""Likewise of models; the other kind that can be read is unigram, 1."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def tokenizer_json(serialized: bytes) -> str:
    """The text of a tokenizer.json for a serialized sentencepiece model (byte pairs or unigram).

    Special pieces become special tokens: unlike sentencepiece, what reads the file finds them inside a text too, which
    is how rendered chat templates are read.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer

    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
    tokenizer = Tokenizer(_byte_pairs(model) if model.trainer_spec.model_type == BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = _decoder(model)
    for piece in model.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            special = piece.type != USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return tokenizer.to_str(pretty=True)


def _byte_pairs(model: Any) -> Any:
    from tokenizers.models import BPE as BytePairs

    # A piece's score is minus the step at which training made it; any two pieces that give it may be merged.
    steps = {piece.piece: -piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = sorted(
        (step, cut, piece[:cut], piece[cut:])
        for piece, step in steps.items()
        for cut in range(1, len(piece))
        if piece[:cut] in steps and piece[cut:] in steps
    )
    return BytePairs(
        {piece.piece: id for id, piece in enumerate(model.pieces)},
        [(left, right) for _, _, left, right in merges],
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unigram(model: Any) -> Any:
    from tokenizers.models import Unigram

    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    return Unigram(pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
