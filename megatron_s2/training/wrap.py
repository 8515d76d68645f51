"""How functions of Megatron are wrapped from outside: once, however often it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

_ORIGINAL = "before_megatron_s2"


def wrap_once(owner: object, name: str, wrapper: Callable) -> None:
    """Replaces the function `owner.name` by `wrapper(original, *args, **kwargs)`.

    A second call replaces the wrapper: the original is never wrapped twice.

    Args:
        owner: module or class.
        name: name of the function or method.
        wrapper: called in its place, with the original first.
    """
    function = getattr(owner, name)
    original = getattr(function, _ORIGINAL, function)

    @wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(owner, name, wrapped)


def unwrap(owner: object, name: str) -> None:
    """Restores the function `owner.name`, if `wrap_once` replaced it."""
    function = getattr(owner, name)
    setattr(owner, name, getattr(function, _ORIGINAL, function))
