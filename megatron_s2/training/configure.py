"""Turns a command line into checked arguments of `megatron.training.pretrain`, before anything is built."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import refuse_bypasses
from megatron_s2.parallel.collectives import Traffic
from megatron_s2.parallel.planner import ModelPlan, plan_model
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.annealing import Annealing
from megatron_s2.report.startup_table import startup_table
from megatron_s2.training.arguments import (
    add_s2_args,
    differences_from_checkpoint,
    load_s2_args,
    set_required_args,
    validate_s2_args,
)
from megatron_s2.training.checkpoint_checks import (
    check_format,
    check_optimizer,
    check_schedule,
    check_weights,
)
from megatron_s2.training.checks import (
    check_model,
    check_numbers,
    check_parallel_sizes,
    check_paths,
    check_rates,
    check_wandb,
)
from megatron_s2.training.data_checks import check_splits, check_vocabulary, tokenizer_flag, vocabulary_of
from megatron_s2.training.environment import rank
from megatron_s2.training.hooks import count_s2_flops, log_context_parallel_traffic
from megatron_s2.training.megatron_errors import errors_that_name_flags
from megatron_s2.training.offload_arguments import validate_offload_args
from megatron_s2.training.patches import (
    escape_help_texts,
    let_eval_interval_be_unset,
    let_resumes_change_the_learning_rate,
    refuse_tokens_beyond,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.config.container import PretrainConfigContainer
    from megatron.training.models.gpt import GPTModelConfig

# Arguments of Megatron that its own pretrain_gpt.py implements and this entry point does not.
_UNSUPPORTED = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "hybrid_context_parallel",
    "overlap_moe_expert_parallel_comm",
    "perform_rl_step",
    "logits_load_dir",
    "logits_save_dir",
    "inprocess_restart",
    "yaml_cfg",
)
# Arguments that Megatron 0.19 parses and ignores, and what replaces them.
_IGNORED = {
    "rampup_batch_size": '--step-batch-size-schedule "0:16 300B:32", say, instead of --global-batch-size',
}


class OneRankError(ValueError):
    """Bad input that only this rank can see."""


def configure(argv: Sequence[str]) -> tuple[Namespace, PretrainConfigContainer]:
    """Parses and validates the command line and sets Megatron's global variables.

    These are the steps of Megatron's `parse_and_validate_args`, with checks between them: of paths before
    Megatron opens any, of S2 flags before it opens log writers and reads the tokenizer.

    Returns:
        Megatron's arguments, and the configuration container for `megatron.training.pretrain`.

    Raises:
        ValueError: bad input; the message names the flag.
        AssertionError: Megatron refuses the arguments.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_s2.layers.config import s2_settings

    args, checkpoint_args = _read_arguments(argv)
    overrides, set_for_s2, set_for_offload = _check_arguments(args, argv, checkpoint_args)
    config, model = _build_configs(args, checkpoint_args)
    if overrides is not None:
        settings = s2_settings(config, **overrides)
        annealing = _annealing(args, settings)
        if args.s2_attention:
            _insert_s2(args, model, annealing)
        count_s2_flops(annealing or settings)
        if rank() == 0:
            _report(args, config, settings, annealing, set_for_s2)
    if set_for_offload and rank() == 0:
        print(f"megatron-s2: set for --s2-offload: {' '.join(set_for_offload)}", flush=True)
    return args, pretrain_cfg_container_from_args(args, model)


