"""All kernel tests: uninitialised memory is NaN, so that reading what nobody wrote shows; one thread."""

import pytest
import torch

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
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return allocate_nan


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    with pytest.MonkeyPatch.context() as patch:
        for home, name in ALLOCATORS:
            patch.setattr(home, name, poisoned(getattr(home, name)))
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At the sizes of tests, threads cost more than they bring, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
