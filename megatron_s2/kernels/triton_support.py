"""What the Triton kernels support, and the chip whose tiles they use."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
_MAX_BATCH = 65535  # an axis of a launch's grid: CUDA C++ Programming Guide, table of compute capabilities
_INTERPRETER_CAPABILITY = 9  # Triton's interpreter runs the tiles of this chip


def require_supported(q: Tensor, v: Tensor) -> None:
    """Checks that the kernels can run on these tensors.

    Raises:
        ValueError: the kernels do not support the device, the dtype, a head_dim or the number of sequences.
    """
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"q {q.dtype}: must be float16, bfloat16 or float32 with backend triton; use backend torch"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} {tuple(x.shape)}: must have at most {MAX_HEAD_DIM} as head_dim "
                "with backend triton; use backend torch"
            )
    if q.shape[0] > _MAX_BATCH:
        raise ValueError(
            f"q {tuple(q.shape)}: must have at most {_MAX_BATCH} sequences with backend triton; "
            "use backend torch"
        )
    # Imported here because it imports Triton.
    from megatron_s2.kernels.triton_common import INTERPRETED

    if not q.is_cuda and not INTERPRETED:
        raise ValueError(f"q on {q.device}: must be on a CUDA device with backend triton; use backend torch")


def capability_of(device: torch.device) -> int:
    """Returns the major compute capability of a device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else _INTERPRETER_CAPABILITY


def takes_boxes(capability: int) -> bool:
    """Returns whether tiles are copied by tensor descriptors on chips of a major compute capability.

    The hardware does so from Hopper on. Products of later chips without `tcgen05` (12 on) take their operands
    from registers, which tiles that arrive as a whole overflow.
    """
    return 9 <= capability < 12
