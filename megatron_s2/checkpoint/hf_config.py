"""Hugging Face's `config.json`: reading a model's architecture and S2 settings from it, and writing them."""

import math

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.config_entries import Config, entry_error, positive_int, positive_number
from megatron_s2.checkpoint.families import FAMILIES, IMPOSSIBLE, SIZES, Family
from megatron_s2.checkpoint.model_config import LLAMA3_POSITIONS, Experts, ModelConfig, Yarn
from megatron_s2.errors import InputError
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.settings import PATTERN_FIELDS, pattern_fields

# `megatron_s2.hf` registers this attention function; without it transformers refuses to load the model.
_ATTENTION = "s2"
_ATTENTION_KEY = "attn_implementation"
_S2_KEY = "s2_attention"
# JSON types of the S2 settings that are not simply whole numbers.
_SETTING_TYPES = {"vert_stride": (int, list), "phases": (list, type(None)), "dense_layers": (list,)}
_TYPE_NAMES = {int: "a whole number", list: "a list of whole numbers", type(None): "null"}
# Where `Family.defaults` has no other value.
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_NORM_EPSILON = 1e-6
_DEFAULT_AUX_LOSS_COEFFICIENT = 0.001
# Of families whose layers from `max_window_layers` on have a window if `use_sliding_window` is true.
_DEFAULT_FULL_LAYERS = 28
_DEFAULT_WINDOW = 4096
# Sizes that Phi-3-small states otherwise, or not at all.
_DERIVED = ("intermediate_size", "head_dim")
# Constants in Megatron (`RotaryEmbedding._apply_scaling`), where only the factor can be chosen.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LLAMA3_POSITIONS,
}
_ROPE_ENTRIES = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
# transformers' defaults for YaRN.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}


