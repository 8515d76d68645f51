"""Helpers of the tests of the Triton kernels: their device, their cases, and the check of results.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
"""

import os

import pytest
import torch
from attention_cases import Case

from megatron_s2.kernels.compare import attention_results, require_as_exact_as_plain, require_equal
from megatron_s2.kernels.tuning import Tiles, Tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu
LOW_PRECISION = [torch.bfloat16, torch.float16]


def cut(rows: int, keys: int, span: int | None = None) -> Tuning:
    """The same tiles for every kernel."""
    return Tuning(*[Tiles(rows, keys, 4, 2)] * 3, span=span)


def case(pattern, special: str, tuning: Tuning, **others) -> Case:
    return Case(pattern, special, device=DEVICE, tuning=tuning, **{"batch": 1, **others})


def require_right(case: Case, dtype: torch.dtype) -> None:
    """float32 to 1e-5, where rounding is luck and logic is not; lower precision by flash-attention's rule."""
    rounded = {name: x if x is None else x.double() for name, x in case.inputs(dtype).items()}
    exact = attention_results(case.attention("reference"), **rounded)
    if dtype == torch.float32:
        require_equal(case.results("triton", dtype), exact, most=1e-5)
    else:
        require_as_exact_as_plain(case.results("triton", dtype), case.results("plain", dtype), exact)
