"""The calls of the torch backend's plans in one C++ operator on the CPU (`torch_tasks.cpp`)."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from megatron_s2.kernels.torch_plan import Band, Call, Causal, Gathered


@cache
def operator():
    torch.ops.load_library("/tmp/tools/torch_tasks.so")
    return torch.ops.megatron_s2_cpu


@lru_cache(maxsize=1024)
def table_of(calls: tuple[Call, ...], block: int) -> Tensor:
    rows = []
    for call in calls:
        if isinstance(call, Causal):
            rows.append((0, call.start, call.stop, 0, call.start, call.stop))
        elif isinstance(call, Band):
            rows.append((1, call.first * block, call.last * block, 0, 0, 0))
        else:
            rows.append((2, call.start, call.stop, int(call.source == "shard"), call.keys_start, call.keys_stop))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)


def rows_of_task(block: int, tokens: int) -> int:
    rows = 1024 if tokens >= 8192 else 512 if tokens >= 2048 else 256
    return max(block, rows)
