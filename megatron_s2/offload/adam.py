"""AdamW on flat slices of the optimizer state, in one order of operations on the CPU and on the GPU.

Decoupled weight decay (arXiv 1711.05101), with the gradient divided by a scale that folds unscaling and
clipping. In float32, each line rounded as it stands (fma rounds once), constants rounded from double:

    g    = g / gradient_scale                         left out where the scale is 1
    p    = p * (1 - lr weight_decay)                  left out where weight_decay is 0
    m    = fma(1 - beta1, g - m, m)                   or fma(-beta1, g - m, g) where beta1 <= 1/2
    v    = fma((1 - beta2) * g, g, v * beta2)
    p    = p + (-lr / (1 - beta1^step) * m) / (sqrt(v) / sqrt(1 - beta2^step) + eps)

The Triton kernel does exactly that. So does PyTorch's fused CPU kernel in its vectorised loop, as built for
x86-64 with AVX2 or AVX-512 (releases 2.11 to 2.15; its source leaves the fma in v to the compiler); other
builds are within a bound (`rounding.py`). The CPU kernel's scalar tail rounds differently; slices here are
multiples of 64 elements and never reach it, so on one machine the CPU's bits do not depend on how state is
cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch

from megatron_s2.offload.plan import ALIGNMENT
from megatron_s2.optional_package import IMPORT_ERRORS

# 16 MiB of float32 state and gradient: the weights are written while the masters are still in the last-level
# cache, and a call costs little against it.
CHUNK = 2**20
BLOCK = 1024
# Modules to import, in order; the last has the kernel. Transformer Engine's package loads its extension from
# where a plain import does not find it.
_EXTENSIONS = {
    "transformer_engine": ("transformer_engine.pytorch", "transformer_engine_torch"),
    "apex": ("amp_C",),
}
_ELEMENTS_PER_BLOCK = 2**16  # that one block of those packages' kernels updates


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of one step of one parameter group.

    Raises:
        ValueError: a setting is out of range; the message starts with its name.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments, each in [0, 1)
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 1  # number of this step, from 1

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 0 and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: must be >= 0 and below 1")
        if self.step < 1:
            raise ValueError(f"step {self.step}: must be >= 1")


class State(NamedTuple):
    """The float32 state of a flat slice: tensors of one size on one device."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def cut(self, start: int, stop: int) -> State:
        """Views of elements `start` to `stop`."""
        return State(*(x[start:stop] for x in self))


def check_gradient_scale(scale: float) -> None:
    """Raises ValueError where a step cannot divide gradients by `scale`, since it is not positive and finite
    in float32."""
    if not 0 < torch.tensor(scale, dtype=torch.float32).item() < math.inf:
        raise ValueError(f"gradient_scale {scale}: must be positive and finite; skip the step instead")


def update_on_cpu(
    state: State,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    settings: AdamWSettings,
    gradient_scale: float = 1.0,
    keep_gradient: bool = False,
) -> None:
    """Updates a slice with PyTorch's fused CPU kernel and rounds the masters into `weights`.

    Args:
        state: `[padded]` each, changed in place; padded is a multiple of `ALIGNMENT`.
        gradient: `[padded]` float32, divided by the scale in place, with zeros beyond the weights; `[n]` of
            any float dtype with `keep_gradient`.
        weights: `[n]` of any float dtype, n <= padded. May begin where `gradient` does: a gradient is
            overwritten after its use.
        gradient_scale: what gradients are divided by, see `check_gradient_scale`.
        keep_gradient: whether the gradient stays unchanged; the update then copies it, chunk by chunk.

    Raises:
        ValueError: a size is out of range.
    """
    padded = state.master.numel()
    longest = max(weights.numel(), gradient.numel())
    of_one_size = state if keep_gradient else (*state, gradient)
    if padded % ALIGNMENT or longest > padded or any(x.numel() != padded for x in of_one_size):
        raise ValueError(
            f"slice of {padded} elements with {weights.numel()} weights: must be a multiple of {ALIGNMENT} "
            "that holds them, in state and gradient alike"
        )
    step = torch.tensor(float(settings.step))
    scale = None if gradient_scale == 1 else torch.tensor(gradient_scale, dtype=torch.float32)
    for start in range(0, padded, CHUNK):
        master, exp_avg, exp_avg_sq = state.cut(start, start + CHUNK)
        chunk, target = gradient[start : start + CHUNK], weights[start : start + CHUNK]
        if keep_gradient:
            copy = torch.zeros_like(master)
            copy[: chunk.numel()].copy_(chunk)
            chunk = copy
        torch._fused_adamw_(
            *([master], [chunk], [exp_avg], [exp_avg_sq], [], [step]),
            lr=settings.lr,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )
        target.copy_(master[: target.numel()])


