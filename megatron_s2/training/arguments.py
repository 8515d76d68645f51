"""Every `--s2-…` flag, and what is checked about it before Megatron builds anything."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import refuse_bypasses, settings_from_args
from megatron_s2.parallel.time_model import OURS, Cluster
from megatron_s2.pattern import S2Settings
from megatron_s2.training.offload_arguments import add_offload_args

_S2_FLAG = "--s2-attention"
# What a checkpoint's attention depends on: the S2 flags, and Megatron's for sink logits.
_CHECKPOINTED = (
    "s2_attention",
    *(f"s2_{name}" for name in S2Settings.__dataclass_fields__),
    "s2_anneal_steps",
    "softmax_type",
)


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
    add(
        "--s2-block-size",
        type=int,
        help=f"Tokens per block, a power of two >= 16. Default {S2Settings.block_size}.",
    )
    add(
        "--s2-local-blocks",
        type=int,
        help="Window of every head in blocks, the query's own block included. "
        f"Default {S2Settings.local_blocks}.",
    )
    add(
        "--s2-vert-stride",
        type=int,
        nargs="+",
        help="v: beyond its window a head sees every v-th block of the past; one number, or one per KV head. "
        f"1 is dense. Default {S2Settings.vert_stride}.",
    )
    add(
        "--s2-sink-blocks",
        type=int,
        help=f"First blocks that every head always sees. Default {S2Settings.sink_blocks}.",
    )
    add(
        "--s2-phases",
        type=int,
        nargs="+",
        help="Phase of each KV head, which sees block j of the past when (j + phase) %% stride is 0. By "
        "default phases spread over the KV heads and, where these are fewer than the stride, rotate with the "
        "layer.",
    )
    add(
        "--s2-num-dense-heads",
        type=int,
        help=f"Last KV heads of each S2 layer that stay dense. Default {S2Settings.num_dense_heads}.",
    )
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
        "--s2-anneal-steps",
        type=int,
        help="Narrow from dense attention to the pattern over so many steps, for --finetune of a dense "
        "model: strides double from 1, while the window halves. Default 0: the pattern from the first step.",
    )
    add(
        "--s2-autotune",
        action="store_true",
        default=None,
        help="Measure once which tiles of the Triton kernels are fastest on this GPU; the bits of results "
        "depend on the choice. Default: the shipped ones.",
    )
    add(
        "--s2-backend",
        choices=["auto", "triton", "torch", "reference"],
        help="Implementation of S2 attention. Default auto.",
    )
    _add_context_parallel_args(parser)
    add_offload_args(parser)
    return parser


def _add_context_parallel_args(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("S2 attention under --context-parallel-size").add_argument
    add(
        "--s2-cp-schedule",
        choices=["auto", *OURS],
        help="gather: ranks exchange the shards and windows their heads need. a2a: heads move to the ranks. "
        "Default auto: for each layer what the planner predicts to be faster (scripts/plan.py shows why).",
    )
    rates = Cluster()
    for name, kind, meaning in (
        ("gpus_per_node", int, "GPUs that share the fast link"),
        ("intra_gigabytes_per_s", float, "GB/s (10**9 bytes) of a GPU to its own node, each direction"),
        ("inter_gigabytes_per_s", float, "GB/s (10**9 bytes) of a GPU to other nodes, each direction"),
        ("chip_tflops", float, "peak of a GPU in 10**12 FLOP/s"),
        ("efficiency", float, "share of the peak that attention reaches"),
    ):
        default = getattr(rates, name)
        add(
            flag_name(f"s2_{name}"),
            type=kind,
            help=f"For the planner: {meaning}. Default {default} (DGX H100).",
        )


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
    given = [
        name
        for name, value in vars(args).items()
        if name.startswith("s2_") and not name.startswith("s2_offload") and value is not None
    ]
    given.remove("s2_attention")
    if not args.s2_attention:
        if given:
            raise ValueError(f"{flag_name(given[0])}: needs --s2-attention")
        return []
    if args.spec is not None:
        raise ValueError(f"--spec: must not be set with {_S2_FLAG}, which brings its own; use one of the two")
    refuse_bypasses(args, _S2_FLAG)
    if args.s2_learnable_sink and args.softmax_type == "off-by-one":
        raise ValueError("--softmax-type off-by-one: must not be set with --s2-learnable-sink")

    settings = settings_from_args(args)
    args.s2_backend = args.s2_backend or "auto"
    args.s2_autotune = bool(args.s2_autotune)
    args.s2_anneal_steps = args.s2_anneal_steps or 0
    args.s2_cp_schedule = args.s2_cp_schedule or "auto"
    cluster_from_args(args)
    if args.s2_anneal_steps:
        _check_annealing(args)
    if args.seq_length is not None and args.seq_length < settings.block_size:
        raise ValueError(
            f"--seq-length {args.seq_length}: must be at least one block "
            f"(--s2-block-size {settings.block_size})"
        )
    if args.context_parallel_size > 1:
        _check_context_parallel(args)
    if args.s2_learnable_sink:
        args.softmax_type = "learnable"
    return settle_for_s2(args, argv, _S2_FLAG)


def cluster_from_args(args: Namespace) -> Cluster:
    """The planner's rates of parsed arguments; fills in the defaults of those flags that were not given.

    Raises:
        ValueError: a rate is not positive; the message starts with its flag.
    """
    for name, default in vars(Cluster()).items():
        if getattr(args, f"s2_{name}") is None:
            setattr(args, f"s2_{name}", default)
    try:
        return Cluster(**{name: getattr(args, f"s2_{name}") for name in Cluster.__dataclass_fields__})
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise ValueError(f"{flag_name('s2_' + name)} {rest}") from None


def _check_annealing(args: Namespace) -> None:
    older = (
        (args.enable_cuda_graph, "--enable-cuda-graph"),
        (args.external_cuda_graph, "--external-cuda-graph"),
    )
    captures = args.cuda_graph_impl != "none", f"--cuda-graph-impl {args.cuda_graph_impl}"
    for given, flag in (captures, *older):
        if given:
            raise ValueError(
                f"{flag}: must not be set with --s2-anneal-steps: a graph keeps the attention of its capture"
            )


def _check_context_parallel(args: Namespace) -> None:
    ranks = args.context_parallel_size
    if args.s2_backend == "reference":
        raise ValueError(
            f"--s2-backend reference: must be auto, torch or triton with --context-parallel-size {ranks}"
        )
    if args.s2_autotune:
        raise ValueError(
            f"--s2-autotune: must not be set with --context-parallel-size {ranks}, where nothing is tuned"
        )
    if args.seq_length is not None and args.seq_length % (2 * ranks):
        raise ValueError(
            f"--seq-length {args.seq_length}: must be a multiple of 2 * --context-parallel-size = {2 * ranks}"
        )
    tensor_parallel = args.tensor_model_parallel_size
    if args.s2_cp_schedule == "a2a" and args.num_attention_heads // tensor_parallel < ranks:
        raise ValueError(
            f"--s2-cp-schedule a2a: must be auto or gather where --context-parallel-size {ranks} is larger "
            f"than --num-attention-heads {args.num_attention_heads} over --tensor-model-parallel-size "
            f"{tensor_parallel}"
        )


def settle_for_s2(args: Namespace, argv: Sequence[str], asked_by: str) -> list[str]:
    """Sets the Megatron flags that S2 attention decides, where the user did not; returns them as flags.

    Raises:
        ValueError: the user asked for dropout inside attention.
    """
    settled = []
    if args.attention_dropout:
        if any(word.split("=")[0] == "--attention-dropout" for word in argv):
            raise ValueError(
                f"--attention-dropout {args.attention_dropout}: must be 0 with {asked_by}: S2 attention "
                "has no dropout inside the softmax"
            )
        args.attention_dropout = 0.0
        settled.append("--attention-dropout 0")
    if args.create_attention_mask_in_dataloader:
        # A mask of seq x seq per sample, which S2 attention would not read.
        args.create_attention_mask_in_dataloader = False
        settled.append("--no-create-attention-mask-in-dataloader")
    packed = getattr(args, "dataloader_inter_document_masking", False)
    if packed and args.context_parallel_size > 1 and args.apply_rope_fusion:
        # The fused kernel places packed tokens as if each document were dealt out on its own.
        args.apply_rope_fusion = False
        settled.append("--no-rope-fusion")
    return settled


def take_from_checkpoint(args: Namespace, saved: Namespace) -> None:
    """Takes the S2 flags that a checkpoint depends on from its arguments where the command line gives none
    (`--use-checkpoint-args`; call it before `validate_s2_args`)."""
    if not getattr(saved, "s2_attention", False):
        return
    args.s2_attention = True
    for name in (n for n in (*_CHECKPOINTED, "s2_learnable_sink") if n in args and n.startswith("s2_")):
        anneals_afresh = name == "s2_anneal_steps" and args.finetune  # only if the command line says so
        if getattr(args, name) is None and not anneals_afresh:
            setattr(args, name, getattr(saved, name, None))
    args.softmax_type = saved.softmax_type if args.softmax_type == "vanilla" else args.softmax_type


def differences_from_checkpoint(args: Namespace, saved: Namespace) -> list[str]:
    """Where the attention of validated arguments is not that of a checkpoint's arguments, one text each."""
    mine, its = ({name: getattr(a, name, None) for name in _CHECKPOINTED} for a in (args, saved))
    if bool(mine["s2_attention"]) != bool(its["s2_attention"]):
        given, trained = ("not given", "with") if its["s2_attention"] else ("given", "without")
        return [f"--s2-attention {given}: the checkpoint was trained {trained} it"]
    if not mine["s2_attention"]:
        return []
    return [
        f"{flag_name(name)} {mine[name]}: the checkpoint was trained with {its[name]}"
        for name in _CHECKPOINTED
        if name in vars(args) and mine[name] != its[name]
    ]


def _layer_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


_layer_numbers.__name__ = "layer numbers"  # argparse names the type in its message
