"""Host time of a layer's attention by the Triton kernels: forward and backward around their launches.

Launches are replaced by nothing, so no GPU is needed: what remains is the work of Python and PyTorch around
them, on CPU tensors whose memory is never touched. A GPU waits for it where a layer computes less than that.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import patch

import torch

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


class _NoKernel:
    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: None


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=200, help="timed layers (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields a row for each number of documents that is not stored."""
    require_positive(repeats=args.repeats)
    torch.set_num_threads(1)
    with ExitStack() as patches:
        patches.enter_context(patch("megatron_s2.kernels.triton_backend.require_supported"))
        for module, names in KERNELS.items():
            for name in names:
                patches.enter_context(patch(f"megatron_s2.kernels.{module}.{name}", _NoKernel()))
        for documents in DOCUMENTS:
            setting = {"tokens": TOKENS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
            setting |= {"documents": documents}
            if not newest_match(stored, setting):
                with OtherLoad() as load:
                    times = interleaved_times({"layer": _layer(documents)}, args.repeats)["layer"]
                yield setting | {"seconds": summary(times[:, 0]), "other_cpus": load.cpus()}


def _layer(documents: int):
    """Returns a function that runs one layer, forward and backward, of an unpacked or packed batch."""
    shapes = [(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
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


def table(rows: list[Row]) -> str:
    newest = {row["documents"]: row for row in rows}
    return "\n".join(
        f"{row['tokens']} tokens, {documents} documents: {1e3 * row['seconds']['median']:.2f} ms "
        f"({1e3 * row['seconds']['p20']:.2f} to {1e3 * row['seconds']['p80']:.2f}) of the host per layer"
        for documents, row in sorted(newest.items())
    )


BENCHMARK = Benchmark(
    name="host-time", help=__doc__, add_arguments=add_arguments, run=run, table=table, takes_device=False
)
