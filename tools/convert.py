"""Hugging Face <-> Megatron: the stage `convert` by its flags alone.

    python tools/convert.py --source HUGGING_FACE_FOLDER --out runs/base
    torchrun --nproc-per-node 2 tools/convert.py --source runs/rto --out runs/rto-hf --parallel.tensor=2

`--help` lists them all.
"""

import sys

from rto_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
