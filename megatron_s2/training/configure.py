"""From a command line to what `megatron.training.pretrain` takes, checked before anything is built."""

from __future__ import annotations

import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import refuse_bypasses
from megatron_s2.parallel.exchange import Traffic
from megatron_s2.parallel.planner import ModelPlan, plan_model
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.annealing import Annealing
from megatron_s2.report.startup_table import startup_table
from megatron_s2.training.arguments import (
    add_s2_args,
    differences_from_checkpoint,
    settle_for_s2,
    take_from_checkpoint,
    validate_s2_args,
)
from megatron_s2.training.checks import (
    check_model,
    check_paths,
    check_splits,
    check_vocabulary,
    check_wandb,
    vocabulary_of,
)
from megatron_s2.training.hooks import count_s2_flops, log_context_parallel_traffic
from megatron_s2.training.offload_arguments import validate_offload_args
from megatron_s2.training.patches import (
    escape_help_texts,
    let_eval_interval_be_unset,
    refuse_tokens_beyond,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.config.container import PretrainConfigContainer
    from megatron.training.models.gpt import GPTModelConfig

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


class OneRankError(ValueError):
    """Bad input that only this rank can see."""


@dataclass
class _Decided:
    """What the checks found and set before Megatron validates the arguments.

    Args:
        set_for_s2, set_for_offload: Megatron flags that were set for the user.
        spec_settings: the settings that `--spec` binds to our layer spec; None without it.
        annealing: position of the run between dense attention and S2; None without `--s2-anneal-steps`.
    """

    set_for_s2: list[str] = field(default_factory=list)
    set_for_offload: list[str] = field(default_factory=list)
    spec_settings: dict | None = None
    annealing: Annealing | None = None


def configure(argv: Sequence[str]) -> tuple[Namespace, PretrainConfigContainer]:
    """Parses and validates the command line and sets Megatron's global variables.

    These are the steps of Megatron's `parse_and_validate_args`, one by one, so that input is checked between
    them: paths before Megatron opens any, S2 flags before it opens log writers and reads the tokenizer.

    Returns:
        Megatron's arguments, and the container that `megatron.training.pretrain` takes.

    Raises:
        ValueError: bad input; the message names the flag.
        AssertionError: Megatron refuses the arguments.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args, checkpoint_args = _read_arguments(argv)
    decided = _check_arguments(args, argv, checkpoint_args)
    config, model = _build_configs(args)
    _insert_s2(args, config, model, decided)
    _report(args, config, decided)
    return args, pretrain_cfg_container_from_args(args, model)


def _read_arguments(argv: Sequence[str]) -> tuple[Namespace, Namespace | None]:
    """The parsed command line, completed from the checkpoint with `--use-checkpoint-args`; and the arguments
    in the checkpoint that the run loads, None where there is none yet."""
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
            take_from_checkpoint(args, checkpoint_args)
    args.tokenizer_type = args.tokenizer_type or "GPT2BPETokenizer"
    args.enable_one_logger &= find_spec("one_logger") is not None  # else Megatron reports it as missing
    return args, checkpoint_args


def _check_arguments(args: Namespace, argv: Sequence[str], checkpoint_args: Namespace | None) -> _Decided:
    """Refuses what would fail later or train something else, and sets the flags that follow from others."""
    check_model(args)
    check_splits(args)
    check_wandb(args)
    let_eval_interval_be_unset(args)
    decided = _Decided(validate_s2_args(args, argv), validate_offload_args(args, argv))
    if args.s2_backend == "triton" and not torch.cuda.is_available():
        raise ValueError("--s2-backend triton: needs a GPU, and there is none here; use auto or torch")
    decided.spec_settings = _s2_settings_of_spec(args)
    if decided.spec_settings is not None:
        asked_by = f"--spec {' '.join(args.spec)}"
        refuse_bypasses(args, asked_by)
        decided.set_for_s2 = settle_for_s2(args, argv, asked_by)
    elif checkpoint_args is not None:
        _compare_with_checkpoint(args, checkpoint_args)
    return decided


def _build_configs(args: Namespace) -> tuple[TransformerConfig, GPTModelConfig]:
    """Megatron's own validation, its global variables, and the transformer and model configurations."""
    from megatron.training import arguments
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.global_vars import rebuild_tokenizer

    from megatron_s2.layers.config import S2TransformerConfig

    arguments.validate_args(args)
    config_class = S2TransformerConfig if args.s2_attention else None
    config = arguments.core_transformer_config_from_args(args, config_class=config_class)
    _check_data(args, rebuild_tokenizer(args))  # before a log writer is opened
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


def _check_data(args: Namespace, tokenizer) -> None:
    """Refuses data with tokens that are none of the model's, before the run and in every sample of it."""
    for line in check_vocabulary(args, tokenizer):
        if _rank() == 0:
            print(f"megatron-s2: {line}", flush=True)
    refuse_tokens_beyond(vocabulary_of(args, tokenizer))


def _insert_s2(args: Namespace, config: TransformerConfig, model: GPTModelConfig, decided: _Decided) -> None:
    """Puts S2 attention into the model's layer spec, and its FLOPs and traffic into Megatron's log."""
    from megatron_s2.layers.config import s2_settings
    from megatron_s2.layers.specs import s2_layer_spec

    if args.s2_attention:
        traffic = Traffic()
        if args.s2_anneal_steps:
            steps_done = partial(_steps_done, args)
            decided.annealing = Annealing(s2_settings(config), args.s2_anneal_steps, steps_done)
        model.transformer_layer_spec = partial(s2_layer_spec, traffic=traffic, annealing=decided.annealing)
        if args.context_parallel_size > 1:
            log_context_parallel_traffic(traffic)
    if args.s2_attention or decided.spec_settings is not None:
        count_s2_flops(decided.annealing or s2_settings(config, **(decided.spec_settings or {})))


def _report(args: Namespace, config: TransformerConfig, decided: _Decided) -> None:
    """Prints, on rank 0, the startup table and what was set for the user."""
    from megatron_s2.layers.config import s2_settings

    if _rank():
        return
    if args.s2_attention or decided.spec_settings is not None:
        settings = s2_settings(config, **(decided.spec_settings or {}))
        element_size = torch.finfo(args.params_dtype).bits // 8
        plan = _context_parallel_plan(args, config, settings, element_size)
        print(startup_table(settings, args.seq_length, args.kv_channels, element_size, plan))
        if decided.set_for_s2:
            print(f"  set for S2: {' '.join(decided.set_for_s2)}")
        if decided.annealing is not None:
            print(f"  annealing: {decided.annealing}")
    if decided.set_for_offload:
        print(f"megatron-s2: set for --s2-offload: {' '.join(decided.set_for_offload)}")
    sys.stdout.flush()


def _context_parallel_plan(
    args: Namespace, config: TransformerConfig, settings: S2Settings, element_size: int
) -> ModelPlan | None:
    """The planned schedules of context parallelism; None on one context-parallel rank."""
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
        element_size=element_size,
        schedule=getattr(args, "s2_cp_schedule", None) or "auto",
        cluster=cluster_of(config),
    )


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


def _steps_done(args: Namespace) -> int:
    """Number of training steps completed so far."""
    return getattr(args, "curr_iteration", None) or args.iteration


def failed_assertion(error: AssertionError) -> str:
    """The message of a failed assertion of Megatron's validation; without one, its condition.

    Raises:
        AssertionError: the given one, if it is not Megatron's: then it is a bug, not bad input.
    """
    import megatron.core

    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not Path(frame.filename).is_relative_to(Path(megatron.core.__file__).parents[1]):
        raise error
    if str(error):
        return str(error)
    condition = (frame.line or "").removeprefix("assert ").rstrip(", \\")
    return f"Megatron requires {re.sub(r'\bargs\.(\w+)', lambda name: flag_name(name[1]), condition)}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
