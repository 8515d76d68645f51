"""Host time of a layer's attention by the Triton kernels: forward and backward around their launches.

Launches are replaced by nothing, so no GPU is needed: what remains is the work of Python and PyTorch around
them, on CPU tensors whose memory is never touched. What Triton does inside a launch is not counted; nor are
the tables of packed documents, which all layers of a micro-batch share. A GPU waits for the host where a
layer computes less than that.

Times are CPU time of the process. Beside them stands the same for an autograd function that allocates the
same tensors and does nothing else.
"""

from __future__ import annotations

import ctypes
import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Row
from benchmarks.measure import OtherLoad, interleaved_times, summary
from benchmarks.options import require_positive
from benchmarks.results import newest_match
from megatron_s2 import S2Pattern, s2_attention

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 131_072, 32, 8, 128
DOCUMENTS = (1, 64, 512)  # 1: not packed
PATTERN = S2Pattern(num_kv_heads=KV_HEADS, block_size=64, local_blocks=8, vert_stride=16)
KERNELS = {
    "triton_forward": ("s2_fwd_kernel",),
    "triton_dq": ("s2_bwd_kernel_delta", "s2_bwd_kernel_dq"),
    "triton_dkv": ("s2_bwd_kernel_dkv_shard", "s2_bwd_kernel_dkv_window"),
}


# Parameters of glibc's mallopt and their defaults (malloc.h, mallopt(3)).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 128 << 10, M_MMAP_MAX: 65536}


class _NoKernel:
    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: None


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """Context in which freed memory stays with the process, as that of a GPU stays with PyTorch's allocator.

    Otherwise the system maps a gigabyte for each large tensor and takes it back, which no GPU waits for.

    Raises:
        ValueError: the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise ValueError("host-time: must run with glibc, whose mallopt keeps freed memory")
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    mallopt(M_TOP_PAD, (1 << 31) - 1)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            mallopt(parameter, value)


class _Nothing(torch.autograd.Function):
    """Allocates what a layer allocates: results, gradients, two row sums and float32 parts of dK and dV."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), _row_sums(q)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, _, _ = ctx.saved_tensors
        gradients = tuple(map(torch.empty_like, (q, k, v)))
        _row_sums(q), _row_sums(q)
        for x in (k, v):
            x.new_empty(x[..., :: PATTERN.vert_stride, :, :].shape, dtype=torch.float32)
        return gradients


def _row_sums(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=200, help="timed layers (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields a row for each number of documents that is not stored."""
    require_positive(repeats=args.repeats)
    torch.set_num_threads(1)
    with ExitStack() as patches:
        patches.enter_context(_freed_memory_kept())
        # CPU tensors are then allowed; all else is checked.
        patches.enter_context(patch("megatron_s2.kernels.triton_common.INTERPRETED", True))
        for module, names in KERNELS.items():
            for name in names:
                patches.enter_context(patch(f"megatron_s2.kernels.{module}.{name}", _NoKernel()))
        for documents in DOCUMENTS:
            setting = {"tokens": TOKENS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
            setting |= {"documents": documents, "clock": "process"}
            if not newest_match(stored, setting):
                with OtherLoad() as load:
                    runs = {"seconds": _layer(documents), "nothing_seconds": _nothing()}
                    times = interleaved_times(runs, args.repeats, clock=time.process_time)
                seconds = {name: summary(each[:, 0]) for name, each in times.items()}
                yield setting | seconds | {"other_cpus": load.cpus()}


def _layer(documents: int):
    """Returns a function that runs one layer, forward and backward, of an unpacked or packed batch."""
    q, k, v = _inputs()
    dout, packed = torch.empty_like(q), {}
    if documents == 1:
        q, k, v, dout = (x.detach()[None].requires_grad_() for x in (q, k, v, dout))
    else:
        edges = random.Random(1).sample(range(1, TOKENS), documents - 1)
        packed = {"cu_seqlens": [0, *sorted(edges), TOKENS]}

    def run():
        out = s2_attention(q, k, v, PATTERN, return_lse=False, backend="triton", **packed)
        yield torch.autograd.grad(out, (q, k, v), dout)

    return run


def _nothing():
    q, k, v = _inputs()
    dout = torch.empty_like(q)

    def run():
        yield torch.autograd.grad(_Nothing.apply(q, k, v), (q, k, v), dout)

    return run


def _inputs() -> list[Tensor]:
    shapes = [(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def table(rows: list[Row]) -> str:
    newest = {row["documents"]: row for row in rows if row.get("clock") == "process"}
    return "\n".join(
        f"{row['tokens']} tokens, {documents} documents: {1e3 * row['seconds']['median']:.2f} ms "
        f"({1e3 * row['seconds']['p20']:.2f} to {1e3 * row['seconds']['p80']:.2f}) of the host per layer; "
        f"an autograd function that does nothing: {1e3 * row['nothing_seconds']['median']:.2f} ms"
        for documents, row in sorted(newest.items())
    )


BENCHMARK = Benchmark(
    name="host-time", help=__doc__, add_arguments=add_arguments, run=run, table=table, takes_device=False
)
