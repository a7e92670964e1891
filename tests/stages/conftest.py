import pytest

from tests.ranks import run_ranks
from tests.stages.chain import build_chain, build_small_reward, write_inputs


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder with a tokenizer, data, and finished runs `sft`, `dpo` and `reward`, made on one rank."""
    folder = tmp_path_factory.mktemp("chain")
    write_inputs(folder)
    run_ranks(build_chain, 1, folder)
    return folder


@pytest.fixture(scope="session")
def small_reward(chain, tmp_path_factory):
    """A reward run whose model is smaller than the chain's, with the chain's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    run_ranks(build_small_reward, 1, chain, folder)
    return folder / "reward"
