"""An output directory gets its name only after everything in it is on the disk."""

import errno
import os

import pytest

from megatron_s2.checkpoint.atomic_directory import atomic_directory


def write(output) -> None:
    with atomic_directory(output, 0) as directory:
        (directory / "inner").mkdir()
        for name in ("one", "inner/two"):
            (directory / name).write_text(name)


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    output, calls = tmp_path / "output", []

    def fsync(descriptor: int) -> None:
        calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), output.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write(output)
    temporary = str(tmp_path / f".output.{os.getpid()}.part")
    paths = ["", "/inner", "/inner/two", "/one"]
    assert sorted(calls[:-1]) == [(temporary + path, False) for path in paths]
    assert calls[-1] == (str(tmp_path), True)
    assert (output / "inner/two").read_text() == "inner/two"


@pytest.mark.parametrize("is_directory", [False, True])
def test_nothing_is_left_when_the_disk_fails(tmp_path, monkeypatch, is_directory):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == is_directory:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_fsync_for_directories(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "output")
    assert (tmp_path / "output/one").read_text() == "one"
