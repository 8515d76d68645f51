"""Checks of output paths, before any work is done."""

import os
import tempfile
from pathlib import Path

from megatron_s2.errors import InputError


def check_writable(flag: str, directory: str) -> None:
    """Raises InputError, naming `flag`, unless `directory` is writable or can be created.

    A file without a name is opened there and closed, because permissions alone do not show whether the
    superuser, a read-only or a remote file system can be written to.
    """
    if problem := _problem(directory):
        raise InputError(f"{flag} {directory}: {problem}; give another directory")


def check_file_writable(flag: str, path: str | Path) -> None:
    """Raises InputError, naming `flag`, unless the file `path` can be written, in a directory that may still
    have to be created."""
    if os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a directory; give a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f"{flag} {path}: is not writable; give another file")
    if problem := _problem(os.path.dirname(path)):
        raise InputError(f"{flag} {path}: {problem}; give another file")


def check_absent(flag: str, value: str, paths: list[str]) -> None:
    """Raises InputError, naming `flag`, if any of `paths` exists."""
    for path in paths:
        if os.path.exists(path):
            raise InputError(f"{flag} {value}: {path} exists already; add --overwrite to replace it")


def check_replaceable(flag: str, value: str, paths: list[str]) -> None:
    """Raises InputError, naming `flag`, if any of `paths` is a directory, which no file can replace."""
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{flag} {value}: {path} is a directory; give another name or remove it")


def _problem(directory: str) -> str | None:
    """Returns why no file can be created in a directory or, if it does not exist, in its nearest parent."""
    nearest = os.path.abspath(directory)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        return f"{nearest} is a file"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest} is not writable ({error.strerror})"
