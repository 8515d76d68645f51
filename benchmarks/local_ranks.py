"""Ranks of one process group as processes of this machine."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class LocalRanks:
    """Context manager of `count` processes that form a process group: gloo, on CUDA NCCL with a GPU each.

    They are killed at the end of the block, and end by themselves if this process is killed.
    """

    def __init__(self, count: int, device: str, threads: int) -> None:
        self.count = count
        self._device = device
        self._threads = threads
        self._processes: list[mp.Process] = []
        self._pipes = []

    def __enter__(self) -> LocalRanks:
        context = mp.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            setup = rank, self.count, self._device, self._threads, f"{self._directory.name}/store"
            process = context.Process(target=_serve, args=(theirs, *setup), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._directory.cleanup()

    def call(self, function: Callable, *arguments) -> list:
        """Calls `function(*arguments)` on every rank and returns the results in the order of ranks.

        Raises:
            RuntimeError: a rank ended, because the function raised there (its traceback is on stderr) or the
                process died. The message names the rank.
        """
        results = []
        for pipe in self._pipes:
            pipe.send((function, arguments))
        for rank, pipe in enumerate(self._pipes):
            try:
                results.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                raise RuntimeError(f"local rank {rank} ended before its work was done") from None
        return results


def _serve(pipe, rank: int, world_size: int, device: str, threads: int, store: str) -> None:
    # Ctrl-C reaches all processes of the terminal; the parent ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*arguments))