def update_on_gpu(
    state: State,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    settings: AdamWSettings,
    gradient_scale: float = 1.0,
) -> None:
    """Updates a slice with the Triton kernel, on the current stream.

    Args:
        state: `[n]` each, contiguous, changed in place.
        gradient: `[n]` of any float dtype, contiguous, not changed.
        weights: `[n]` of any float dtype, contiguous, written.
        settings, gradient_scale: as for `update_on_cpu`.

    Raises:
        ValueError: sizes differ, or a tensor is not contiguous.
    """
    from megatron_s2.offload.adam_kernel import adamw_kernel

    size = gradient.numel()
    for x in (*state, gradient, weights):
        if x.numel() != size or not x.is_contiguous():
            raise ValueError(f"slice of {size} elements: must be contiguous and of one size, not {x.shape}")
    if not size:
        return
    adamw_kernel[((size + BLOCK - 1) // BLOCK,)](
        p_master=state.master,
        p_exp_avg=state.exp_avg,
        p_exp_avg_sq=state.exp_avg_sq,
        p_gradient=gradient,
        p_weights=weights,
        size=size,
        **kernel_constants(settings, gradient_scale),
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def kernel_constants(settings: AdamWSettings, gradient_scale: float) -> dict[str, float | bool]:
    """Returns the kernel's arguments besides its tensors, computed in float64 as PyTorch does for its CPU
    kernel; a launch rounds them to float32."""
    beta1, beta2 = settings.betas
    weight = float(torch.tensor(1 - beta1, dtype=torch.float32))
    from_mean = weight < 0.5
    return {
        "gradient_scale": float(gradient_scale),
        "decay": 1.0 - settings.lr * settings.weight_decay,
        "mean_weight": weight if from_mean else float(torch.tensor(weight, dtype=torch.float32) - 1),
        "beta2": float(beta2),
        "square_weight": 1.0 - beta2,
        "root_correction": math.sqrt(1 - beta2**settings.step),
        "eps": float(settings.eps),
        "minus_step_size": -settings.lr / (1 - beta1**settings.step),
        "SCALED": gradient_scale != 1,
        "DECAYED": settings.weight_decay != 0,
        "FROM_MEAN": from_mean,
    }


def fused_update(package: str) -> Callable[..., None]:
    """Returns an update like `update_on_gpu` with another package's fused Adam.

    The package's kernel has its own order of operations, so results depend on which subgroups the GPU
    updates, within rounding. Gradients are passed to it as a scaled float32 copy.

    Args:
        package: `transformer_engine` or `apex`.

    Raises:
        ValueError: the package or its CUDA extension is not installed.
    """
    try:
        *_, extension = map(import_module, _EXTENSIONS[package])
        multi_tensor_adam = extension.multi_tensor_adam
    except (*IMPORT_ERRORS, AttributeError) as error:
        raise ValueError(f"--s2-offload-gpu-adam {package}: cannot be used here: {error}") from None

    def update(
        state: State,
        gradient: torch.Tensor,
        weights: torch.Tensor,
        settings: AdamWSettings,
        gradient_scale: float,
    ) -> None:
        scaled = gradient.float() / gradient_scale
        overflow = torch.zeros(1, dtype=torch.int32, device=gradient.device)
        tensors = [[scaled], [state.master], [state.exp_avg], [state.exp_avg_sq]]
        decoupled, bias_correction = 1, 1
        multi_tensor_adam(
            *(_ELEMENTS_PER_BLOCK, overflow, tensors, settings.lr, *settings.betas, settings.eps),
            *(settings.step, decoupled, bias_correction, settings.weight_decay),
        )
        weights.copy_(state.master)

    return update
