"""Tables of the Triton kernels and CUDA graphs: a capture cannot copy them, and a graph reads them later."""

from __future__ import annotations

import torch
from torch import Tensor

_CAPTURED: dict[int, Tensor] = {}  # by address; kept as long as the process, as a graph may be


def require_no_capture(device: torch.device) -> None:
    """Checks that a table may be copied to a device now.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "CUDA graph of S2 attention: tables of this call are not on the device yet, and a capture cannot "
            "copy them; run the same call once before the capture"
        )


def keep(*tables: Tensor) -> None:
    """Keeps tables that a CUDA graph, which is being captured, is going to read."""
    _CAPTURED.update((table.data_ptr(), table) for table in tables)


def is_capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
