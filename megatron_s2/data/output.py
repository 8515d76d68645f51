"""Checks of output paths, before any work is done."""

import os

from megatron_s2.errors import InputError


def check_writable(flag: str, directory: str) -> None:
    """Raises InputError, naming `flag`, unless `directory` is writable or can be created."""
    nearest = os.path.abspath(directory)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        raise InputError(f"{flag} {directory}: {nearest} is a file; give another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {directory}: {nearest} is not writable; give another directory")


def check_absent(flag: str, value: str, paths: list[str]) -> None:
    """Raises InputError, naming `flag`, if any of `paths` exists."""
    for path in paths:
        if os.path.exists(path):
            raise InputError(f"{flag} {value}: {path} exists already; add --overwrite to replace it")
