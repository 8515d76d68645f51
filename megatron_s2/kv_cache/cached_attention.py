"""Attention of new tokens to themselves and to what a KV cache holds, which takes them up on the way.

One token of each sequence is read against the cache as it lies there (`_decode`), on a GPU by the kernels of
`triton_decode`. Several tokens of an empty sequence are plain `s2_attention`; several behind cached ones are
two sources (`torch_pieces`, `triton_pieces`): the cached window with the new tokens behind it, and the shards
as they will be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.interface import choose_backend
from megatron_s2.kernels.torch_slice import TorchSlice
from megatron_s2.kernels.triton_backend import require_supported
from megatron_s2.kv_cache.cache import KVCache, Run

_BACKENDS = ("auto", "reference", "torch", "triton")


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    softmax_scale: float | None = None,
    sink_logits: Tensor | None = None,
    new: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `s2_attention` would give for new tokens at the end of all that their sequences have had.

    Without gradients.

    Args:
        q: queries of the new tokens `[batch, tokens, heads, head_dim]`.
        k, v: their keys and values `[batch, tokens, kv_heads, head_dim]`; what later tokens see of them stays
            in the cache.
        cache: what there is of the tokens before; changed in place.
        softmax_scale: factor on the scores; 1 / sqrt(head_dim) by default.
        sink_logits: `[heads]`, a logit per query head that joins the softmax with no value.
        new: how many of the tokens are real in each row, the first ones; None for all.
        backend: as in `s2_attention`; what `reference` has no code for, cached tokens, is left to PyTorch.

    Returns:
        `[batch, tokens, heads, head_dim]` in the dtype of `q`; zeros for tokens that are not real.

    Raises:
        ValueError: an argument does not fit the others; the message starts with its name.
    """
    counts = cache.counts(k, v, new)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}: must be [batch, tokens, heads, head_dim] for k {tuple(k.shape)}"
        )
    if q.dtype != cache.dtype:
        raise ValueError(f"q {q.dtype}: must have the cache's {cache.dtype}")
    if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)}: must be [heads] = [{q.shape[2]}]")
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r}: must be {', '.join(_BACKENDS[:-1])} or {_BACKENDS[-1]}")
    backend = choose_backend(q, v) if backend == "auto" else backend
    if backend == "triton":
        require_supported(q, v)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    with torch.no_grad():
        if q.shape[1] == 1:
            return _decode(q, k, v, cache, scale, sink_logits, counts, backend)
        if not any(cache.lengths) and min(counts) == q.shape[1]:
            out = _whole(q, k, v, cache, scale, sink_logits, backend)
            cache.append(k, v)
            return out
        out = torch.zeros_like(q)
        for row, count in enumerate(counts):
            if count:
                part = slice(row, row + 1), slice(count)
                begun = cache.lengths[row] > 0
                window = cache.window(row, k[row, :count], v[row, :count])
                if begun:
                    out[part] = _behind(q[part], window, row, cache, scale, sink_logits, backend)
                else:
                    out[part] = _whole(q[part], k[part], v[part], cache, scale, sink_logits, backend)
                cache.settle(row, window, count)
        return out


def _whole(q, k, v, cache, scale, sink_logits, backend) -> Tensor:
    return s2_attention(
        q, k, v, cache.pattern, scale, sink_logits=sink_logits, return_lse=False, backend=backend
    )


# ---------------------------------------------------------------------------------------------------------
# One token of each sequence. The query heads of a KV head become the rows of its attention, so keys are read
# once and never expanded.


def _decode(q, k, v, cache: KVCache, scale, sink_logits, counts: list[int], backend: str) -> Tensor:
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return torch.zeros_like(q)
    cache.write(k, v, rows)
    heads = range(cache.pattern.num_kv_heads)
    kept = [[cache.kept(row, g) if count else 0 for g in heads] for row, count in enumerate(counts)]
    decode = _decode_in_triton if backend == "triton" else _decode_in_torch
    out = decode(q[:, 0], cache.runs, kept, scale, sink_logits)
    cache.forget()
    return out[:, None]


def _decode_in_triton(q: Tensor, runs: list[Run], kept: list[list[int]], scale, sink_logits) -> Tensor:
    """As `_decode_in_torch`, with one small copy to the GPU that the host does not wait for."""
    from megatron_s2.kernels.triton_decode import decode_attention

    counts = torch.tensor(kept, dtype=torch.int32, pin_memory=q.is_cuda).to(q.device, non_blocking=True)
    return decode_attention(q, [(run.k, run.v) for run in runs], counts, scale, sink_logits)


