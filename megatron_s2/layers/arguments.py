"""What Megatron's arguments say about S2 attention: its settings, and what would bypass it."""

from __future__ import annotations

from argparse import Namespace

from megatron_s2.errors import flag_name
from megatron_s2.pattern import S2Settings

# Megatron paths that attend without asking core attention, or ask it for what S2 has no meaning for. With
# them a model would train or run dense, or wrong, without a word.
_BYPASSES = {
    "multi_latent_attention": ("--multi-latent-attention", "S2 needs keys and values per head"),
    "flash_decode": ("--flash-decode", "it bypasses core attention"),
    "inference_dynamic_batching": ("--inference-dynamic-batching", "it bypasses core attention"),
    "experimental_attention_variant": (
        "--experimental-attention-variant",
        "it replaces the attention that S2 replaces",
    ),
    "heterogeneous_layers_config_path": (
        "--heterogeneous-layers-config-path",
        "its layers do not carry the S2 settings",
    ),
    "heterogeneous_layers_config_encoded_json": (
        "--heterogeneous-layers-config-encoded-json",
        "its layers do not carry the S2 settings",
    ),
    "use_kitchen_attention": ("--use-kitchen-attention", "it replaces the attention that S2 replaces"),
    "hierarchical_context_parallel_sizes": (
        "--hierarchical-context-parallel-sizes",
        "S2 attention has context-parallel schedules of its own (--s2-cp-schedule)",
    ),
    "window_size": ("--window-size", "the window of S2 is --s2-local-blocks"),
    "reset_attention_mask": (
        "--reset-attention-mask",
        "S2 reads no mask; documents are kept apart by --dataloader-inter-document-masking",
    ),
    "qk_clip": ("--qk-clip", "S2 attention does not report its largest logit"),
    "log_max_attention_logit": (
        "--log-max-attention-logit",
        "S2 attention does not report its largest logit",
    ),
}


def settings_from_args(args: Namespace) -> S2Settings:
    """The S2 settings of parsed arguments; fills in the defaults of those flags that were not given.

    Raises:
        ValueError: a flag is out of range; the message starts with it.
    """
    for name, field in S2Settings.__dataclass_fields__.items():
        value = getattr(args, f"s2_{name}", None)
        if f"s2_{name}" in args and value is None:
            setattr(args, f"s2_{name}", field.default)
        elif isinstance(value, list):
            single = name == "vert_stride" and len(value) == 1
            setattr(args, f"s2_{name}", value[0] if single else tuple(value))
    kv_heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for flag, value in (("--num-layers", args.num_layers), ("--num-attention-heads", kv_heads)):
        if value is None:
            raise ValueError(f"{flag}: must be given")
    chosen = {
        name: getattr(args, f"s2_{name}")
        for name in S2Settings.__dataclass_fields__
        if hasattr(args, f"s2_{name}")
    }
    try:
        return S2Settings(num_layers=args.num_layers, num_kv_heads=kv_heads, **chosen)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise ValueError(f"{flag_name('s2_' + name)} {rest}" if name in chosen else str(error)) from None


def refuse_bypasses(chosen: object, asked_by: str) -> None:
    """Refuses what would attend past S2 attention or need what it lacks.

    Args:
        chosen: Megatron's parsed arguments, or its transformer configuration (whose fields have the names).
        asked_by: the flag that asks for S2 attention.

    Raises:
        ValueError: `--flag value: must be …`.
    """
    for name, (flag, why) in _BYPASSES.items():
        if getattr(chosen, name, None):
            raise ValueError(f"{flag}: must not be set with {asked_by}: {why}")
    if chosen.transformer_impl == "inference_optimized":
        raise ValueError(
            "--transformer-impl inference_optimized: must be local or transformer_engine with "
            f"{asked_by}: it bypasses core attention"
        )
    if getattr(chosen.attention_backend, "name", None) == "local":
        raise ValueError(
            f"--attention-backend local: must not be set with {asked_by}: it puts dense attention back"
        )
    if getattr(chosen, "position_embedding_type", None) == "relative":
        raise ValueError(
            f"--position-embedding-type relative: must be another with {asked_by}: "
            "S2 attention takes no attention bias"
        )
