"""The CPU operators in C++: compiled once and whole or not at all; few tensors, whatever the threads."""

import ctypes
import multiprocessing
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native_operators import require_native
from torch._subclasses import FakeTensorMode

from megatron_s2 import S2Pattern, s2_attention
from megatron_s2.kernels import torch_native

PATTERN = S2Pattern(2, 16, 2, 4)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Returns a function that makes a shell script the compiler; `$out` is the file that it writes. The cache
    folder is empty."""
    monkeypatch.setenv("MEGATRON_S2_CACHE", str(tmp_path / "cache"))

    def make(script: str) -> None:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\nfor out; do :; done\necho "$out" >> {tmp_path}/calls\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return make


def cached(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_one_compiles_and_the_others_wait(compiler, tmp_path):
    compiler('sleep 0.3; echo compiled > "$out"')
    with ThreadPoolExecutor(3) as pool:
        paths = {future.result() for future in [pool.submit(torch_native.library) for _ in range(3)]}
    (path,) = paths
    assert path.read_text() == "compiled\n" and cached(tmp_path) == [path.name]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_what_another_machine_has_compiled_needs_no_compiler(compiler, monkeypatch):
    compiler('touch "$out"')
    path = torch_native.library()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert torch_native.library() == path


@pytest.mark.parametrize(
    "script, reason",
    [
        ('echo half > "$out"; echo "In a.h:" >&2; echo "a.h:1: error: no" >&2; exit 1', "a.h:1: error: no"),
        ('echo half > "$out"; exit 3', "status 3"),
        ('echo half > "$out"', "file too short|invalid ELF header"),
        ("exit 0", "No such file"),
    ],
    ids=["with an error", "with a status", "without a library", "without a file"],
)
def test_a_compiler_that_fails_costs_a_warning(compiler, tmp_path, script, reason):
    compiler(script)
    with pytest.warns(UserWarning, match=rf"without its C\+\+ operators, slower: .*({reason})") as caught:
        assert torch_native.load.__wrapped__() is None
    assert "\n" not in str(caught[0].message)
    if "exit" in script:
        assert cached(tmp_path) == []


def test_no_compiler_costs_a_warning(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.warns(UserWarning, match="slower: no C.. compiler, /no/such/compiler is not on PATH"):
        assert torch_native.load.__wrapped__() is None


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGATRON_S2_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Not a directory"):
        assert torch_native.load.__wrapped__() is None


def test_an_interrupt_leaves_nothing_behind(compiler, tmp_path):
    compiler('echo half > "$out"; kill -INT $PPID; exec sleep 10')
    with pytest.raises(KeyboardInterrupt):
        torch_native.library()
    assert cached(tmp_path) == []
    compiler('echo whole > "$out"')
    assert torch_native.library().read_text() == "whole\n"


# The operators.


def attend(*inputs: torch.Tensor, pattern: S2Pattern = PATTERN) -> torch.Tensor:
    return s2_attention(*inputs, pattern, return_lse=False, backend="torch")


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, heads, 32, generator=generator).requires_grad_() for heads in (4, 2, 2)]


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_with_tasks_of_equal_size_threads_change_no_bit(threads, monkeypatch):
    require_native()
    monkeypatch.setattr(torch_native, "_MOST_ROWS", 16)
    q, k, v = inputs(300)
    results = []
    for count in (1, 2, 3):
        threads(count)
        out = attend(q, k, v)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def peak_above(run) -> int:
    """Bytes of memory that a function adds at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def status(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak memory")
def test_the_gradients_of_tasks_do_not_add_up_in_memory(threads, monkeypatch):
    """Of 128 tasks on 2 threads each has up to 1 MiB, 64 MiB in all; at most 5 of them wait for each head."""
    require_native()
    threads(2)
    monkeypatch.setattr(torch_native, "_MOST_ROWS", 64)
    q, k, v = inputs(4096)
    out = attend(q, k, v, pattern=S2Pattern(2, 16, 2, 1))

    def backward():
        torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True)

    backward()  # the first allocates what stays
    assert peak_above(backward) < 24 << 20


def test_fake_tensors_have_the_shapes_of_real_ones():
    require_native()
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, requires_grad=True) for x in inputs(100))
        out = attend(q, k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]


def test_a_default_device_changes_nothing():
    require_native()
    q, k, v = inputs(100)
    expected = attend(q, k, v)
    with torch.device("meta"):
        assert torch.equal(attend(q, k, v), expected)


def test_other_python_threads_run_meanwhile():
    require_native()
    q, k, v = inputs(4096)
    ended, steps = threading.Event(), []

    def step():
        while not ended.wait(0.001):
            steps.append(None)

    other = threading.Thread(target=step)
    other.start()
    before = len(steps)
    attend(q, k, v, pattern=S2Pattern(2, 16, 2, 1))
    meanwhile = len(steps) - before
    ended.set()
    other.join()
    assert meanwhile > 3


def _in_a_fork(tokens: int) -> float:
    torch.set_num_threads(1)
    return attend(*inputs(tokens)).sum().item()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_with_one_thread_computes_after_its_parent_used_more(threads):
    require_native()
    threads(2)
    expected = attend(*inputs(300)).sum().item()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_in_a_fork, (300,)).get(timeout=60) == pytest.approx(expected, rel=1e-4)


def test_backward_multiplies_in_float32_unless_all_heads_are_dense(monkeypatch):
    monkeypatch.setattr(torch_native, "_multiplies_bfloat16", lambda: True)
    x = torch.zeros(1, dtype=torch.bfloat16)
    for stride in (0, 4):
        sparse = S2Pattern(2, block_size=16, local_blocks=2, vert_stride=stride)
        assert torch_native.product_dtype(x, sparse, backward=True) == torch.float32
    dense = S2Pattern(2, block_size=16, local_blocks=1, vert_stride=1)
    assert torch_native.product_dtype(x, dense, backward=True) == torch_native.product_dtype(x, dense)
