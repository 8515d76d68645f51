"""Integers that the host computes and the device reads: all of them in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def copy_to_device(device: torch.device, *arrays: ArrayLike) -> list[Tensor]:
    """Returns arrays of whole numbers as int64 tensors on a device, in one copy that the host does not wait
    for."""
    arrays = [np.asarray(array, dtype=np.int64) for array in arrays]
    flat = torch.tensor(
        np.concatenate([array.ravel() for array in arrays]), pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]
