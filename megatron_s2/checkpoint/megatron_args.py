"""Megatron's arguments: those that build a model, and the model that a checkpoint's arguments describe."""

from argparse import Namespace
from dataclasses import asdict
from itertools import groupby

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.families import FAMILIES, SIZES
from megatron_s2.checkpoint.model_config import Experts, ModelConfig, Yarn
from megatron_s2.errors import InputError, flag_name
from megatron_s2.layers.arguments import PATTERN_FILE, settings_from_args
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.settings import PATTERN_FIELDS, pattern_fields

_FLAG_OF_FALSE = {
    "add_bias_linear": "--disable-bias-linear",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
}
# Arguments that are the same in all families, apart from sizes.
_COMMON = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}
# Values that a checkpoint's arguments must have. Older checkpoints may lack some of these arguments.
_REQUIRED_VALUES = _COMMON | {
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
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "spec": None,  # may replace the attention that the other arguments describe
}
# Fields of `Yarn`, and the arguments of Megatron.
_YARN = {
    "factor": "rotary_scaling_factor",
    "original_positions": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "is_truncated": "yarn_correction_range_round_to_int",
}
# Megatron's defaults where the argument is not set.
_YARN_DEFAULTS = asdict(Yarn(factor=1.0, original_positions=4096))
# Further ones of a checkpoint of a model with experts.
_REQUIRED_VALUES_OF_EXPERTS = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
}
# Values of `--moe-router-load-balancing-type` with which a token's experts are those of largest weight.
_TOP_K_ROUTING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
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
        "position_embedding_type": "rope" if model.yarn is None else "yarn",
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
    if model.rotary_percent != 1.0:
        args["rotary_percent"] = model.rotary_percent
    if model.llama3_factor is not None:
        args |= {"use_rope_scaling": True, "rope_scaling_factor": model.llama3_factor}
    if model.linear_factor is not None:
        args["rotary_seq_len_interpolation_factor"] = model.linear_factor
    if model.phi3_small is not None:
        args |= phi3_small.megatron_args(model)
    if model.yarn is not None:
        args |= {argument: getattr(model.yarn, field) for field, argument in _YARN.items()}
    return args | FAMILIES[model.family].megatron_args | _args_from_experts(model)


def _args_from_experts(model: ModelConfig) -> dict[str, object]:
    if model.experts is None:
        return {}
    args = {
        "num_experts": model.experts.count,
        "moe_ffn_hidden_size": model.experts.ffn_hidden_size,
        "moe_router_topk": model.experts.top_k,
        "moe_router_pre_softmax": not model.experts.is_normalized,
    }
    if not model.layers_are_alike:
        args["moe_layer_freq"] = [int(has_experts) for has_experts in model.experts.layers]
    return args


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
        elif argument == "moe_layer_freq" and isinstance(value, list):
            flags.append([flag, _layer_pattern(value)])
        elif isinstance(value, tuple) and value:
            flags.append([flag, *map(str, value)])
        elif not isinstance(value, bool) and value is not None and value != ():
            flags.append([flag, str(value)])
    return flags


def _layer_pattern(values: list[int]) -> str:
    """Returns the text of a list of 0 and 1 for Megatron, such as `([0]*1+[1]*23)`.

    Its parenthesis keeps a shell that expands `$(cat …)` from finding a file of that name.
    """
    return f"({'+'.join(f'[{value}]*{len(list(run))}' for value, run in groupby(values))})"


def _flag(argument: str) -> str:
    return "--norm-epsilon" if argument == "layernorm_epsilon" else flag_name(argument)


