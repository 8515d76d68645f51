"""S2 attention on a GPU: brings the arguments of `s2_attention` into the form of the custom operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

import megatron_s2.kernels.triton_ops  # noqa: F401  (registers torch.ops.megatron_s2)
from megatron_s2.kernels.triton_pattern import KernelPattern, edges_code, mask_pairs, mask_tables
from megatron_s2.kernels.triton_support import capability_of, require_supported
from megatron_s2.kernels.tuning import Tuning, tuning_for
from megatron_s2.pattern import BlockPattern, S2Pattern


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float,
    sink_logits: Tensor | None,
    documents: Sequence[tuple[int, int]],
    q_start: int,
    tuning: Tuning | Literal["autotune"] | None = None,
) -> tuple[Tensor, Tensor]:
    """S2 attention on a GPU; arguments and results as in `reference_attention`.

    Args:
        tuning: as in `s2_attention`.

    Raises:
        ValueError: the kernels do not support the device, the dtype or a head_dim.
    """
    require_supported(q, v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    if tuning == "autotune":
        tuning_code = ""
    else:
        head_dim = max(q.shape[-1], v.shape[-1])
        tuning = tuning or tuning_for(capability_of(q.device), head_dim, q.element_size())
        tuning_code = tuning.code
    is_packed = len(documents) != 1 or documents[0] != (0, q.shape[1])
    edges = edges_code(tuple(documents)) if is_packed else ""
    tables, pairs = (None, None), 0
    if not isinstance(pattern, S2Pattern):
        tables, pairs = mask_tables(pattern, q.device), mask_pairs(pattern, documents, q_start)
    return torch.ops.megatron_s2.attention_forward.default(
        q, k, v, sink_logits, *tables, KernelPattern.of(pattern).code, pairs, softmax_scale, edges,
        q_start, tuning_code,
    )  # fmt: skip
