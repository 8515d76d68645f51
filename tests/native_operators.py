"""Tests of the CPU operators in C++."""

import shutil

import pytest

from megatron_s2.kernels import torch_native


def require_native() -> None:
    """Skips the test where there is no compiler; one that fails is an error."""
    if torch_native.load() is None:
        if shutil.which(torch_native.compiler()[0]) is None:
            pytest.skip("no compiler for the operators in C++")
        pytest.fail("the operators in C++ do not compile, see the warning")
