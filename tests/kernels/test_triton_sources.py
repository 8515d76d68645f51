"""Specification of the two-source contract: a window that begins anywhere and a compact shard are enough.

Run as `test_triton.py` is. Context parallelism and generation hold less than K and V; what the kernels make
of that is what they make of the whole.
"""

import pytest
import torch
from attention_cases import s2
from selection import exhaustive
from triton_cases import case, cut, on_device

PATTERN = s2(2, sink_blocks=1, phases=(0, 1))
B, L = PATTERN.block_size, PATTERN.local_blocks


def shards(rows: int) -> list[list[int]]:
    """Of each KV head, the blocks of its shard that some rows see beyond their window."""
    sizes = [PATTERN.shard_prefix(head, rows - 1) for head in range(PATTERN.num_kv_heads)]
    return [[PATTERN.shard_block(head, n) for n in range(size)] for head, size in enumerate(sizes)]


def places(rows: int) -> tuple[int, ...]:
    """Where each head's shard begins when they lie one after another, a block of NaN before each."""
    sizes = [(len(blocks) + 1) * B for blocks in shards(rows)]
    return tuple(sum(sizes[:head]) + B for head in range(len(sizes)))


def shard_tokens(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The compact shard source `[batch, tokens, 1, dim]`."""
    nothing = x.new_full((x.shape[0], B, x.shape[-1]), float("nan"))
    parts = []
    for head, blocks in enumerate(shards(rows)):
        parts += [nothing, *(x[:, block * B : block * B + B, head] for block in blocks)]
    return torch.cat([*parts, nothing], 1)[:, :, None]


@on_device
@pytest.mark.parametrize(
    ("q_start", "tiles"),
    [(137, cut(64, 32, 50)), *exhaustive((128, cut(64, 32, 50)), (137, cut(32, 16, 64)))],
    ids=["unaligned", "aligned", "unaligned, small tiles"],
)
def test_a_window_slice_and_a_compact_shard_give_what_the_whole_gives(q_start, tiles):
    from megatron_s2.kernels.triton_backend import shape_of
    from megatron_s2.kernels.triton_launch import (
        KernelArgs,
        launch_columns,
        launch_delta,
        launch_rows,
        launch_shard_columns,
        launch_window_columns,
    )

    one = case(PATTERN, "", tiles, queries=70, q_start=q_start)
    inputs = one.inputs(torch.float32)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    k_start = (q_start // B - L + 1) * B
    rows = PATTERN.num_blocks(k.shape[1])
    call = {"shape": shape_of(PATTERN), "scale": 0.25, "cuts": [], "q_start": q_start, "tuning": tiles}
    whole = KernelArgs(q, k, v, **call)
    sources = KernelArgs(
        q, k[:, k_start:], v[:, k_start:], **call, k_start=k_start,
        k_shard=shard_tokens(k, rows), v_shard=shard_tokens(v, rows), places=places(rows),
    )  # fmt: skip

    out, lse = torch.empty_like(q), q.new_empty(1, q.shape[2], q.shape[1])
    launch_rows(whole, "forward", out, lse, None)
    out_2, lse_2 = torch.empty_like(out), torch.empty_like(lse)
    launch_rows(sources, "forward", out_2, lse_2, None)
    assert torch.equal(out, out_2) and torch.equal(lse, lse_2)

    delta, dq, dq_2 = torch.empty_like(lse), torch.empty_like(q), torch.empty_like(q)
    launch_delta(dout, out, None, delta)
    launch_rows(whole, "dq", dq, lse, None, dout, delta)
    launch_rows(sources, "dq", dq_2, lse, None, dout, delta)
    assert torch.equal(dq, dq_2)

    # One source after the other, in either order.
    out_3, lse_3, dq_3 = (x.new_full(x.shape, float("nan")) for x in (out, lse, dq))
    launch_rows(sources, "forward", out_3, lse_3, None, source="window")
    launch_rows(sources, "forward", out_3, lse_3, None, source="shard", resume=True)
    launch_rows(sources, "dq", dq_3, lse, None, dout, delta, source="shard")
    launch_rows(sources, "dq", dq_3, lse, None, dout, delta, source="window", resume=True)
    for got, expected in ((out_3, out), (lse_3, lse), (dq_3, dq)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    exact = [torch.empty_like(k), torch.empty_like(v)]
    launch_columns(whole, dout, lse, delta, *exact)
    window = [torch.empty_like(x[:, k_start:]) for x in (k, v)]
    launch_window_columns(sources, dout, lse, delta, *window)
    for expected, of_window, of_shard in zip(exact, window, launch_shard_columns(sources, dout, lse, delta)):
        got = torch.zeros_like(expected)
        got[:, k_start:] += of_window
        for head, part in enumerate(of_shard.sum(0).split(sources.seen, 1)):
            for n, block in enumerate(shards(rows)[head]):
                got[:, block * B : block * B + B, head] += part[:, n * B : n * B + B]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
