"""Safetensors files written a tensor at a time: names and shapes first, the tensors after."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsFiles:
    """The weights of a Hugging Face folder, cut into files; never more than one tensor in memory.

    safetensors' own `save_file` takes all tensors of a file at once. The format begins with a header that
    follows from names, shapes and dtype, so the bytes can come later.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, *, part_bytes: int
    ) -> None:
        """Plan the files.

        Args:
            folder: must be there when the first tensor comes.
            shapes: of all tensors, by name, in the order in which they will be written.
            dtype: of all tensors.
            part_bytes: size that a file does not exceed, unless one tensor alone does.
        """
        self.folder, self.dtype = folder, dtype
        self._sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._parts = _cut(self._sizes, part_bytes)
        self._first_of = {part[0]: number for number, part in enumerate(self._parts)}
        self._waiting = iter(self._sizes)
        self._file: IO[bytes] | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        expected = next(self._waiting)
        assert (name, list(tensor.shape), tensor.dtype) == (expected, self._shapes[expected], self.dtype), (
            f"{expected} {self._shapes[expected]} is next, got {name} {list(tensor.shape)} {tensor.dtype}"
        )
        if name in self._first_of:
            self._begin(self._first_of[name])
        assert self._file is not None
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(content.data)

    def close(self) -> None:
        """End the last file and write the index, which a single file does without."""
        assert next(self._waiting, None) is None, "tensors are missing"
        self._end()
        if len(self._parts) > 1:
            where = {name: self._file_name(number) for number, part in enumerate(self._parts) for name in part}
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Let go of a file that will not be finished."""
        if self._file is not None:
            self._file.close()

    def _begin(self, number: int) -> None:
        self._end()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in self._parts[number]:
            end = start + self._sizes[name]
            header[name] = {"dtype": _DTYPES[self.dtype], "shape": self._shapes[name], "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of 8 bytes
        self._file = open(self.folder / self._file_name(number), "wb")  # noqa: SIM115 - outlives this function
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _file_name(self, number: int) -> str:
        return WEIGHTS if len(self._parts) == 1 else f"model-{number + 1:05d}-of-{len(self._parts):05d}.safetensors"


def _cut(sizes: Mapping[str, int], part_bytes: int) -> list[list[str]]:
    """Names of each file, in order."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
