"""Attention of new tokens to themselves and to a KV cache, which stores them.

One token per sequence reads the cache as it is stored (`_decode`), on a GPU with the kernels of
`triton_decode`. Several tokens of an empty sequence are a call of `s2_attention`. Several tokens that follow
cached ones are a `SequenceSlice`: its window is the cached window followed by the new tokens, and its shards
are those that the new tokens will see.

What sequences share (`SharedEntries`) is read once for all of them, and merged by log-sum-exp into what each
reads for itself. If the cache is spread over ranks, each reads what it keeps, for the same queries. Attention
and log-sum-exp are gathered and merged; keys and values stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.backends import choose_backend, slice_class
from megatron_s2.kernels.numerics import autocast_dtype, autocast_off, compute_dtype, merge_parts
from megatron_s2.kernels.query_heads import repeated_for
from megatron_s2.kernels.triton_support import require_supported
from megatron_s2.kv_cache.cache import HeadStorage, KVCache, SharedEntries, refuse_gradients, take_blocks
from megatron_s2.kv_cache.decode_step import DecodeStep
from megatron_s2.parallel.collectives import ContextParallelGroup

# Log-sum-exp of no keys. It is finite, so that two of them merge to zeros instead of NaN.
_NO_KEYS = -1e30


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
    """Returns what `s2_attention` over the whole sequences returns for their new tokens, without gradients.

    One token of each sequence is stored as planned (`plan_step`), and the host waits for nothing. Under
    autocast, q, k and v are cast to its dtype, which must then be the cache's.

    Args:
        q: queries of the new tokens `[batch, tokens, heads, head_dim]`.
        k, v: keys and values of the new tokens `[batch, tokens, kv_heads, head_dim]`; the cache stores what
            later tokens see of them, repeated for the query heads if its pattern has a head for each.
        cache: the tokens so far; changed in place. If it is spread over ranks, all of them call this with the
            same queries, keys and values, and get the same result.
        softmax_scale: factor on the scores; default 1 / sqrt(head_dim).
        sink_logits: `[heads]`, a logit per query head that joins the softmax with no value.
        new: number of real tokens of each row, the first ones of the row; None if all are real.
        backend: as in `s2_attention`. `reference` cannot read cached tokens; the torch backend reads them.

    Returns:
        `[batch, tokens, heads, head_dim]` in the dtype of `q`; zeros for tokens that are not real.

    Raises:
        ValueError: an argument does not fit the others, or gradients of it are recorded; the message starts
            with its name.
    """
    if (dtype := autocast_dtype(q)) is not None:
        with autocast_off(q):
            q, k, v = (x.to(dtype) for x in (q, k, v))
            return cached_attention(q, k, v, cache, softmax_scale, sink_logits, new, backend)
    refuse_gradients(q=q, **({} if sink_logits is None else {"sink_logits": sink_logits}))
    k, v = repeated_for(cache.pattern, q, k, v)
    counts = cache.new_counts(k, v, new)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}: must be [batch, tokens, heads, head_dim] for k {tuple(k.shape)}"
        )
    if q.dtype != cache.dtype:
        raise ValueError(f"q {q.dtype}: must have the cache's {cache.dtype}")
    if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)}: must be [heads] = [{q.shape[2]}]")
    backend = choose_backend(backend, q, v)
    if backend == "triton":
        require_supported(q, v)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    with torch.no_grad():
        if q.shape[1] == 1:
            return _decode(q, k, v, cache, scale, sink_logits, counts, backend)
        if cache.group is None and not any(cache.lengths) and min(counts) == q.shape[1]:
            out = _attend_from_start(q, k, v, cache, scale, sink_logits, backend)
            cache.append(k, v)
            return out
        out = torch.zeros_like(q)
        for row, count in enumerate(counts):
            if count:
                part = slice(row, row + 1), slice(count)
                window = cache.window(row, k[row, :count], v[row, :count])
                if cache.lengths[row] or cache.group is not None:
                    out[part] = _attend_from_cache(q[part], window, row, cache, scale, sink_logits, backend)
                else:
                    out[part] = _attend_from_start(
                        q[part], k[part], v[part], cache, scale, sink_logits, backend
                    )
                cache.commit(row, window, count)
        return out


def _attend_from_start(q, k, v, cache, scale, sink_logits, backend) -> Tensor:
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
    step, q = cache.write(k, v, rows), q[:, 0]
    if backend == "triton" and cache.group is None and not cache.shared:
        out = _call_triton(q, cache.storages, step, scale, sink_logits)
    else:
        read = _read_in_triton if backend == "triton" else _read_in_torch
        out, lse = read(q, cache.storages, step, scale)
        for entries in cache.shared:
            _merge_shared(out, lse, q, cache.storages, entries, scale)
        if cache.group is not None:
            out, lse = _merge_ranks(out, lse, cache.group)
        if sink_logits is not None:
            out *= _key_share(lse, sink_logits)
        if len(rows) < cache.batch:
            idle = torch.ones(cache.batch, dtype=torch.bool, device=q.device)
            out.masked_fill_(idle.index_fill_(0, step.row_index, False)[:, None, None], 0)
        out = out.to(q.dtype)
    cache.evict()
    return out[:, None]


def _call_triton(q: Tensor, storages: list[HeadStorage], step: DecodeStep, *others):
    # Imported here because it imports Triton.
    from megatron_s2.kernels.triton_decode import decode_attention

    return decode_attention(q, [(x.k, x.v) for x in storages], step.read_table, *others)


def _read_in_triton(q: Tensor, storages: list[HeadStorage], step: DecodeStep, scale) -> tuple[Tensor, Tensor]:
    """`_read_in_torch` in Triton."""
    out, lse = _call_triton(q, storages, step, scale, None, True)
    return out.to(lse.dtype), lse.clamp_(min=_NO_KEYS)


def _read_in_torch(q: Tensor, storages: list[HeadStorage], step: DecodeStep, scale) -> tuple[Tensor, Tensor]:
    """Attention of q `[batch, heads, head_dim]` to the entries that a step reads, and its log-sum-exp
    `[batch, heads]`, in the dtype of sums; zeros and `_NO_KEYS` where it reads none."""
    kv_heads, dtype = len(step.read[0]), compute_dtype(q.dtype)
    out, lse = (
        torch.zeros(q.shape, dtype=dtype, device=q.device),
        q.new_full(q.shape[:2], _NO_KEYS, dtype=dtype),
    )
    grouped, out_g, lse_g = (x.unflatten(1, (kv_heads, -1)) for x in (q, out, lse))
    for storage in storages:
        heads = slice(storage.heads.start, storage.heads.stop)
        counts = [row[heads] for row in step.read]
        keys = storage.k, storage.v
        part = _attend_to_first(grouped[:, heads], *keys, counts, step.read_table[:, heads], scale)
        if part is not None:
            out_g[:, heads], lse_g[:, heads] = part
    return out, lse


def _merge_shared(
    out: Tensor, lse: Tensor, q: Tensor, storages: list[HeadStorage], entries: SharedEntries, scale: float
) -> None:
    """Merges attention to shared entries into that of the sequences which share them.

    The queries of all these sequences are the rows of one attention, so that the keys are read once.
    """
    kv_heads, sharers = len(entries.tokens), len(entries.rows)
    grouped, out_g, lse_g = (x.unflatten(1, (kv_heads, -1)) for x in (q, out, lse))
    everyone = sharers == len(q)
    for storage, (k, v) in zip(storages, entries.parts):
        heads = slice(storage.heads.start, storage.heads.stop)
        # [sharers, heads, group, head_dim] -> [1, heads, sharers * group, head_dim]
        rows = grouped[:, heads] if everyone else grouped[entries.index, heads]
        rows = rows.transpose(0, 1).flatten(1, 2)[None]
        part = _attend_to_first(
            rows, k[None], v[None], [entries.tokens[heads]], entries.table[None, heads], scale
        )
        if part is None:
            continue
        more, more_lse = (x[0].unflatten(1, (sharers, -1)).transpose(0, 1) for x in part)
        here = (slice(None) if everyone else entries.index), heads
        into, into_lse = out_g[here], lse_g[here]  # views, or copies of some rows
        merge_parts(into, into_lse, more.to(out.dtype), more_lse.to(lse.dtype))
        if not everyone:
            out_g[here], lse_g[here] = into, into_lse


def _merge_ranks(out: Tensor, lse: Tensor, group: ContextParallelGroup) -> tuple[Tensor, Tensor]:
    """Merges what every rank has read into `out` `[…, head_dim]` and `lse` `[…]`, the same on all ranks."""
    read = group.all_gather(torch.cat([out, lse[..., None]], -1)[None]).wait()
    outs, lses = read[..., :-1], read[..., -1]
    merged = torch.zeros_like(out)
    for part, weight in zip(outs, lses.softmax(0)):
        merged.addcmul_(part, weight[..., None])
    return merged, lses.logsumexp(0)


def _attend_to_first(
    q: Tensor, k: Tensor, v: Tensor, counts: Sequence[Sequence[int]], table: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Attention of q `[batch, heads, rows, head_dim]` to the first keys of each head, and its log-sum-exp:
    zeros and `_NO_KEYS` for a head without keys. None if no head has any.

    Args:
        counts: number of keys of each sequence and head.
        table: `counts` on the device, `[batch, heads]`.
    """
    longest, shortest = max(map(max, counts)), min(map(min, counts))
    if not longest:
        return None
    mask = _padding_mask(table, longest, q.dtype) if shortest < longest else None
    out, lse = _attend(q, k[:, :, :longest], v[:, :, :longest], mask, scale)
    if not shortest:
        empty = table[..., None] == 0
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, _NO_KEYS)
    return out, lse


