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

from megatron_s2.parallel.attention import context_parallel_attention
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


@pytest.mark.parametrize(
    ("fate", "schedule"),
    [("dies", "gather"), ("dies", "a2a"), ("hangs", "a2a"), ("hangs while another is late", "gather")],
)
def test_a_lost_peer_is_named_by_all_others(tmp_path, fate, schedule):
    context = mp.start_processes(
        one_rank, (tmp_path, fate, schedule), nprocs=RANKS, start_method="spawn", join=False
    )
    survivors = [rank for rank in range(RANKS) if rank != VICTIM]
    try:
        for rank in survivors:
            context.processes[rank].join(timeout=200)
            assert context.processes[rank].exitcode == 0
    finally:
        for process in context.processes:
            process.kill()
    for rank in survivors:
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith(
            f"rank {VICTIM} did not complete the context-parallel exchange of layer 7 (group [0, 1, 2]): "
        )
