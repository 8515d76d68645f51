"""Specification of host memory: exact size, aligned, zero, and refused with the numbers."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_s2.offload.host_memory import (
    HostMemory,
    _left_in_groups,
    available_bytes,
    check_available,
    fault_in,
)
from megatron_s2.offload.plan import make_plan
from megatron_s2.offload.state import aligned_starts, allocate_on_host

PLAN = make_plan(64 * 10 + 5, subgroup_size=128)
MIXED = make_plan(
    640, subgroup_size=128, gpu_budget=12 * 128, host_budget=16 * 128 * 3, nvme=True, ring_slots=2
)


def on_host(plan):
    """The memory of tier `host`, and the views of each of its subgroups by index."""
    subgroups = [s for s in plan.subgroups if s.tier == "host"]
    memory, views = allocate_on_host(subgroups)
    return memory, dict(zip([s.index for s in subgroups], views, strict=True))


def test_subgroups_are_views_of_aligned_zeros_that_do_not_overlap():
    _, views = on_host(PLAN)
    for subgroup in PLAN.subgroups:
        for n, view in enumerate((*views[subgroup.index].state, views[subgroup.index].gradient)):
            assert view.dtype == torch.float32 and view.shape == (subgroup.size,)
            assert view.data_ptr() % 256 == 0 and not view.any()
            view.fill_(4 * subgroup.index + n)
    for subgroup in PLAN.subgroups:
        for n, view in enumerate((*views[subgroup.index].state, views[subgroup.index].gradient)):
            assert (view == 4 * subgroup.index + n).all()


def test_it_takes_what_it_holds_and_padding_only():
    assert on_host(PLAN)[0].size == 16 * 704 and PLAN.host_bytes == 16 * 645
    memory, views = on_host(MIXED)
    assert 0 < len(views) < len(MIXED.subgroups) and memory.size == 16 * 128 * len(views)


def test_nothing_on_the_host_takes_nothing():
    assert on_host(make_plan(640, gpu_budget=12 * 640)) == (None, {})


@pytest.mark.parametrize("ranks, available", [(1, 16 * 704 - 1), (4, 4 * 16 * 704 - 1)])
def test_what_does_not_fit_is_refused_with_the_numbers(ranks, available):
    with pytest.raises(
        ValueError, match=r"host memory: the buffers .* take 0.000 GB.* has 0.000 GB left; raise"
    ):
        check_available(16 * 704, ranks, available)
    check_available(16 * 704, ranks, available + 1)


def test_more_than_this_machine_has_is_refused():
    size = available_bytes() + 10**10
    with pytest.raises(ValueError, match=rf"take {size / 1e9:.3f} GB"):
        check_available(size, 1, available_bytes())


def group(folder, limit, most, **used):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in used.items()))


def test_every_control_group_above_this_process_counts(tmp_path):
    """As under Slurm: the limit is that of a job's group, neither the lowest nor the root."""
    group(tmp_path / "job", "memory.max", 1000, anon=300, shmem=20, kernel=1, file=500)
    group(tmp_path / "job/step", "memory.max", "max", anon=300)
    assert list(_left_in_groups("0::/job/step/task", tmp_path)) == [679]
    group(tmp_path, "memory.max", 500, anon=400)
    assert list(_left_in_groups("0::/job/step", tmp_path)) == [679, 100]
    assert list(_left_in_groups("0::/", tmp_path)) == [100]


def test_control_groups_of_version_1_count(tmp_path):
    group(tmp_path / "memory/job", "memory.limit_in_bytes", 1000, rss=1, total_rss=300, total_shmem=20)
    group(tmp_path / "memory", "memory.limit_in_bytes", 2**63 - 4096, total_rss=300)
    groups = "9:name=systemd:/\n5:devices:/job\n4:cpu,memory:/job\n0::/"
    assert list(_left_in_groups(groups, tmp_path)) == [680, 2**63 - 4096 - 300]


def test_memory_the_system_has_not_is_refused():
    with pytest.raises(RuntimeError, match=r"host memory: \d+.000 GB cannot be mapped"):
        HostMemory(2**62 // 10**9 * 10**9)


def test_memory_returns_to_the_system_with_the_last_view():
    before = resident_bytes()
    memory = HostMemory(2**26)
    memory.bytes.fill_(1)
    assert resident_bytes() > before + 2**25
    memory.close()
    assert resident_bytes() < before + 2**25
    memory.close()


def test_processes_that_fork_later_do_not_get_it():
    """Or each page would be copied at the next update, while a worker of a data loader keeps the old one."""
    code = """
import os
from megatron_s2.offload.host_memory import HostMemory

memory = HostMemory(2**24)
memory.bytes.fill_(1)
child = os.fork()
if not child:
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    os._exit(any(int(a, 16) <= memory.address < int(b, 16) for a, b in maps))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child has it"
assert memory.bytes.sum() == 2**24
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), reason="no huge pages here"
)
def test_pages_are_huge():
    memory = HostMemory(2**26)
    before = page_faults()
    memory.bytes.fill_(1)
    assert page_faults() - before < 2**26 // 2**21 * 4 + 1000  # small pages would be 16384
    memory.close()


def test_faulting_in_leaves_zeros_and_the_threads_of_others_alone():
    before, threads = resident_bytes(), torch.get_num_threads()
    memory = HostMemory(2**26)
    fault_in(memory.bytes)
    assert resident_bytes() > before + 2**25 and torch.get_num_threads() == threads
    faults = page_faults()
    assert not memory.bytes.any()
    assert page_faults() - faults < 1000
    memory.close()


def test_memory_is_there_before_cuda_registers_it_at_once(monkeypatch):
    """Clearing pages takes the time, and several threads do it; a copy may cross any border."""
    calls = []

    def register(address, size, flags):
        before = page_faults()
        ctypes.memset(address, 0, size)
        calls.append((size, page_faults() - before < 1000))
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    HostMemory(2**26, pinned=True).close()
    assert calls == [(2**26, True)]


def test_stretches_begin_aligned():
    assert aligned_starts([64, 1, 65, 0, 3]) == ([0, 64, 128, 256, 256], 320)


@pytest.mark.gpu
def test_pinned_memory_is_known_to_pytorch():
    memory, views = allocate_on_host(PLAN.subgroups, pinned=True)
    assert views[0].gradient.is_pinned()
    memory.close()
