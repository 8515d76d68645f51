"""What a Megatron layer needs around it, without a run: a device, process groups."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def cpu_device(monkeypatch):
    """Layers are built on the CPU; Megatron's own attention finds its scratch memory and random state."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.utils import GlobalMemoryBuffer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    monkeypatch.setattr(
        tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=lambda: nullcontext())
    )


@pytest.fixture
def one_rank():
    """Process groups of one rank, as far as core attention asks them."""
    return SimpleNamespace(tp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))


@pytest.fixture
def second_of_two_ranks():
    """Tensor-parallel rank 1 of 2, in a process group that communicates with nobody."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield SimpleNamespace(tp=distributed.group.WORLD)
    distributed.destroy_process_group()
