"""A peer that dies or hangs in the middle of an exchange: all others end with an error that names it."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import START_METHOD

from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.exchange import Exchange, PeerLostError
from megatron_s2.pattern import S2Pattern

RANKS, VICTIM, LATE = 3, 1, 2
SECONDS_LATE = 8  # longer than a rank has to answer
TIMEOUT = timedelta(seconds=15)
PATTERN = S2Pattern(num_kv_heads=3, block_size=16, local_blocks=2, vert_stride=3)


def one_rank(rank: int, directory: Path, fate: str, schedule: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    exchange = Exchange(dist.group.WORLD, layer=7)
    q, k, v = torch.randn(3, 1, 64, 3, 16)
    context_parallel_attention(q, k, v, PATTERN, exchange, schedule)
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL if fate == "dies" else signal.SIGSTOP)
    if rank == LATE and "late" in fate:
        time.sleep(SECONDS_LATE)
    try:
        context_parallel_attention(q, k, v, PATTERN, exchange, schedule)
    except PeerLostError as error:
        (directory / f"{rank}.txt").write_text(str(error))
    os._exit(0)


FATES = [
    ("dies", "gather"),
    ("dies", "a2a"),
    ("hangs", "a2a"),
    ("hangs while another is late", "gather"),
]


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
def test_a_lost_peer_is_named_by_all_others(groups, case):
    group, directory = groups[case]
    survivors = [rank for rank in range(RANKS) if rank != VICTIM]
    for rank in survivors:
        group.processes[rank].join(timeout=200)
        assert group.processes[rank].exitcode == 0
    for rank in survivors:
        said = (directory / f"{rank}.txt").read_text()
        assert said.startswith(
            f"rank {VICTIM} did not complete the context-parallel exchange of layer 7 (group [0, 1, 2]): "
        )
