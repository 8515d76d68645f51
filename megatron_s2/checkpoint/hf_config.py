"""Hugging Face's `config.json`: reading a model's architecture and S2 settings from it, and writing them."""

from megatron_s2.checkpoint import phi3_small
from megatron_s2.checkpoint.config_entries import Config, entry_error, positive_int, positive_number
from megatron_s2.checkpoint.families import FAMILIES, SIZES, Family
from megatron_s2.checkpoint.model_config import ModelConfig
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
_DEFAULT_ROPE_THETA = 10000.0
# Of families whose layers from `max_window_layers` on have a window if `use_sliding_window` is true.
_DEFAULT_FULL_LAYERS = 28
_DEFAULT_WINDOW = 4096
# Sizes that Phi-3-small states otherwise, or not at all.
_DERIVED = ("intermediate_size", "head_dim")
# Constants in Megatron (`RotaryEmbedding._apply_scaling`), where only the factor can be chosen.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_from_config(config: Config) -> ModelConfig:
    """Returns the architecture that a `config.json` describes, apart from its `sliding_window`.

    Raises:
        InputError: an entry describes something that Megatron or this conversion does not support.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise entry_error("model_type", name, f"must be one of {', '.join(FAMILIES)}")
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
    ):
        if config.get(entry, allowed[0]) not in allowed:
            raise entry_error(entry, config[entry], f"must be {allowed[0]}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise entry_error("tie_word_embeddings", repr(tied), "must be true or false")
    config = _with_derived_sizes(config, family)
    sizes = {size: positive_int(config, entry) for size, entry, _ in SIZES}
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    if heads % groups:
        raise entry_error("num_key_value_heads", groups, f"must divide num_attention_heads {heads}")
    return ModelConfig(
        family=name,
        **sizes,
        norm_epsilon=positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        **_rope_from_config(config),
        tied=tied,
        phi3_small=own,
    )


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


def _rope_from_config(config: Config) -> dict[str, object]:
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
    if partial not in (None, 1.0):
        raise entry_error("partial_rotary_factor", partial, "must be 1.0")
    older_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", older_type)
    factor = None
    if rope_type in ("llama3", "linear"):
        factor = rope.pop("factor", None)
        positive_number("rope_scaling: factor", factor)
    fields = {"rotary_base": int(theta), "llama3_factor": None, "linear_factor": None}
    if rope_type == "llama3":
        for entry, constant in _LLAMA3.items():
            value = rope.pop(entry, config.get(entry))
            if value != constant:
                raise entry_error(f"rope_scaling: {entry}", value, f"must be {constant:g}, fixed in Megatron")
        fields["llama3_factor"] = float(factor)
    elif rope_type == "linear":
        if factor != int(factor):
            raise entry_error(
                "rope_scaling: factor", factor, "must be a whole number, as in Megatron, for linear"
            )
        fields["linear_factor"] = int(factor)
    elif rope_type != "default":
        raise entry_error("rope_scaling: rope_type", rope_type, "must be default, linear or llama3")
    for entry, value in rope.items():
        raise entry_error(f"rope_scaling: {entry}", value, f"is not known for rope_type {rope_type}")
    return fields


def sliding_window(config: Config) -> int | None:
    """Returns the attention window of a model in tokens; None where every layer attends to all tokens."""
    family = FAMILIES[config["model_type"]]
    if not family.has_window_switch:
        return config.get("sliding_window", family.default_sliding_window)
    if layer_types := config.get("layer_types"):
        slides = "sliding_attention" in layer_types
    else:
        full_layers = config.get("max_window_layers", _DEFAULT_FULL_LAYERS)
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
        for entry in ("rope_parameters", "rope_theta", "rope_scaling"):
            config.pop(entry, None)
        config |= _architecture_entries(model)
    family = FAMILIES[model.family]
    if family.default_sliding_window is not None or (base and sliding_window(base) is not None):
        config["sliding_window"] = None
        if family.has_window_switch:
            config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * model.num_layers}
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


def _architecture_entries(model: ModelConfig) -> dict[str, object]:
    if model.phi3_small is not None:
        sizes = {entry: getattr(model, size) for size, entry, _ in SIZES if entry not in _DERIVED}
        return sizes | phi3_small.architecture_entries(model)
    scaling = None
    if model.llama3_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.llama3_factor, **_LLAMA3}
    elif model.linear_factor is not None:
        scaling = {"rope_type": "linear", "factor": float(model.linear_factor)}
    return {
        "architectures": [FAMILIES[model.family].architecture],
        "model_type": model.family,
        **{entry: getattr(model, size) for size, entry, _ in SIZES},
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "tie_word_embeddings": model.tied,
    }
