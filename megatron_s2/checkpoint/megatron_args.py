"""Megatron's arguments: those that build a model, and the model that a checkpoint's arguments describe."""

from argparse import Namespace

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.families import FAMILIES, SIZES
from megatron_s2.checkpoint.model_config import ModelConfig
from megatron_s2.errors import InputError, flag_name
from megatron_s2.layers.arguments import PATTERN_FILE, settings_from_args
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.settings import PATTERN_FIELDS, pattern_fields

_FLAG_OF_FALSE = {"add_bias_linear": "--disable-bias-linear", "bias_gelu_fusion": "--no-bias-gelu-fusion"}
# Arguments that are the same in all families, apart from sizes.
_COMMON = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}
# Values that a checkpoint's arguments must have. Older checkpoints may lack some of these arguments.
_REQUIRED_VALUES = _COMMON | {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "activation_func_clamp_value": None,
    "qk_l2_norm": False,
    "use_mup": False,
    "window_size": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "spec": None,  # may replace the attention that the other arguments describe
}
# Arguments that a checkpoint must have, so that its model is known. The vocabulary may be known otherwise.
_REQUIRED_ARGUMENTS = (
    *(argument for _, _, argument in SIZES if argument != "vocab_size"),
    "group_query_attention",
    "layernorm_epsilon",
    "rotary_base",
    "untie_embeddings_and_output_weights",
)
# Arguments that Megatron reads from a checkpoint when it loads one.
_READ_BY_MEGATRON = {
    "add_position_embedding": True,
    "add_qkv_bias": False,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "group_query_attention": False,
    "num_query_groups": 1,
    "pipeline_model_parallel_size": 1,
    "qk_layernorm": False,
    "s2_anneal_steps": 0,
    "s2_learnable_sink": False,
    "softmax_type": "vanilla",
    "tensor_model_parallel_size": 1,
}


def args_from_model(model: ModelConfig) -> dict[str, object]:
    """Returns the arguments that make Megatron build `model`, by their names after parsing."""
    args = {argument: getattr(model, size) for size, _, argument in SIZES}
    args |= _COMMON | {
        "rotary_base": model.rotary_base,
        "layernorm_epsilon": model.norm_epsilon,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "padded_vocab_size": model.padded_vocab_size,
    }
    if model.num_query_groups == model.num_attention_heads:
        del args["num_query_groups"]
    else:
        args["group_query_attention"] = True
    if model.llama3_factor is not None:
        args |= {"use_rope_scaling": True, "rope_scaling_factor": model.llama3_factor}
    if model.linear_factor is not None:
        args["rotary_seq_len_interpolation_factor"] = model.linear_factor
    if model.phi3_small is not None:
        args |= phi3_small.megatron_args(model)
    return args | FAMILIES[model.family].megatron_args


def args_from_s2_settings(settings: S2Settings | None, anneal_steps: int) -> dict[str, object]:
    """Returns the arguments of S2 attention, by their names after parsing; None is dense attention."""
    if settings is None:
        return {"s2_attention": False}
    args = {"s2_attention": True}
    args |= {f"s2_{name}": value for name, value in pattern_fields(settings).items()}
    return args | ({"s2_anneal_steps": anneal_steps} if anneal_steps else {})


def checkpoint_args(args: dict[str, object]) -> Namespace:
    """Returns the arguments to store in a checkpoint: `args`, and what else Megatron reads when it loads."""
    return Namespace(**_READ_BY_MEGATRON | args)


def flags_from_args(args: dict[str, object]) -> list[list[str]]:
    """Returns the flags that set `args`, each with its values; unset arguments have none."""
    flags = []
    for argument, value in args.items():
        flag = _flag(argument)
        if value is False and argument in _FLAG_OF_FALSE:
            flags.append([_FLAG_OF_FALSE[argument]])
        elif value is True and argument not in _FLAG_OF_FALSE:
            flags.append([flag])
        elif argument == "s2_dense_layers" and value:
            flags.append([flag, ",".join(map(str, value))])
        elif isinstance(value, tuple) and value:
            flags.append([flag, *map(str, value)])
        elif not isinstance(value, bool) and value is not None and value != ():
            flags.append([flag, str(value)])
    return flags


def _flag(argument: str) -> str:
    return "--norm-epsilon" if argument == "layernorm_epsilon" else flag_name(argument)


