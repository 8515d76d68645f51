"""A cache for functions that are called around the operators, in eager code and in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch


def cached_in_eager[**P, R](maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator like `lru_cache(maxsize)`, without its effect where `torch.compile` traces the
    call: that warns of each cache, and computes the result once in any case."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        cached = lru_cache(maxsize)(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (function if torch.compiler.is_compiling() else cached)(*args, **kwargs)

        return call

    return decorate
