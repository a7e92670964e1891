"""Data sources to token ids: rows for SFT, preference pairs, and prompts for rollouts."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from rto_megatron.data.chat import Message
from rto_megatron.data.rows import Refuse, Row, stop
from rto_megatron.data.sources import open_source
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.errors import DataError

TooLong = Literal["drop", "error"]


@dataclass(frozen=True, kw_only=True)
class SFTRow:
    """A prompt and the response to learn."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Closes with EOS."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """A prompt and two responses to it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    """Closes with EOS."""
    rejected_ids: list[int]
    """Closes with EOS."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to answer."""

    prompt_ids: list[int]
    text: str
    """For people: the user's words, or the turns with their roles."""
    index: int
    """Its place in the source, 0-based, counting dropped rows: part of the key of its randomness."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What became of the rows of a source."""

    source: str
    num_read: int
    num_too_long: int
    """Dropped: over `max_tokens`."""
    max_tokens: int
    lengths: tuple[int, ...] = ()
    """Tokens of each row, the dropped ones too."""

    def __str__(self) -> str:
        kept = f"{self.source}: {self.num_read - self.num_too_long} of {self.num_read} rows"
        return kept + (f"; {self.num_too_long} dropped, over {self.max_tokens} tokens" if self.num_too_long else "")


RowType = TypeVar("RowType")


def read_sft(
    source: str, tokenizer: Tokenizer, *, max_length: int, too_long: TooLong, refuse: Refuse = stop
) -> tuple[list[SFTRow], Dropped]:
    """Read `prompt` or `messages` with `response`, or `messages` that end with the assistant's answer.

    Args:
        source: a JSONL path, or a name for the `datasets` library.
        max_length: tokens of prompt and response together.
        too_long: `drop` leaves longer rows out and counts them, `error` refuses them.
        refuse: takes the error of a row that is bad or too long.
    """

    def convert(row: Row, _: int) -> tuple[SFTRow, int]:
        prompt_ids = _render(tokenizer, row.prompt(), row)
        response_ids = _respond(tokenizer, row.response(), row)
        return SFTRow(prompt_ids=prompt_ids, response_ids=response_ids), len(prompt_ids) + len(response_ids)

    return _read(source, convert, limit=max_length, limit_name="data.max_length", too_long=too_long, refuse=refuse)


def read_preferences(
    source: str, tokenizer: Tokenizer, *, max_length: int, too_long: TooLong, refuse: Refuse = stop
) -> tuple[list[PreferenceRow], Dropped]:
    """Read pairs: `prompt` or `messages`, with `chosen` and `rejected` as text or as messages.

    Args:
        source: a JSONL path, or a name for the `datasets` library.
        max_length: tokens of the prompt and the longer response together.
        too_long: `drop` leaves longer pairs out and counts them, `error` refuses them.
        refuse: takes the error of a row that is bad or too long.
    """

    def convert(row: Row, _: int) -> tuple[PreferenceRow, int]:
        prompt, *answers = row.pair()
        prompt_ids = _render(tokenizer, prompt, row)
        chosen_ids, rejected_ids = (_respond(tokenizer, answer, row) for answer in answers)
        if chosen_ids == rejected_ids:
            row.fail("needs a pair whose sides differ, but both become the same tokens")
        pair = PreferenceRow(prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids)
        return pair, len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))

    return _read(source, convert, limit=max_length, limit_name="data.max_length", too_long=too_long, refuse=refuse)


def read_prompts(
    source: str, tokenizer: Tokenizer, *, max_prompt_tokens: int, too_long: TooLong, refuse: Refuse = stop
) -> tuple[list[PromptRow], Dropped]:
    """Read `prompt` or `messages`; answers that the rows may hold are ignored.

    Args:
        source: a JSONL path, or a name for the `datasets` library.
        max_prompt_tokens: tokens of the rendered prompt.
        too_long: `drop` leaves longer prompts out and counts them, `error` refuses them.
        refuse: takes the error of a row that is bad or too long.
    """

    def convert(row: Row, index: int) -> tuple[PromptRow, int]:
        messages = row.prompt()
        prompt_ids = _render(tokenizer, messages, row)
        return PromptRow(prompt_ids=prompt_ids, text=_readable(messages), index=index), len(prompt_ids)

    name = "rollout.max_prompt_tokens"
    return _read(source, convert, limit=max_prompt_tokens, limit_name=name, too_long=too_long, refuse=refuse)


def _read(
    source: str,
    convert: Callable[[Row, int], tuple[RowType, int]],
    *,
    limit: int,
    limit_name: str,
    too_long: TooLong,
    refuse: Refuse,
) -> tuple[list[RowType], Dropped]:
    kept: list[RowType] = []
    lengths: list[int] = []
    for index, row in enumerate(open_source(source, refuse)):
        try:
            converted, length = convert(row, index)
        except DataError as error:
            refuse(error)
            continue
        lengths.append(length)
        if length <= limit:
            kept.append(converted)
        elif too_long == "error":
            refuse(
                DataError(
                    f"{row.place}: needs at most {limit} tokens ({limit_name}), has {length}; "
                    f"raise {limit_name}, or set too_long to drop"
                )
            )
    if not lengths:
        raise DataError(f"{source}: needs at least one row, found none")
    if not kept:
        raise DataError(
            f"{source}: none of its {len(lengths)} rows has at most {limit} tokens ({limit_name}), "
            f"the shortest has {min(lengths)}; raise {limit_name}"
        )
    dropped = Dropped(
        source=source,
        num_read=len(lengths),
        num_too_long=len(lengths) - len(kept),
        max_tokens=limit,
        lengths=tuple(lengths),
    )
    return kept, dropped


def digest(rows: Sequence[SFTRow | PreferenceRow | PromptRow]) -> str:
    """sha256 of what was read, as token ids in order: another file, template, tokenizer or limit shows."""
    total = hashlib.sha256()
    for row in rows:
        for field in fields(row):
            ids = getattr(row, field.name)
            if isinstance(ids, list):
                total.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return total.hexdigest()


def _render(tokenizer: Tokenizer, messages: list[Message], row: Row) -> list[int]:
    try:
        ids = tokenizer.render(messages)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from None
    # Nothing predicts the first token, so an answer needs one before it.
    if not ids:
        row.fail("needs a prompt of at least one token, but the chat template renders nothing")
    return ids


def _respond(tokenizer: Tokenizer, text: str, row: Row) -> list[int]:
    ids = tokenizer.encode(text)
    if tokenizer.eos_id in ids:
        row.fail("needs answers without the tokenizer's end-of-text token, which is added to them")
    # Its probability is 0, so one of them would make the loss 1e30.
    if tokenizer.pad_id in ids:
        row.fail("needs answers without the tokenizer's pad token (or, where that is <unk>, without unknown text)")
    return [*ids, tokenizer.eos_id]


def _readable(messages: list[Message]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
