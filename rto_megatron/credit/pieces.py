"""A response cut at its tokens so that the pieces, put together, read as the text."""

from collections.abc import Sequence
from dataclasses import dataclass

from rto_megatron.data.tokenizer import Tokenizer

HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character, at least not yet."""
MOST_HELD = 4
"""Tokens that can share a character: UTF-8 has at most so many bytes to one."""
CONTEXT = 6
"""Tokens before a piece that are decoded with it: they decide on spaces."""
MOST_CONTEXT = 64
"""The same where bytes are broken for long; there one sign more or less may be shown."""


@dataclass(frozen=True)
class Pieces:
    """The text of each token."""

    texts: list[str]
    """One a token. A character of several tokens is in the first of them, and the others are empty."""
    specials: list[int]
    """Places whose token is no text, such as EOS; `texts` has its name there."""


def cut_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> Pieces:
    """The pieces of `ids`; those that are no specials add up to `tokenizer.decode(ids)`.

    Decoders look at neighbours: a sentencepiece model drops the first space, and byte-level pieces are often no whole
    characters (most emoji are two to four). So each piece is what a token adds to the text of those before it.
    """
    texts, specials, first, held = [""] * len(ids), [], 0, 0
    whole = [0]
    """Places before which the text is whole characters: how broken bytes read depends on where decoding starts."""

    for place in range(len(ids)):
        near = [start for start in whole[-CONTEXT:] if start > place - MOST_CONTEXT]
        start = near[0] if near else first
        before, now = tokenizer.decode(ids[start:first]), tokenizer.decode(ids[start : place + 1])
        added = now[len(before) :] if now.startswith(before) else _without_common(before, now)
        is_whole = not now.endswith(HALF)
        if not added and not held and _is_special(tokenizer, ids[place]):
            texts[place] = tokenizer.token(ids[place])
            specials.append(place)
        elif not is_whole and held + 1 < MOST_HELD and place + 1 < len(ids):
            held += 1
            continue
        else:
            _share_out(texts, place, held, added)
        first, held = place + 1, 0
        if is_whole:
            whole.append(first)
    return Pieces(texts, specials)


def _share_out(texts: list[str], place: int, held: int, added: str) -> None:
    """Give the text of the token at `place` and of those held before it to them.

    Broken bytes are not held together by a character: each gets its own sign, and the rest is the last one's.
    """
    first = place - held
    broken = len(added) - len(added.lstrip(HALF))
    for taken in range(min(broken, held)):
        texts[first + taken] = added[taken]
    rest = added[min(broken, held) :]
    texts[first if not broken else place] += rest


def _without_common(before: str, now: str) -> str:
    """What is new where the decoder has changed its mind on the end of `before`: a broken character became whole."""
    same = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    return now[same:]


def _is_special(tokenizer: Tokenizer, id: int) -> bool:
    """Whether a token without text is none by nature, rather than a space that the decoder drops."""
    return tokenizer.decode([id]) == "" and bool(tokenizer.token(id).strip("\u2581 "))
