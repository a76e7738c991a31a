"""What every test may rely on: no network, one thread, the same seeds."""

import gc
import os

# Before anything imports a library that reads them. The tests marked ``network`` run with HF_HUB_OFFLINE=0 in front.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", os.environ["HF_HUB_OFFLINE"])

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fast import holds_fast_tests

# Triton reads it when it is imported, which nothing above does: kernels then run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread: the order of every sum is fixed, so bits can be compared, and small models run no slower for it.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=40, metavar="N", help="mutants of every file that tests damage")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file without fast tests for ``-m fast``: importing all files takes longer than the fast tests."""
    if config.option.markexpr == "fast" and collection_path.name.startswith("test_"):
        return not holds_fast_tests(collection_path) or None
    return None


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> int:
    """Return how many mutants to try: seeds 0 to N - 1."""
    return int(request.config.getoption("--fuzz"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Exclude the imported modules and the collected tests from garbage collections: they stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
