"""Replaces functions and classes of Megatron, once, even if a hook is applied several times."""

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


def replace_class(owner: object, name: str, replacement: type) -> None:
    """Replaces the class `owner.name`; another call replaces the replacement."""
    current = getattr(owner, name)
    setattr(replacement, _ORIGINAL, getattr(current, _ORIGINAL, current))
    setattr(owner, name, replacement)


def unwrap(owner: object, name: str) -> None:
    """Restores the function or class `owner.name`, if it was replaced here."""
    current = getattr(owner, name)
    setattr(owner, name, getattr(current, _ORIGINAL, current))
