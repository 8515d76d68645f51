"""The benchmark runner, loaded as the script it is."""

import importlib.util
from pathlib import Path

import pytest
import torch

RUNNER = Path(__file__).parents[2] / "scripts" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", RUNNER)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RUNNER.parents[1])
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    """The runner's `--threads` does not outlive a file's tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
