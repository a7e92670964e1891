"""A source's name -> its raw rows: JSON lines, or whatever the `datasets` library opens."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rto_megatron.data.rows import Refuse, Row, stop
from rto_megatron.errors import DataError

_LOADERS = {".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
"""Single files that the `datasets` library reads, by suffix."""
_MOST_QUOTED = 300
"""Characters of the library's message that ours repeats."""


def open_source(source: str, refuse: Refuse = stop) -> Iterator[Row]:
    """Yield the rows of a `.jsonl` file, another data file or folder, or `name[:split]` of the hub.

    Args:
        refuse: takes the error of a line that is no JSON object.
    """
    source = os.path.expanduser(source)
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from _json_lines(path, refuse)
    elif path.suffix in _LOADERS:
        if not os.path.isfile(path):
            raise DataError(f"{path}: there is no such data file; paths are relative to the working directory")
        yield from _data_set(source, name=_LOADERS[path.suffix], files=str(path), split="train")
    else:
        name, _, split = source.partition(":")
        _check_name(source, name)
        yield from _data_set(source, name=name, files=None, split=split or "train")


def _check_name(source: str, name: str) -> None:
    """Raise DataError for a path that is not there: the hub would be asked for half a minute, and not know it."""
    suffixes = (".jsonl", *_LOADERS)
    if os.path.isfile(name):
        raise DataError(
            f"{source}: a data file must be named by its path alone and end with one of {', '.join(suffixes)}"
        )
    # The hub's names are `name` and `organization/name`.
    only_a_path = name.startswith((".", "/", "~")) or name.endswith(suffixes) or name.count("/") > 1
    if (only_a_path or ("/" in name and os.path.isdir(os.path.dirname(name)))) and not os.path.isdir(name):
        raise DataError(f"{source}: there is no such data file or folder; paths are relative to the working directory")


def _json_lines(path: Path, refuse: Refuse) -> Iterator[Row]:
    try:
        # Only "\n" ends a line: splitlines() would also cut at U+2028, which JSON allows inside a string.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = Row(_json_object(line, f"{path}:{number}"), f"{path}:{number}")
                    except DataError as error:
                        refuse(error)
                    else:
                        yield row
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file; paths are relative to the working directory") from None
    except OSError as error:
        raise DataError(f"{path}: must be a readable file of JSON lines, got: {error.strerror}") from None


def _json_object(line: bytes, place: str) -> dict:
    try:
        value = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: must be UTF-8 text, but byte {error.start + 1} of the line breaks it") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: must be one JSON object, but column {error.colno} breaks it: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise DataError(f"{place}: must be one JSON object that Python can hold, got: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be one JSON object, found a {type(value).__name__}")
    return value


def _data_set(source: str, *, name: str, files: str | None, split: str) -> Iterator[Row]:
    # Seconds to import, and only for who asks for it.
    import datasets

    try:
        data: Any = datasets.load_dataset(name, data_files=files, split=split)
    except Exception as error:  # the library raises whatever its readers and the hub raise
        cause = error.__cause__ or error  # a broken file's error comes inside one that does not say what broke
        reason = " ".join(str(cause).split())[:_MOST_QUOTED] or type(cause).__name__
        raise DataError(
            f"data source '{source}': must be a .jsonl file, a data file or folder, or a data set's name[:split]; "
            f"the `datasets` library says: {reason}"
        ) from None
    for number, values in enumerate(data):
        yield Row(values, f"{source} row {number}")
