"""With any Triton the kernels compile for every chip and fit, and on Hopper their loops waste nothing; the
committed table is theirs.

No GPU is needed: the kernels are compiled ahead of time.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernel_resources.py"


def kernel_resources(*arguments: str) -> subprocess.CompletedProcess:
    compiler = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=compiler, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive
def test_every_kernel_fits_its_chip_with_the_installed_triton(resources):
    """The table says it of the Triton that it names and of the kernels with its fingerprint; with another
    Triton all of them are compiled."""
    table = resources.TABLE.read_text()
    assert resources.fingerprint() in table
    if resources.made_by(resources.triton.__version__) not in table:
        check = kernel_resources("--check")
        assert check.returncode == 0, check.stderr


def test_a_part_of_the_table_is_never_written():
    refused = kernel_resources("--chips", "sm_80")
    assert refused.returncode == 2 and "only with --check" in refused.stderr


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import kernel_resources

    return kernel_resources


@pytest.mark.parametrize(
    ("chip", "kernel"),
    [("sm_80", "dkv window"), ("sm_90", "dkv shard"), ("sm_90", "forward"), ("sm_100", "dq")],
)
def test_a_kernel_fits_its_chip(resources, tmp_path, monkeypatch, chip, kernel):
    """Each of them once, each chip once, as shipped for head_dim 128; all of them: the exhaustive test."""
    monkeypatch.setattr(resources.triton.knobs.cache, "dir", str(tmp_path))
    (case,) = [case for case in resources.cases([chip], [128], shipped=True) if case.kernel == kernel]
    found = resources.compiled(case)
    assert found.problems() == []
    assert resources.stale(resources.TABLE.read_text(), [found]) == []


@pytest.mark.parametrize(
    ("kernel", "tiles", "problem"),
    [
        ("dkv shard", (64, 64, 8, 2), "8192 exponentials for 4096 scores"),
        ("dkv shard", (128, 64, 4, 2), r"\d\d+ accesses to local memory, at most 2"),
        ("dq", (128, 64, 8, 1), "waits for what it has just copied, with no other program to run"),
    ],
    ids=["a tile computed twice", "a spill in the loop", "no pipeline"],
)
def test_what_wastes_time_on_hopper_is_a_problem(resources, tmp_path, monkeypatch, kernel, tiles, problem):
    monkeypatch.setattr(resources.triton.knobs.cache, "dir", str(tmp_path))
    found = resources.compiled(resources.Case("sm_90", kernel, 128, resources.Tiles(*tiles))).problems()
    assert re.search(problem, "\n".join(found)), found


def test_loads_that_are_waited_for_are_a_problem(resources, tmp_path, monkeypatch):
    """Tiles read through pointers in one stage: neither ahead nor through descriptors."""
    monkeypatch.setattr(resources.triton.knobs.cache, "dir", str(tmp_path))
    tiles = resources.Tiles(64, 64, 4, 1)
    found = resources.compiled(resources.Case("sm_90", "dkv shard", 64, tiles, pointers=True))
    assert any("no asynchronous copies" in problem for problem in found.problems())
    promised = replace(found, case=replace(found.case, pointers=False))
    assert any("no tensor descriptors" in problem for problem in promised.problems())


def test_spills_size_and_missing_tensor_cores_are_problems(resources):
    tiles = resources.Tiles(128, 64, 8, 3)
    case = resources.Case("sm_80", "dq", 128, tiles)
    bad = resources.Resources(case, 255, 80, 1 << 20, tensor_core=False)
    where = "sm_80 dq head_dim 128: "
    assert bad.problems() == [
        where + "spills 80 bytes per thread to local memory, at most 64",
        where + "shared memory 1048576, at most 166912",
        where + "no mma.sync in its PTX",
    ]
    good = resources.Resources(case, 200, 0, 1 << 17, tensor_core=True)
    assert good.problems() == []
    many = resources.Resources(
        replace(case, tiles=replace(tiles, warps=16)), 200, 0, 1 << 17, tensor_core=True
    )
    assert many.problems() == [where + "102400 registers, at most 65536"]
    decode = resources.Case("sm_90", resources.DECODE, 128, tiles)
    (problem,) = resources.Resources(decode, 80, 0, 1 << 16, tensor_core=False).problems()
    assert problem == "sm_90 decode split head_dim 128: no mma.sync in its PTX"
    unseen = replace(good, case=replace(case, chip="sm_90"))
    assert unseen.problems() == ["sm_90 dq head_dim 128: no loop found in its machine code"]


def test_the_table_has_every_candidate_of_every_chip_and_head_dim(resources):
    table = resources.TABLE.read_text()
    assert resources.fingerprint() in table
    rows = [line for line in table.splitlines() if line.startswith("| sm_")]
    cases = resources.cases(tuple(resources.CHIPS), resources.HEAD_DIMS)
    assert len(rows) == len(cases)
    for case, row in zip(cases, rows):
        tiles = f"{case.tiles.rows} x {case.tiles.keys} | {case.tiles.warps} | {case.tiles.stages}"
        assert row.startswith(f"| {case.chip} | {case.kernel} | {case.head_dim} | {case.what()} | {tiles} |")
        local = int(row.split(" | ")[8])
        assert local <= resources.MOST_LOCAL or case.chip == resources.HOPPER, row


def test_numbers_are_compared_only_with_those_of_the_same_triton(resources, monkeypatch):
    case = resources.cases(["sm_90"], [128])[0]
    made, other = (resources.Resources(case, n, 0, 1 << 16, tensor_core=True) for n in (200, 201))
    monkeypatch.setattr(resources, "cases", lambda *args: [case])
    text = resources.page([made])
    assert resources.stale(text, [made]) == []
    (problem,) = resources.stale(text, [other])
    assert problem == f"kernel-resources.md is stale, now: {other.row()}"
    monkeypatch.setattr(resources.triton, "__version__", "3.0.0")
    assert resources.stale(text, [other]) == []
    monkeypatch.setattr(resources, "cases", lambda *args: [])
    (problem,) = resources.stale(text, [other])
    assert problem.startswith("kernel-resources.md is of other kernels or tiles: fingerprint ")


def test_the_fingerprint_is_of_code_not_of_comments(resources, tmp_path, monkeypatch):
    source = Path(resources.triton_forward.__file__).read_text()
    copy = tmp_path / "triton_forward.py"
    monkeypatch.setattr(resources.triton_forward, "__file__", str(copy))
    before = [copy.write_text(source), resources.fingerprint()][1]
    copy.write_text(source + "\n# more")
    assert resources.fingerprint() == before
    copy.write_text(source.replace("l_i += 1.0", "l_i += 2.0"))
    assert resources.fingerprint() != before
