"""From words to the frozen config of a stage, with one clear message for whatever does not fit.

A YAML file is saved command-line words: the file's words come first, the user's after, and the later one wins.
tyro says how a text becomes the type of a field, and prints the help. Names and sections are matched here rather than
by `tyro.cli`, which answers a mistake with a box and an exit, and cannot say which line of which file it came from.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo, UnsupportedTypeAnnotationError

from rto_megatron.config.run import STAGES, stage_of
from rto_megatron.config.words import COMMAND_LINE, EMPTY_SECTION, Word, words_of_command_line, words_of_yaml
from rto_megatron.errors import ConfigError

_BOOLS = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


def load_run(stage: str, yaml_path: Path | None, words: Sequence[str]) -> Any:
    """Read the config of `stage` from a YAML file and the command-line words that follow it.

    Returns:
        The frozen dataclass `STAGES[stage]`. Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: a setting is wrong or missing, or the file is another stage's.
    """
    if stage not in STAGES:
        raise ConfigError(f"{COMMAND_LINE}: {_one_of_the_stages(stage)}")
    if "-h" in words or "--help" in words:
        print_help(stage)
    named, rest = _split_stage(_words(yaml_path, words))
    if named and STAGES[named.texts[0]] is not STAGES[stage]:
        raise ConfigError(
            f"{named.origin}: stage is {named.texts[0]}, but the command line runs {stage}; "
            f"name a config of the stage {stage}, or run `python -m rto_megatron {named.texts[0]}`"
        )
    return _build(stage, rest, yaml_path)


def load_any(yaml_path: Path | None, words: Sequence[str]) -> tuple[str, Any]:
    """The stage that a YAML file is for, and its config; for commands that take the file of any stage.

    The stage is what the file or `--stage=` says; without either, the one stage whose settings the words can be.

    Raises:
        ConfigError: as `load_run`, or more than one stage would take the words, or none.
    """
    named, rest = _split_stage(_words(yaml_path, words))
    stage = named.texts[0] if named else _infer_stage(rest, yaml_path)
    return stage, _build(stage, rest, yaml_path)


def load_despite_mistakes(yaml_path: Path | None, words: Sequence[str]) -> tuple[str, Any, list[ConfigError]]:
    """As `load_any`, but all mistakes rather than the first; each wrong setting has its default in the config.

    Returns:
        The stage, empty where it is not known; the config, None where there is nothing to go on with; the mistakes.
    """
    stage, mistakes = "", []
    try:
        named, rest = _split_stage(_words(yaml_path, words))
        stage = named.texts[0] if named else _infer_stage(rest, yaml_path)
    except ConfigError as error:
        return stage, None, [error]
    wrong: set[str] = set()
    while True:
        try:
            return stage, _build(stage, rest, yaml_path), mistakes
        except ConfigError as error:
            culprits = {word.key for word in rest if _is_about(str(error), word)}
            if culprits or not any(f": {key} " in str(error) for key in wrong):  # else it follows from one before
                mistakes.append(error)
            if not culprits:
                return stage, None, mistakes
            wrong |= culprits
            rest = [word for word in rest if word.key not in culprits]


def split_options(options_class: type, words: Sequence[str]) -> tuple[Any, list[str]]:
    """A command's own options, as a dataclass, and the words that are left for the stage."""
    own: list[str] = []
    rest: list[str] = []
    names, taker = {field.name for field in fields(options_class)}, rest
    for word in words:
        if word.startswith("--"):
            taker = own if word[2:].partition("=")[0].replace("-", "_") in names else rest
        taker.append(word)
    return _Settings(options_class, words_of_command_line(own), None).build(options_class, prefix=""), rest


def dump_run(config: Any) -> str:
    """Write a config as the YAML that `load_run` and `load_any` read it back from."""
    return yaml.safe_dump({"stage": stage_of(config), **_plain(config)}, sort_keys=False, allow_unicode=True)


def _words(yaml_path: Path | None, words: Sequence[str]) -> list[Word]:
    return (words_of_yaml(yaml_path) if yaml_path else []) + words_of_command_line(words)


def _split_stage(words: Sequence[Word]) -> tuple[Word | None, list[Word]]:
    """The word that names the stage (the last one, if any), and the stage's own words."""
    named = None
    for word in words:
        if word.key == "stage":
            if word.is_list or word.texts[0] not in STAGES:
                raise ConfigError(f"{word.origin}: {_one_of_the_stages(', '.join(word.texts))}")
            named = word
    return named, [word for word in words if word.key != "stage"]


def _one_of_the_stages(got: str) -> str:
    return f"the stage must be one of {', '.join(STAGES)}, got {got!r}"