def _decode_in_torch(q: Tensor, runs: list[Run], kept: list[list[int]], scale, sink_logits) -> Tensor:
    """Attention of `[batch, heads, head_dim]` to the first `kept` entries of each row and KV head; zeros for
    a row that has none."""
    out = torch.zeros_like(q)
    grouped, result = (x.unflatten(1, (len(kept[0]), -1)) for x in (q, out))  # [batch, kv_heads, group, dim]
    sinks = None if sink_logits is None else sink_logits.unflatten(0, (len(kept[0]), -1))
    for run in runs:
        heads = slice(run.heads.start, run.heads.stop)
        of_run = [of_row[heads] for of_row in kept]
        longest = max(map(max, of_run))
        mask = None
        if longest > min(map(min, of_run)):
            mask = _beyond(torch.tensor(of_run, device=q.device), longest, q.dtype)
        part, lse = _attend(grouped[:, heads], run.k[:, :, :longest], run.v[:, :, :longest], mask, scale)
        if sinks is not None:
            part = part * _share(lse, sinks[heads]).to(part.dtype)
        result[:, heads] = part
    nothing = [row for row, of_row in enumerate(kept) if not any(of_row)]
    if nothing:
        out[nothing] = 0
    return out


def _beyond(kept: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Additive `[batch, heads, 1, longest]`: minus infinity beyond what each row and head holds."""
    empty = torch.arange(longest, device=kept.device) >= kept[..., None]
    return torch.zeros(empty.shape, dtype=dtype, device=kept.device).masked_fill_(empty, float("-inf"))[
        :, :, None
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `[batch, heads, rows, head_dim]` to all keys that `mask` leaves, and its log-sum-exp."""
    if q.device.type == "cpu":
        # It takes strides as they are, but wants the elements of a head side by side.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.contiguous(), k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * scale
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(compute)).to(q.dtype), lse


def _share(lse: Tensor, sink_logits: Tensor) -> Tensor:
    """The share of the softmax that keys keep beside a sink: exp(lse) / (exp(lse) + exp(sink))."""
    return torch.sigmoid(lse - sink_logits.to(lse.dtype))[..., None]


# ---------------------------------------------------------------------------------------------------------
# Several tokens of one sequence behind cached ones.


def _behind(q, window, row: int, cache: KVCache, scale, sink_logits, backend: str) -> Tensor:
    q_start = cache.lengths[row]
    shards, places = _shards(window, row, cache, q.shape[1])
    piece = _kind_of_piece(backend)(
        cache.pattern, scale, q_start, q_start + q.shape[1], cache.window_start(row), places
    )
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape, dtype=compute)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)
    piece.forward("window", q, *(x.transpose(0, 1)[None] for x in window), out, lse)
    piece.forward("shard", q, *shards, out, lse)
    if sink_logits is not None:
        out *= _share(lse, sink_logits[:, None]).transpose(1, 2)
    return out.to(q.dtype)


def _kind_of_piece(backend: str) -> type:
    if backend == "triton":
        from megatron_s2.kernels.triton_slice import TritonSlice

        return TritonSlice
    return TorchSlice


def _shards(window, row: int, cache: KVCache, tokens: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """What the new queries see beyond their windows, `[1, tokens, head_dim]` with the heads one after
    another, and where each head's begins and ends: what is cached of the shard, and the blocks that the
    window passes on the way."""
    p, B, start = cache.pattern, cache.pattern.block_size, cache.window_start(row)
    last = (cache.lengths[row] + tokens - 1) // B
    parts, places, place = ([], []), [], 0
    for g in range(p.num_kv_heads):
        cached = cache.shard_tokens(row, g)
        stop = p.shard_prefix(g, last)
        passed = [p.shard_block(g, n) - start // B for n in range(cached // B, stop)]
        for part, old, new in zip(parts, cache.entries(row, g), window):
            part.append(old[:cached])
            if passed:
                whole = new.shape[1] // B * B
                part.append(new[g, :whole].unflatten(0, (-1, B))[passed].flatten(0, 1))
        places.append((place, place + stop * B))
        place += stop * B
    return [torch.cat(part)[None] for part in parts], places