def families_of(args: Namespace) -> list[str]:
    """Returns the families that a checkpoint may be of; several where they are the same in Megatron.

    Args:
        args: arguments of the run that wrote the checkpoint.

    Raises:
        InputError: the arguments combine what no family has together.
    """
    distinguishing = dict.fromkeys(name for family in FAMILIES.values() for name in family.megatron_args)
    found = {name: getattr(args, name) for name in distinguishing if getattr(args, name, False)}
    families = [name for name, family in FAMILIES.items() if family.megatron_args == found]
    if not families:
        first, *others = map(_flag, found)
        raise InputError(f"{first}: no family has it together with {', '.join(others)}")
    return families


def model_from_args(args: Namespace, family: str, vocab_size: int | None) -> ModelConfig:
    """Returns the architecture that a checkpoint's arguments describe.

    Args:
        args: arguments of the run that wrote the checkpoint.
        family: one of `families_of(args)`.
        vocab_size: number of tokens without padding; None where it is not known.

    Raises:
        InputError: an argument is missing, or has a value that none of the families has.
    """
    if getattr(args, "softmax_type", None) == "learnable":
        raise InputError(
            "--s2-learnable-sink: none of the families has learned sinks; they cannot be written"
        )
    for argument in _REQUIRED_ARGUMENTS:
        if getattr(args, argument, None) is None:
            raise InputError(
                f"{_flag(argument)}: missing from the checkpoint's arguments, so the model is not known"
            )
    own = phi3_small.required_args(args) if family == phi3_small.NAME else {}
    for argument, required in (_REQUIRED_VALUES | own).items():
        value = getattr(args, argument, required)
        if value != required:
            raise InputError(
                f"{_flag(argument)} {value}: the checkpoint was trained with it; must be {required}"
            )
    if vocab_size is None:
        raise InputError("--vocab-size: must be given, because the checkpoint does not contain it")
    sizes = {size: getattr(args, argument, None) for size, _, argument in SIZES} | {"vocab_size": vocab_size}
    if not args.group_query_attention:
        sizes["num_query_groups"] = args.num_attention_heads
    return ModelConfig(
        family=family,
        **sizes,
        norm_epsilon=args.layernorm_epsilon,
        rotary_base=args.rotary_base,
        llama3_factor=args.rope_scaling_factor if getattr(args, "use_rope_scaling", False) else None,
        linear_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        tied=not args.untie_embeddings_and_output_weights,
        phi3_small=phi3_small.from_args(args) if family == phi3_small.NAME else None,
    )


def s2_settings_from_args(args: Namespace, model: ModelConfig) -> S2Settings | None:
    """Returns the S2 settings in parsed arguments, of a command line or of a checkpoint; None without
    `--s2-attention`.

    Raises:
        InputError: a setting is out of range.
    """
    if not getattr(args, "s2_attention", False):
        return None
    pattern = {f"s2_{name}": getattr(args, f"s2_{name}", None) for name in PATTERN_FIELDS}
    pattern[PATTERN_FILE] = getattr(args, PATTERN_FILE, None)
    complete = Namespace(
        num_layers=model.num_layers,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        num_attention_heads=model.num_attention_heads,
        **pattern,
    )
    try:
        return settings_from_args(complete)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_s2_flags(flags: Namespace) -> None:
    """Raises InputError if an `--s2-…` flag is given that does not describe a model, or is given without
    `--s2-attention`."""
    allowed = {"s2_attention", "s2_anneal_steps", PATTERN_FILE, *(f"s2_{name}" for name in PATTERN_FIELDS)}
    for argument, value in vars(flags).items():
        if not argument.startswith("s2_") or value in (None, False):
            continue
        flag = _flag(argument)
        if argument == "s2_learnable_sink":
            raise InputError(f"{flag}: must not be set: the model has no learned sinks to convert")
        if argument not in allowed:
            raise InputError(f"{flag}: must not be set: it is for training, and is not part of a checkpoint")
        if not flags.s2_attention:
            raise InputError(f"{flag}: needs --s2-attention")


def check_annealed(args: Namespace, iteration: int) -> None:
    """Raises InputError for a checkpoint whose annealing is not finished: its attention is not yet that of
    the pattern."""
    steps = getattr(args, "s2_anneal_steps", None) or 0
    if iteration < steps:
        alternative = "" if iteration else ", or convert the model anew without --s2-anneal-steps"
        raise InputError(
            f"--s2-anneal-steps {steps}: the checkpoint is of step {iteration}, before its attention is the "
            f"pattern; take one from step {steps} on{alternative}"
        )
