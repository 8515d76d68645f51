"""An output directory has its name only once everything in it is on the disk."""

import errno
import os

import pytest

from megatron_s2.checkpoint.whole import whole_directory


def write(output) -> None:
    with whole_directory(output, 0) as directory:
        (directory / "inner").mkdir()
        for name in ("one", "inner/two"):
            (directory / name).write_text(name)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    output, calls = tmp_path / "output", []

    def fsync(descriptor: int) -> None:
        calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), output.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write(output)
    temporary = str(tmp_path / f".output.{os.getpid()}.part")
    of_output = ["", "/inner", "/inner/two", "/one"]
    assert sorted(calls[:-1]) == [(temporary + name, False) for name in of_output]
    assert calls[-1] == (str(tmp_path), True)
    assert (output / "inner/two").read_text() == "inner/two"


@pytest.mark.parametrize("is_directory", [False, True])
def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch, is_directory):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == is_directory:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_do_it_for_directories(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "output")
    assert (tmp_path / "output/one").read_text() == "one"
