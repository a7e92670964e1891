"""Messages to text: Jinja chat templates, rendered the same way for every kind of tokenizer."""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rto_megatron.errors import DataError

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

ROLES = ("system", "user", "assistant")

CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""What the built-in template is written with: each must be one token of the tokenizer."""

_FRAMES_OF_TEMPLATES = ("<template>", "<unknown>")
"""What Jinja calls a template's file in a traceback: while it renders, and while it compiles."""


class _Generation(Extension):
    """Lets `{% generation %}` through: it marks the assistant's text in some templates and renders as its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become text."""

    text: str
    """Jinja, in the dialect of Hugging Face chat templates."""
    source: str
    """What messages call it: the file that it is in."""

    def render(self, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
        """The text of a conversation up to where the assistant's next answer begins.

        Args:
            messages: the turns so far.
            special_tokens: names that the template may use (`bos_token`, `eos_token`, ...) and their text.

        Raises:
            DataError: with the template's source and line, if it cannot.
        """
        try:
            return _compile(self.text).render(messages=list(messages), add_generation_prompt=True, **special_tokens)
        except Exception as error:  # a template is code, and raises what its expressions raise
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f", line {frame.lineno}," for frame in frames if frame.filename in _FRAMES_OF_TEMPLATES]
            where = self.source + (lines[-1] if lines else "")
            raise DataError(f"the chat template {where} cannot render these messages: {error}") from None


BUILT_IN_TEMPLATE = ChatTemplate(
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    source="built in",
)
"""For sentencepiece tokenizers that have the chat symbols; a response, like every turn, closes with <|end|>."""


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    # Templates come with downloaded tokenizers, so they run sandboxed. There is no `strftime_now` on purpose:
    # templates that ask whether it is defined (Llama 3) then use their fixed date, and today's prompts are tomorrow's.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
