"""Before anything is timed: does an implementation compute what it claims to?"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.benchmark import WrongResultError
from benchmarks.cases import PASSES, Case
from benchmarks.implementations import Attention, Implementation
from megatron_s2.kernels.compare import require_as_exact_as_plain
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.pattern.s2_pattern import S2Pattern

_QUERIES = 32


def check(implementation: Implementation, case: Case) -> int:
    """Compares output and gradients with plain masked attention in float64.

    For some queries only, so that it is affordable at the very size that is timed: their output, and all
    gradients when the loss depends on these queries alone.

    Returns:
        Tokens at which it was done: fewer than the case's where memory holds the comparison at fewer only.

    Raises:
        WrongResultError: an error is larger than the house's rule allows.
    """
    case = replace(case, seq_length=checked_length(case, _memory(case.device)))
    *inputs, dout = case.inputs()
    # Not the first query: it sees one key, so its exact gradient is 0 and all else is rounding.
    rows = torch.linspace(0, case.seq_length - 1, _QUERIES + 1)[1:].round().long().unique()
    visible = visible_keys(implementation.pattern(case), rows, case.seq_length).to(case.device)
    dout, rows = dout[:, rows], rows.to(case.device)
    backward = implementation.unavailable(case, PASSES[1]) is None
    attention = implementation.prepare(case)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q[:, rows], k, v, visible, case.shape.head_dim**-0.5, None)[0]

    got = _results(lambda q, k, v: attention(q, k, v)[:, rows], inputs, dout, inputs[0].dtype, backward)
    try:
        for b in range(case.shape.batch):
            one = [x[b : b + 1] for x in inputs], dout[b : b + 1]
            require_as_exact_as_plain(
                got={name: x[b : b + 1] for name, x in got.items()},
                plain=_results(plain, *one, inputs[0].dtype, backward),
                exact=_results(plain, *one, torch.float64, backward),
            )
    except AssertionError as error:
        raise WrongResultError(f"{implementation.name} at {case.seq_length} tokens: {error}") from error
    return case.seq_length


def _results(
    attend: Attention, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype, backward: bool
) -> dict[str, Tensor]:
    inputs = [x.detach().to(dtype).requires_grad_(backward) for x in inputs]
    out = attend(*inputs)
    results = {"out": out.detach()}
    if backward:
        gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
        results |= zip(("dq", "dk", "dv"), gradients)
    return results


def checked_length(case: Case, memory: int) -> int:
    """The case's length, halved until one batch element fits three fifths of `memory` in float64.

    What stays are K and V, their copies for each query head, the gradients of both, q and its gradient, and
    some five score matrices of the compared queries.
    """
    length, heads, head_dim = case.seq_length, case.shape.heads, case.shape.head_dim
    while length > 1024 and 8 * length * heads * (8 * head_dim + 5 * _QUERIES) > 0.6 * memory:
        length = -(-length // 2)
    return length


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def visible_keys(pattern: S2Pattern, rows: Tensor, seq_length: int) -> Tensor:
    """Bool `[kv_heads, rows, seq_length]`: the keys that some queries see."""
    B = pattern.block_size
    blocks = torch.zeros(pattern.num_kv_heads, len(rows), pattern.num_blocks(seq_length), dtype=torch.bool)
    for g in range(pattern.num_kv_heads):
        for n, row in enumerate(rows.tolist()):
            blocks[g, n, pattern.row_blocks(g, row // B)] = True
    return blocks.repeat_interleave(B, 2)[..., :seq_length] & (torch.arange(seq_length) <= rows[:, None])
