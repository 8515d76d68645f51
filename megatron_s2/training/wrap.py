"""Replaces functions and classes of Megatron, once, even if a hook is applied several times."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps

_ORIGINAL = "before_megatron_s2"
_WRAPPERS = "wrappers_of_megatron_s2"


def wrap_once(owner: object, name: str, wrapper: Callable) -> None:
    """Replaces the function `owner.name` by `wrapper(original, *args, **kwargs)`.

    Several wrappers of one function call each other, the latest first. A wrapper of the same qualified name
    takes the place of the earlier one, so that nothing is wrapped twice by one hook.

    Args:
        owner: module or class.
        name: name of the function or method.
        wrapper: called in its place, with the original, or the next wrapper, first.
    """
    function = getattr(owner, name)
    original = getattr(function, _ORIGINAL, function)
    wrappers = getattr(function, _WRAPPERS, {}) | {wrapper.__qualname__: wrapper}
    call = original
    for each in wrappers.values():
        call = partial(each, call)

    @wraps(original)
    def wrapped(*args, **kwargs):
        return call(*args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(wrapped, _WRAPPERS, wrappers)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def replace_class(owner: object, name: str, replacement: type) -> None:
    """Replaces the class `owner.name`; another call replaces the replacement."""
    current = getattr(owner, name)
    setattr(replacement, _ORIGINAL, getattr(current, _ORIGINAL, current))
    setattr(owner, name, replacement)


def unwrap(owner: object, name: str) -> None:
    """Restores the function or class `owner.name`, if it was replaced here."""
    current = getattr(owner, name)
    setattr(owner, name, getattr(current, _ORIGINAL, current))
