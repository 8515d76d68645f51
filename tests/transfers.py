"""Counts what would cross between host and GPU if the tensors of a CPU run were on one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Each of them returns numbers to Python, or a shape that depends on numbers: the host waits for the GPU.
_TO_HOST = {
    Tensor.cpu: "cpu",
    Tensor.numpy: "numpy",
    Tensor.tolist: "tolist",
    Tensor.item: "item",
    Tensor.nonzero: "nonzero",
    torch.nonzero: "nonzero",
    torch.equal: "equal",
    Tensor.__bool__: "bool",
    Tensor.__int__: "int",
    Tensor.__float__: "float",
    Tensor.__index__: "index",
    Tensor.__contains__: "in",
}
_TO_DEVICE = {torch.tensor: "tensor", torch.as_tensor: "as_tensor", torch.from_numpy: "from_numpy"}
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class Transfers(TorchFunctionMode):
    """Counts copies while it is entered.

    Attributes:
        to_host: names of the calls for which the host waits for the GPU; indexing by a boolean mask is one.
        to_device: names of the calls that copy Python numbers to the GPU; indexing by a list is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _TO_HOST:
            self.to_host.append(_TO_HOST[function])
        elif function in _TO_DEVICE:
            self.to_device.append(_TO_DEVICE[function])
        elif function in _INDEXING:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts):
                self.to_host.append("boolean index")
            if any(isinstance(part, list) for part in parts):
                self.to_device.append("list index")
        return function(*args, **(kwargs or {}))