def families_of(args: Namespace) -> list[str]:
    """Returns the families that a checkpoint may be of; several where they are the same in Megatron.

    Args:
        args: arguments of the run that wrote the checkpoint.

    Raises:
        InputError: the arguments combine what no family has together.
    """
    all_marks = dict.fromkeys(mark for family in FAMILIES.values() for mark in family.marks)
    found = [mark for mark in all_marks if getattr(args, mark, False)]
    families = [name for name, family in FAMILIES.items() if set(family.marks) == set(found)]
    if getattr(args, "rotary_percent", 1.0) != 1.0:  # of all that look alike, some cannot have it
        families = [name for name in families if FAMILIES[name].has_partial_rotary] or families
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
    experts = _experts_from_args(args, family)
    required_values = _REQUIRED_VALUES | _required_rope(args, family) | _required_routing(experts, family)
    if family == phi3_small.NAME:
        required_values |= phi3_small.required_args(args)
    for argument, required in required_values.items():
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
    if experts is not None and FAMILIES[family].experts.ffn_hidden_size == "intermediate_size":
        sizes["ffn_hidden_size"] = experts.ffn_hidden_size
    return ModelConfig(
        family=family,
        **sizes,
        norm_epsilon=args.layernorm_epsilon,
        rotary_base=args.rotary_base,
        llama3_factor=args.rope_scaling_factor if getattr(args, "use_rope_scaling", False) else None,
        linear_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        tied=not args.untie_embeddings_and_output_weights,
        experts=experts,
        rotary_percent=getattr(args, "rotary_percent", 1.0),
        yarn=_yarn_from_args(args) if _has_yarn(args) else None,
        phi3_small=phi3_small.from_args(args) if family == phi3_small.NAME else None,
    )


def _has_yarn(args: Namespace) -> bool:
    return getattr(args, "position_embedding_type", None) == "yarn"


def _yarn_from_args(args: Namespace) -> Yarn:
    """Returns the YaRN scaling that a checkpoint's arguments describe, with Megatron's defaults."""
    given = {field: getattr(args, argument, None) for field, argument in _YARN.items()}
    fields = _YARN_DEFAULTS | {field: value for field, value in given.items() if value is not None}
    return Yarn(**{field: type(_YARN_DEFAULTS[field])(value) for field, value in fields.items()})


def _required_rope(args: Namespace, family: str) -> dict[str, object]:
    """Returns the rotary positions that a checkpoint of a family must have, with one scaling at most."""
    types = FAMILIES[family].rope_types
    has_yarn, has_llama3 = _has_yarn(args) and "yarn" in types, getattr(args, "use_rope_scaling", False)
    required: dict[str, object] = {"position_embedding_type": "yarn" if has_yarn else "rope"}
    if has_yarn or "llama3" not in types:
        required["use_rope_scaling"] = False
    if has_yarn or has_llama3 or "linear" not in types:
        required["rotary_seq_len_interpolation_factor"] = None
    if has_yarn or not FAMILIES[family].has_partial_rotary:
        required["rotary_percent"] = 1.0
    return required


def _experts_from_args(args: Namespace, family: str) -> Experts | None:
    """Returns the experts that a checkpoint's arguments describe.

    Raises:
        InputError: the routing is another than that of the family.
    """
    if FAMILIES[family].experts is None:
        return None
    balancing = getattr(args, "moe_router_load_balancing_type", None) or "none"
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind not in _TOP_K_ROUTING:
            raise InputError(
                f"--moe-router-load-balancing-type {kind}: the checkpoint was trained with it; must be one "
                f"of {', '.join(_TOP_K_ROUTING)}"
            )
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return Experts(
        count=args.num_experts,
        ffn_hidden_size=getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size,
        top_k=args.moe_router_topk,
        is_normalized=not getattr(args, "moe_router_pre_softmax", False),
        layers=tuple(map(bool, frequency)),
    )


def _required_routing(experts: Experts | None, family: str) -> dict[str, object]:
    """Returns the values that the arguments of a checkpoint with experts must have."""
    if experts is None:
        return {}
    entries = FAMILIES[family].experts
    required = dict(_REQUIRED_VALUES_OF_EXPERTS)
    if entries.normalization is None:
        required["moe_router_pre_softmax"] = False
    if not entries.may_be_missing and not all(experts.layers):
        required["moe_layer_freq"] = 1
    return required


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
