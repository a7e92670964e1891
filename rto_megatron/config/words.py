"""Where settings come from: a YAML file and the command line, both as words that name their origin."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rto_megatron.errors import ConfigError

COMMAND_LINE = "command line"

EMPTY_SECTION = "{}"
"""The text of a YAML mapping without keys: a section that is there, with all its defaults."""

_MERGE = "tag:yaml.org,2002:merge"
"""What YAML 1.1 calls the key `<<`."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)", re.IGNORECASE)
"""What a reader takes for a number without quotes too."""

_NULLS = ("", "~", "null", "Null", "NULL", "None")
"""What YAML reads as null, and tyro's and Python's own word for it."""


@dataclass(frozen=True)
class Word:
    """One setting, still text: `--key=text`."""

    key: str
    """Dotted name of the field, such as `optimizer.lr`."""
    texts: tuple[str, ...]
    """One text, or one per item of a list."""
    is_list: bool
    """True if it was written as a YAML list or as several command-line words."""
    origin: str
    """`file:line` or `command line`."""

    @property
    def is_null(self) -> bool:
        """True if the setting says that there is no value."""
        return not self.is_list and self.texts[0] in _NULLS

    def shown(self) -> str:
        """The value as messages quote it."""
        if self.is_null:
            return "null"
        if self.is_list:
            return str(list(self.texts))
        return self.texts[0] if _NUMBER.fullmatch(self.texts[0]) else repr(self.texts[0])


def words_of_yaml(path: Path) -> list[Word]:
    """Flatten a YAML mapping into words; `{optimizer: {lr: 1e-4}}` is `--optimizer.lr=1e-4`.

    Scalars stay text, so the type of the field decides what they mean: YAML 1.1 would read `1e-4` as a string.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the config file must be readable UTF-8 text, got: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: the config must be valid YAML, found: {' '.join(problem.split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: the config must be sections of settings, found hundreds of brackets") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: the config must be a mapping of keys to values, found a {root.id}")
    words = list(_flatten(root, path, prefix="", inside=()))
    first: dict[str, Word] = {}
    for word in words:
        if word.key in first:
            line = first[word.key].origin.rpartition(":")[2]
            raise ConfigError(f"{word.origin}: {word.key} is set twice, first in line {line}; delete one of the two")
        first[word.key] = word
    return words


def _flatten(
    mapping: yaml.MappingNode, path: Path, prefix: str, inside: tuple[yaml.MappingNode, ...]
) -> Iterator[Word]:
    """The words of a mapping; `inside` are the mappings around it."""
    inside = (*inside, mapping)
    for key_node, node in mapping.value:
        origin = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin}: a key must be a name, found a {key_node.id}")
        key = prefix + key_node.value
        if key_node.tag == _MERGE:
            raise ConfigError(f"{origin}: {key} must not merge another mapping into this one; write its settings out")
        if node in inside:
            raise ConfigError(f"{origin}: {key} must not be an alias of a section it is in; write its settings out")
        if isinstance(node, yaml.MappingNode) and node.value:
            yield from _flatten(node, path, f"{key}.", inside)
        elif isinstance(node, yaml.MappingNode):
            yield Word(key, (EMPTY_SECTION,), is_list=False, origin=origin)
        elif isinstance(node, yaml.SequenceNode):
            if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
                raise ConfigError(f"{origin}: {key} must be a list of plain values, found a list of lists or mappings")
            yield Word(key, tuple(item.value for item in node.value), is_list=True, origin=origin)
        else:
            yield Word(key, (node.value,), is_list=False, origin=origin)


def words_of_command_line(arguments: Sequence[str]) -> list[Word]:
    """Read `--a.b=value` and `--a.b value [value ...]`; hyphens and underscores in names are the same."""
    words: list[Word] = []
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or name == "--":
            raise ConfigError(f"{COMMAND_LINE}: a setting must look like --section.field=value, got {name!r}")
        name, equals, text = name[2:].partition("=")
        texts = [text] if equals else []
        # A word of one dash may be a negative number, so only two dashes end the values of a setting.
        while not equals and rest and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        if not texts:
            raise ConfigError(
                f"{COMMAND_LINE}: --{name} needs a value; write --{name}=value (true or false for a switch)"
            )
        words.append(Word(name.replace("-", "_"), tuple(texts), is_list=len(texts) > 1, origin=COMMAND_LINE))
    return words
