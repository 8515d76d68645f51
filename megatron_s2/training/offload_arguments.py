"""The `--s2-offload…` flags, their checks together with Megatron's flags, and the settings of offload."""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.output import check_file_writable
from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import refuse_arguments
from megatron_s2.offload.plan import ALIGNMENT, GB, SUBGROUP_SIZE, check_fraction
from megatron_s2.offload.settings import OffloadSettings
from megatron_s2.training.environment import given

_FLAG = "--s2-offload"
# Arguments with which Megatron's distributed optimizer leaves state and weights to the inner optimizer.
_IMPLIED = ("optimizer_cpu_offload", "use_precision_aware_optimizer", "use_distributed_optimizer")
# Flags of the optimizer that is replaced (HybridDeviceOptimizer), and the reason to refuse each.
_REFUSED_HYBRID_FLAGS = {
    "--optimizer-offload-fraction": "the share that the GPU updates is --s2-offload-gpu-fraction",
    "--overlap-cpu-optimizer-d2h-h2d": "transfers always overlap; gradients do with --overlap-grad-reduce",
    "--use-torch-optimizer-for-cpu-offload": "the CPU always updates by PyTorch's fused AdamW",
    "--no-pin-cpu-grads": "host memory is pinned",
    "--no-pin-cpu-params": "host memory is pinned",
}
# Other arguments of Megatron that are incompatible, and the reason.
_REFUSED = {
    "use_megatron_fsdp": "it holds the state itself",
    "use_torch_fsdp2": "it holds the state itself",
    "optimizer_cuda_graph": "the CPU takes part in the step",
    "fp8_param_gather": "weights are written in 16 or 32 bits",
    "fp4_param_gather": "weights are written in 16 or 32 bits",
    "reuse_grad_buf_for_mxfp8_param_ag": "weights are written in 16 or 32 bits",
    "overlap_param_gather_with_optimizer_step": "one step updates the whole model",
    "qk_clip": "it changes master weights, which are not where it expects them",
    "load_main_params_from_ckpt": "master weights come from the checkpoint's state, or else from the weights",
    "rl_offload_optimizer_during_inference": "the state is not on the GPU",
}
_DTYPES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def add_offload_args(parser: ArgumentParser) -> None:
    """Adds the flags to Megatron's parser; those that are not given are parsed as None."""
    add = parser.add_argument_group("S2 optimizer offload").add_argument
    add(
        _FLAG,
        action="store_true",
        help="Keep AdamW's state on the host (or NVMe) and update it on CPU and GPU at once (Deep Optimizer "
        "States, arXiv 2410.21316). Takes the place of Megatron's HybridDeviceOptimizer, so it sets "
        "--optimizer-cpu-offload, --use-precision-aware-optimizer and --use-distributed-optimizer; "
        "--optimizer-offload-fraction, --overlap-cpu-optimizer-d2h-h2d and the others of that optimizer are "
        "refused. With --overlap-grad-reduce gradients go to the host during backward, else after it.",
    )
    add(
        "--s2-offload-gpu-fraction",
        type=_fraction,
        help="Share of the state not resident on the GPU that the GPU updates, 0 to 1. Default auto: the "
        "best at the measured rates of this node, which are stored. Results do not depend on it.",
    )
    add(
        "--s2-offload-subgroup-size",
        type=int,
        help=f"Parameters that move together, a multiple of {ALIGNMENT}. Default {SUBGROUP_SIZE}.",
    )
    add(
        "--s2-offload-gpu-budget-gb",
        type=float,
        help="GB (10**9 bytes) of state that each rank keeps on the GPU. Default 0.",
    )
    add(
        "--s2-offload-host-budget-gb",
        type=float,
        help="GB of host memory for state and gradients of each rank; further state is stored in "
        "--s2-offload-nvme-dir. Saving a checkpoint needs more memory. Default: no limit.",
    )
    add(
        "--s2-offload-nvme-dir",
        metavar="DIR[,DIR]",
        help="Directories for the state that exceeds both budgets, distributed by measured bandwidth. Needs "
        "--s2-offload-host-budget-gb. While a checkpoint is saved or loaded, the first directory contains a "
        "copy of the state, 12 bytes per parameter.",
    )
    add(
        "--s2-offload-cpu-threads",
        type=int,
        help="Threads of the CPU updates of each rank. Default: the cores that it may use; ranks of the node "
        "that may use the same ones divide them.",
    )
    add(
        "--s2-offload-gpu-adam",
        choices=["triton", "transformer_engine", "apex"],
        help="Kernel of the GPU's updates. Default triton, which rounds as the CPU does; with the FusedAdam "
        "of Transformer Engine or Apex results depend on the fraction, within rounding.",
    )
    add(
        "--s2-offload-trace",
        metavar="FILE",
        help="Write predicted and measured timeline of rank 0's steps 1, 2, 4, 8, … as Chrome-trace JSON, "
        "each over the one before; scripts/plot_trace.py draws it.",
    )