def _is_about(message: str, word: Word) -> bool:
    """Whether a message begins with the word's setting, behind the origin of that and maybe of others."""
    return re.match(rf"{re.escape(word.origin)}(, [\w.]+ from [^;]*?)?: {re.escape(word.key)} ", message) is not None


def _infer_stage(words: Sequence[Word], yaml_path: Path | None) -> str:
    """The one stage that knows all these settings and needs no others."""
    keys = {word.key for word in words}
    fitting = [
        stage
        for stage, config_class in STAGES.items()
        if stage != "ppo"  # it takes the settings of rto
        and keys <= dict(_fields_below(config_class, prefix="")).keys()
        and keys >= set(_required(config_class, prefix=""))
    ]
    if len(fitting) != 1:
        found = f"may be those of {' or '.join(fitting)}" if fitting else "are those of no stage"
        raise ConfigError(
            f"{yaml_path or COMMAND_LINE}: the settings {found}; say which one is meant: "
            "`stage: NAME` in the file, or --stage=NAME"
        )
    return fitting[0]


def _build(stage: str, words: list[Word], yaml_path: Path | None) -> Any:
    if stage == "ppo":  # RTO whose DPO coefficient is 0
        words = [*words, Word("rto.dpo_coef", ("0",), is_list=False, origin=COMMAND_LINE)]
    return _Settings(STAGES[stage], words, yaml_path).build(STAGES[stage], prefix="")


def print_help(stage: str) -> None:
    """Print every setting of a stage with its meaning and default, and exit with code 0."""
    print_options(STAGES[stage], f"python -m rto_megatron {stage} RUN.yaml")


