"""Comparison of attention results with exact ones, by one rule for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Results = dict[str, Tensor]


def attention_results(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
) -> Results:
    """Returns the results and gradients of `attention(q, k, v, sink_logits)` -> (out, lse), by name.

    Args:
        dout, dlse: upstream gradients of out and lse; None sends no gradient through that result.

    Returns:
        out, lse, dq, dk, dv and, with `sink_logits`, dsink_logits.
    """
    inputs = {"q": q, "k": k, "v": v} | ({} if sink_logits is None else {"sink_logits": sink_logits})
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, lse = attention(*(inputs.get(name) for name in ("q", "k", "v", "sink_logits")))
    upstream = [(x, dx) for x, dx in ((out, dout), (lse, dlse)) if dx is not None]
    gradients = torch.autograd.grad(
        [x for x, _ in upstream],
        list(inputs.values()),
        [dx.to(x.dtype) for x, dx in upstream],
        materialize_grads=True,
    )
    names = (f"d{name}" for name in inputs)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients))}


def max_error(got: Tensor, exact: Tensor) -> float:
    """Returns the largest absolute difference, computed in float64; NaN if `got` has a NaN."""
    return (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0


def require_equal(got: Results, exact: Results, most: float = 1e-10) -> None:
    """Requires that every error is at most `most`, by default for float64 against float64.

    Raises:
        AssertionError: a result has a larger error; the message names each such result.
    """
    _require({name: (max_error(got[name], exact[name]), most) for name in exact})


def require_as_exact_as_plain(got: Results, plain: Results, exact: Results) -> None:
    """Requires errors of at most twice those of plain PyTorch in the same dtype (flash-attention's rule).

    Both errors are against `exact`, computed in float64. One unit in the last place of the largest value is
    allowed in addition, because plain PyTorch computes some results exactly: a gradient through a single
    visible key is a copy.

    Raises:
        AssertionError: a result has a larger error; the message names each such result.
    """
    errors = {}
    for name, truth in exact.items():
        largest = truth.abs().max().item() if truth.numel() else 0.0
        ulp = torch.finfo(got[name].dtype).eps * largest
        errors[name] = max_error(got[name], truth), 2 * max_error(plain[name], truth) + ulp
    _require(errors)


def _require(errors: dict[str, tuple[float, float]]) -> None:
    wrong = [
        f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
        for name, (error, allowed) in errors.items()
        if not error <= allowed  # true for a NaN error, too
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