def model_from_config(config: Config) -> ModelConfig:
    """Returns the architecture that a `config.json` describes, apart from its `sliding_window`.

    Raises:
        InputError: an entry describes something that Megatron or this conversion does not support.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES | IMPOSSIBLE:
        raise entry_error("model_type", name, f"must be one of {', '.join(FAMILIES)}")
    if name in IMPOSSIBLE:
        raise entry_error("model_type", name, f"cannot be converted: {IMPOSSIBLE[name]}")
    family = FAMILIES[name]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise entry_error("architectures", architectures, f"must be {family.architecture}")
    own = None
    if name == phi3_small.NAME:
        own, config = phi3_small.own_entries(config), phi3_small.common_entries(config)
    for entry, allowed in (
        ("hidden_act", ("silu",)),
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("quantization_config", (None,)),
        ("router_jitter_noise", (0.0, None)),
    ):
        if config.get(entry, allowed[0]) not in allowed:
            raise entry_error(entry, config[entry], f"must be {allowed[0]}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise entry_error("tie_word_embeddings", repr(tied), "must be true or false")
    config = _with_derived_sizes({**family.defaults, **config}, family)
    sizes = {size: positive_int(config, entry) for size, entry, _ in SIZES}
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    if heads % groups:
        raise entry_error("num_key_value_heads", groups, f"must divide num_attention_heads {heads}")
    return ModelConfig(
        family=name,
        **sizes,
        norm_epsilon=positive_number("rms_norm_eps", config.get("rms_norm_eps", _DEFAULT_NORM_EPSILON)),
        **_rope_from_config(config, family, sizes["head_dim"]),
        tied=tied,
        experts=_experts_from_config(config, family, sizes["num_layers"]),
        phi3_small=own,
    )


def _experts_from_config(config: Config, family: Family, num_layers: int) -> Experts | None:
    """Reads the entries that describe experts; None for a family without."""
    entries = family.experts
    if entries is None:
        return None
    count_entry = next((name for name in entries.count if config.get(name) is not None), entries.count[0])
    count, top_k = positive_int(config, count_entry), positive_int(config, entries.top_k)
    is_normalized = entries.normalization is None or config.get(entries.normalization, False)
    if not isinstance(is_normalized, bool):
        raise entry_error(entries.normalization, repr(is_normalized), "must be true or false")
    if top_k > count:
        raise entry_error(entries.top_k, top_k, f"must be at most {count_entry} {count}")
    if top_k == 1 and is_normalized:
        hint = f", or {entries.normalization} false" if entries.normalization else ""
        raise entry_error(
            entries.top_k, top_k, f"must be at least 2, as in Megatron where weights sum to 1{hint}"
        )
    step, without = 1, []
    if entries.may_be_missing:
        step = positive_int({"decoder_sparse_step": 1} | config, "decoder_sparse_step")
        without = config.get("mlp_only_layers") or []
        if not isinstance(without, list) or any(type(layer) is not int for layer in without):
            raise entry_error("mlp_only_layers", without, "must be a list of whole numbers")
    layers = tuple(layer not in without and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(layers):
        raise entry_error(
            "mlp_only_layers", without, f"and decoder_sparse_step {step} leave no layer experts"
        )
    return Experts(count, positive_int(config, entries.ffn_hidden_size), top_k, is_normalized, layers)


def aux_loss_coefficient(config: Config) -> float:
    """Returns the coefficient of the loss that balances experts, as config.json has it.

    Raises:
        InputError: it is not a number, or is negative.
    """
    value = config.get("router_aux_loss_coef", _DEFAULT_AUX_LOSS_COEFFICIENT)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise entry_error("router_aux_loss_coef", value, "must be a number >= 0")
    return float(value)


def _with_derived_sizes(config: Config, family: Family) -> Config:
    """Returns `config` with `head_dim` and `num_key_value_heads`, which some families may omit."""
    hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    omitted = [
        entry
        for entry in ("head_dim", "num_key_value_heads")
        if config.get(entry) is None and entry not in family.required_entries
    ]
    if "head_dim" in omitted and hidden % heads:
        raise entry_error("hidden_size", hidden, f"must be a multiple of num_attention_heads {heads}")
    derived = {"head_dim": hidden // heads, "num_key_value_heads": heads}
    return {**config, **{entry: derived[entry] for entry in omitted}}


def _rope_from_config(config: Config, family: Family, head_dim: int) -> dict[str, object]:
    """Reads `rope_parameters`, or the entries before transformers 5: `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers' precedence
    if not isinstance(rope, dict):
        raise entry_error("rope_scaling", rope, "must be an object or null")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or _DEFAULT_ROPE_THETA
    if positive_number("rope_theta", theta) != int(theta):
        raise entry_error("rope_theta", theta, "must be a whole number (Megatron's --rotary-base)")
    partial = rope.pop("partial_rotary_factor", None)
    partial = config.get("partial_rotary_factor") if partial is None else partial
    rotary_percent = 1.0 if partial is None else positive_number("partial_rotary_factor", partial)
    if rotary_percent != 1.0 and not family.has_partial_rotary:
        raise entry_error("partial_rotary_factor", partial, "must be 1.0")
    if rotary_percent > 1.0 or int(head_dim * rotary_percent) % 2:
        raise entry_error("partial_rotary_factor", partial, f"must leave an even part of head_dim {head_dim}")
    older_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", older_type)
    if rope_type not in family.rope_types:
        *others, last = family.rope_types
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise entry_error("rope_scaling: rope_type", rope_type, f"must be {allowed}")
    fields = {
        "rotary_base": int(theta),
        "rotary_percent": rotary_percent,
        "llama3_factor": None,
        "linear_factor": None,
        "yarn": None,
    }
    if rope_type != "default":
        factor = positive_number("rope_scaling: factor", rope.pop("factor", None))
    if rope_type == "llama3":
        for entry, constant in _LLAMA3.items():
            value = rope.pop(entry, config.get(entry))
            if value != constant:
                raise entry_error(f"rope_scaling: {entry}", value, f"must be {constant:g}, fixed in Megatron")
        fields["llama3_factor"] = factor
    elif rope_type == "linear":
        if factor != int(factor):
            raise entry_error(
                "rope_scaling: factor", factor, "must be a whole number, as in Megatron, for linear"
            )
        fields["linear_factor"] = int(factor)
    elif rope_type == "yarn":
        fields["yarn"] = _pop_yarn(rope, config, factor)
    for entry, value in rope.items():
        raise entry_error(f"rope_scaling: {entry}", value, f"is not known for rope_type {rope_type}")
    return fields


def _pop_yarn(rope: dict[str, object], config: Config, factor: float) -> Yarn:
    """Returns the YaRN scaling that entries of `rope_scaling` describe, and removes them."""
    attention_factor = rope.pop("attention_factor", None)
    if attention_factor is not None:
        rule = "must be null: Megatron computes it from factor, mscale and mscale_all_dim"
        raise entry_error("rope_scaling: attention_factor", attention_factor, rule)
    is_truncated = rope.pop("truncate", True)
    if not isinstance(is_truncated, bool):
        raise entry_error("rope_scaling: truncate", repr(is_truncated), "must be true or false")
    length = "original_max_position_embeddings"
    original = {length: rope.pop(length, None) or config.get(length) or config["max_position_embeddings"]}
    given = {entry: rope.pop(entry, None) or default for entry, default in _YARN.items()}
    if not (given["mscale"] and given["mscale_all_dim"]):  # transformers then has the factor alone
        given |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    for entry, value in given.items():
        if entry != "mscale_all_dim" or value:
            positive_number(f"rope_scaling: {entry}", value)
    return Yarn(
        factor,
        positive_int(original, length),
        **{entry: float(value) for entry, value in given.items()},
        is_truncated=is_truncated,
    )


def sliding_window(config: Config) -> int | None:
    """Returns the attention window of a model in tokens; None where every layer attends to all tokens."""
    family = FAMILIES[config["model_type"]]
    if not family.has_window_switch:
        return config.get("sliding_window", family.defaults.get("sliding_window"))
    if family.has_full_layers and (layer_types := config.get("layer_types")):
        slides = "sliding_attention" in layer_types
    else:
        full_layers = config.get("max_window_layers", _DEFAULT_FULL_LAYERS) if family.has_full_layers else 0
        slides = config.get("use_sliding_window", False) and full_layers < config["num_hidden_layers"]
    return config.get("sliding_window", _DEFAULT_WINDOW) if slides else None


def s2_settings_from_config(config: Config, model: ModelConfig) -> S2Settings | None:
    """Returns the S2 settings in a `config.json`; None where it has none.

    Raises:
        InputError: a setting is unknown, has another type, or is out of range.
    """
    if model.phi3_small is not None:
        return phi3_small.settings_from_config(config, model)
    saved = config.get(_S2_KEY)
    if saved is None:
        return None
    if not isinstance(saved, dict):
        raise entry_error(_S2_KEY, saved, "must be an object")
    for name in saved:
        if name not in PATTERN_FIELDS:
            raise entry_error(_S2_KEY, name, "is not a setting of S2 attention")
    fields = {name: _setting(name, value) for name, value in saved.items()}
    try:
        settings = S2Settings(num_layers=model.num_layers, num_kv_heads=model.num_query_groups, **fields)
        settings.check_query_heads(model.num_attention_heads)
        return settings
    except ValueError as error:
        raise InputError(f"config.json: {_S2_KEY}: {error}") from None


def _setting(name: str, value: object) -> object:
    """Returns an S2 setting read from JSON, in which true and 16.0 are no whole numbers.

    The patterns of layers pass as they are: `S2Settings` checks them.
    """
    if name == "layers":
        if type(value) is not list:
            raise entry_error(f"{_S2_KEY}: {name}", repr(value), "must be a list with one object per layer")
        return tuple(value)
    allowed = _SETTING_TYPES.get(name, (int,))
    members = value if type(value) is list else []
    if type(value) not in allowed or any(type(member) is not int for member in members):
        rule = " or ".join(_TYPE_NAMES[each] for each in allowed)
        raise entry_error(f"{_S2_KEY}: {name}", repr(value), f"must be {rule}")
    return tuple(value) if type(value) is list else value


def config_from_model(
    model: ModelConfig, base: Config, settings: S2Settings | None, dtype: str
) -> dict[str, object]:
    """Returns the `config.json` of a model.

    Args:
        base: the `config.json` that the model came with, or an empty mapping. If it is of the same family,
            its entries that do not describe the architecture are kept.
        settings: S2 settings to store; None for dense attention.
        dtype: dtype of the weights, such as "bfloat16".

    Raises:
        InputError: a config.json of the family cannot describe the settings.
    """
    described = _model_or_none(base)
    if described is None or described.family != model.family:
        base = {}
    config = {entry: value for entry, value in base.items() if entry not in (_S2_KEY, _ATTENTION_KEY)}
    if described != model:
        config = with_architecture(config, model)
    family = FAMILIES[model.family]
    if "sliding_window" in family.defaults or (base and sliding_window(base) is not None):
        config["sliding_window"] = None
        if family.has_window_switch:
            config["use_sliding_window"] = False
        if family.has_full_layers:
            config["layer_types"] = ["full_attention"] * model.num_layers
    if not base:
        config["pad_token_id"] = None  # the default of Phi-3 is beyond a small vocabulary
    config["dtype" if "dtype" in base else "torch_dtype"] = dtype
    if model.phi3_small is not None:
        return config | phi3_small.pattern_entries(model, settings)
    if settings is not None:
        config[_S2_KEY] = pattern_fields(settings)
        config[_ATTENTION_KEY] = _ATTENTION
    return config


def _model_or_none(config: Config) -> ModelConfig | None:
    try:
        return model_from_config(config)
    except InputError:
        return None


def with_architecture(config: Config, model: ModelConfig) -> dict[str, object]:
    """Returns a `config.json` in which the entries that describe the architecture are those of `model`."""
    experts = FAMILIES[model.family].experts
    replaced = (*_ROPE_ENTRIES, *(experts.count if experts else ()))
    kept = {entry: value for entry, value in config.items() if entry not in replaced}
    return kept | _architecture_entries(model)


def _expert_entries(model: ModelConfig) -> dict[str, object]:
    """Returns the entries that describe the experts of a model; none without experts."""
    if model.experts is None:
        return {}
    names = FAMILIES[model.family].experts
    entries = {
        names.count[0]: model.experts.count,
        names.ffn_hidden_size: model.experts.ffn_hidden_size,
        names.top_k: model.experts.top_k,
    }
    if names.normalization is not None:
        entries[names.normalization] = model.experts.is_normalized
    if names.may_be_missing:
        without = [layer for layer, has_experts in enumerate(model.experts.layers) if not has_experts]
        entries |= {"decoder_sparse_step": 1, "mlp_only_layers": without}
    return entries


def _rope_entries(model: ModelConfig) -> dict[str, object]:
    scaling = {"rope_type": model.rope_type}
    if model.llama3_factor is not None:
        scaling |= {"factor": model.llama3_factor, **_LLAMA3}
    elif model.linear_factor is not None:
        scaling["factor"] = float(model.linear_factor)
    elif (yarn := model.yarn) is not None:
        scaling |= {
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.is_truncated,
        }
        if yarn.mscale_all_dim:
            scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    entries = {
        "rope_theta": float(model.rotary_base),
        "rope_scaling": None if model.rope_type == "default" else scaling,
    }
    if model.rotary_percent != 1.0:
        entries["partial_rotary_factor"] = model.rotary_percent
    return entries


def _architecture_entries(model: ModelConfig) -> dict[str, object]:
    if model.phi3_small is not None:
        sizes = {entry: getattr(model, size) for size, entry, _ in SIZES if entry not in _DERIVED}
        return sizes | phi3_small.architecture_entries(model)
    return {
        "architectures": [FAMILIES[model.family].architecture],
        "model_type": model.family,
        **{entry: getattr(model, size) for size, entry, _ in SIZES},
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        **_rope_entries(model),
        "tie_word_embeddings": model.tied,
        **_expert_entries(model),
    }
