"""Specification of window and shard as two sources: results are those of the whole keys and values.

Run as `test_triton.py` is. Context parallelism and generation hold a window that begins anywhere and a
compact shard, less than all of K and V.
"""

import pytest
import torch
from attention_cases import s2
from selection import exhaustive
from triton_cases import case, cut, on_device

PATTERN = s2(2, sink_blocks=1, phases=(0, 1))
B, L = PATTERN.block_size, PATTERN.local_blocks


def shards(rows: int) -> list[list[int]]:
    """Per KV head, the blocks of its shard that some of the rows see beyond their window."""
    sizes = [PATTERN.shard_prefix(head, rows - 1) for head in range(PATTERN.num_kv_heads)]
    return [[PATTERN.shard_block(head, n) for n in range(size)] for head, size in enumerate(sizes)]


def shard_starts(rows: int) -> tuple[int, ...]:
    """First token of each head's shard in the compact source, with a block of NaN before each."""
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
    ("q_start", "tiles", "scale"),
    [
        (137, cut(64, 32, 50), 0.25),
        *exhaustive((128, cut(64, 32, 50), 0.25), (137, cut(32, 16, 64), 0.25), (137, cut(64, 32, 50), 0.0)),
    ],
    ids=["unaligned", "aligned", "unaligned, small tiles", "scale 0"],
)
def test_a_window_and_a_compact_shard_equal_the_whole(q_start, tiles, scale):
    from megatron_s2.kernels.triton_args import KernelArgs
    from megatron_s2.kernels.triton_dkv import launch_dkv, launch_dkv_shard, launch_dkv_window
    from megatron_s2.kernels.triton_dq import launch_delta, launch_dq
    from megatron_s2.kernels.triton_forward import launch_forward
    from megatron_s2.kernels.triton_pattern import KernelPattern

    one = case(PATTERN, "", tiles, queries=70, q_start=q_start)
    inputs = one.inputs(torch.float32)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    k_start = (q_start // B - L + 1) * B
    rows = PATTERN.num_blocks(k.shape[1])
    call = {"pattern": KernelPattern.of(PATTERN), "scale": scale, "q_start": q_start, "tuning": tiles}
    whole = KernelArgs(q, k, v, **call)
    sources = KernelArgs(
        q, k[:, k_start:], v[:, k_start:], **call, keys_start=k_start,
        k_shard=shard_tokens(k, rows), v_shard=shard_tokens(v, rows), shard_starts=shard_starts(rows),
    )  # fmt: skip

    out, lse = torch.empty_like(q), q.new_empty(1, q.shape[2], q.shape[1])
    launch_forward(whole, out, lse)
    out_2, lse_2 = torch.empty_like(out), torch.empty_like(lse)
    launch_forward(sources, out_2, lse_2)

    delta, lse2, dq, dq_2 = (torch.empty_like(x) for x in (lse, lse, q, q))
    launch_delta(dout, out, lse, delta, lse2)
    launch_dq(whole, dout, lse2, delta, dq)
    launch_dq(sources, dout, lse2, delta, dq_2)
    assert torch.equal(dq, dq_2)
    # Two tiles at a time, which are others across two sources, round otherwise.
    for got, expected in ((out_2, out), (lse_2, lse)):
        assert torch.equal(got, expected) or tiles.forward.keys <= B
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    # One source after the other, in either order.
    out_3, lse_3, dq_3 = (x.new_full(x.shape, float("nan")) for x in (out, lse, dq))
    launch_forward(sources, out_3, lse_3, source="window")
    launch_forward(sources, out_3, lse_3, source="shard", resume=True)
    launch_dq(sources, dout, lse2, delta, dq_3, source="shard")
    launch_dq(sources, dout, lse2, delta, dq_3, source="window", resume=True)
    for got, expected in ((out_3, out), (lse_3, lse), (dq_3, dq)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    exact = [torch.empty_like(k), torch.empty_like(v)]
    launch_dkv(whole, dout, lse2, delta, *exact)
    window = [torch.empty_like(x[:, k_start:]) for x in (k, v)]
    launch_dkv_window(sources, dout, lse2, delta, *window)
    for expected, grad, parts in zip(exact, window, launch_dkv_shard(sources, dout, lse2, delta)):
        got = torch.zeros_like(expected)
        got[:, k_start:] += grad
        for head, part in enumerate(parts[:, :, :, 0].sum(0).split(sources.layout.shard_tokens, 1)):
            for n, block in enumerate(shards(rows)[head]):
                got[:, block * B : block * B + B, head] += part[:, n * B : n * B + B]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
