"""Checks of a command line against the checkpoint that it loads.

Megatron compares few arguments; with others it fails on the shape or the name of some tensor. All checks read
the arguments of the run after Megatron's validation, and those in the checkpoint.
"""

from argparse import Namespace
from pathlib import Path

from megatron_s2.errors import flag_name

# Arguments that the shapes of weights depend on.
_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "swiglu",
    "num_experts",
    "moe_ffn_hidden_size",
    "multi_latent_attention",
)
# Arguments that add weights.
_WEIGHTS = (
    "add_qkv_bias",
    "disable_bias_linear",
    "qk_layernorm",
    "normalization",
    "apply_layernorm_1p",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "softmax_type",
)
_ONLY_WITH_WEIGHTS = {"position_embedding_type": "learned_absolute", "softmax_type": "learnable"}
_RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "start_weight_decay", "end_weight_decay")


def check_weights(args: Namespace, saved: Namespace) -> None:
    """Checks that the model has the weights of the checkpoint.

    Raises:
        ValueError: naming the flag that differs, and both values.
    """
    ours, theirs = _model(args), _model(saved)
    # With another strictness than the default, Megatron trains on with weights that a checkpoint lacks.
    is_strict = args.dist_ckpt_strictness == "assume_ok_unexpected"
    for name in (*_SHAPES, *(_WEIGHTS if is_strict else ())):
        mine, its = ours.get(name), theirs.get(name)
        only = _ONLY_WITH_WEIGHTS.get(name)
        if name in theirs and mine != its and (only is None or only in (mine, its)):
            raise ValueError(
                f"{_difference(name, mine, its)}; give the same, or --use-checkpoint-args to take the model "
                "from the checkpoint"
            )


def _difference(name: str, mine: object, its: object) -> str:
    """Says how an argument differs; a flag without a value is given or not."""
    if isinstance(mine, bool):
        mine, its = "given" if mine else "not given", "it" if its else None
    trained = f"with {its}" if its else "without it"
    return f"{flag_name(name)} {mine}: the checkpoint was trained {trained}"


def _model(args: Namespace) -> dict[str, object]:
    values = dict(vars(args))
    if "add_bias_linear" in values:
        values["disable_bias_linear"] = not values["add_bias_linear"]
    if values.get("group_query_attention") is False:
        # The argument says nothing then; Megatron's count of FLOPs sets it to this during training.
        values["num_query_groups"] = values.get("num_attention_heads")
    return values


def check_optimizer(args: Namespace, saved: Namespace) -> None:
    """Checks that the state in the checkpoint is that of the optimizer which resumes from it.

    Raises:
        ValueError: naming the flag that differs, both values and what to do.
    """
    if not _loads_optimizer(args, saved):
        return
    remedy = "give the same, or --no-load-optim to drop the optimizer's state"
    for name in ("optimizer", "use_distributed_optimizer"):
        ours, theirs = getattr(args, name), getattr(saved, name)
        if ours != theirs:
            raise ValueError(f"{_difference(name, ours, theirs)}; {remedy}")
    ours, theirs = _precision(args), _precision(saved)
    if ours != theirs and not getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        raise ValueError(
            f"{ours}: the checkpoint was trained with {theirs}, and its optimizer has other state; {remedy}"
        )


def _precision(args: Namespace) -> str:
    """The flag of the weights' precision, as far as it decides which state the optimizer has."""
    if args.bf16 or args.fp16:
        is_same = not args.use_distributed_optimizer
        return "--bf16 or --fp16" if is_same else "--bf16" if args.bf16 else "--fp16"
    return "neither --bf16 nor --fp16"


def check_format(args: Namespace, directory: Path) -> None:
    """Checks that `--ckpt-format torch` loads no sharded checkpoint: Megatron cannot.

    Raises:
        ValueError: the checkpoint in this directory is sharded.
    """
    if args.ckpt_format == "torch" and (directory / "metadata.json").is_file():
        raise ValueError(f"--ckpt-format torch: {directory} is sharded; use --ckpt-format torch_dist")


def _loads_optimizer(args: Namespace, saved: Namespace) -> bool:
    """Whether the run resumes with the optimizer's state of a checkpoint that has one."""
    is_saved = getattr(saved, "lr", None) is not None and not getattr(saved, "no_save_optim", False)
    return is_saved and not (args.finetune or args.no_load_optim)


def check_schedule(args: Namespace, saved: Namespace) -> None:
    """Checks that a resumed run has the learning-rate schedule of its checkpoint, or says which one counts.

    Call it with validated arguments. With `--use-checkpoint-opt-param-scheduler` the rates of the checkpoint
    replace those in `args`, since Megatron builds the parameter groups by them.

    Args:
        args: arguments of the run, changed in place.
        saved: arguments in the checkpoint that it loads.

    Raises:
        ValueError: naming the flag that differs, both values and what to do.
    """
    if not _loads_optimizer(args, saved):
        return
    if (args.decoupled_lr is None) != (saved.decoupled_lr is None):
        raise ValueError(
            f"--decoupled-lr {args.decoupled_lr}: the checkpoint was trained with {saved.decoupled_lr}, "
            "so its optimizer has other parameter groups; give the same, or --no-load-optim to drop its state"
        )
    if args.override_opt_param_scheduler:
        return
    if args.use_checkpoint_opt_param_scheduler:
        for name in _RATES:
            setattr(args, name, getattr(saved, name, None))
        return
    mine, its = _schedule(args), _schedule(saved)
    for flag, value in mine.items():
        if value != its.get(flag, value):
            raise ValueError(
                f"{flag} {value}: the checkpoint was trained with {its[flag]}; give the same, or "
                "--override-opt-param-scheduler to train on with the new schedule, or "
                "--use-checkpoint-opt-param-scheduler to keep the checkpoint's"
            )


def _schedule(args: Namespace) -> dict[str, object]:
    """What Megatron compares on resume, as flags: the rates, and where the schedule ends."""
    # Megatron sets train_iters of a run by samples, too. Only iterations are counted in batches.
    unit = "samples" if args.train_samples else "iters"
    names = [*_RATES, "lr_decay_style", "weight_decay_incr_style", "lr_warmup_fraction"]
    names += [f"train_{unit}", f"lr_warmup_{unit}"]
    names += ["global_batch_size"] if unit == "iters" and not args.step_batch_size_schedule else []
    values = {name: getattr(args, name, None) for name in names}
    values[f"lr_decay_{unit}"] = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    return {flag_name(name): value for name, value in values.items()}
