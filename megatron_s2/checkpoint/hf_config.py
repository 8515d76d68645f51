"""Hugging Face's `config.json`: the model it describes, and the one that describes a model."""

import math
from collections.abc import Mapping
from dataclasses import asdict

from megatron_s2.checkpoint.model import FAMILIES, Model
from megatron_s2.errors import InputError
from megatron_s2.pattern.settings import S2Settings

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What this attention function is called in transformers; a load fails where it is not registered.
_ATTENTION = "s2"
_S2_KEY = "s2_attention"
_ATTENTION_KEY = "attn_implementation"
_NOT_OF_A_MODEL_FILE = ("num_layers", "num_kv_heads")
# What a setting of S2 may be in JSON, where that is not just a whole number.
_KINDS_OF_SETTINGS = {"vert_stride": (int, list), "phases": (list, type(None)), "dense_layers": (list,)}
_KINDS = {int: "a whole number", list: "a list of whole numbers", type(None): "null"}
_DEFAULT_BASE = 10000.0
# Megatron has these as constants (`RotaryEmbedding._apply_scaling`); only the factor can be chosen.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DEFAULT_WINDOW_OF_MISTRAL = 4096

Config = Mapping[str, object]


def model_of(config: Config) -> Model:
    """The model that a `config.json` describes. Its attention window is not looked at (`sliding_window`).

    Raises:
        InputError: another architecture, or something that Megatron or this conversion does not have, by
            name.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _error("model_type", family, f"must be one of {', '.join(FAMILIES)}")
    architectures = config.get("architectures") or [_ARCHITECTURES[family]]
    if architectures != [_ARCHITECTURES[family]]:
        raise _error("architectures", architectures, f"must be {_ARCHITECTURES[family]}")
    for name, allowed in (
        ("hidden_act", ("silu",)),
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("quantization_config", (None,)),
    ):
        if config.get(name, allowed[0]) not in allowed:
            raise _error(name, config[name], f"must be {allowed[0]}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _error("tie_word_embeddings", repr(tied), "must be true or false")
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    if family == "qwen3" or config.get("head_dim") is not None:
        head_dim = _whole(config, "head_dim")
    elif hidden % heads:
        raise _error("hidden_size", hidden, f"must be a multiple of num_attention_heads {heads}")
    else:
        head_dim = hidden // heads
    groups = heads
    if family != "llama" or config.get("num_key_value_heads") is not None:
        groups = _whole(config, "num_key_value_heads")
    if heads % groups:
        raise _error("num_key_value_heads", groups, f"must divide num_attention_heads {heads}")
    return Model(
        family=family,
        num_layers=_whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=_whole(config, "vocab_size"),
        max_position_embeddings=_whole(config, "max_position_embeddings"),
        norm_epsilon=_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        **_rotary(config),
        tied=tied,
    )


def _rotary(config: Config) -> dict[str, object]:
    """Reads `rope_parameters`, or what stood for it before transformers 5: `rope_theta`, `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # as transformers prefers
    if not isinstance(rope, dict):
        raise _error("rope_scaling", rope, "must be an object or null")
    rope = dict(rope)
    base = rope.pop("rope_theta", None) or config.get("rope_theta") or _DEFAULT_BASE
    if _number("rope_theta", base) != int(base):
        raise _error("rope_theta", base, "must be a whole number (Megatron's --rotary-base)")
    share = _given(rope, "partial_rotary_factor", _given(config, "partial_rotary_factor", 1.0))
    rope.pop("partial_rotary_factor", None)
    if share != 1.0:
        raise _error("partial_rotary_factor", share, "must be 1.0")
    older = rope.pop("type", "default")
    kind = rope.pop("rope_type", older)
    factor = None
    if kind in ("llama3", "linear"):
        factor = rope.pop("factor", None)
        _number("rope_scaling: factor", factor)
    read = {"rotary_base": int(base), "llama3_factor": None, "linear_factor": None}
    if kind == "llama3":
        for name, constant in _LLAMA3.items():
            value = rope.pop(name, config.get(name))
            if value != constant:
                raise _error(f"rope_scaling: {name}", value, f"must be {constant:g}, fixed in Megatron")
        read["llama3_factor"] = float(factor)
    elif kind == "linear":
        if factor != int(factor):
            raise _error("rope_scaling: factor", factor, "must be a whole number, as in Megatron, for linear")
        read["linear_factor"] = int(factor)
    elif kind != "default":
        raise _error("rope_scaling: rope_type", kind, "must be default, linear or llama3")
    for name, value in rope.items():
        raise _error(f"rope_scaling: {name}", value, f"is not known for rope_type {kind}")
    return read


def sliding_window(config: Config) -> int | None:
    """The window beyond which some layer does not see, in tokens; None where all layers see everything."""
    if config["model_type"] == "mistral":
        return config.get("sliding_window", _DEFAULT_WINDOW_OF_MISTRAL)
    kinds = config.get("layer_types")
    windowed = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", False)
    return config.get("sliding_window") if windowed else None


def settings_of(config: Config, model: Model) -> S2Settings | None:
    """The S2 settings in a `config.json`; None where it has none.

    Raises:
        InputError: a setting is unknown, of another type, or out of range.
    """
    saved = config.get(_S2_KEY)
    if saved is None:
        return None
    if not isinstance(saved, dict):
        raise _error(_S2_KEY, saved, "must be an object")
    for name in saved:
        if name not in S2Settings.__dataclass_fields__ or name in _NOT_OF_A_MODEL_FILE:
            raise _error(_S2_KEY, name, "is no setting of S2 attention")
    fields = {name: _setting(name, value) for name, value in saved.items()}
    try:
        return S2Settings(num_layers=model.num_layers, num_kv_heads=model.num_query_groups, **fields)
    except ValueError as error:
        raise InputError(f"config.json: {_S2_KEY}: {error}") from None


def _setting(name: str, value: object) -> object:
    """A setting of S2 as it stands in JSON, where true and 16.0 are no whole numbers."""
    allowed = _KINDS_OF_SETTINGS.get(name, (int,))
    members = value if type(value) is list else []
    if type(value) not in allowed or any(type(member) is not int for member in members):
        rule = " or ".join(_KINDS[kind] for kind in allowed)
        raise _error(f"{_S2_KEY}: {name}", repr(value), f"must be {rule}")
    return tuple(value) if type(value) is list else value


def config_of(model: Model, base: Config, settings: S2Settings | None, dtype: str) -> dict[str, object]:
    """The `config.json` of a model.

    Args:
        base: the one that the model came with, or any other, or an empty mapping; what it says besides stays
            if it is of this family.
        dtype: of the weights, such as bfloat16.
    """
    described = _model_or_none(base)
    if described is None or described.family != model.family:
        base = {}
    config = {name: v for name, v in base.items() if name not in (_S2_KEY, _ATTENTION_KEY)}
    if described != model:
        for name in ("rope_parameters", "rope_theta", "rope_scaling"):
            config.pop(name, None)
        config |= _fields(model)
    if model.family == "mistral" or (base and sliding_window(base) is not None):
        config["sliding_window"] = None
        if model.family != "mistral":
            config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * model.num_layers}
    config["dtype" if "dtype" in base else "torch_dtype"] = dtype
    if settings is not None:
        config[_S2_KEY] = {
            name: value for name, value in asdict(settings).items() if name not in _NOT_OF_A_MODEL_FILE
        }
        config[_ATTENTION_KEY] = _ATTENTION
    return config


def _model_or_none(config: Config) -> Model | None:
    try:
        return model_of(config)
    except InputError:
        return None


def _fields(model: Model) -> dict[str, object]:
    scaling = None
    if model.llama3_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.llama3_factor, **_LLAMA3}
    elif model.linear_factor is not None:
        scaling = {"rope_type": "linear", "factor": float(model.linear_factor)}
    return {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "tie_word_embeddings": model.tied,
    }


def _given(config: Config, name: str, default: object) -> object:
    """What is said; null says nothing."""
    value = config.get(name)
    return default if value is None else value


def _whole(config: Config, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise _error(name, value, "must be a whole number >= 1")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise _error(name, value, "must be a number > 0")
    return float(value)


def _error(name: str, value: object, rule: str) -> InputError:
    return InputError(f"config.json: {name} {value}: {rule}")
