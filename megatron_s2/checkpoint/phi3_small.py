"""Phi-3-small, whose published models have this attention: its entries, tensors and Megatron arguments.

Beside the pattern, whose phases belong to query heads, it differs from the other families in LayerNorm,
biases, muP's constants (arXiv 2203.03466), and its gated activation

    gegelu(x, y) = quick_gelu(min(x, limit)) * (clamp(y, -limit, limit) + 1)
    quick_gelu(x) = x * sigmoid(1.702 * x)

whose x and y are the even and the odd rows of one projection.
"""

from argparse import Namespace

from megatron_s2.checkpoint.config_entries import Config, entry_error, positive_int, positive_number
from megatron_s2.checkpoint.model_config import ModelConfig, Phi3Small
from megatron_s2.checkpoint.tensors import GATE_UP_ROWS, TensorMapping
from megatron_s2.errors import InputError
from megatron_s2.pattern import S2Pattern, S2Settings

NAME = "phi3small"
ARCHITECTURE = "Phi3SmallForCausalLM"


def _norm(name: str, module: str) -> tuple[TensorMapping, ...]:
    return tuple(
        TensorMapping(f"{module}.layer_norm_{part}", {f"{name}.{part}": "hidden"})
        for part in ("weight", "bias")
    )


def _output(name: str, module: str, columns: str) -> tuple[TensorMapping, ...]:
    return (
        TensorMapping(f"{module}.weight", {f"{name}.weight": f"hidden {columns}"}),
        TensorMapping(f"{module}.bias", {f"{name}.bias": "hidden"}),
    )


ATTENTION = (
    *_norm("input_layernorm", "self_attention.linear_qkv"),
    # The queries of a group, its key and its value follow one another, as in Megatron.
    TensorMapping(
        "self_attention.linear_qkv.weight", {"self_attn.query_key_value.weight": "query+key+value hidden"}
    ),
    TensorMapping("self_attention.linear_qkv.bias", {"self_attn.query_key_value.bias": "query+key+value"}),
    *_output("self_attn.dense", "self_attention.linear_proj", "query"),
)
MLP = (
    *_norm("post_attention_layernorm", "mlp.linear_fc1"),
    TensorMapping("mlp.linear_fc1.weight", {"mlp.up_proj.weight": "gate+up hidden"}, GATE_UP_ROWS),
    TensorMapping("mlp.linear_fc1.bias", {"mlp.up_proj.bias": "gate+up"}, GATE_UP_ROWS),
    *_output("mlp.down_proj", "mlp.linear_fc2", "ffn"),
)
FINAL_NORM = tuple(
    TensorMapping(f"decoder.final_layernorm.{part}", {f"model.final_layernorm.{part}": "hidden"})
    for part in ("weight", "bias")
)

# Values of Megatron's arguments that every model of the family has. With `--use-mup`, scores are divided by
# head_dim, and learning rates are scaled only if `--mup-base-hidden-size` is given, too.
_ARGS = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "use_mup": True,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
}
# Megatron (0.19.2) has no fused kernel for this activation in an MLP, and raises an error if asked for one.
_TRAINING_ARGS = {"bias_gelu_fusion": False}
_REQUIRED_ARGS = _ARGS | {"mup_base_head_dim": None, "mup_attn_scale_power": 1.0}
# Those by which it is recognized; `--add-qkv-bias` follows from biases everywhere.
MARKS = {"use_mup": True, "quick_geglu": True, "add_qkv_bias": True}

# The defaults of the published configuration class, for entries that config.json may lack.
_DEFAULTS = {
    "hidden_act": "gegelu",
    "ff_intermediate_size": 14336,
    "ff_dim_multiplier": None,
    "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "rope_scaling": None,
    "gegelu_limit": 20.0,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
    "tie_word_embeddings": True,
}
_PATTERN_ENTRIES = (
    "blocksparse_block_size",
    "blocksparse_num_local_blocks",
    "blocksparse_vert_stride",
    "blocksparse_homo_head_pattern",
    "dense_attention_every_n_layers",
)
# Entries of the other families, and those that have their meaning.
_RENAMED = {
    "intermediate_size": "ff_intermediate_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rope_embedding_base",
}


def own_entries(config: Config) -> Phi3Small:
    """Returns what a `config.json` says that only this family has.

    Raises:
        InputError: an entry describes something that Megatron does not have.
    """
    config = _DEFAULTS | config
    for entry, allowed, rule in (
        ("hidden_act", "gegelu", "gegelu"),
        ("ff_dim_multiplier", None, "null; state ff_intermediate_size"),
        ("mup_use_scaling", True, "true"),
        ("mup_attn_multiplier", 1.0, "1.0"),
        ("rope_scaling", None, "null; Megatron has no LongRoPE, which the models for 128K tokens have"),
    ):
        if config[entry] != allowed:
            raise entry_error(entry, config[entry], f"must be {rule}")
    divisor = positive_number("mup_width_multiplier", config["mup_width_multiplier"])
    if 1 / (1 / divisor) != divisor:
        raise entry_error("mup_width_multiplier", divisor, "must have an exact inverse, by which logits grow")
    limit = config["gegelu_limit"]
    return Phi3Small(
        embedding_multiplier=positive_number("mup_embedding_multiplier", config["mup_embedding_multiplier"]),
        logits_divisor=divisor,
        gegelu_limit=None if limit is None else positive_number("gegelu_limit", limit),
    )


