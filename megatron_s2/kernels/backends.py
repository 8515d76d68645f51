"""Choice of the implementation of S2 attention: `reference`, `torch` or `triton`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_s2.kernels.reference import reference_attention
from megatron_s2.kernels.slice import SequenceSlice
from megatron_s2.kernels.torch_backend import blocked_attention
from megatron_s2.kernels.torch_slice import TorchSlice
from megatron_s2.kernels.triton_backend import triton_attention
from megatron_s2.kernels.triton_support import MAX_HEAD_DIM
from megatron_s2.kernels.tuning import Tuning

BACKENDS = ("reference", "torch", "triton")


def choose_backend(backend: str, q: Tensor, v: Tensor) -> str:
    """Returns `backend`, or for `auto` triton on a GPU where its kernels support the inputs, else torch.

    Raises:
        ValueError: there is no such backend.
    """
    if backend == "auto":
        supported = q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM
        return "triton" if q.is_cuda and supported else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: must be auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return backend


def attention_function(
    backend: str, tuning: Tuning | Literal["autotune"] | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the function of a backend; its arguments are those of `reference_attention`."""
    if backend == "triton":
        return partial(triton_attention, tuning=tuning)
    return reference_attention if backend == "reference" else blocked_attention


def slice_class(backend: str) -> type[SequenceSlice]:
    """Returns the class that computes attention of a sequence slice.

    Raises:
        ValueError: the backend has no such class.
    """
    if backend == "torch":
        return TorchSlice
    if backend == "triton":
        # Imported here because it imports Triton.
        from megatron_s2.kernels.triton_slice import TritonSlice

        return TritonSlice
    raise ValueError(f"backend {backend!r}: must be auto, torch or triton with schedule gather")
