"""The entry point: unmodified `megatron.training.pretrain` with S2 attention, on whatever machine this is.

`torchrun … scripts/pretrain_gpt.py <Megatron flags> <--s2-… flags>` or, in one process without torchrun,
`python -m megatron_s2.pretrain …`. Every Megatron flag means what it means there.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

from megatron_s2.offload.manager import OffloadManager
from megatron_s2.offload.session import OffloadError
from megatron_s2.parallel.exchange import PeerLostError
from megatron_s2.training.configure import OneRankError, configure, failed_assertion
from megatron_s2.training.hooks import use_offload
from megatron_s2.training.machine import Machine, describe, runnable_arguments
from megatron_s2.training.offload_arguments import offload_settings
from megatron_s2.training.patches import (
    EmptySplitError,
    TokenIdError,
    apply_patches,
    quiet_known_warnings,
)

_SECONDS_RANK_0_HAS_TO_SPEAK = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says.

    Every end but that of a complete run ends the process: bad input with status 2 and one line on stderr,
    Ctrl-C with status 130, a lost peer with status 1 and one line, any other error with status 1 and its
    traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _train_to_the_end(words)
        except BaseException:
            # A Ctrl-C that arrived while a collective was waiting shows first as the peer's lost connection;
            # the sleep lets Python deliver the signal itself.
            time.sleep(0)
            raise
    except KeyboardInterrupt:
        if _rank() == 0:
            print("megatron-s2: interrupted", file=sys.stderr)
        _leave(130)
    except PeerLostError as error:
        print(f"error: {error} (on rank {_rank()})", file=sys.stderr)
        _leave(1)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(1)


def _train_to_the_end(argv: Sequence[str]) -> None:
    """Trains, and destroys the process group on all ranks together."""
    try:
        train(argv)
    except SystemExit as ended:
        if ended.code:
            raise
        # Status 0: Megatron ends itself between two steps, as with --exit-interval.
    if torch.distributed.is_initialized():
        # The barrier is for runs without a launcher: rank 0 keeps the store that NCCL's watchdogs read.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def train(argv: Sequence[str]) -> None:
    """Prepares this process and runs `megatron.training.pretrain` on the command line `argv`.

    The process group and Megatron's own global state are left as they are then; after an error, so are the
    offload's threads, which may wait for peers that are gone.
    """
    quiet_known_warnings()
    machine = Machine.detect()
    try:
        argv, added = runnable_arguments(argv, machine)
    except ValueError as error:
        _refuse(str(error))
    if _rank() == 0 and (line := describe(machine, added)):
        print(line, flush=True)

    if not machine.gpu:
        from megatron_s2.training.cpu_runtime import enable_cpu_runtime

        enable_cpu_runtime()
    apply_patches(cpu=not machine.gpu)

    try:
        args, container = configure(argv)
    except OneRankError as error:
        _refuse(str(error), only_here=True)
    except ValueError as error:
        _refuse(str(error))
    except AssertionError as error:
        _refuse(failed_assertion(error))

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain

    from megatron_s2.training.forward_step import datasets, forward_step

    offload = None
    if args.s2_offload:
        offload = OffloadManager(offload_settings(args), _rank(), _local_world_size())
    use_offload(offload)
    try:
        pretrain(
            container,
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            store=None if "WORLD_SIZE" in os.environ else torch.distributed.HashStore(),
        )
    except (EmptySplitError, OffloadError) as error:
        _end(offload)
        _refuse(str(error))
    except TokenIdError as error:
        _end(offload)
        _refuse(str(error), only_here=True)
    except SystemExit:  # Megatron's, between two steps
        _end(offload)
        raise
    finally:
        if (writer := get_tensorboard_writer()) is not None:
            writer.close()
    _end(offload)


def _end(offload: OffloadManager | None) -> None:
    if offload is not None:
        offload.close()


def _local_world_size() -> int:
    """On this machine, as the launcher says."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    said = [os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")]
    numbers = [int(word) for word in said if word.isdigit()]
    if not numbers:
        _refuse("LOCAL_WORLD_SIZE: must be set by the launcher, or SLURM_NTASKS_PER_NODE, with --s2-offload")
    return numbers[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _refuse(message: str, only_here: bool = False) -> NoReturn:
    """Ends this rank with status 2; rank 0 says why, in one line, or the only rank that knows.

    A launcher kills the other ranks as soon as one has ended, so they give rank 0 time to be first. If it
    does not end, the input is bad only here (a path that this node lacks), and one rank of the node says so.
    """
    line = f"error: {' '.join(message.split())}"
    if _rank() == 0:
        print(line, file=sys.stderr, flush=True)
    elif only_here:
        print(f"{line} (on rank {_rank()})", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(_SECONDS_RANK_0_HAS_TO_SPEAK)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{line} (on rank {_rank()})", file=sys.stderr, flush=True)
    sys.exit(2)


def _leave(status: int) -> NoReturn:
    """Ends the process at once, whatever its threads do.

    An interpreter that ends in order waits for process groups, and these for peers that may be gone; and it
    aborts when a thread comes back from C++ code. All else that it would do is done here.
    """
    try:
        if (wandb := sys.modules.get("wandb")) is not None:
            wandb.finish(exit_code=status)  # by itself it knows of `sys.exit` and of tracebacks only
        atexit._run_exitfuncs()  # ends child processes and removes temporary files; has no public name
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