def _read_arguments(argv: Sequence[str]) -> tuple[Namespace, Namespace | None]:
    """Returns the parsed command line, completed from the checkpoint with `--use-checkpoint-args`; and the
    arguments in the checkpoint that the run loads, None if there is none yet."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    args = _parse(argv)
    _refuse_unsupported(args)
    check_paths(args)
    checkpoint_args = _checkpoint_args(args)
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
        _refuse_unsupported(args)
        if checkpoint_args is not None:
            load_s2_args(args, checkpoint_args)
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    args.enable_one_logger &= find_spec("one_logger") is not None  # else Megatron reports it as missing
    return args, checkpoint_args


def _check_arguments(
    args: Namespace, argv: Sequence[str], checkpoint_args: Namespace | None
) -> tuple[dict | None, list[str], list[str]]:
    """Refuses what would fail later or train something else, and sets the flags that others require.

    Returns:
        Fields of `S2Settings` that `--spec` sets, None without S2 attention; and the flags that were set for
        S2 attention and for offload.
    """
    check_numbers(args)
    check_model(args)
    check_splits(args)
    check_rates(args)
    check_wandb(args)
    let_eval_interval_be_unset(args)
    set_for_s2, set_for_offload = validate_s2_args(args, argv), validate_offload_args(args, argv)
    check_parallel_sizes(args)
    if args.s2_backend == "triton" and not torch.cuda.is_available():
        raise ValueError("--s2-backend triton: needs a GPU, and there is none here; use auto or torch")
    overrides = {} if args.s2_attention else _settings_of_spec(args)
    if args.spec is not None and overrides is not None:
        source = f"--spec {' '.join(args.spec)}"
        refuse_bypasses(args, source)
        set_for_s2 = set_required_args(args, argv, source)
    elif checkpoint_args is not None:
        _compare_with_checkpoint(args, checkpoint_args)
    return overrides, set_for_s2, set_for_offload


def _build_configs(
    args: Namespace, checkpoint_args: Namespace | None
) -> tuple[TransformerConfig, GPTModelConfig]:
    """Runs Megatron's validation, sets its global variables, and returns the transformer and the model
    configuration."""
    from megatron.training import arguments
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_s2.layers.config import S2TransformerConfig

    with errors_that_name_flags(args):
        arguments.validate_args(args)
        if checkpoint_args is not None:
            check_weights(args, checkpoint_args)
            check_optimizer(args, checkpoint_args)
            check_schedule(args, checkpoint_args)
        if args.override_opt_param_scheduler:
            let_resumes_change_the_learning_rate()
        config_class = S2TransformerConfig if args.s2_attention else None
        config = arguments.core_transformer_config_from_args(args, config_class=config_class)
        _check_token_ids(args, _build_tokenizer(args))  # before a log writer is opened
        _set_global_variables(args)
        return config, gpt_config_from_args(args, config=config)


def _set_global_variables(args: Namespace) -> None:
    """All of Megatron's but the tokenizer; raises OneRankError where wandb, on the last rank, has no key."""
    from megatron.training.global_vars import set_global_variables

    try:
        set_global_variables(args, build_tokenizer=False)
    except Exception as error:  # wandb's own class, which may not be installed
        if not type(error).__module__.startswith("wandb"):
            raise
        raise OneRankError(
            f"--wandb-project {args.wandb_project}: wandb does not start ({error}); run wandb login, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline to log to files"
        ) from error


def _build_tokenizer(args: Namespace):
    """Sets Megatron's global tokenizer and returns it; the errors of its libraries name the flag here."""
    from megatron.training.global_vars import rebuild_tokenizer

    try:
        return rebuild_tokenizer(args)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{tokenizer_flag(args)}: cannot be loaded: {error}") from error


def _check_token_ids(args: Namespace, tokenizer) -> None:
    """Refuses data with tokens that the model does not have, before the run and in every sample of it."""
    for line in check_vocabulary(args, tokenizer):
        if rank() == 0:
            print(f"megatron-s2: {line}", flush=True)
    refuse_tokens_beyond(vocabulary_of(args, tokenizer))


def _annealing(args: Namespace, settings: S2Settings) -> Annealing | None:
    return (
        Annealing(settings, args.s2_anneal_steps, partial(_iteration, args)) if args.s2_anneal_steps else None
    )


def _iteration(args: Namespace) -> int:
    """Number of training steps completed so far."""
    return getattr(args, "curr_iteration", None) or args.iteration


def _insert_s2(args: Namespace, model: GPTModelConfig, annealing: Annealing | None) -> None:
    """Puts S2 attention into the model's layer spec, and its traffic into Megatron's log."""
    from megatron_s2.layers.specs import s2_layer_spec

    traffic = Traffic()
    model.transformer_layer_spec = partial(s2_layer_spec, traffic=traffic, annealing=annealing)
    if args.context_parallel_size > 1:
        log_context_parallel_traffic(traffic)


