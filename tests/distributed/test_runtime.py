"""Choosing where to run, and refusing to where it cannot work."""

import subprocess
import sys

import pytest
import torch

from rto_megatron.distributed import runtime
from rto_megatron.errors import UserError
from tests.ranks import run_ranks

IMPORT_EVERYTHING = """
from rto_megatron.distributed.runtime import prepare_imports
prepare_imports()
import importlib, pkgutil, sys
import rto_megatron
for module in pkgutil.walk_packages(rto_megatron.__path__, "rto_megatron."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized(), "an import touched CUDA"
assert not torch.distributed.is_initialized(), "an import joined a process group"
from rto_megatron.distributed import cpu
assert not cpu.is_installed(), "an import patched torch"
"""


def test_importing_the_package_starts_nothing_and_says_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def alone():
    import os

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        del os.environ[name]
    started = runtime.start_runtime(threads=1)
    answer = (started.device.type, runtime.rank(), runtime.world_size(), torch.distributed.get_world_size())
    runtime.stop_runtime()
    runtime.stop_runtime()
    return answer, torch.distributed.is_initialized()


def test_one_process_runs_without_torchrun():
    assert run_ranks(alone, 1) == [((runtime_device(), 0, 1, 1), False)]


def runtime_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
        ("", "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"),
        (None, "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"),  # a folder left behind
    ],
)
def test_an_unusable_transformer_engine_is_named_with_the_way_out(tmp_path, monkeypatch, content, shown):
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    if content is not None:
        (folder / "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    runtime.check_transformer_engine.cache_clear()
    with pytest.raises(UserError) as error:
        runtime.prepare_imports()
    runtime.check_transformer_engine.cache_clear()
    sys.modules.pop("transformer_engine", None)
    message = str(error.value)
    assert str(folder) in message and shown in message and "pip uninstall transformer-engine" in message
