"""Tables that the Triton kernels read on the device."""

import weakref

import torch

from megatron_s2.kernels import triton_args

CPU = torch.device("cpu")


def test_a_table_that_a_cuda_graph_reads_is_never_dropped(monkeypatch):
    def table_made(first: int) -> weakref.ref:
        return weakref.ref(triton_args._on_device(((first, 1, 0, 0),), CPU))

    monkeypatch.setattr(triton_args, "_is_capturing", lambda device: True)
    captured = table_made(10_001)
    monkeypatch.setattr(triton_args, "_is_capturing", lambda device: False)
    eager = table_made(10_002)
    for first in range(1000):
        table_made(first)
    assert captured() is not None
    assert eager() is None
