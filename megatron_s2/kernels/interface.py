"""`s2_attention`, the public function: checks its arguments, splits documents and calls a backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from megatron_s2.kernels.backends import attention_function, choose_backend
from megatron_s2.kernels.call_cache import cached_in_eager
from megatron_s2.kernels.numerics import autocast_dtype, autocast_off
from megatron_s2.kernels.query_heads import repeated_for
from megatron_s2.kernels.tuning import Tuning
from megatron_s2.pattern import BlockMaskPattern, BlockPattern

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float | None = None,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    q_start: int = 0,
    return_lse: bool = True,
    backend: str = "auto",
    tuning: Tuning | Literal["autotune"] | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """Causal attention in which each head sees the key blocks that its pattern shows (arXiv 2407.17678).

    Under autocast, q, k and v are cast to its dtype, as `scaled_dot_product_attention` does; float64 is not.

    Args:
        q: queries `[batch, seq_q, heads, head_dim]`, any strides; `[tokens, heads, head_dim]` if packed, that
            is with `cu_seqlens`. float16, bfloat16, float32 or float64.
        k: keys `[batch, seq_k, kv_heads, head_dim]`; packed `[tokens, kv_heads, head_dim]`. Query head h
            reads KV head h // (heads / kv_heads).
        v: values, with the shape of `k` except that head_dim may differ.
        pattern: key blocks that each query block of each KV head sees, for which keys and values are never
            expanded. Or those of each query head (a pattern of `heads` heads): they are then repeated for
            the query heads of their group, so that reading and storing them takes heads / kv_heads times
            the bytes, also of their gradients, which are summed at the end; FLOPs are those of the pairs.
        softmax_scale: factor on the scores; default 1 / sqrt(head_dim).
        sink_logits: `[heads]`, a logit per query head that joins the softmax with no value, so that attention
            may go nowhere. `lse` includes it.
        cu_seqlens: int `[documents + 1]`, token offsets of packed documents, non-decreasing from 0 to
            `tokens`. The pattern restarts at the first token of each document. Repeated offsets, with which
            Megatron fills up the array, are empty documents. A tensor costs a device synchronization, a
            sequence of ints does not.
        q_start: position of the first query in tokens, where keys start at 0. Must be 0 with `cu_seqlens`.
        return_lse: also return the log-sum-exp.
        backend: `triton` (CUDA), `torch` (any device), `reference` (quadratic memory, for tests) or `auto`:
            triton on a GPU where its kernels support the inputs, else torch.
        tuning: tile sizes of the Triton kernels. By default the shipped ones, which give the same bits on
            every run. `autotune` measures a few candidates on this GPU when first needed and stores the
            fastest in a file (`megatron_s2.kernels.autotune`). Bits depend on the choice, which may differ
            between ranks on different GPUs or without a common file system. Other backends have no tuning.

    Returns:
        `out` `[batch, seq_q, heads, v_head_dim]` (packed `[tokens, heads, v_head_dim]`) in the dtype of `q`
        and, with `return_lse`, the natural-log `lse` of the scaled scores `[batch, heads, seq_q]` (packed
        `[heads, tokens]`) in float32 (float64 for float64 inputs). Both are differentiable.

    Raises:
        ValueError: an argument does not fit the others; the message starts with its name.
    """
    if (dtype := autocast_dtype(q)) is not None:
        with autocast_off(q):
            q, k, v = (x.to(dtype) for x in (q, k, v))
            return s2_attention(
                q,
                k,
                v,
                pattern,
                softmax_scale,
                sink_logits,
                cu_seqlens,
                q_start,
                return_lse,
                backend,
                tuning,
            )
    _check_tensors(q, k, v, pattern, packed=cu_seqlens is not None)
    k, v = repeated_for(pattern, q, k, v)
    if sink_logits is not None:
        _check_sinks(sink_logits, q)
    backend = choose_backend(backend, q, v)
    _check_tuning(tuning, backend)
    attention = attention_function(backend, tuning)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale

    if cu_seqlens is None:
        if q_start < 0 or q_start + q.shape[1] > k.shape[1]:
            raise ValueError(
                f"q_start {q_start}: must be >= 0 and leave room for {q.shape[1]} queries "
                f"in {k.shape[1]} keys"
            )
        _check_size(pattern, [(0, q_start + q.shape[1])])
        out, lse = attention(q, k, v, pattern, scale, sink_logits, [(0, q.shape[1])], q_start)
    else:
        documents = _documents(cu_seqlens, q.shape[0], q_start)
        _check_size(pattern, documents)
        out, lse = attention(q[None], k[None], v[None], pattern, scale, sink_logits, documents, 0)
        out, lse = out.squeeze(0), lse.squeeze(0)  # whose gradient is a view, unlike that of [0]
    return (out, lse) if return_lse else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, packed: bool) -> None:
    dims, dtype, device = 3 if packed else 4, q.dtype, q.device
    shapes = q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    for name, x, shape in zip("qkv", (q, k, v), shapes):
        if len(shape) != dims:
            layout = (
                "[tokens, heads, head_dim] with cu_seqlens" if packed else "[batch, seq, heads, head_dim]"
            )
            raise ValueError(f"{name} {tuple(shape)}: must be {layout}")
        if x.dtype != dtype or dtype not in _DTYPES:
            raise ValueError(
                f"{name} {x.dtype}: must be float16, bfloat16, float32 or float64, the same for q, k and v"
            )
        if x.device != device:
            raise ValueError(f"{name} on {x.device}: must be on the device of q, {device}")
    heads, kv_heads = q_shape[-2], k_shape[-2]
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(f"v {tuple(v_shape)}: must match k {tuple(k_shape)} but for head_dim")
    for name, shape in (("q", q_shape), ("v", v_shape)):
        if shape[-1] < 1:
            raise ValueError(f"{name} {tuple(shape)}: must have a head_dim >= 1")
    if q_shape[-1] != k_shape[-1]:
        raise ValueError(f"k {tuple(k_shape)}: must have the head_dim of q, {q_shape[-1]}")
    if q_shape[0] != k_shape[0]:
        raise ValueError(
            f"k {tuple(k_shape)}: must have the {'tokens' if packed else 'batch'} of q, {q_shape[0]}"
        )
    if pattern.num_kv_heads not in (kv_heads, heads):
        raise ValueError(
            f"pattern for {pattern.num_kv_heads} heads: must be for the {kv_heads} heads of k, or for the "
            f"{heads} heads of q"
        )
    if heads % kv_heads:
        raise ValueError(f"k with {kv_heads} heads: must divide the {heads} heads of q")


def _check_tuning(tuning: Tuning | str | None, backend: str) -> None:
    if isinstance(tuning, str) and tuning != "autotune":
        raise ValueError(f"tuning {tuning!r}: must be a Tuning, autotune or None")
    if isinstance(tuning, Tuning) and backend != "triton":
        raise ValueError(f"tuning {tuning}: must be None with backend {backend}, which has nothing to tune")


def _check_size(pattern: BlockPattern, documents: Sequence[tuple[int, int]]) -> None:
    if not isinstance(pattern, BlockMaskPattern):
        return
    tokens = max((stop - start for start, stop in documents), default=0)
    if pattern.num_blocks(tokens) > pattern.max_blocks:
        raise ValueError(
            f"pattern of {pattern.max_blocks} blocks: must have the {pattern.num_blocks(tokens)} of {tokens} "
            "tokens"
        )


def _check_sinks(sink_logits: Tensor, q: Tensor) -> None:
    if sink_logits.shape != q.shape[-2:-1]:
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)}: must be [heads] = [{q.shape[-2]}]")
    if sink_logits.dtype not in _DTYPES:
        raise ValueError(f"sink_logits {sink_logits.dtype}: must be float16, bfloat16, float32 or float64")
    if sink_logits.device != q.device:
        raise ValueError(f"sink_logits on {sink_logits.device}: must be on the device of q, {q.device}")


def _documents(cu_seqlens: Tensor | Sequence[int], tokens: int, q_start: int) -> tuple[tuple[int, int], ...]:
    """Returns start and stop of each document that has tokens."""
    if q_start:
        raise ValueError(f"q_start {q_start}: must be 0 with cu_seqlens")
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: must be int [documents + 1]"
            )
        cu_seqlens = cu_seqlens.tolist()
    return _between(tuple(cu_seqlens), tokens)


@cached_in_eager(maxsize=64)
def _between(offsets: tuple[int, ...], tokens: int) -> tuple[tuple[int, int], ...]:
    """The documents between the offsets, for equal ones the same object: all layers ask for them."""
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or list(offsets) != sorted(offsets):
        raise ValueError(
            f"cu_seqlens {[*offsets[:4]]} … {[*offsets[-1:]]}: must not decrease, from 0 to {tokens} tokens"
        )
    return tuple((start, stop) for start, stop in pairwise(offsets) if stop > start)
