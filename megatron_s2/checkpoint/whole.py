"""An output directory that appears whole or not at all, even if the power fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_s2.data.output import check_writable
from megatron_s2.errors import InputError


def check_new(path: Path) -> None:
    """Raises InputError where `--output` names something that exists, or a place that cannot be written."""
    if os.path.lexists(path):
        raise InputError(f"--output {path}: exists already; give a directory that does not")
    check_writable("--output", str(path))


@contextmanager
def whole_directory(path: Path, size: int) -> Iterator[Path]:
    """A directory to write `size` bytes into; it gets the name `path` when the block ends without exception,
    and is removed otherwise.

    Raises:
        InputError: `path` exists, cannot be written, or the disk has not enough space left.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise InputError(
            f"--output {path}: needs {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()  # fails where another process of this number writes there, and leaves it alone
    try:
        yield temporary
        for directory, _, files in os.walk(temporary):
            for name in files:
                _to_disk(os.path.join(directory, name))
            _to_disk(directory)
        check_new(path)
        temporary.rename(path)
        _to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: str | Path) -> None:
    """Waits until what was written to a file, or the list of names that a directory is, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems cannot do it for directories (fsync(2)).
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(opened)