def print_options(options_class: type, prog: str) -> None:
    """Print every field of a dataclass with its meaning and default, and exit with code 0."""
    tyro.cli(
        options_class,
        prog=prog,
        default=_specimen(options_class),
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


class _Settings:
    """The words of one run by key, and how they become dataclasses."""

    def __init__(self, config_class: type, words: Sequence[Word], yaml_path: Path | None) -> None:
        self.source = str(yaml_path) if yaml_path else COMMAND_LINE
        self.kinds = dict(_fields_below(config_class, prefix=""))
        self.words: dict[str, Word] = {}
        for word in words:
            self._check_name(word)
            if _section(self.kinds[word.key]):
                # `model.rope_scaling: null` takes back what was said about its fields before.
                self.words = {key: kept for key, kept in self.words.items() if not key.startswith(f"{word.key}.")}
            self.words[word.key] = word

    def build(self, config_class: type, prefix: str) -> Any:
        """The dataclass whose fields are named `prefix` + name; fields without a word keep their default."""
        values = {}
        for name, kind in get_type_hints(config_class).items():
            key = prefix + name
            section = _section(kind)
            word = self.words.get(key)
            given = any(other.startswith(f"{key}.") for other in self.words)
            if section and (given or not _is_optional(kind) or (word and word.texts[0] == EMPTY_SECTION)):
                values[name] = self.build(section, prefix=f"{key}.")
            elif word:
                values[name] = None if word.is_null and _is_optional(kind) else _convert(word, kind)
        self._check_complete(config_class, values, prefix)
        try:
            return config_class(**values)
        except ValueError as error:
            raise ConfigError(self._located(str(error), config_class, prefix)) from None

    def _check_name(self, word: Word) -> None:
        if word.key not in self.kinds:
            raise ConfigError(f"{word.origin}: {word.key} is not a setting; {self._suggestion(word.key)}")
        section = _section(self.kinds[word.key])
        if section and not word.is_null and word.texts[0] != EMPTY_SECTION:
            names = ", ".join(field.name for field in fields(section))
            raise ConfigError(f"{word.origin}: {word.key} is a section, got {word.shown()}; set its fields: {names}")

    def _suggestion(self, key: str) -> str:
        leaves = [known for known, kind in self.kinds.items() if not _section(kind)]
        by_last = {known.rpartition(".")[2]: known for known in leaves}
        close = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
        if not close:
            close = [by_last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
        if close:
            return f"did you mean {close[0]}?"
        parent = key.rpartition(".")[0]
        inside = parent if any(known.startswith(f"{parent}.") for known in leaves) else ""
        names = [known.rpartition(".")[2] for known in self.kinds if known.rpartition(".")[0] == inside]
        return f"{inside or 'this stage'} takes {', '.join(names)}"

    def _check_complete(self, config_class: type, values: dict[str, Any], prefix: str) -> None:
        for field in fields(config_class):
            if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
                key = prefix + field.name
                raise ConfigError(f"{self.source}: {key} must be set; write it in the file or add --{key}=...")

    def _located(self, message: str, config_class: type, prefix: str) -> str:
        """Put the origin of the field that `message` begins with in front of it, and those of others that it names.

        A class that serves two sections (OptimizerConfig) knows only one of their names, so the name is set right too.
        Where nobody set the first field, the mistake is in what was said of the others.
        """
        named = re.match(r"[\w.]+", message)
        key = named.group() if named else ""
        name = key.rpartition(".")[2]
        if prefix and name in {field.name for field in fields(config_class)}:
            message, key = f"{prefix}{name}{message[len(key) :]}", prefix + name
        origins = {other: origin for other in [key, *self._named(message)] if (origin := self._origin(other))}
        if not origins:
            return f"{self.source}: {message}"
        first, *others = origins.items()
        more = "".join(f", {other} from {origin}" for other, origin in others if origin != first[1])
        return f"{first[1]}{more}: {message}"

    def _named(self, message: str) -> list[str]:
        """The dotted settings that a message names before its way out; bare names may be plain English words."""
        return [name for name in re.findall(r"\w+(?:\.\w+)+", message.partition(";")[0]) if name in self.kinds]

    def _origin(self, key: str) -> str:
        """Where a setting, or the last field of a section, was said; empty where nowhere."""
        said = [word.origin for name, word in self.words.items() if name == key or name.startswith(f"{key}.")]
        return said[-1] if said else ""


def _fields_below(config_class: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every dotted key below a config class with its type, sections included."""
    for name, kind in get_type_hints(config_class).items():
        yield prefix + name, kind
        section = _section(kind)
        if section:
            yield from _fields_below(section, prefix=f"{prefix}{name}.")


def _required(config_class: type, prefix: str) -> Iterator[str]:
    """The dotted keys that have no default."""
    kinds = get_type_hints(config_class)
    for field in fields(config_class):
        if field.default is MISSING and field.default_factory is MISSING:
            section = _section(kinds[field.name])
            yield from _required(section, f"{prefix}{field.name}.") if section else [prefix + field.name]


def _section(kind: Any) -> type | None:
    """The dataclass that a field of this type holds, or None for a plain value."""
    bare = _without_none(kind)
    return bare if isinstance(bare, type) and is_dataclass(bare) else None


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _without_none(kind: Any) -> Any:
    if not _is_optional(kind):
        return kind
    return Union[tuple(arg for arg in get_args(kind) if arg is not type(None))]  # noqa: UP007 (built at run time)


def _convert(word: Word, kind: Any) -> Any:
    """Read the text of a setting as the type of its field."""
    bare = _without_none(kind)
    texts = list(word.texts)
    if word.is_null:
        raise ConfigError(f"{word.origin}: {word.key} must be {_described(kind)}, got null")
    if word.is_list and get_origin(bare) is not tuple:
        raise ConfigError(f"{word.origin}: {word.key} must be {_described(kind)}, got the list {word.shown()}")
    if bare is bool:
        texts = [_BOOLS.get(text.lower(), text) for text in texts]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(bare, set()))
    assert not isinstance(spec, UnsupportedTypeAnnotationError), f"{word.key}: tyro cannot read {bare}"
    try:
        if spec.choices is not None and texts[0] not in spec.choices:
            raise ValueError
        value = spec.instance_from_str(texts)
    except ValueError:
        raise ConfigError(f"{word.origin}: {word.key} must be {_described(kind)}, got {word.shown()}") from None
    if bare is float and not math.isfinite(value):
        raise ConfigError(f"{word.origin}: {word.key} must be finite, got {word.shown()}")
    # The shell expands `~` only where a word begins with it, and never inside a YAML file.
    return value.expanduser() if isinstance(value, Path) else value


def _described(kind: Any) -> str:
    """A type in words, for messages."""
    bare = _without_none(kind)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if get_origin(bare) is Literal:
        words = f"one of {', '.join(map(str, get_args(bare)))}"
    elif get_origin(bare) is tuple:
        words = f"a list, each item {_described(get_args(bare)[0])}"
    else:
        words = plain[bare]
    return f"{words} or null" if _is_optional(kind) else words


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, paths as text, tuples as lists: what YAML can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _specimen(config_class: type) -> Any:
    """An instance that lets tyro list the fields of optional sections too; made past all checks, for help only."""
    instance = object.__new__(config_class)
    kinds = get_type_hints(config_class)
    for field in fields(config_class):
        section = _section(kinds[field.name])
        if section:
            value = _specimen(section)
        elif field.default is not MISSING:
            value = field.default
        else:
            value = tyro.MISSING
        object.__setattr__(instance, field.name, value)
    return instance