def _report(
    args: Namespace,
    config: TransformerConfig,
    settings: S2Settings,
    annealing: Annealing | None,
    set_for_s2: list[str],
) -> None:
    """Prints the startup table and the flags that were set for S2 attention."""
    plan = _context_parallel_plan(args, config, settings)
    print(startup_table(settings, args.seq_length, args.kv_channels, args.params_dtype.itemsize, plan))
    if set_for_s2:
        print(f"  set for S2: {' '.join(set_for_s2)}")
    if annealing is not None:
        print(f"  annealing: {annealing}")
    sys.stdout.flush()


def _context_parallel_plan(
    args: Namespace, config: TransformerConfig, settings: S2Settings
) -> ModelPlan | None:
    """Returns the planned schedules of context parallelism; None for one context-parallel rank."""
    from megatron_s2.layers.config import cluster_of

    if args.context_parallel_size == 1:
        return None
    return plan_model(
        settings,
        seq_length=args.seq_length,
        num_attention_heads=args.num_attention_heads,
        head_dim=args.kv_channels,
        context_parallel=args.context_parallel_size,
        tensor_parallel=args.tensor_model_parallel_size,
        micro_batch=args.micro_batch_size,
        element_size=args.params_dtype.itemsize,
        schedule=getattr(args, "s2_cp_schedule", None) or "auto",
        cluster=cluster_of(config),
    )


def _settings_of_spec(args: Namespace) -> dict | None:
    """Returns the settings that `--spec` binds to `s2_layer_spec`; None for another spec or without one."""
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
    """Returns the arguments in the checkpoint that this run loads; None if there is none yet."""
    from megatron.training.checkpointing import _load_base_checkpoint, get_checkpoint_tracker_filename

    if args.load is None or not Path(get_checkpoint_tracker_filename(args.load)).exists():
        return None
    try:
        state, directory, *_ = _load_base_checkpoint(args.load, args, rank0=True)
    except FileNotFoundError as error:
        flag = f"--ckpt-step {args.ckpt_step}" if args.ckpt_step else f"--load {args.load}"
        raise ValueError(f"{flag}: there is no {error.filename}") from error
    if state:
        check_format(args, Path(directory))
    return state.get("args") if state else None


def _compare_with_checkpoint(args: Namespace, saved: Namespace) -> None:
    """Refuses to continue a checkpoint with other attention; with `--finetune`, prints the difference."""
    differences = differences_from_checkpoint(args, saved)
    if not differences:
        return
    if not args.finetune:
        raise ValueError(f"{differences[0]}; give the same, or --finetune to train on from its weights")
    if rank() == 0:
        print(f"megatron-s2: --finetune changes the attention: {'; '.join(differences)}", flush=True)


def _parse(argv: Sequence[str]) -> Namespace:
    """Parses `argv` by Megatron's parser. Its errors raise ValueError instead of printing 847 options."""
    from megatron.training.arguments import parse_args

    def refuse_by_exception(message: str) -> None:
        raise ValueError(message)

    def extend(parser: ArgumentParser) -> ArgumentParser:
        parser.error = refuse_by_exception
        escape_help_texts(parser)
        return add_s2_args(parser)

    outer, sys.argv = sys.argv, [sys.argv[0], *argv]  # Megatron parses only sys.argv
    try:
        return parse_args(extend)
    finally:
        sys.argv = outer


def _refuse_unsupported(args: Namespace) -> None:
    for name in _UNSUPPORTED:
        if getattr(args, name, None):
            raise ValueError(
                f"{flag_name(name)}: not supported by megatron-s2; use Megatron-LM's own pretrain_gpt.py"
            )
    for name, replacement in _IGNORED.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag_name(name)}: Megatron 0.19 ignores it; use {replacement}")
    if args.dataloader_inter_document_masking and args.context_parallel_size > 1 and not args.s2_attention:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: must be 1 with "
            "--dataloader-inter-document-masking, except with --s2-attention"
        )
    pipelined_packing = args.dataloader_inter_document_masking and args.pipeline_model_parallel_size > 1
    if pipelined_packing and args.micro_batch_size not in (None, 1):
        # Packing joins the samples of a micro-batch to one row; stages communicate the shapes before that.
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size}: must be 1 with --dataloader-inter-document-masking "
            "and --pipeline-model-parallel-size > 1; use more micro-batches instead"
        )
