"""Which cases of a parametrized test only `scripts/test.sh --all` runs."""

from collections.abc import Callable, Iterable

import pytest


def exhaustive(*cases) -> list:
    """The cases, marked `exhaustive`; a case of several arguments is a tuple."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
        for case in cases
    ]


def thinned(cases: Iterable, kept: Callable[..., bool]) -> list:
    """All cases in their order, those that are not `kept` marked `exhaustive`."""
    return [case if kept(case) else exhaustive(case)[0] for case in cases]
