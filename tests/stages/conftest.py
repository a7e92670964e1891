import pytest

from tests.ranks import run_ranks
from tests.stages.chain import build_small_reward


@pytest.fixture(scope="session")
def small_reward(chain, tmp_path_factory):
    """A reward run whose model is smaller than the chain's, with the chain's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    run_ranks(build_small_reward, 1, chain, folder)
    return folder / "reward"
