"""The benchmark runner, loaded as the script it is, and the rows that it stores."""

import importlib.util
import json
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


@pytest.fixture(autouse=True)
def same_threads():
    """Undoes the runner's `--threads`."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_in(directory: Path, benchmark: str = "*") -> list[dict]:
    """Returns the stored rows of a benchmark, oldest run first."""
    files = sorted(directory.glob(f"*/{benchmark}-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]