def validate_offload_args(args: Namespace, argv: Sequence[str] = ()) -> list[str]:
    """Checks the parsed flags, and sets the Megatron flags that they imply.

    Call it after parsing and before Megatron's own validation.

    Args:
        args: the parsed namespace, changed in place.
        argv: the command line, which distinguishes the user's flags from Megatron's defaults.

    Returns:
        The flags that were set.

    Raises:
        ValueError: `--flag value: must be …`.
    """
    if not args.s2_offload:
        for name, value in vars(args).items():
            if name.startswith("s2_offload_") and value is not None:
                raise ValueError(f"{flag_name(name)}: needs {_FLAG}")
        return []
    for flag, why in _REFUSED_HYBRID_FLAGS.items():
        if given(argv, flag) is not None:
            raise ValueError(f"{flag}: must not be set with {_FLAG}: {why}")
    refuse_arguments(args, _REFUSED, _FLAG)
    modules = " ".join(map(str, (args.cuda_graph_modules or []) + (args.cuda_graph_scope_deprecated or [])))
    if args.cuda_graph_impl == "full_iteration" or "full_iteration" in modules:
        raise ValueError(
            f"--cuda-graph-impl full_iteration: must be another with {_FLAG}: the host's code copies "
            "gradients during backward"
        )
    if args.optimizer != "adam":
        raise ValueError(f"--optimizer {args.optimizer}: must be adam with {_FLAG}")
    for name in _DTYPES:
        if (dtype := getattr(args, name)) not in ("fp32", None):
            raise ValueError(f"{flag_name(name)} {dtype}: must be fp32 with {_FLAG}")
    if args.ckpt_format == "fsdp_dtensor":
        raise ValueError(f"--ckpt-format fsdp_dtensor: must be torch_dist or torch with {_FLAG}")
    if offload_settings(args).nvme_dirs and args.async_save and args.use_persistent_ckpt_worker:
        raise ValueError(
            "--use-persistent-ckpt-worker: must not be set with --s2-offload-nvme-dir: a checkpoint's copy "
            "of the state is in files without names there, which a process that already runs cannot open"
        )
    implied = list(_IMPLIED)
    if args.dist_ckpt_optim_fully_reshardable:
        # Otherwise a save gathers the unsharded state, 12 bytes per parameter, on every data-parallel rank.
        implied.append("distrib_optim_fully_reshardable_mem_efficient")
        if not args.use_gloo_process_groups:
            raise ValueError(
                f"--disable-gloo-process-groups: must not be set with {_FLAG} and "
                "--dist-ckpt-optim-fully-reshardable: without them a save would hold the unsharded state, 12 "
                "bytes per parameter, on every data-parallel rank"
            )
    added = [name for name in implied if not getattr(args, name)]
    for name in added:
        setattr(args, name, True)
    return [flag_name(name) for name in added]


def offload_settings(args: Namespace) -> OffloadSettings:
    """Returns the settings of parsed arguments.

    Raises:
        ValueError: a flag is out of range; the message starts with it.
    """
    fraction = args.s2_offload_gpu_fraction
    size = SUBGROUP_SIZE if args.s2_offload_subgroup_size is None else args.s2_offload_subgroup_size
    if size < ALIGNMENT or size % ALIGNMENT:
        raise ValueError(f"--s2-offload-subgroup-size {size}: must be a positive multiple of {ALIGNMENT}")
    threads = args.s2_offload_cpu_threads
    if threads is not None and threads < 1:
        raise ValueError(f"--s2-offload-cpu-threads {threads}: must be >= 1")
    host_budget = _bytes(args, "s2_offload_host_budget_gb")
    directories = tuple(filter(None, (args.s2_offload_nvme_dir or "").split(",")))
    if args.s2_offload_nvme_dir is not None and host_budget is None:
        raise ValueError(
            "--s2-offload-nvme-dir: needs --s2-offload-host-budget-gb; without it all state stays in memory"
        )
    for directory in directories:
        if not os.path.isdir(directory):
            raise ValueError(f"--s2-offload-nvme-dir {directory}: there is no such directory")
    if len({os.path.realpath(directory) for directory in directories}) < len(directories):
        raise ValueError(f"--s2-offload-nvme-dir {args.s2_offload_nvme_dir}: must name each directory once")
    gpu_adam = args.s2_offload_gpu_adam or "triton"
    if gpu_adam != "triton":
        import torch

        from megatron_s2.offload.adam import fused_update

        if not torch.cuda.is_available():
            raise ValueError(f"--s2-offload-gpu-adam {gpu_adam}: needs a GPU, and there is none here")
        fused_update(gpu_adam)
    trace = args.s2_offload_trace
    if trace is not None and not Path(trace).absolute().parent.is_dir():
        raise ValueError(f"--s2-offload-trace {trace}: there is no such directory")
    if trace is not None:
        check_file_writable("--s2-offload-trace", trace)
    return OffloadSettings(
        gpu_fraction=None if fraction == "auto" else fraction,
        subgroup_size=size,
        gpu_budget=_bytes(args, "s2_offload_gpu_budget_gb") or 0,
        host_budget=host_budget,
        nvme_dirs=directories,
        cpu_threads=threads,
        gpu_adam=gpu_adam,
        trace=trace,
    )


def _bytes(args: Namespace, name: str) -> int | None:
    value = getattr(args, name)
    if value is None:
        return None
    if not 0 <= value < math.inf:
        raise ValueError(f"{flag_name(name)} {value:g}: must be >= 0")
    return int(value * GB)


def _fraction(text: str) -> float | str:
    if text == "auto":
        return text
    value = float(text)
    check_fraction(value)
    return value


_fraction.__name__ = "auto, or a number from 0 to 1"  # argparse names the type in its message
