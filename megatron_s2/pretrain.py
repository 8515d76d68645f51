"""The entry point: unmodified `megatron.training.pretrain` with S2 attention, on GPUs or a CPU.

`torchrun … scripts/pretrain_gpt.py <Megatron flags> <--s2-… flags>` or, in one process without torchrun,
`python -m megatron_s2.pretrain …`. Every Megatron flag means what it means there.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

import torch

from megatron_s2.offload.manager import OffloadManager
from megatron_s2.offload.session import OffloadError
from megatron_s2.parallel.collectives import PeerLostError
from megatron_s2.training.configure import OneRankError, configure
from megatron_s2.training.environment import Environment, describe, rank, runnable_arguments
from megatron_s2.training.hooks import use_offload
from megatron_s2.training.megatron_errors import failed_assertion
from megatron_s2.training.offload_arguments import offload_settings
from megatron_s2.training.patches import (
    EmptySplitError,
    TokenIdError,
    apply_patches,
    hide_transformer_engine,
    quiet_known_warnings,
)
from megatron_s2.training.refusal import refuse, report_to_launcher


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a model, given the command line.

    Unless the run is complete, this ends the process: bad input with status 2 and one line on stderr,
    Ctrl-C with status 130, a lost peer with status 1 and one line, any other error with status 1 and its
    traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _train_to_the_end(words)
        except BaseException:
            # Ctrl-C in a collective first raises the error of a lost peer. The sleep lets Python deliver the
            # signal.
            time.sleep(0)
            raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("megatron-s2: interrupted", file=sys.stderr)
        _leave(130)
    except PeerLostError as error:
        print(f"error: {error} (on rank {rank()})", file=sys.stderr)
        report_to_launcher(str(error))
        _leave(1)
    except SystemExit as ended:
        if torch.distributed.is_initialized() and isinstance(ended.code, int):
            _leave(ended.code)  # refused in the run, where peers may wait for this rank
        raise
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        report_to_launcher("".join(traceback.format_exception(error)))
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
    environment = Environment.detect()
    try:
        argv, added = runnable_arguments(argv, environment)
    except ValueError as error:
        refuse(str(error))
    if rank() == 0 and (line := describe(environment, added)):
        print(line, flush=True)

    if not environment.transformer_engine:
        hide_transformer_engine()
    if not environment.gpu:
        from megatron_s2.training.cpu_runtime import enable_cpu_runtime

        enable_cpu_runtime()
    apply_patches(cpu=not environment.gpu)

    try:
        args, container = configure(argv)
    except OneRankError as error:
        refuse(str(error), only_here=True)
    except ValueError as error:
        refuse(str(error))
    except AssertionError as error:
        refuse(failed_assertion(error))

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain

    from megatron_s2.training.forward_step import datasets, forward_step

    offload = None
    if args.s2_offload:
        offload = OffloadManager(offload_settings(args), rank())
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
        refuse(str(error))
    except TokenIdError as error:
        _end(offload)
        refuse(str(error), only_here=True)
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


def _leave(status: int) -> NoReturn:
    """Ends the process at once, without waiting for its threads.

    At a regular exit the interpreter would wait for process groups, and these for peers that may be gone; and
    it would abort when a thread returns from C++ code. Its other steps are taken here.
    """
    try:
        if (wandb := sys.modules.get("wandb")) is not None:
            wandb.finish(exit_code=status)  # by itself it notices only `sys.exit` and tracebacks
        atexit._run_exitfuncs()  # ends child processes and removes temporary files; has no public name
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
