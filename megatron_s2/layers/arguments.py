"""Megatron's parsed arguments, read for S2 attention: its settings, its rates, and what would bypass it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

from megatron_s2.errors import flag_name
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file
from megatron_s2.pattern.settings import PATTERN_FIELDS, pattern_fields

PATTERN_FILE = "s2_pattern_file"  # the argument; what the file contains is stored as `s2_layers`

# Arguments with which Megatron does not call core attention, or needs something that S2 attention does not
# have, and the reason. A model would silently be trained or run with dense or wrong attention.
_BYPASSES = {
    "multi_latent_attention": "S2 needs keys and values per head",
    "flash_decode": "it bypasses core attention",
    "inference_dynamic_batching": "it bypasses core attention",
    "experimental_attention_variant": "it replaces the attention that S2 replaces",
    "heterogeneous_layers_config_path": "its layers do not carry the S2 settings",
    "heterogeneous_layers_config_encoded_json": "its layers do not carry the S2 settings",
    "use_kitchen_attention": "it replaces the attention that S2 replaces",
    "hierarchical_context_parallel_sizes": "S2 attention has context-parallel schedules of its own "
    "(--s2-cp-schedule)",
    "window_size": "the window of S2 is --s2-local-blocks",
    "reset_attention_mask": "S2 reads no mask; --dataloader-inter-document-masking separates documents",
    "qk_clip": "S2 attention does not report its largest logit",
    "log_max_attention_logit": "S2 attention does not report its largest logit",
}


def settings_from_args(args: Namespace) -> S2Settings:
    """Returns the S2 settings of parsed arguments, and sets flags that were not given to their defaults.

    With `--s2-pattern-file` the file is read once: its contents become the argument `s2_layers`.

    Raises:
        ValueError: a flag is out of range, or given beside a pattern file; the message starts with it.
    """
    kv_heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for flag, value in (("--num-layers", args.num_layers), ("--num-attention-heads", kv_heads)):
        if value is None:
            raise ValueError(f"{flag}: must be given")
    if getattr(args, PATTERN_FILE, None) is not None and args.s2_layers is None:
        settings = pattern_file_settings(args, args.num_layers, kv_heads)
        for name, value in pattern_fields(settings).items():
            setattr(args, f"s2_{name}", value)
    settings = from_s2_fields(S2Settings, args, num_layers=args.num_layers, num_kv_heads=kv_heads)
    with _named_by_flag(("pattern_heads",)):
        settings.check_query_heads(args.num_attention_heads)
    return settings


def pattern_file_settings(args: Namespace, num_layers: int | None, num_kv_heads: int | None) -> S2Settings:
    """Returns the settings in the pattern file of parsed arguments.

    Args:
        num_layers, num_kv_heads: sizes of the model; None for any.

    Raises:
        ValueError: the file is not for the model, or flags of the pattern are given beside it.
    """
    for name in PATTERN_FIELDS:
        if getattr(args, f"s2_{name}", None) is not None:
            raise ValueError(
                f"{flag_name('s2_' + name)}: must not be set with {flag_name(PATTERN_FILE)}, which contains "
                "the whole pattern"
            )
    return read_pattern_file(
        args.s2_pattern_file,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        num_query_heads=args.num_attention_heads,
    )


def pattern_differences(given: S2Settings, saved: S2Settings) -> list[tuple[str, object, object]]:
    """Returns the flag, the given and the saved value of each setting that differs; patterns of layers are
    compared layer by layer if one of both has them."""
    if given.layers is None and saved.layers is None:
        pairs = {name: (getattr(given, name), getattr(saved, name)) for name in PATTERN_FIELDS}
        return [(flag_name(f"s2_{name}"), *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
    found = []
    if given.block_size != saved.block_size:
        found.append((flag_name("s2_block_size"), given.block_size, saved.block_size))
    layers = zip(given.per_layer.layers, saved.per_layer.layers)
    for number, (ours, theirs) in enumerate(layers, 1):
        if ours != theirs:
            values = ("dense attention" if layer is None else layer for layer in (ours, theirs))
            found.append((f"{flag_name(PATTERN_FILE)}: layer {number}:", *values))
    return found


def cluster_from_args(args: Namespace) -> Cluster:
    """Returns the planner's rates of parsed arguments, and sets flags that were not given to their defaults.

    Raises:
        ValueError: a rate is not positive; the message starts with its flag.
    """
    return from_s2_fields(Cluster, args)


def from_s2_fields[T](kind: type[T], args: object, **others: object) -> T:
    """Returns the dataclass `kind` with the fields of `args` of the same names, prefixed by `s2_`.

    Args:
        args: parsed arguments or transformer configuration, in which None is replaced by the default.
        others: fields that replace those of `args`.

    Raises:
        ValueError: a field is out of range; the message starts with its flag, or with the name of one of
            `others`.
    """
    values = {}
    for name, field in kind.__dataclass_fields__.items():
        if name in others or not hasattr(args, f"s2_{name}"):
            continue
        value = getattr(args, f"s2_{name}")
        if value is None:
            value = field.default
        elif isinstance(value, list):
            value = value[0] if name == "vert_stride" and len(value) == 1 else tuple(value)
        setattr(args, f"s2_{name}", value)
        values[name] = value
    with _named_by_flag(values):
        return kind(**others, **values)


@contextmanager
def _named_by_flag(names: Container[str]) -> Iterator[None]:
    """Context in which a ValueError that begins with one of the fields `names` begins with its flag."""
    try:
        yield
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise ValueError(f"{flag_name('s2_' + name)} {rest}" if name in names else str(error)) from None


def refuse_arguments(args: object, reasons: Mapping[str, str], source: str) -> None:
    """Refuses the arguments in `reasons` that are set.

    Args:
        args: Megatron's parsed arguments or transformer configuration, whose fields have the same names.
        reasons: why each argument is refused, by its name.
        source: the flag that is incompatible with them.

    Raises:
        ValueError: `--flag: must not be set with …`.
    """
    for name, reason in reasons.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag_name(name)}: must not be set with {source}: {reason}")


def refuse_bypasses(args: object, source: str) -> None:
    """Refuses what would bypass S2 attention, or needs something that it does not have.

    Args:
        args: Megatron's parsed arguments or transformer configuration.
        source: the flag that selects S2 attention.

    Raises:
        ValueError: `--flag value: must be …`.
    """
    refuse_arguments(args, _BYPASSES, source)
    if args.transformer_impl == "inference_optimized":
        raise ValueError(
            "--transformer-impl inference_optimized: must be local or transformer_engine with "
            f"{source}: it bypasses core attention"
        )
    if getattr(args.attention_backend, "name", None) == "local":
        raise ValueError(
            f"--attention-backend local: must not be set with {source}: it replaces S2 by dense attention"
        )
    if getattr(args, "position_embedding_type", None) == "relative":
        raise ValueError(
            f"--position-embedding-type relative: must be another with {source}: S2 attention does not take "
            "an attention bias"
        )
