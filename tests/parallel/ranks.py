"""Runs a function on several ranks in processes of their own, inside pytest."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(ranks: int, function: Callable, directory: Path, *arguments) -> list:
    """`function(rank, *arguments)` on every rank of a gloo group; what each returned, in order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a rank raised, with its traceback.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_run, (ranks, function, directory, arguments), nprocs=ranks, start_method="spawn")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, function: Callable, directory: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(function(rank, *arguments), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
