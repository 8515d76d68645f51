"""An output directory that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_s2.data.errors import InputError
from megatron_s2.data.output import check_writable


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
        check_new(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
