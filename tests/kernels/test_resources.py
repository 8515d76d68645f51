"""The Triton kernels compile for every chip, spill nothing and fit; docs/kernel-resources.md says the same.

No GPU is needed: the kernels are compiled ahead of time, in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernel_resources.py"


def kernel_resources(*arguments: str) -> subprocess.CompletedProcess:
    compiler = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=compiler, capture_output=True, text=True, check=False)


def test_the_table_is_current_and_nothing_spills():
    """head_dim 128 alone, to be quick; the script checks 64 too."""
    check = kernel_resources("--check", "--head-dims", "128")
    assert check.returncode == 0, check.stderr


def test_a_part_of_the_table_is_never_written():
    refused = kernel_resources("--chips", "sm_80")
    assert refused.returncode == 2 and "only with --check" in refused.stderr


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import kernel_resources

    return kernel_resources


def test_spills_size_and_missing_tensor_cores_are_problems(resources):
    tiles = resources.Tiles(128, 64, 8, 3)
    bad = resources.Resources("sm_90", "dq", 128, tiles, 255, 16, 1 << 20, tensor_core=False)
    where = "sm_90 dq head_dim 128: "
    assert bad.problems() == [
        where + "spills 16 bytes per thread to local memory",
        where + "shared memory 1048576, at most 232448",
        where + "no wgmma in its PTX",
    ]
    good = resources.Resources("sm_90", "dq", 128, tiles, 200, 0, 1 << 17, tensor_core=True)
    assert good.problems() == []
