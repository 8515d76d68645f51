"""The entry point: unmodified `megatron.training.pretrain` with S2 attention, on whatever machine this is.

`torchrun … scripts/pretrain_gpt.py <Megatron flags> <--s2-… flags>` or, in one process without torchrun,
`python -m megatron_s2.pretrain …`. Every Megatron flag means what it means there.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import refuse_bypasses
from megatron_s2.offload.manager import OffloadManager
from megatron_s2.offload.session import OffloadError
from megatron_s2.parallel.exchange import PeerLostError, Traffic
from megatron_s2.parallel.planner import plan_model
from megatron_s2.pattern.annealing import Annealing
from megatron_s2.pattern.settings import S2Settings
from megatron_s2.report.startup_table import startup_table
from megatron_s2.training.arguments import (
    add_s2_args,
    differences_from_checkpoint,
    settle_for_s2,
    take_from_checkpoint,
    validate_s2_args,
)
from megatron_s2.training.checks import check_model, check_paths, check_splits
from megatron_s2.training.hooks import count_s2_flops, log_context_parallel_traffic, use_offload
from megatron_s2.training.machine import Machine, describe, runnable_arguments
from megatron_s2.training.offload_arguments import offload_settings, validate_offload_args
from megatron_s2.training.patches import (
    EmptySplitError,
    apply_patches,
    escape_help_texts,
    let_eval_interval_be_unset,
    quiet_known_warnings,
)

if TYPE_CHECKING:
    from megatron.training.config.container import PretrainConfigContainer

# What Megatron can do and this entry point does not, so that it is refused instead of half done.
_UNSUPPORTED = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "mtp_num_layers": "--mtp-num-layers",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "hybrid_override_pattern": "--hybrid-override-pattern",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "perform_rl_step": "--perform-rl-step",
    "logits_load_dir": "--logits-load-dir",
    "logits_save_dir": "--logits-save-dir",
    "inprocess_restart": "--inprocess-restart",
    "yaml_cfg": "--yaml-cfg",
}
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
            train(words)
            # Together: where no launcher does, rank 0 keeps the store that NCCL's watchdogs read to the end.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
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
    except ValueError as error:
        _refuse(str(error))
    except AssertionError as error:
        _refuse(_failed_assertion(error))

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain

    from megatron_s2.training import forward_step as gpt

    offload = None
    if args.s2_offload:
        offload = OffloadManager(offload_settings(args), _rank(), _local_world_size())
    use_offload(offload)
    try:
        pretrain(
            container,
            gpt.datasets,
            ModelType.encoder_or_decoder,
            gpt.forward_step,
            store=None if "WORLD_SIZE" in os.environ else torch.distributed.HashStore(),
        )
    except (EmptySplitError, OffloadError) as error:
        _end(offload)
        _refuse(str(error))
    except SystemExit:  # Megatron's, between two steps
        _end(offload)
        raise
    finally:
        if (writer := get_tensorboard_writer()) is not None:
            writer.close()
    _end(offload)


def configure(argv: Sequence[str]) -> tuple[Namespace, PretrainConfigContainer]:
    """Parses and validates the command line, in the steps of Megatron's `parse_and_validate_args`, and sets
    Megatron's global variables.

    The steps are called one by one to check the input between them: paths before Megatron looks at anything,
    S2 flags before it opens log writers and reads the tokenizer.

    Returns:
        Megatron's arguments, and what `megatron.training.pretrain` takes.

    Raises:
        ValueError: bad input; the message names the flag.
        AssertionError: Megatron refuses it.
    """
    from megatron.training import arguments
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    from megatron_s2.layers.config import S2TransformerConfig, s2_settings
    from megatron_s2.layers.specs import s2_layer_spec

    args = _parse(argv)
    _refuse_unsupported(args)
    check_paths(args)
    saved = _checkpoint_args(args)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
        _refuse_unsupported(args)
        if saved is not None:
            take_from_checkpoint(args, saved)
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    args.enable_one_logger &= find_spec("one_logger") is not None  # else Megatron says it is missing
    check_model(args)
    check_splits(args)
    let_eval_interval_be_unset(args)
    settled = validate_s2_args(args, argv)
    for_offload = validate_offload_args(args, argv)
    if args.s2_backend == "triton" and not torch.cuda.is_available():
        raise ValueError("--s2-backend triton: needs a GPU, and there is none here; use auto or torch")
    spec_settings = _s2_settings_of_spec(args)
    if spec_settings is not None:
        asked_by = f"--spec {' '.join(args.spec)}"
        refuse_bypasses(args, asked_by)
        settled = settle_for_s2(args, argv, asked_by)
    elif saved is not None:
        _compare_with_checkpoint(args, saved)
    arguments.validate_args(args)
    config = arguments.core_transformer_config_from_args(
        args, config_class=S2TransformerConfig if args.s2_attention else None
    )
    set_global_variables(args)
    model = gpt_config_from_args(args, config=config)
    traffic = Traffic()
    annealing = None
    if args.s2_attention:
        if args.s2_anneal_steps:
            steps_taken = partial(_steps_taken, args)
            annealing = Annealing(s2_settings(config), args.s2_anneal_steps, steps_taken)
        model.transformer_layer_spec = partial(s2_layer_spec, traffic=traffic, annealing=annealing)
        if args.context_parallel_size > 1:
            log_context_parallel_traffic(traffic)
    if args.s2_attention or spec_settings is not None:
        settings = s2_settings(config, **(spec_settings or {}))
        count_s2_flops(annealing or settings)
        _show_table(args, config, settings, settled)
        if annealing is not None and not _rank():
            print(f"  annealing: {annealing}", flush=True)
    if for_offload and not _rank():
        print(f"megatron-s2: set for --s2-offload: {' '.join(for_offload)}", flush=True)
    return args, pretrain_cfg_container_from_args(args, model)


def _s2_settings_of_spec(args: Namespace) -> dict | None:
    """The settings that `--spec` binds to our layer spec, None where it names another spec or none."""
    from megatron_s2.layers.specs import s2_layer_spec

    if args.spec is None:
        return None
    try:
        module, name = args.spec
        spec = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--spec {' '.join(args.spec)}: cannot be imported: {error}") from None
    if spec is s2_layer_spec:
        return {}
    bound = isinstance(spec, partial) and spec.func is s2_layer_spec
    return dict(spec.keywords) if bound else None


def _checkpoint_args(args: Namespace) -> Namespace | None:
    """The arguments in the checkpoint that this run loads, None where there is none yet."""
    from megatron.training.checkpointing import _load_base_checkpoint, get_checkpoint_tracker_filename

    if args.load is None or not Path(get_checkpoint_tracker_filename(args.load)).exists():
        return None
    state, *_ = _load_base_checkpoint(args.load, args, rank0=True)
    return state.get("args") if state else None


def _compare_with_checkpoint(args: Namespace, saved: Namespace) -> None:
    """Refuses to continue a checkpoint with another attention; `--finetune` may, and says so."""
    differences = differences_from_checkpoint(args, saved)
    if not differences:
        return
    if not args.finetune:
        raise ValueError(f"{differences[0]}; give the same, or --finetune to train on from its weights")
    if _rank() == 0:
        print(f"megatron-s2: --finetune changes the attention: {'; '.join(differences)}", flush=True)


def _show_table(args: Namespace, config, settings: S2Settings, settled: list[str]) -> None:
    if _rank():
        return
    from megatron_s2.layers.config import cluster_of

    element = torch.finfo(args.params_dtype).bits // 8
    plan = None
    if args.context_parallel_size > 1:
        plan = plan_model(
            settings,
            seq_length=args.seq_length,
            num_attention_heads=args.num_attention_heads,
            head_dim=args.kv_channels,
            context_parallel=args.context_parallel_size,
            tensor_parallel=args.tensor_model_parallel_size,
            micro_batch=args.micro_batch_size,
            element_size=element,
            schedule=getattr(args, "s2_cp_schedule", None) or "auto",
            cluster=cluster_of(config),
        )
    print(startup_table(settings, args.seq_length, args.kv_channels, element, plan))
    if settled:
        print(f"  set for S2: {' '.join(settled)}")
    sys.stdout.flush()


def _parse(argv: Sequence[str]) -> Namespace:
    """Megatron's own parser on `argv`; what it refuses raises ValueError instead of printing 847 options."""
    from megatron.training.arguments import parse_args

    def refuse_by_exception(message: str) -> None:
        raise ValueError(message)

    def extend(parser: ArgumentParser) -> ArgumentParser:
        parser.error = refuse_by_exception
        escape_help_texts(parser)
        return add_s2_args(parser)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]  # Megatron parses sys.argv and nothing else
    try:
        return parse_args(extend)
    finally:
        sys.argv = outer


