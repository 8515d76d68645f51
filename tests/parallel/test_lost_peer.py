"""A peer that dies or hangs in the middle of an exchange: all others end with an error that names layer and
group. An error that no peer caused stays what it is."""

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import START_METHOD
from waiting import PATIENCE

from megatron_s2.parallel import collectives as module
from megatron_s2.parallel.collectives import ContextParallelGroup, PeerLostError, Pending
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.pattern import S2Pattern

RANKS, VICTIM = 3, 1
TIMEOUT = timedelta(seconds=15)
PATTERN = S2Pattern(num_kv_heads=3, block_size=16, local_blocks=2, vert_stride=3)
FATES = [("dies", "gather"), ("dies", "a2a"), ("hangs", "gather"), ("hangs", "a2a")]


def one_rank(rank: int, directory: Path, fate: str, schedule: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    group = ContextParallelGroup(dist.group.WORLD, layer=7)
    q, k, v = torch.randn(3, 1, 64, 3, 16)
    context_parallel_attention(q, k, v, PATTERN, group, schedule)
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL if fate == "dies" else signal.SIGSTOP)
    begin = time.monotonic()
    try:
        context_parallel_attention(q, k, v, PATTERN, group, schedule)
    except PeerLostError as error:
        (directory / f"{rank}.txt").write_text(f"{time.monotonic() - begin}\n{error}")
    os._exit(0)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """One group of ranks for each fate, at once: they spend their time waiting."""
    directories = {case: tmp_path_factory.mktemp("group") for case in FATES}
    started = {
        case: mp.start_processes(
            one_rank, (directory, *case), nprocs=RANKS, start_method=START_METHOD, join=False
        )
        for case, directory in directories.items()
    }
    yield {case: (group, directories[case]) for case, group in started.items()}
    for group in started.values():
        for process in group.processes:
            process.kill()


@pytest.mark.parametrize("case", FATES, ids=" ".join)
def test_all_others_end_with_an_error_that_names_layer_and_group(groups, case):
    group, directory = groups[case]
    survivors = [rank for rank in range(RANKS) if rank != VICTIM]
    for rank in survivors:
        group.processes[rank].join(PATIENCE)
        assert group.processes[rank].exitcode == 0
    for rank in survivors:
        seconds, said = (directory / f"{rank}.txt").read_text().split("\n")
        assert said.startswith(
            "context-parallel exchange of layer 7, group [0, 1, 2]: a rank died or did not answer in time: "
        )
        assert float(seconds) < 10 * TIMEOUT.seconds  # one, and what a busy machine adds


IN_GLOO = "/pytorch/third_party/gloo/gloo/transport/tcp/"
IN_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:1, in words\n"
BY_A_PEER = {
    "broken connection": RuntimeError(f"[{IN_GLOO}pair.cc:538] Read error [::1]:5: Connection reset by peer"),
    "timeout": RuntimeError(f"[{IN_GLOO}unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"),
    "timeout of another operation": RuntimeError("Application timeout caused pair closure"),
    "NCCL, remote": dist.DistBackendError(f"{IN_NCCL}ncclRemoteError: A call failed possibly due to"),
    "NCCL, timeout": dist.DistBackendError(
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"
    ),
    "store": dist.DistStoreError("wait timeout after 600000ms, keys: /0/3"),
    "network": dist.DistNetworkError("The client socket has failed to connect"),
}
BY_NO_PEER = {
    "illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "NCCL, illegal access": dist.DistBackendError(f"{IN_NCCL}ncclUnhandledCudaError: Call to CUDA failed"),
    "NCCL, misuse": dist.DistBackendError(f"{IN_NCCL}ncclInvalidUsage: This usually reflects invalid usage"),
    "GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host memory": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
    "assertion of gloo": RuntimeError(f"[enforce fail at {IN_GLOO}pair.cc:9] op.preamble.length <= max"),
    "anything else": RuntimeError("shape '[3]' is invalid for input of size 4"),
    "no RuntimeError": ValueError("Connection reset by peer"),
}


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ContextParallelGroup(dist.group.WORLD, layer=3)
    dist.destroy_process_group()


class Failing:
    """A collective under way that ends with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> None:
        raise self._error


def raised(group: ContextParallelGroup, error: Exception) -> Exception:
    """What comes out of a wait for a collective that ends with this error."""
    try:
        Pending(group, Failing(error), torch.empty(0), torch.empty(0)).wait()
    except Exception as found:
        return found
    raise AssertionError("the error is gone")


@pytest.mark.parametrize("error", BY_A_PEER.values(), ids=BY_A_PEER)
def test_what_a_peer_caused_names_layer_and_group(group, error):
    found = raised(group, error)
    assert type(found) is PeerLostError and isinstance(found, RuntimeError) and found.__cause__ is error
    first_line = str(error).split("\n")[0]
    assert str(found).startswith("context-parallel exchange of layer 3, group [0]: ")
    assert str(found).endswith(first_line) and "\n" not in str(found)


@pytest.mark.parametrize("error", BY_NO_PEER.values(), ids=BY_NO_PEER)
def test_what_no_peer_caused_passes_unchanged(group, error):
    assert raised(group, error) is error


@pytest.mark.parametrize("start", [
    lambda group, x: group.all_gather(x),
    lambda group, x: group.all_to_all(x, [len(x)], [len(x)]),
], ids=["gather", "a2a"])  # fmt: skip
def test_a_collective_that_cannot_begin_is_told_apart_too(group, monkeypatch, start):
    lost, other = BY_A_PEER["store"], BY_NO_PEER["illegal access"]
    for error, expected in ((lost, PeerLostError), (other, torch.AcceleratorError)):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(module, "_all_gather_single", fail)
        monkeypatch.setattr(dist, "all_to_all_single", fail)
        with pytest.raises(expected):
            start(group, torch.zeros(4, 2))


def test_no_name_of_torch_is_used_that_warns(group):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.arange(8.0).view(4, 2)
        assert torch.equal(group.all_gather(x).wait(), x)
        assert torch.equal(group.all_to_all(x, [4], [4]).wait(), x)
