"""An output directory that appears complete or not at all, even if the power fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_s2.data.output import check_writable
from megatron_s2.errors import InputError


def check_new(path: Path) -> None:
    """Raises InputError, naming `--output`, if `path` exists or cannot be created."""
    if os.path.lexists(path):
        raise InputError(f"--output {path}: exists already; give a directory that does not")
    check_writable("--output", str(path))


@contextmanager
def atomic_directory(path: Path, size: int) -> Iterator[Path]:
    """Yields a temporary directory, which is renamed to `path` if the block ends without an exception.

    Otherwise it is removed. Everything in it is on the disk before it is renamed.

    Args:
        size: number of bytes that will be written.

    Raises:
        InputError: `path` exists, cannot be created, or its disk has less than `size` bytes left.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise InputError(
            f"--output {path}: needs {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()  # raises if a process with the same id on another machine is writing there
    try:
        yield temporary
        for directory, _, files in os.walk(temporary):
            for name in files:
                _fsync(os.path.join(directory, name))
            _fsync(directory)
        check_new(path)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: str | Path) -> None:
    """Waits until the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support it for directories (fsync(2)).
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
