"""The one rule by which attention results are judged, in tests and before every benchmark."""

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
    """Everything that `attention(q, k, v, sink_logits)` -> (out, lse) computes, by name.

    Args:
        dout, dlse: upstream gradients of out and lse; None sends none through that result.

    Returns:
        out, lse, dq, dk, dv and with `sink_logits` dsink_logits.
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
    """Largest absolute difference, computed in float64; NaN where `got` has one."""
    return (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0


def require_equal(got: Results, exact: Results, most: float = 1e-10) -> None:
    """Every error is at most `most`: for float64 against float64.

    Raises:
        AssertionError: naming the results that are further off, or that are missing.
    """
    _require({name: (max_error(got[name], exact[name]), most) for name in exact})


def require_as_exact_as_plain(got: Results, plain: Results, exact: Results) -> None:
    """Every error is at most twice that of plain PyTorch in the same dtype (flash-attention's rule).

    Both errors are taken against `exact`, from float64. One unit in the last place of the largest value is
    allowed beside, for results that plain PyTorch happens to hit exactly: a gradient through one visible key
    is a mere copy.

    Raises:
        AssertionError: naming the results that are further off, or that are missing.
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
        if not error <= allowed  # also when the error is NaN
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
