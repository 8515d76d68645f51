"""Records how large the tensors of a computation get."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records in `most` the bytes of the largest tensor that any operator returned."""

    most = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.most = max(self.most, *sizes, 0)
        return result
