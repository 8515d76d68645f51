"""Fixtures of all kernel tests: uninitialised memory is NaN, so that reading it shows, and Triton's
interpreter is quick and multiplies bfloat16."""

import os

import pytest
import torch
from interpreter import multiply_bfloat16, quicken_interpreter

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        return x

    return allocate_nan


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    with pytest.MonkeyPatch.context() as patch:
        for home, name in ALLOCATORS:
            patch.setattr(home, name, poisoned(getattr(home, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        quicken_interpreter()
        multiply_bfloat16()
