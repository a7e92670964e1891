"""Files written a tensor at a time are the files that safetensors would have written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rto_megatron.models.safetensors_files import SafetensorsFiles

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([-1.5]),
    "c": torch.arange(4.0).reshape(2, 2).t(),  # not contiguous
}


def write(folder, *, part_bytes, dtype=torch.float32):
    files = SafetensorsFiles(folder, {k: v.shape for k, v in TENSORS.items()}, dtype, part_bytes=part_bytes)
    for name, tensor in TENSORS.items():
        files.write(name, tensor.to(dtype))
    files.close()
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_holds_all_and_needs_no_index(tmp_path, dtype):
    assert write(tmp_path, part_bytes=1000, dtype=dtype) == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_cut_into_files_of_a_size_and_the_index_says_where_they_are(tmp_path):
    # 24, 4 and 16 bytes: 24 + 4 fit into 30, the 16 after them do not
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert write(tmp_path, part_bytes=30) == [*parts, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 44}, "weight_map": {"b": parts[0], "a": parts[0], "c": parts[1]}}
    assert [sorted(load_file(tmp_path / part)) for part in parts] == [["a", "b"], ["c"]]


def test_a_tensor_larger_than_a_file_gets_a_file_of_its_own(tmp_path):
    assert len(write(tmp_path, part_bytes=1)) == 3 + 1


def test_another_tensor_than_the_next_is_a_bug(tmp_path):
    files = SafetensorsFiles(tmp_path, {"a": (1,), "b": (2, 3)}, torch.float32, part_bytes=1000)
    with pytest.raises(AssertionError, match=r"a \[1\] is next, got b"):
        files.write("b", TENSORS["b"])
