"""Every `--s2-…` flag, and what is checked about it before Megatron builds anything."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_s2.settings import S2Settings

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
    "use_kitchen_attention": ("--use-kitchen-attention", "it replaces the attention that S2 replaces"),
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
    "spec": ("--spec", "--s2-attention brings its own; use one of the two"),
}


def add_s2_args(parser: ArgumentParser) -> ArgumentParser:
    """Adds the `--s2-…` flags to Megatron's parser (an `extra_args_provider`).

    Their parsed defaults are None, so that `validate_s2_args` knows what the user gave; it fills them in.
    """
    group = parser.add_argument_group("S2 attention")
    add = group.add_argument
    add(
        "--s2-attention",
        action="store_true",
        help="Replace core attention by S2 attention (Sparsely-Sharded, arXiv 2407.17678).",
    )
    add("--s2-block-size", type=int, help="Tokens per block, a power of two >= 16. Default 64.")
    add(
        "--s2-local-blocks",
        type=int,
        help="Window of every head in blocks, the query's own block included. Default 8.",
    )
    add(
        "--s2-vert-stride",
        type=int,
        nargs="+",
        help="Every so many blocks of the past one is in a head's shard; one number, or one per KV head. "
        "1 is dense. Default 16.",
    )
    add("--s2-sink-blocks", type=int, help="First blocks that every head always sees. Default 0.")
    add(
        "--s2-phases",
        type=int,
        nargs="+",
        help="Residue of each KV head's shard: it sees block j when (j + phase) %% stride is 0. By default "
        "phases spread over the KV heads and, where these are fewer than the stride, rotate with the layer.",
    )
    add("--s2-num-dense-heads", type=int, help="Last KV heads of each S2 layer that stay dense. Default 0.")
    add(
        "--s2-dense-layers",
        type=_layer_numbers,
        help="Layers that keep dense attention, numbered from 1: 1,2. Default none.",
    )
    add("--s2-dense-layer-freq", type=int, help="Every so many layers one stays dense. Default 0: none.")
    add(
        "--s2-learnable-sink",
        action="store_true",
        default=None,
        help="A learned logit per head, from 0 on, that takes part in the softmax without a value; the same "
        "as --softmax-type learnable.",
    )
    add(
        "--s2-backend",
        choices=["auto", "torch", "reference"],
        help="Implementation of S2 attention. Default auto.",
    )
    return parser


def validate_s2_args(args: Namespace, argv: Sequence[str] = ()) -> list[str]:
    """Checks the parsed S2 flags, fills in their defaults, and settles Megatron flags that follow.

    Call it after parsing and before Megatron's own validation.

    Args:
        args: the parsed namespace, changed in place.
        argv: the command line, to tell what the user asked for from Megatron's defaults.

    Returns:
        What was settled for the user, as flags.

    Raises:
        ValueError: `--flag value: must be …`.
    """
    given = [name for name, value in vars(args).items() if name.startswith("s2_") and value is not None]
    given.remove("s2_attention")
    if not args.s2_attention:
        if given:
            raise ValueError(f"{_flag(given[0])}: needs --s2-attention")
        return []
    for name, (flag, why) in _BYPASSES.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag}: must not be set with --s2-attention: {why}")
    _check_choices(args)

    defaults = S2Settings.__dataclass_fields__
    for name in (n for n in vars(args) if n.startswith("s2_") and n.removeprefix("s2_") in defaults):
        value = getattr(args, name)
        if value is None:
            value = defaults[name.removeprefix("s2_")].default
        elif isinstance(value, list):
            value = value[0] if name == "s2_vert_stride" and len(value) == 1 else tuple(value)
        setattr(args, name, value)
    args.s2_backend = args.s2_backend or "auto"
    settings = settings_from_args(args)
    if args.seq_length is not None and args.seq_length < settings.block_size:
        raise ValueError(
            f"--seq-length {args.seq_length}: must be at least one block "
            f"(--s2-block-size {settings.block_size})"
        )
    return _settle(args, argv)


def settings_from_args(args: Namespace) -> S2Settings:
    """The S2 settings of validated arguments.

    Raises:
        ValueError: a flag is out of range; the message starts with it.
    """
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
        raise ValueError(f"{_flag('s2_' + name)} {rest}" if name in chosen else str(error)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _layer_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


_layer_numbers.__name__ = "layer numbers"  # argparse names the type in its message


def _check_choices(args: Namespace) -> None:
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: must be 1 with --s2-attention "
            "(context parallelism of S2 attention is not available yet)"
        )
    if args.transformer_impl == "inference_optimized":
        raise ValueError(
            "--transformer-impl inference_optimized: must be local or transformer_engine with "
            "--s2-attention: it bypasses core attention"
        )
    if getattr(args.attention_backend, "name", None) == "local":
        raise ValueError(
            "--attention-backend local: must not be set with --s2-attention: it puts dense attention back"
        )
    if args.position_embedding_type == "relative":
        raise ValueError(
            "--position-embedding-type relative: must be another with --s2-attention: "
            "S2 attention takes no attention bias"
        )
    if args.s2_learnable_sink and args.softmax_type == "off-by-one":
        raise ValueError("--softmax-type off-by-one: must not be set with --s2-learnable-sink")


def _settle(args: Namespace, argv: Sequence[str]) -> list[str]:
    settled = []
    if args.attention_dropout:
        if any(word.split("=")[0] == "--attention-dropout" for word in argv):
            raise ValueError(
                f"--attention-dropout {args.attention_dropout}: must be 0 with --s2-attention, which has no "
                "dropout inside the softmax"
            )
        args.attention_dropout = 0.0
        settled.append("--attention-dropout 0")
    if args.create_attention_mask_in_dataloader:
        # A mask of seq x seq per sample, which S2 attention would not read.
        args.create_attention_mask_in_dataloader = False
        settled.append("--no-create-attention-mask-in-dataloader")
    if args.s2_learnable_sink:
        args.softmax_type = "learnable"
    return settled
