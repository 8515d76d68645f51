"""Checks of arguments that Megatron accepts at first and that make it fail or hang later.

It starts from random weights, for one, if the directory of `--load` does not exist. These checks read only
the parsed arguments and the file system.
"""

import math
import os
from argparse import Namespace
from importlib.util import find_spec

from megatron_s2.data.output import check_file_writable, check_writable
from megatron_s2.data.token_ids import REMOTE_SCHEMES
from megatron_s2.errors import flag_name
from megatron_s2.training.data_checks import check_data, check_sequences_per_dataset, check_tokenizer

_MODEL_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
_OUTPUT_DIRECTORIES = (
    "save",
    "tensorboard_dir",
    "wandb_save_dir",
    "data_cache_path",
    "non_persistent_global_ckpt_dir",
    "non_persistent_local_ckpt_dir",
)
# Smallest value of numbers for which Megatron, numpy or torch fails, some only after the model is built.
_AT_LEAST = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "seq_length"), 1),
    **dict.fromkeys(("make_vocab_size_divisible_by", "rotary_seq_len_interpolation_factor"), 1),
    **dict.fromkeys(("seed", "train_iters", "train_samples", "log_interval", "hysteresis"), 1),
    **dict.fromkeys(
        ("num_workers", "adam_eps", "weight_decay", "clip_grad", "init_method_std", "lr_warmup_init"), 0
    ),
}
_POSITIVE = ("rotary_base", "rope_scaling_factor", "initial_loss_scale", "min_loss_scale")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout")


def check_paths(args: Namespace) -> None:
    """Checks that every path that the run will read exists, and that every directory that it will write to
    exists or can be made.

    Raises:
        ValueError: a path does not exist or is not writable; the message names it and its flag.
    """
    check_data(args)
    check_sequences_per_dataset(args)
    _check_load(args)
    check_tokenizer(args)
    for name in _OUTPUT_DIRECTORIES:
        if (path := getattr(args, name, None)) and not path.startswith(REMOTE_SCHEMES):
            check_writable(flag_name(name), path)
    if path := args.result_rejected_tracker_filename:
        check_file_writable("--result-rejected-tracker-filename", path)
    if (path := args.heterogeneous_layers_config_path) and not os.path.isfile(path):
        raise ValueError(f"--heterogeneous-layers-config-path {path}: there is no such file")


def check_numbers(args: Namespace) -> None:
    """Checks that numbers are in the ranges in which Megatron can train.

    Raises:
        ValueError: one is not, or is not a number; the message names its flag.
    """
    for name, smallest in _AT_LEAST.items():
        if (value := getattr(args, name)) is not None and not smallest <= value < math.inf:
            raise ValueError(f"{flag_name(name)} {value}: must be >= {smallest}")
    for name in _POSITIVE:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag_name(name)} {value}: must be > 0")
    for name in _BELOW_ONE:
        if not 0 <= (value := getattr(args, name)) < 1:
            raise ValueError(f"{flag_name(name)} {value}: must be >= 0 and < 1")


def check_model(args: Namespace) -> None:
    """Checks arguments of the model that Megatron does not validate.

    Raises:
        ValueError: an argument is invalid; the message names its flag.
    """
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads and (groups < 1 or heads % groups):
        raise ValueError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
    channels = args.kv_channels or (args.hidden_size or 0) // (heads or 1)
    if args.position_embedding_type == "rope" and channels % 2:
        raise ValueError(
            f"--kv-channels {channels} (--hidden-size over --num-attention-heads if not given): must be even "
            "with --position-embedding-type rope, which rotates pairs of channels"
        )
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ValueError(f"--vocab-size {args.vocab_size}: must be >= 1")
    if args.num_experts and args.moe_router_topk > args.num_experts:
        raise ValueError(
            f"--moe-router-topk {args.moe_router_topk}: must be at most --num-experts {args.num_experts}"
        )
    if args.config_logger_dir:
        raise ValueError(
            f"--config-logger-dir {args.config_logger_dir}: Megatron cannot write its configuration, which "
            "contains process groups; remove the flag, all arguments are printed at the start"
        )


def check_wandb(args: Namespace) -> None:
    """Checks what wandb needs besides a key, which only the last rank asks for.

    Raises:
        ValueError: naming the flag and what to do.
    """
    if not args.wandb_project:
        return
    flag = f"--wandb-project {args.wandb_project}"
    if find_spec("wandb") is None:
        raise ValueError(f"{flag}: needs wandb: python -m pip install 'megatron-s2[wandb]'")
    if not args.wandb_exp_name:
        raise ValueError(f"--wandb-exp-name: must be given with {flag}")
    if not args.wandb_save_dir and not args.save:
        raise ValueError(
            f"--wandb-save-dir: must be given with {flag}, or --save, whose wandb folder is used"
        )


def check_parallel_sizes(args: Namespace) -> None:
    """Checks that the number of ranks is a multiple of those that hold one model.

    Raises:
        ValueError: it is not; the message names the flags.
    """
    parallel = {name: getattr(args, name) for name in _MODEL_PARALLEL if getattr(args, name) != 1}
    if args.world_size % max(math.prod(parallel.values()), 1):
        flags = ", ".join(f"{flag_name(name)} {size}" for name, size in parallel.items())
        raise ValueError(f"{flags}: the product must divide the number of ranks, {args.world_size}")


def check_rates(args: Namespace) -> None:
    """Checks that the learning rate's warmup ends before its decay does, and what Megatron finds out only
    when the model is built or a checkpoint loaded.

    Raises:
        ValueError: the message names the flag.
    """
    if args.lr is not None and args.lr_warmup_init > args.lr:
        raise ValueError(f"--lr-warmup-init {args.lr_warmup_init}: must be at most --lr {args.lr}")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is args.lr_wsd_decay_samples is None:
        unit = "samples" if args.train_samples else "iters"
        raise ValueError(f"--lr-wsd-decay-{unit}: must be given with --lr-decay-style WSD")
    decoupled = args.decoupled_lr, args.min_lr if args.decoupled_min_lr is None else args.decoupled_min_lr
    if decoupled == (args.lr, args.min_lr):
        # Megatron tells groups of parameters in a checkpoint apart by their rates.
        raise ValueError(
            f"--decoupled-lr {args.decoupled_lr}: must differ from --lr, or checkpoints cannot be resumed; "
            "remove it"
        )
    fraction = args.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(f"--lr-warmup-fraction {fraction}: must be >= 0 and < 1")
    for unit in ("iters", "samples"):
        warmup, total = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or total
        if total and warmup >= decay:
            end = f"--lr-decay-{unit}" if getattr(args, f"lr_decay_{unit}") else f"--train-{unit}"
            raise ValueError(f"--lr-warmup-{unit} {warmup}: must be smaller than {end} {decay}")


def _check_load(args: Namespace) -> None:
    for flag in ("--load", "--pretrained-checkpoint"):
        path = getattr(args, flag[2:].replace("-", "_"), None)
        if not path or path.startswith(REMOTE_SCHEMES) or os.path.isdir(path):
            continue
        # A job that saves to the directory that it loads from finds nothing there when it first starts.
        is_first_launch = (
            flag == "--load" and args.save and os.path.abspath(args.save) == os.path.abspath(path)
        )
        if not is_first_launch:
            raise ValueError(
                f"{flag} {path}: there is no such directory; "
                "to start from random weights, remove the flag or give the --save directory"
            )
