"""A file that a script cannot write is refused with status 2 and one line, before the work and the input."""

import sys

import pytest
from script_main import load_main

from benchmarks import results_page
from megatron_s2.data.output import check_file_writable, check_writable
from megatron_s2.errors import InputError
from megatron_s2.report.figure import new_figure, save_figure

PLAN = "--seq-length 4096 --num-layers 2 --num-attention-heads 4 --kv-channels 64 --context-parallel-size 2"
RATES = "--params 1M --h2d-gbps 1 --d2h-gbps 1 --cpu-gparams 1 --gpu-gparams 1"
COMMANDS = {
    "plan": f"{PLAN} --plot",
    "plan_offload": f"{RATES} --plot",
    "plot_losses": "--tensorboard-dir /nowhere --output",
    "plot_pattern": "--num-attention-heads 0 --output",
    "plot_trace": "/nowhere --output",
    "bench": "attention --out",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_what_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys, script):
    (tmp_path / "file").touch()
    words, path = COMMANDS[script].split(), tmp_path / "file" / "a.png"
    monkeypatch.setattr(sys, "argv", [script, *words, str(path)])  # some scripts take no other
    try:
        status = load_main(script)()
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith(f"error: {words[-1]} {path}: {tmp_path}/file is a file; give another ")
    assert printed.err.count("\n") == 1


def test_the_page_of_results_is_refused_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    page = tmp_path / "file" / "page.md"
    with pytest.raises(SystemExit, match="2"):
        results_page.main(["--page", str(page)])
    assert capsys.readouterr().err == f"error: --page {page}: {tmp_path}/file is a file; give another file\n"


def test_a_picture_is_written_into_a_new_directory(tmp_path):
    save_figure(new_figure(1, 1), tmp_path / "new" / "a.svg")
    assert (tmp_path / "new" / "a.svg").stat().st_size


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("file/a", "{root}/file is a file; give another file"),
        ("dir", "is a directory; give a file"),
        ("loop/a", "{root}/loop is a file; give another file"),
        ("/proc/nothing/a", "/proc is not writable (No such file or directory); give another file"),
    ],
)
def test_where_a_file_cannot_be_written(tmp_path, path, problem):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as refused:
        check_file_writable("--output", tmp_path / path)
    assert str(refused.value) == f"--output {tmp_path / path}: {problem.format(root=tmp_path)}"


def test_what_can_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("content")
    for path in ("there", "new", "new/er", tmp_path / "new"):
        check_file_writable("--output", path)
    check_writable("--output", "new/er")
    check_writable("--output", ".")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "content"
