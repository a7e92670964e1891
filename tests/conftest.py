"""Before any test: one thread a process, hypothesis without deadlines, and third parties' warnings that we expect.

All other warnings are errors: pyproject.toml.
"""

import os
import re

# Before torch is imported, here and, inherited, in the fork server: rank processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# No deadline: a shared machine pauses. No database: a test run leaves nothing behind in the checkout.
settings.register_profile("tests", deadline=None, database=None, max_examples=50)
settings.load_profile("tests")


def pytest_configure(config):
    from rto_megatron.distributed.runtime import QUIET_WARNINGS

    for start, _why in QUIET_WARNINGS:
        # A colon would end the field; '.' matches it.
        config.addinivalue_line("filterwarnings", f"ignore:{re.escape(start).replace(':', '.')}")


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder with a tokenizer, data, and finished runs `sft`, `dpo` and `reward`, made on one rank."""
    from tests.ranks import run_ranks
    from tests.stages.chain import build_chain, write_inputs

    folder = tmp_path_factory.mktemp("chain")
    write_inputs(folder)
    run_ranks(build_chain, 1, folder)
    return folder
