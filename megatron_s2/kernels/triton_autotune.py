"""Autotuning of one attention call: measures each candidate's launch on the GPU, once per kind of call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import triton
from triton.runtime.errors import OutOfResources

from megatron_s2.kernels.autotune import Autotuner, Key
from megatron_s2.kernels.triton_args import KernelArgs
from megatron_s2.kernels.triton_support import capability_of
from megatron_s2.kernels.tuning import Tiles, candidates, tuning_for

_REPEATS = 9  # timed launches per candidate


def _seconds(launch: Callable[[], None]) -> float:
    """Median time of a launch on the GPU; infinite if the chip lacks the shared memory or registers."""
    try:
        launch()
    except OutOfResources:
        return float("inf")
    milliseconds = []
    for _ in range(_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return median(milliseconds) / 1000


AUTOTUNER = Autotuner(_seconds)


def with_tuning(args: KernelArgs, kernel: str, launch: Callable[[KernelArgs], None]) -> KernelArgs:
    """Returns `args` with a tuning: the caller's, or for `kernel` the fastest of the candidate tiles.

    Args:
        kernel: one of `tuning.KERNELS`.
        launch: launches that kernel; called to measure each candidate.
    """
    if args.tuning is not None:
        return args
    q, device = args.q, args.q.device
    chip = capability_of(device), max(q.shape[-1], args.v.shape[-1]), q.element_size()
    shipped = tuning_for(*chip)
    key = Key(
        kernel=kernel,
        chip=torch.cuda.get_device_name(device) if q.is_cuda else "interpreter",
        dtype=str(q.dtype),
        head_dim=q.shape[-1],
        v_head_dim=args.v.shape[-1],
        block_size=args.pattern.block_size,
        group=args.layout.group,
        mask=args.mask is not None,
        triton=triton.__version__,
        candidates=candidates(kernel, *chip),
    )

    def tuned(tiles: Tiles) -> KernelArgs:
        return replace(args, tuning=replace(shipped, **{kernel: tiles}))

    return tuned(AUTOTUNER.choose(key, lambda tiles: launch(tuned(tiles))))
