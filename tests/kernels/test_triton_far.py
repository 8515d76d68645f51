"""Specification of the Triton kernels where offsets exceed 2^31 elements: 32-bit arithmetic would wrap.

Run as `test_triton.py` is. The tensors are few tokens far apart, so that they take address space, not memory.
"""

import mmap

import pytest
import torch
from attention_cases import packed, s2
from interpreter import check_overflow
from selection import exhaustive
from triton_cases import DEVICE, INTERPRETED, case, cut, on_device

from megatron_s2.kernels.compare import attention_results

NO_RESERVE = 0x4000  # of Linux; `mmap.MAP_NORESERVE` from Python 3.13 on


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, the last token more than 2^31 elements after the first."""
    dim = x.dim() - 3  # of tokens
    strides = [stride if d > dim else 0 for d, stride in enumerate(x.stride())]
    strides[dim] = 2**31 // (x.shape[dim] - 1) // 64 * 64 + 64
    elements = strides[dim] * x.shape[dim]
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = mmap.mmap(-1, elements * x.element_size(), flags=flags)
        flat = torch.frombuffer(memory, dtype=x.dtype)
    else:
        flat = torch.empty(elements, dtype=x.dtype, device=x.device)
    far = flat.as_strided(x.shape, strides)
    assert (x.shape[dim] - 1) * strides[dim] > 2**31
    return far.copy_(x)


@pytest.fixture
def overflow_is_an_error():
    if INTERPRETED:
        check_overflow(True)
    yield
    if INTERPRETED:
        check_overflow(False)


@on_device
@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize("options", [{"queries": 60}, *exhaustive(packed(40, 20))], ids=["batch", "packed"])
def test_tokens_far_apart_change_no_bit(options):
    near = case(s2(2, sink_blocks=1), "", cut(32, 16, 64), group=2, **options)
    inputs = near.inputs(torch.float32)
    expected = attention_results(near.attention("triton"), **inputs)
    far = inputs | {name: far_apart(inputs[name]) for name in ("q", "k", "v", "dout")}
    got = attention_results(near.attention("triton"), **far)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
