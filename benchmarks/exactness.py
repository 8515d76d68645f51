"""The check before anything is timed: does an implementation compute what it claims to?

Results are compared for some queries only, so that the check is affordable at the lengths that are timed: the
output of these queries, and all gradients of a loss that depends on them alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.benchmark import WrongResultError
from benchmarks.cases import PASSES, Case
from benchmarks.implementations import Attention, Implementation
from megatron_s2.kernels.compare import Results, require_as_exact_as_plain
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.pattern import S2Pattern

_QUERIES = 32


@dataclass(frozen=True)
class Reference:
    """Results of plain masked attention for one batch element: out `[1, rows, heads, head_dim]`, and dq, dk
    and dv unless only the forward pass is compared.

    Args:
        rows: positions of the compared queries.
        plain: results in the case's dtype.
        exact: results in float64.
    """

    rows: Tensor
    plain: Results
    exact: Results

    @classmethod
    def of(
        cls, case: Case, pattern: S2Pattern, rows: Tensor, element: int = 0, backward: bool = True
    ) -> Reference:
        visible = visible_keys(pattern, rows, case.seq_length).to(case.device)
        *inputs, dout = (x[element : element + 1] for x in case.inputs())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return masked_attention(q[:, rows], k, v, visible, case.shape.head_dim**-0.5, None)[0]

        plain, exact = (
            attention_results(attend, [x.to(dtype) for x in inputs], dout[:, rows], backward)
            for dtype in (dout.dtype, torch.float64)
        )
        return cls(rows, plain, exact)

    def require(self, got: Results) -> None:
        """Raises AssertionError if an error of `got` is larger than `require_as_exact_as_plain` allows."""
        require_as_exact_as_plain(got, self.plain, self.exact)


def attention_results(
    attend: Attention, inputs: list[Tensor], dout: Tensor, backward: bool = True
) -> Results:
    """Returns out, dq, dk and dv of an attention; only out unless `backward`."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    out = attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, dout.to(out.dtype)) if backward else ()
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}


def check(implementation: Implementation, case: Case) -> int:
    """Compares an implementation with plain masked attention in float64.

    Returns:
        Length in tokens of the comparison; less than the case's if memory holds no longer one.

    Raises:
        WrongResultError: an error is larger than `require_as_exact_as_plain` allows.
    """
    case = replace(case, seq_length=checked_length(case, _memory(case.device)))
    rows = compared_rows(case.seq_length, _QUERIES)
    backward = implementation.unavailable(case, PASSES[1]) is None
    attention, pattern = implementation.prepare(case), implementation.pattern(case)
    *inputs, dout = case.inputs()
    got = attention_results(lambda q, k, v: attention(q, k, v)[:, rows], inputs, dout[:, rows], backward)
    try:
        for b in range(case.shape.batch):
            reference = Reference.of(case, pattern, rows, b, backward)
            reference.require({name: x[b : b + 1] for name, x in got.items()})
    except AssertionError as error:
        raise WrongResultError(f"{implementation.name} at {case.seq_length} tokens: {error}") from error
    return case.seq_length


def checked_length(case: Case, memory: int) -> int:
    """Halves the case's length until one batch element fits three fifths of `memory` bytes in float64.

    Memory holds K and V, their copies for each query head, the gradients of both, q and its gradient, and
    about five score matrices of the compared queries.
    """
    length, heads, head_dim = case.seq_length, case.shape.heads, case.shape.head_dim
    while length > 1024 and 8 * length * heads * (8 * head_dim + 5 * _QUERIES) > 0.6 * memory:
        length = -(-length // 2)
    return length


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compared_rows(seq_length: int, count: int) -> Tensor:
    """Returns positions of about `count` evenly spaced queries. The first query is none of them: it sees one
    key, so its exact gradient is 0 and everything else is rounding."""
    return torch.linspace(0, seq_length - 1, count + 1)[1:].round().long().unique()


def visible_keys(pattern: S2Pattern, rows: Tensor, seq_length: int) -> Tensor:
    """Returns the keys that each query of `rows` sees, bool `[kv_heads, rows, seq_length]`."""
    B = pattern.block_size
    blocks = torch.zeros(pattern.num_kv_heads, len(rows), pattern.num_blocks(seq_length), dtype=torch.bool)
    for g in range(pattern.num_kv_heads):
        for n, row in enumerate(rows.tolist()):
            blocks[g, n, pattern.row_blocks(g, row // B)] = True
    return blocks.repeat_interleave(B, 2)[..., :seq_length] & (torch.arange(seq_length) <= rows[:, None])
