"""Specification of the NVMe tier: state passes through files unharmed, or one clear error says why not."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from selection import exhaustive
from steps import ELEMENTS, MIXED, ON_NVME, executor, plain_solution, require_same, state_of, take_steps
from waiting import PATIENCE

from megatron_s2.offload import nvme
from megatron_s2.offload.node import Node
from megatron_s2.offload.nvme import PAGE, NvmeTier, TierError, distribute, measure_bandwidth

SIZES = [128] * 5 + [64]


@pytest.fixture
def tier(tmp_path):
    one = NvmeTier([tmp_path], SIZES, slots=2)
    yield one
    one.close()


def opened(tier: NvmeTier) -> str:
    """A path by which others can reach its only file, which has no name."""
    return f"/proc/self/fd/{tier._files[0]._descriptor}"


def fill(tier: NvmeTier, j: int, value: float) -> None:
    for n, x in enumerate(tier.slice_of(j).state):
        x.fill_(value + n / 4)


def store_all(tier: NvmeTier, add: float = 0) -> None:
    for j in range(len(tier.sizes)):
        fill(tier, j, j + add)
        tier.store(j)


def require_stored(tier: NvmeTier, add: float = 0) -> None:
    for j in range(len(tier.sizes)):
        tier.load(j)
        for n, x in enumerate(tier.slice_of(j).state):
            assert x.shape == (tier.sizes[j],) and (x == j + add + n / 4).all()


# What it holds


@pytest.mark.parametrize("slots", [1, 2, 6, 9])
@pytest.mark.parametrize("directories", [1, 3])
def test_what_was_stored_is_loaded(tmp_path, slots, directories):
    folders = [tmp_path / str(n) for n in range(directories)]
    for folder in folders:
        folder.mkdir()
    one = NvmeTier(folders, SIZES, slots, shares=range(1, directories + 1))
    for add in (0, 100):
        store_all(one, add)
        require_stored(one, add)
    assert not any(list(folder.iterdir()) for folder in folders)
    one.close()


def test_records_longer_than_a_transfer(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "TRANSFER_BYTES", 2 * PAGE)
    one = NvmeTier([tmp_path], [64 * 100] * 3, 1)
    store_all(one)
    require_stored(one)
    one.close()


def test_new_state_is_zero_whatever_lay_in_the_slot(tier):
    fill(tier, 0, 7.0)
    tier.load(2)
    assert tier.slot_of(0) == tier.slot_of(2) and not any(x.any() for x in tier.slice_of(2).state)


def test_slots_and_records_are_aligned_pages(tier):
    for j in range(len(SIZES)):
        assert tier.slice_of(j).state.master.data_ptr() % PAGE == 0
        assert tier.slice_of(j).gradient.data_ptr() % PAGE == 0
    # Records of 12 x 128 bytes and their trailers take a page each.
    assert os.stat(opened(tier)).st_size == PAGE * 6


def test_direct_io_is_used_where_there_is_some(tier):
    flags = fcntl.fcntl(tier._files[0]._descriptor, fcntl.F_GETFL)
    assert flags & os.O_DIRECT


def test_buffered_io_is_a_notice_not_a_secret(tmp_path, monkeypatch, capsys):
    real = fcntl.fcntl

    def refuse(descriptor, command, flags=0):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    one = NvmeTier([tmp_path], SIZES, 2)
    assert f"{tmp_path}: its file system refuses O_DIRECT" in capsys.readouterr().err
    store_all(one)
    require_stored(one)
    one.close()


@pytest.mark.parametrize(
    "shares, counts", [([1], [12]), ([1, 1], [6, 6]), ([2, 1], [8, 4]), ([1, 5], [2, 10])]
)
def test_directories_take_what_their_bandwidth_says(shares, counts):
    placement = distribute([64] * 12, shares)
    assert [placement.count(n) for n in range(len(shares))] == counts


def test_neighbours_lie_on_different_directories():
    placement = distribute([64] * 12, [1.0, 1.0, 1.0])
    assert all(len({*placement[n : n + 3]}) == 3 for n in range(0, 12, 3))
    with pytest.raises(ValueError, match=r"shares \[1, 0\]: must be positive"):
        distribute([64], [1, 0])


def test_bandwidth_is_measured_and_nothing_stays(tmp_path):
    bandwidth = measure_bandwidth(tmp_path, Node.detect(), 2**22)
    assert bandwidth.read > 0 and bandwidth.write > 0 and not list(tmp_path.iterdir())


# What it refuses


@pytest.mark.parametrize("arguments, message", [
    ({"directories": []}, "--s2-offload-nvme-dir: must name directories"),
    ({"shares": [1, 2]}, "--s2-offload-nvme-dir: must name directories, one for each of 2 shares"),
    ({"directories": ["/nowhere"]}, "--s2-offload-nvme-dir /nowhere: must be a directory"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        NvmeTier(**{"directories": [tmp_path], "sizes": SIZES, "slots": 2} | arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=f"--s2-offload-nvme-dir {tmp_path}: .* cannot be made: .*Read-only"):
        NvmeTier([tmp_path], SIZES, 2)


def test_two_runs_share_a_directory(tier, tmp_path):
    other = NvmeTier([tmp_path], SIZES, 2)
    store_all(tier)
    store_all(other, 100)
    require_stored(tier)
    require_stored(other, 100)
    other.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_leaves_nothing(tmp_path):
    def run() -> None:
        tier = NvmeTier([tmp_path], SIZES, 2)
        for j in range(6):
            tier.slice_of(j).state.master.fill_(9)
            tier.store(j)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=run)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not list(tmp_path.iterdir())


# What happens to it


@pytest.mark.parametrize("size", [0, 2 * PAGE, 2 * PAGE + 100])
def test_a_truncated_file_is_one_clear_error(tier, size):
    store_all(tier)
    os.truncate(opened(tier), size)
    with pytest.raises(TierError, match=rf"file ends at {size} bytes, .* Resume from the last checkpoint"):
        tier.load(4)


@pytest.mark.parametrize("with_what", [b"\1" * PAGE, "the record before"], ids=["bytes", "older"])
def test_a_record_changed_by_others_is_one_clear_error(tier, with_what):
    store_all(tier)
    older = Path(opened(tier)).read_bytes()[PAGE : 2 * PAGE]
    store_all(tier, 100)
    with open(opened(tier), "r+b") as file:
        file.seek(PAGE)
        file.write(with_what if isinstance(with_what, bytes) else older)
    tier.load(0)
    with pytest.raises(TierError, match=rf"the record at {PAGE} is not the one that was written there"):
        tier.load(1)


def refuse_after(monkeypatch, name, calls, result):
    """The system call fails, or returns `result`, after so many that work."""
    real, seen = getattr(os, name), []

    def call(descriptor, buffers, offset):
        seen.append(offset)
        if len(seen) <= calls:
            return real(descriptor, buffers, offset)
        if isinstance(result, int):
            return result
        raise result

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None])
def test_a_full_disk_is_one_clear_error(tier, monkeypatch, code):
    result = 0 if code is None else OSError(code, os.strerror(code))
    refuse_after(monkeypatch, "pwritev", 2, result)
    with pytest.raises(
        TierError, match=r"cannot be written, the disk is full \(.* GB free\) .* Make room or name"
    ):
        store_all(tier)


def test_a_record_written_half_is_not_loaded(tier, monkeypatch):
    store_all(tier)
    with monkeypatch.context() as patch:
        refuse_after(patch, "pwritev", 0, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(TierError, match=r"cannot be written \(4096 bytes\): .*Input/output error"):
            tier.store(3)
    tier.load(1)
    with pytest.raises(TierError, match="was written half"):
        tier.load(3)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_short_transfers_are_continued(tmp_path, monkeypatch, name):
    one = NvmeTier([tmp_path], [64 * 100] * 3, 2)
    real = getattr(os, name)

    def short(descriptor, buffers, offset):
        return real(descriptor, [buffers[0][: 2 * PAGE]], offset)

    monkeypatch.setattr(os, name, short)
    store_all(one)
    require_stored(one)
    one.close()


def test_reads_that_fail_are_one_clear_error(tier, monkeypatch):
    store_all(tier)
    refuse_after(monkeypatch, "preadv", 0, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(TierError, match=r"file cannot be read \(4096 bytes\): .*Input/output error"):
        tier.load(0)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_that_cannot_reserve_room_will_do(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    one = NvmeTier([tmp_path], SIZES, 2)
    assert os.stat(opened(one)).st_size == 6 * PAGE
    store_all(one)
    require_stored(one)
    one.close()


def test_an_interruption_leaves_nothing_on_its_way(tmp_path, monkeypatch):
    """As by Ctrl-C while a checkpoint is read: what comes late would end in the state of another subgroup."""
    one = NvmeTier([tmp_path], SIZES, 1)
    store_all(one)
    real, reading, interrupted = os.preadv, threading.Event(), threading.Event()

    def slow(*args):
        reading.set()
        assert interrupted.wait(PATIENCE)
        time.sleep(0.3)
        return real(*args)

    def interrupt(piece):
        assert reading.wait(PATIENCE)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(Future, "exception", interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.load(1)
    fill(one, 2, 77)
    time.sleep(0.4)
    assert (one.slice_of(2).state.master == 77).all()
    one.close()


def test_a_directory_without_room_is_refused_at_once(tmp_path):
    """By a real limit of the system; nothing is left behind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, before[1]))
    try:
        with pytest.raises(TierError, match="the state file cannot be made, the disk is full"):
            NvmeTier([tmp_path], SIZES, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# Under the executor


@pytest.fixture(scope="module")
def truth():
    return plain_solution(6)


@pytest.mark.parametrize(
    ("slots", "directories", "fraction"),
    [(1, 1, 0.0), (2, 1, 0.5), (3, 2, 1.0), (5, 3, 0.5), *exhaustive((1, 1, 1.0), (3, 2, 0.0))],
)
def test_ring_sizes_and_directories_change_no_bit(tmp_path, truth, slots, directories, fraction):
    ring = {"ring_slots": slots, "host_budget": 16 * 128 * slots}
    one = executor(tmp_path, directories=directories, **ON_NVME | ring, fraction=fraction)
    assert one.plan.tiers.nvme >= ELEMENTS - 128
    take_steps(one, range(1, 7))
    require_same(state_of(one), truth)
    one.close()


def test_what_the_last_step_left_is_not_read_again(tmp_path):
    """Up, then down: the slots hold what comes first."""
    one = executor(tmp_path, **ON_NVME)
    on_nvme = [s.index for s in one.plan.subgroups if s.tier == "nvme"]
    take_steps(one, [1])
    for step, left in ((2, on_nvme[-3:]), (3, on_nvme[:3])):
        take_steps(one, [step])
        read = [int(event.name.split()[1]) for event in one.events if event.queue == "nvme_read"]
        written = [event for event in one.events if event.queue == "nvme_write"]
        assert sorted(read) == sorted({*on_nvme} - {*left}) and len(written) == len(on_nvme)
    one.close()


def test_a_full_disk_ends_the_step_with_that_error(tmp_path, monkeypatch):
    one = executor(tmp_path, **MIXED)
    take_steps(one, [1])
    with monkeypatch.context() as patch:
        refuse_after(patch, "pwritev", 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(TierError, match="the disk is full") as failure:
            take_steps(one, [2])
    assert "resume from the last checkpoint" in failure.value.__notes__[-1]
    one.close()
    assert not list((tmp_path / "0").iterdir())


MEMORY = """
import sys
from pathlib import Path
import torch
from megatron_s2.offload.adam import AdamWSettings
from megatron_s2.offload.executor import Executor
from megatron_s2.offload.plan import make_plan
from megatron_s2.offload.queues import ThreadBackend
from megatron_s2.offload.state import lay_out

torch.set_num_threads(1)
N, BUDGET = 2**23, 24 * 2**20

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024

def build(n, budget, folder):
    parameters, elements = lay_out([torch.zeros(n // 8, dtype=torch.bfloat16) for _ in range(8)], [0] * 8)
    plan = make_plan(elements, FRACTION, subgroup_size=2**17, host_budget=budget, nvme=True)
    return Executor(plan, parameters, ThreadBackend(), [folder]), parameters, plan

def steps(executor, parameters, gradients, count):
    for step in range(1, count + 1):
        for index, gradient in enumerate(gradients):
            executor.flush(index, gradient)
        executor.step([AdamWSettings(1e-3, step=step)])

FRACTION = float(sys.argv[2])
small, parameters, plan = build(2**19, 16 * 2**17 * 4, sys.argv[1])
steps(small, parameters, [torch.ones(p.weights.numel()) for p in parameters], 2)  # whatever starts, starts
small.close()
executor, parameters, plan = build(N, BUDGET, sys.argv[1])
gradients = [torch.ones(p.weights.numel(), dtype=torch.bfloat16) for p in parameters]
before = resident()[0]
Path("/proc/self/clear_refs").write_text("5")
steps(executor, parameters, gradients, 3)
print(resident()[1] - before, plan.host_bytes, plan.gpu_bytes, 12 * N, 4 * 2**20)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_memory_stays_within_the_budget_while_the_state_is_several_times_larger(tmp_path, fraction):
    """Without a GPU its buffer sets are host memory too, and so is a chunk of gradients. 1 MiB is for stacks
    of threads and for Python."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(fraction)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    grown, host, buffers, state, chunk = map(int, run.stdout.split())
    budget = 24 * 2**20
    assert host <= budget and state == 4 * budget
    assert grown <= budget + 2**20 + (buffers + chunk if fraction else 0), run.stdout
    assert grown > budget // 2, "the ring is not used"
