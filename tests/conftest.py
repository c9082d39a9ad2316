"""Tiny models run fastest on one thread; nothing may reach a hub or a network from a test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# forked processes load models: in new threads there torch now and then finds its pool invalid
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import gc

import pytest
from hypothesis import HealthCheck, settings

# a busy machine draws its examples slowly
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_finish():
    """What was imported is garbage to nobody, and a test's files need not outlive a power cut."""
    gc.freeze()
    os.fsync = lambda file: None


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What earlier files' tests imported is no garbage either: each collection would look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A folder with a draft and a target of one family."""
    from family import make_family

    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def pool_file(tmp_path):
    from family import write_pool

    return write_pool(tmp_path / "pool.jsonl")