def _refuse_unsupported(args: Namespace) -> None:
    for name, flag in _UNSUPPORTED.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag}: not supported by megatron-s2; use Megatron-LM's own pretrain_gpt.py")
    if args.dataloader_inter_document_masking and args.context_parallel_size > 1 and not args.s2_attention:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: must be 1 with "
            "--dataloader-inter-document-masking, except with --s2-attention"
        )
    pipelined_packing = args.dataloader_inter_document_masking and args.pipeline_model_parallel_size > 1
    if pipelined_packing and args.micro_batch_size not in (None, 1):
        # Packing joins a micro-batch to one row, and stages expect from each other what was not joined.
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size}: must be 1 with --dataloader-inter-document-masking "
            "and --pipeline-model-parallel-size > 1; use more micro-batches instead"
        )


def _steps_taken(args: Namespace) -> int:
    """Before the training step that is under way, or the last one."""
    return getattr(args, "curr_iteration", None) or args.iteration


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


def _failed_assertion(error: AssertionError) -> str:
    """What an assertion of Megatron's validation says; where it says nothing, its condition.

    Raises the assertion again when it is not Megatron's: then it is a bug, not bad input.
    """
    import megatron.core

    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not Path(frame.filename).is_relative_to(Path(megatron.core.__file__).parents[1]):
        raise error
    if str(error):
        return str(error)
    condition = (frame.line or "").removeprefix("assert ").rstrip(", \\")
    return f"Megatron requires {re.sub(r'\bargs\.(\w+)', lambda name: flag_name(name[1]), condition)}"


def _refuse(message: str) -> NoReturn:
    """Ends this rank with status 2; rank 0 says why, in one line.

    A launcher kills the other ranks as soon as one has ended, so they give rank 0 time to be first. If it
    does not end, the input is bad only here (a path that this node lacks), and one rank of the node says so.
    """
    line = f"error: {' '.join(message.split())}"
    if _rank() == 0:
        print(line, file=sys.stderr, flush=True)
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