def common_entries(config: Config) -> dict[str, object]:
    """Returns a `config.json` with the entries of the other families, apart from what `own_entries` reads."""
    config = _DEFAULTS | config
    scale = positive_number("rope_position_scale", config["rope_position_scale"])
    renamed = {entry: config[own] for entry, own in _RENAMED.items()}
    linear = {"rope_type": "linear", "factor": scale}
    return config | renamed | {"hidden_act": "silu", "rope_scaling": None if scale == 1 else linear}


def architecture_entries(model: ModelConfig) -> dict[str, object]:
    """Returns the entries that describe the architecture beside the sizes, the pattern not included.

    Raises:
        InputError: the entries cannot describe it.
    """
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise InputError(
            f"--kv-channels {model.head_dim}: config.json of {NAME} cannot describe it: that has the "
            f"{model.hidden_size} of --hidden-size over --num-attention-heads {model.num_attention_heads}"
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": NAME,
        "hidden_act": "gegelu",
        "ff_intermediate_size": model.ffn_hidden_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "rope_embedding_base": float(model.rotary_base),
        "rope_position_scale": float(model.linear_factor or 1),
        "gegelu_limit": model.phi3_small.gegelu_limit,
        "mup_use_scaling": True,
        "mup_attn_multiplier": 1.0,
        "mup_embedding_multiplier": model.phi3_small.embedding_multiplier,
        "mup_width_multiplier": model.phi3_small.logits_divisor,
        "tie_word_embeddings": model.tied,
    }


def settings_from_config(config: Config, model: ModelConfig) -> S2Settings | None:
    """Returns the pattern that a `config.json` describes; None if all layers are dense.

    Raises:
        InputError: an entry is out of range.
    """
    config = _DEFAULTS | config
    *sizes, homo_head, every = _PATTERN_ENTRIES
    is_alike, dense_freq = config[homo_head], config[every] or 0
    if not isinstance(is_alike, bool):
        raise entry_error(homo_head, repr(is_alike), "must be true or false")
    if type(dense_freq) is not int or dense_freq < 0:
        raise entry_error(every, dense_freq, "must be a whole number >= 0, or null")
    if dense_freq == 1:
        return None
    try:
        return _settings(model, *(positive_int(config, entry) for entry in sizes), is_alike, dense_freq)
    except ValueError as error:
        raise InputError(f"config.json: blocksparse pattern: {error}") from None


def _settings(
    model: ModelConfig, block_size: int, local_blocks: int, stride: int, is_alike: bool, dense_freq: int
) -> S2Settings:
    pattern = S2Pattern.from_dkernel(
        num_heads=model.num_attention_heads,
        block_size=block_size,
        local_blocks=local_blocks,
        vert_stride=stride,
        homo_head=is_alike,
        head_sliding_offset=1,
    )
    return S2Settings(
        model.num_layers,
        model.num_query_groups,
        block_size,
        local_blocks,
        stride,
        phases=pattern.phases,
        dense_layer_freq=dense_freq,
        pattern_heads=model.num_attention_heads,
    )


def pattern_entries(model: ModelConfig, settings: S2Settings | None) -> dict[str, object]:
    """Returns the entries that describe a pattern; None is dense attention.

    Raises:
        InputError: the entries cannot describe it.
    """
    sparse = [] if settings is None else settings.sparse_layers
    if not sparse:
        return {"dense_attention_every_n_layers": 1}
    first = settings.pattern(sparse[0])
    stride, is_alike = max(first.strides), len(set(first.head_phases)) == 1
    dense_freq = next((n for n in range(1, model.num_layers + 1) if settings.is_dense(n)), None)
    if stride:
        numbers = settings.block_size, first.local_blocks, stride, is_alike, dense_freq
        if _settings(model, *numbers[:-1], dense_freq or 0).per_layer == settings.per_layer:
            return dict(zip(_PATTERN_ENTRIES, numbers))
    raise InputError(
        f"S2 pattern {settings.describe()}: config.json of {NAME} cannot describe it: that has one window, "
        "one stride, DKernel's phases, no sinks, and every n-th layer dense"
    )


def megatron_args(model: ModelConfig) -> dict[str, object]:
    """Returns the arguments of Megatron that differ from those of the other families."""
    return (
        _ARGS
        | _TRAINING_ARGS
        | {
            "activation_func_clamp_value": model.phi3_small.gegelu_limit,
            "mup_embedding_mult": model.phi3_small.embedding_multiplier,
            "mup_output_mult": 1 / model.phi3_small.logits_divisor,
        }
    )


def required_args(args: Namespace) -> dict[str, object]:
    """Returns the values that arguments of a checkpoint must have, where they differ from other families'."""
    return _REQUIRED_ARGS | {
        "activation_func_clamp_value": getattr(args, "activation_func_clamp_value", None)
    }


def from_args(args: Namespace) -> Phi3Small:
    """Returns what the arguments of a checkpoint say that only this family has."""
    return Phi3Small(
        embedding_multiplier=float(args.mup_embedding_mult),
        logits_divisor=1 / args.mup_output_mult,
        gegelu_limit=args.activation_func_clamp_value,
    )
