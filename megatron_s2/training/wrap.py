"""Wrapping functions of Megatron from outside: once, however often it is asked for."""

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
    original = _original(owner, name)

    @wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    replace_once(owner, name, wrapped)


def replace_once(owner: object, name: str, replacement: Callable) -> None:
    """Replaces `owner.name`, a function or class, and keeps the original for `unwrap`."""
    setattr(replacement, _ORIGINAL, _original(owner, name))
    setattr(owner, name, replacement)


def unwrap(owner: object, name: str) -> None:
    """Restores `owner.name`, if one of the functions above replaced it."""
    setattr(owner, name, _original(owner, name))


def _original(owner: object, name: str) -> Callable:
    current = getattr(owner, name)
    return getattr(current, _ORIGINAL, current)
