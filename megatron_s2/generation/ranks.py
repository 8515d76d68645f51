"""The ranks that generate together, each with a part of the heads, or of the keys and values of a context."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class RankLayout:
    """How several ranks generate together.

    Args:
        tensor: number of ranks over which the heads, and the matrices, are spread.
        context: number of ranks over which the keys and values of every head are spread.

    Raises:
        ValueError: a size is out of range; the message starts with its flag.
    """

    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for flag, size in self._flags.items():
            if size < 1:
                raise ValueError(f"{flag} {size}: must be >= 1")

    @property
    def ranks(self) -> int:
        return self.tensor * self.context

    @property
    def _flags(self) -> dict[str, int]:
        return {"--tensor-model-parallel-size": self.tensor, "--context-parallel-size": self.context}

    def require_ranks(self, launched: int) -> None:
        """Raises ValueError, which names the flags, unless as many ranks were launched."""
        if self.ranks != launched:
            given = ", ".join(f"{flag} {size}" for flag, size in self._flags.items())
            raise ValueError(
                f"{given}: the product must be {launched}, the number of ranks, which torchrun "
                "--nproc-per-node sets"
            )


def launched_ranks() -> int:
    """Returns how many ranks the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> dist.ProcessGroup:
    """Joins the other ranks of the launcher, each with a GPU where there is one, and returns their group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    leave_ranks_at_exit()
    return dist.group.WORLD


def leave_ranks_at_exit() -> None:
    """Destroys the process group before the interpreter shuts down; later, NCCL would print a warning."""
    atexit.register(_leave_ranks)


def _leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def tokens_of_first_rank(
    chosen: Mapping[int, int], group: dist.ProcessGroup, device: torch.device
) -> dict[int, int]:
    """Returns the tokens that the first rank of a group has chosen for the same rows, on all of its ranks.

    Ranks can round differently, and must not go on with different tokens.
    """
    tokens = torch.tensor(list(chosen.values()), device=device)
    dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return dict(zip(chosen, tokens.tolist()))
