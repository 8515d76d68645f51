"""Arithmetic that every backend shares: dtypes, also under autocast, and the sink's part of the softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which attention is summed: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype in which attention of `x` has to run under autocast; None outside of it.

    As for `scaled_dot_product_attention`, float64 stays as it is.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or x.is_meta:  # where autocast does not exist
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast_off(x: Tensor) -> torch.autocast:
    """Context in which sums in float32 stay in float32, whatever surrounds it."""
    return torch.autocast(x.device.type, enabled=False)


def merge_parts(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merges attention over further keys into `out` `[…, head_dim]` and `lse` `[…]`, in place.

    The weights exp(lse - total) and exp(more_lse - total) with total = logaddexp(lse, more_lse) are
    sigmoids.
    """
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def merge_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Lets a sink logit per head join a finished softmax: scales `out` in place and returns the new lse.

    Args:
        out: `[batch, seq, heads, head_dim]`, in the dtype of `lse`.
        lse: `[batch, heads, seq]`, natural log.
        sink_logits: `[heads]`.
    """
    merged = torch.logaddexp(lse, sink_logits.to(lse.dtype)[None, :, None])
    out *= torch.exp(lse - merged).transpose(1, 2)[..., None]
    return merged


def sink_gradient(sink_logits: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Returns the gradient of `sink_logits`, `[heads]` in their dtype.

    Softmax backward is dS = P (dP - delta). A sink has no value, so its dP is 0.

    Args:
        sink_logits: `[heads]`.
        lse: `[batch, heads, seq]`, natural log, the sink included.
        delta: `[batch, heads, seq]`, rowsum(dout * out) minus the gradient of lse.
    """
    p = torch.exp(sink_logits.to(lse.dtype)[None, :, None] - lse)
    return -(p * delta).sum((0, 2)).to(sink_logits.dtype)
