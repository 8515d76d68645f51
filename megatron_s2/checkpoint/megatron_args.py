"""Megatron's arguments: those that build a model, and the model that a checkpoint's arguments describe."""

from argparse import Namespace
from dataclasses import asdict

from megatron_s2.checkpoint.model import Model
from megatron_s2.errors import InputError, flag_name
from megatron_s2.layers.arguments import settings_from_args
from megatron_s2.pattern.settings import S2Settings

# Names of Megatron's arguments whose flag is another word.
_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}
_FLAGS_OF_FALSE = {"add_bias_linear": "--disable-bias-linear"}
# What must be so for a model to be one of ours. An argument that an older checkpoint lacks counts as right.
_REQUIRED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
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
    "spec": None,  # it may bring an attention that the other arguments do not tell of
}
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "layernorm_epsilon",
    "rotary_base",
    "untie_embeddings_and_output_weights",
)
_S2_FIELDS = tuple(S2Settings.__dataclass_fields__)[2:]  # without the model's own numbers


def arguments_of(model: Model) -> dict[str, object]:
    """The arguments that make Megatron build `model`, by the names they have after parsing."""
    arguments = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": model.rotary_base,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
    }
    if model.num_query_groups != model.num_attention_heads:
        arguments |= {"group_query_attention": True, "num_query_groups": model.num_query_groups}
    if model.llama3_factor is not None:
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": model.llama3_factor}
    if model.linear_factor is not None:
        arguments["rotary_seq_len_interpolation_factor"] = model.linear_factor
    if model.family == "qwen2":
        arguments["add_qkv_bias"] = True
    if model.family == "qwen3":
        arguments["qk_layernorm"] = True
    return arguments


def arguments_of_s2(settings: S2Settings | None, anneal_steps: int) -> dict[str, object]:
    """The arguments that S2 settings are, by the names they have after parsing."""
    if settings is None:
        return {"s2_attention": False}
    pattern = {f"s2_{name}": getattr(settings, name) for name in _S2_FIELDS}
    return {"s2_attention": True} | pattern | ({"s2_anneal_steps": anneal_steps} if anneal_steps else {})


def flags(arguments: dict[str, object]) -> list[list[str]]:
    """The flags, each with its values, that give `arguments`; those whose value is their default are left
    out."""
    found = []
    for name, value in arguments.items():
        flag = _flag(name)
        if value is False and name in _FLAGS_OF_FALSE:
            found.append([_FLAGS_OF_FALSE[name]])
        elif value is True:
            found.append([flag])
        elif name == "s2_dense_layers" and value:
            found.append([flag, ",".join(map(str, value))])
        elif isinstance(value, tuple) and value:
            found.append([flag, *map(str, value)])
        elif value is not False and value is not None and value != ():
            found.append([flag, str(value)])
    return found


def _flag(name: str) -> str:
    return _FLAGS.get(name, flag_name(name))


def saved_arguments(arguments: dict[str, object]) -> Namespace:
    """What stands in a checkpoint as the arguments of the run that wrote it: `arguments`, and others that
    Megatron looks for when it loads."""
    written = {
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
    return Namespace(**written | arguments)


def model_of(args: Namespace, family_without_marks: str, vocab_size: int | None) -> Model:
    """The model that a checkpoint's arguments describe.

    Args:
        args: the arguments of the run that wrote the checkpoint.
        family_without_marks: llama or mistral, which are the same in Megatron.
        vocab_size: tokens that have an embedding, None where nothing says it.

    Raises:
        InputError: the arguments say something that none of the families has, by flag.
    """
    if getattr(args, "softmax_type", None) == "learnable":
        raise InputError(
            "--s2-learnable-sink: none of the families has learned sinks; they cannot be written"
        )
    for name in _SIZES:
        if getattr(args, name, None) is None:
            raise InputError(
                f"{_flag(name)}: the checkpoint's arguments do not say it, so the model is not known"
            )
    for name, required in _REQUIRED.items():
        value = getattr(args, name, required)
        if value != required:
            raise InputError(f"{_flag(name)} {value}: the checkpoint was trained with it; must be {required}")
    biased, normed = getattr(args, "add_qkv_bias", False), getattr(args, "qk_layernorm", False)
    if biased and normed:
        raise InputError("--add-qkv-bias: no family has it together with --qk-layernorm")
    scaled = getattr(args, "use_rope_scaling", False)
    if vocab_size is None:
        raise InputError("--vocab-size: must be given, because the checkpoint does not say it")
    return Model(
        family="qwen2" if biased else "qwen3" if normed else family_without_marks,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        norm_epsilon=args.layernorm_epsilon,
        rotary_base=args.rotary_base,
        llama3_factor=args.rope_scaling_factor if scaled else None,
        linear_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        tied=not args.untie_embeddings_and_output_weights,
    )


def settings_of(args: Namespace, model: Model) -> S2Settings | None:
    """The S2 settings in parsed arguments, of a command line or of a checkpoint; None without
    `--s2-attention`.

    Raises:
        InputError: a setting is out of range.
    """
    if not getattr(args, "s2_attention", False):
        return None
    given = {name: getattr(args, f"s2_{name}", None) for name in _S2_FIELDS}
    whole = Namespace(
        num_layers=model.num_layers,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        num_attention_heads=model.num_attention_heads,
        **{f"s2_{name}": value for name, value in given.items()},
    )
    try:
        return settings_from_args(whole)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_s2_flags(flags: Namespace) -> None:
    """Raises InputError where `--s2-…` flags are given that say nothing about a model, or without
    `--s2-attention`."""
    of_a_model = {"s2_attention", "s2_anneal_steps", *(f"s2_{name}" for name in _S2_FIELDS)}
    for name, value in vars(flags).items():
        if not name.startswith("s2_") or value in (None, False):
            continue
        flag = _flag(name)
        if name == "s2_learnable_sink":
            raise InputError(f"{flag}: must not be set: the model has no learned sinks to convert")
        if name not in of_a_model:
            raise InputError(f"{flag}: must not be set: it is for training, and no part of a checkpoint")
        if not flags.s2_attention:
            raise InputError(f"{flag}: needs --s2-attention")


def check_annealed(args: Namespace, iteration: int) -> None:
    """Raises InputError for a checkpoint that still saw more than its pattern: all that was there when it
    has not been trained at all."""
    steps = getattr(args, "s2_anneal_steps", None) or 0
    if iteration < steps:
        otherwise = "" if iteration else ", or convert the model anew without --s2-anneal-steps"
        raise InputError(
            f"--s2-anneal-steps {steps}: the checkpoint is of step {iteration}, before its attention is the "
            f"pattern; take one from step {steps} on{otherwise}"
        )


def first_difference(given: S2Settings, saved: S2Settings) -> tuple[str, object, object] | None:
    """The first setting that differs, as a flag, and its two values."""
    mine, its = asdict(given), asdict(saved)
    for name in _S2_FIELDS:
        if mine[name] != its[name]:
            return _flag(f"s2_{name}"), mine[name], its[name]
    return None
