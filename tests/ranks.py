"""Runs a function on several ranks, each a process, inside pytest."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a server process that has imported torch and keeps its first environment.
START_METHOD = "forkserver"
mp.get_context(START_METHOD).set_forkserver_preload(["torch", "torch.distributed"])


def run_on_ranks(
    ranks: int, function: Callable, directory: Path, *arguments, env: Mapping[str, str] | None = None
) -> list:
    """Calls `function(rank, *arguments)` on every rank of a gloo group and returns the results by rank.

    `env` is set before a rank imports the module of `function`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised an exception; holds its traceback.
    """
    directory.mkdir(parents=True, exist_ok=True)
    call = pickle.dumps((function, arguments))
    mp.start_processes(
        _run, (ranks, directory, dict(env or {}), call), nprocs=ranks, start_method=START_METHOD
    )
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, directory: Path, env: dict[str, str], call: bytes) -> None:
    os.environ |= env
    function, arguments = pickle.loads(call)
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(function(rank, *arguments), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
