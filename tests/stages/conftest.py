import pytest

from tests.ranks import run_ranks
from tests.stages.chain import build_chain, write_inputs


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder with a tokenizer, data, and finished runs `sft`, `dpo` and `reward`, made on one rank."""
    folder = tmp_path_factory.mktemp("chain")
    write_inputs(folder)
    run_ranks(build_chain, 1, folder)
    return folder
