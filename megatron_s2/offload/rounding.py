"""How far the updates of CPU and GPU may differ, and whether they do on this machine."""

from __future__ import annotations

import math

import torch

from megatron_s2.offload.adam import AdamWSettings, State, update_on_cpu, update_on_gpu


def rounding_bound(
    state: State, gradient: torch.Tensor, settings: AdamWSettings, gradient_scale: float = 1.0
) -> tuple[State, State]:
    """Computes one step in float64, and how far a step in float32 may be from it.

    The bound holds for any order of the formula's operations, with or without fma, if each is rounded to
    nearest. A rounding, of a constant too, is at most u = 2^-24 of a magnitude M that is not below the
    result's, where what is below the smallest normal number counts as that number:

        m    5 roundings, bound  6 u M, M = |m| + |g|
        v    6 roundings, bound  7 u M, M = v after the step
        p   16 roundings, bound 17 u M, M = |p| + lr / (1 - beta1^step) (|m| + |g|) / denominator

    The 16 are those of the change of p: 5 of m, 7 of the denominator, 3 of its own and the sum with p. The
    rest of a bound is for products of roundings. Two implementations differ by at most twice the bound.

    Args:
        state: `[n]` each, float32, before the step; not changed.
        gradient: `[n]` float32, not changed.
        settings: with eps >= 1e-12, so that no denominator vanishes.
        gradient_scale: as for `update_on_cpu`.

    Returns:
        float64 `[n]` each: the state after the step, and its bounds.
    """
    p, m, v = (x.double() for x in state)
    g = gradient.double() / gradient_scale
    beta1, beta2 = settings.betas
    size = settings.lr / (1 - beta1**settings.step)
    smallest = torch.finfo(torch.float32).tiny
    sum_of_terms = m.abs() + g.abs() + smallest
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g.square()
    denominator = v.sqrt() / math.sqrt(1 - beta2**settings.step) + settings.eps
    bound_of_p = 17 * (p.abs() + (size * sum_of_terms + smallest) / denominator)
    p = p * (1 - settings.lr * settings.weight_decay) - size * m / denominator
    bounds = (bound_of_p, 6 * sum_of_terms, 7 * (v + smallest))
    return State(p, m, v), State(*(x * 2.0**-24 for x in bounds))


def same_bits(device: torch.device, dtype: torch.dtype = torch.bfloat16, elements: int = 4096) -> bool:
    """Returns whether the GPU's update of a sample rounds as this CPU's does, at a few steps.

    Where it does not, results depend on the placement, within `rounding_bound`.

    Args:
        dtype: dtype of the weights.

    Raises:
        RuntimeError: the two differ by more than that, or weights are not their masters rounded.
    """
    seed = torch.Generator().manual_seed(1)
    same = True
    for step, scale in ((1, 1.0), (2, 3.7), (1000, 0.3)):
        settings = AdamWSettings(1e-3, (0.9, 0.95), 1e-8, 0.1, step)
        cpu = State(*(torch.randn(elements, generator=seed) for _ in range(3)))
        cpu.exp_avg_sq.square_()
        gradient = torch.randn(elements, generator=seed)
        _, bounds = rounding_bound(cpu, gradient, settings, scale)
        gpu, on_gpu = State(*(x.to(device, copy=True) for x in cpu)), gradient.to(device, copy=True)
        weights = [torch.empty(elements, dtype=dtype, device=where) for where in ("cpu", device)]
        update_on_cpu(cpu, gradient, weights[0], settings, scale)
        update_on_gpu(gpu, on_gpu, weights[1], settings, scale)
        gpu = State(*(x.cpu() for x in gpu))
        for name, x, y, bound in zip(State._fields, cpu, gpu, bounds):
            excess = ((x.double() - y.double()).abs() / (2 * bound)).max().item()
            if not excess <= 1:
                raise RuntimeError(
                    f"the GPU's AdamW kernel is wrong on this machine: {name} differs from the CPU's by "
                    f"{excess:.3g} times what rounding can explain; update on the CPU alone with "
                    "--s2-offload-gpu-fraction 0 --s2-offload-gpu-budget-gb 0, and report it"
                )
        if not torch.equal(weights[1].cpu(), gpu.master.to(dtype)):
            raise RuntimeError(f"the GPU's AdamW kernel rounds masters to {dtype} wrongly; report it")
        same &= all(torch.equal(x, y) for x, y in zip(cpu, gpu))
    return same


def rounding_note(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Returns what a user must know about the placement of updates on this machine; None where no bit depends
    on it.

    Args:
        dtype: dtype of the weights.

    Raises:
        RuntimeError: as `same_bits`.
    """
    if same_bits(device, dtype):
        return None
    cpu = torch.backends.cpu.get_cpu_capability()
    return (
        f"megatron-s2: PyTorch {torch.__version__} rounds AdamW on this CPU ({cpu}) otherwise than the GPU "
        "does: results depend on --s2-offload-gpu-fraction and the budgets, within rounding"
    )