def _padding_mask(kept: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Additive `[batch, heads, 1, longest]`: minus infinity behind the first `kept` entries."""
    padding = torch.arange(longest, device=kept.device) >= kept[..., None]
    mask = torch.zeros(padding.shape, dtype=dtype, device=kept.device)
    return mask.masked_fill_(padding, float("-inf"))[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q `[batch, heads, rows, head_dim]` to all keys under an additive mask, and its lse."""
    if q.device.type == "cpu":
        # The CPU kernel takes any strides, except that head_dim must be contiguous.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.contiguous(), k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    dtype = compute_dtype(q.dtype)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(dtype)).to(q.dtype), lse


def _key_share(lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Share of the softmax that keys keep beside a sink: exp(lse) / (exp(lse) + exp(sink))."""
    return torch.sigmoid(lse - sink_logits.to(lse.dtype))[..., None]


# ---------------------------------------------------------------------------------------------------------
# Several tokens of one sequence that follow cached ones.


def _attend_from_cache(q, window, row: int, cache: KVCache, scale, sink_logits, backend: str) -> Tensor:
    q_start = cache.lengths[row]
    shards, bounds = _shards(window, row, cache, q.shape[1])
    queries = slice_class("torch" if backend == "reference" else backend)(
        cache.pattern, scale, q_start, q_start + q.shape[1], cache.window_start(row), bounds
    )
    dtype = compute_dtype(q.dtype)
    out = q.new_zeros(q.shape, dtype=dtype)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), _NO_KEYS, dtype=dtype)
    if cache.reads_window:
        queries.forward("window", q, *(x.transpose(0, 1)[None] for x in window), out, lse)
    queries.forward("shard", q, *shards, out, lse)
    lse = lse.transpose(1, 2)
    if cache.group is not None:
        out, lse = _merge_ranks(out, lse, cache.group)
    if sink_logits is not None:
        out *= _key_share(lse, sink_logits)
    return out.to(q.dtype)


def _shards(window, row: int, cache: KVCache, tokens: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Returns the shards that the new tokens see beyond their windows, and start and stop of each head's.

    The shard of a head consists of the cached shard blocks and the blocks that the window passes meanwhile.
    Keys and values are `[1, tokens, head_dim]`, the shards of the heads one after another.
    """
    p, B, start = cache.pattern, cache.pattern.block_size, cache.window_start(row)
    last = (cache.lengths[row] + tokens - 1) // B
    parts, bounds, offset = ([], []), [], 0
    for g in range(p.num_kv_heads):
        cached = cache.shard_tokens(row, g)
        stop = p.shard_prefix(g, last)
        passed = [p.shard_block(g, n) - start // B for n in range(cached // B, stop)]
        for part, old, new in zip(parts, cache.shard(row, g), window):
            part += old
            if passed:
                whole = new.shape[1] // B * B
                part.append(take_blocks(new[g, :whole].unflatten(0, (-1, B)), passed).flatten(0, 1))
        bounds.append((offset, offset + stop * B))
        offset += stop * B
    return [torch.cat(part)[None] for part in parts], bounds
