"""One row of a data file -> its texts, checked: prompt messages and the answers to them."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from rto_megatron.data.chat import ROLES, Message
from rto_megatron.errors import DataError

Refuse = Callable[[DataError], None]
"""What becomes of a bad row: `stop` raises its error; who wants all of them keeps it, and the row is passed over."""


def stop(error: DataError) -> None:
    """Raise it: what every stage does at the first bad row."""
    raise error


class Row:
    """A JSON object and where it came from; every problem is a DataError that names the place."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        # The `datasets` library fills columns that a row lacks with None.
        self.values = {key: value for key, value in values.items() if value is not None}
        self.place = place
        """`file:line`, or `name row i`."""

    def fail(self, rule: str) -> NoReturn:
        """Raise a DataError: the place, the rule, and the keys that the row does have."""
        raise DataError(f"{self.place}: {rule}, found keys {sorted(self.values)}")

    def prompt(self) -> list[Message]:
        """The turns before the answer: `messages` up to the last user turn, or `prompt` as text or as messages."""
        if "messages" in self.values:
            messages = self.messages("messages")
            # Whole conversations are prompts too: the last answer is what is asked for.
            return self._ends_with_user(messages[:-1] if messages[-1]["role"] == "assistant" else messages, "messages")
        if isinstance(self.values.get("prompt"), list):
            return self._ends_with_user(self.messages("prompt"), "prompt")
        return [{"role": "user", "content": self.text("prompt", "a non-empty 'prompt' or 'messages'")}]

    def response(self) -> str:
        """`response`, or the assistant's turn that `messages` ends with."""
        if "response" in self.values or "messages" not in self.values:
            return self.text("response", "a non-empty 'response', or 'messages' that end with an assistant turn")
        last = self.messages("messages")[-1]
        if last["role"] != "assistant":
            self.fail("needs a 'response', or 'messages' that end with an assistant turn")
        return last["content"]

    def pair(self) -> tuple[list[Message], str, str]:
        """Prompt, chosen and rejected; the answers as text, or as messages that end with the answer."""
        prompts, answers = [], []
        for name in ("chosen", "rejected"):
            if isinstance(self.values.get(name), list):
                *before, last = self.messages(name)
                if last["role"] != "assistant":
                    self.fail(f"needs '{name}' messages that end with an assistant turn")
                answers.append(last["content"])
                if before:
                    prompts.append(self._ends_with_user(before, name))
            else:
                answers.append(self.text(name))
        if len(prompts) == 2 and prompts[0] != prompts[1]:
            self.fail("needs 'chosen' and 'rejected' that answer the same messages")
        if answers[0].strip() == answers[1].strip():
            self.fail(f"needs a pair whose sides differ, both are {_short(answers[0])}")
        return prompts[0] if prompts else self.prompt(), answers[0], answers[1]

    def text(self, name: str, wanted: str = "") -> str:
        """A field that must be non-empty text."""
        value = self.values.get(name, "")
        if not isinstance(value, str):
            self.fail(f"needs text in '{name}', got {_short(value)}")
        if not value.strip():
            self.fail(f"needs {wanted or f'a non-empty {name!r}'}")
        self._check_characters(value, name)
        return value

    def messages(self, name: str) -> list[Message]:
        """A field that must be a list of messages with known roles and non-empty text."""
        value = self.values[name]
        if not isinstance(value, list) or not value:
            self.fail(f"needs a non-empty list of messages in '{name}', got {_short(value)}")
        for number, message in enumerate(value, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
                self.fail(f"needs a 'role' and a text 'content' in every message, got {_short(message)} in '{name}'")
            if message.get("role") not in ROLES:
                self.fail(f"needs a role out of {', '.join(ROLES)}, got {message.get('role')!r} in '{name}' {number}")
            if not message["content"].strip():
                self.fail(f"needs a non-empty 'content' in every message, but '{name}' {number} is empty")
            self._check_characters(message["content"], name)
        return [{"role": message["role"], "content": message["content"]} for message in value]

    def _check_characters(self, text: str, name: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold half an emoji, tokenizers cannot
            half = text[error.start]
            self.fail(f"needs whole characters in '{name}', but character {error.start + 1} is half of one, {half!r}")

    def _ends_with_user(self, messages: list[Message], name: str) -> list[Message]:
        if not messages or messages[-1]["role"] != "user":
            self.fail(f"needs a user turn before the answer in '{name}'")
        return messages


def _short(value: Any, most: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else shown[:most] + "..."
