"""The `--s2-…` flags of attention, and their checks before Megatron builds anything."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_s2.errors import flag_name
from megatron_s2.layers.arguments import (
    PATTERN_FILE,
    cluster_from_args,
    pattern_differences,
    refuse_bypasses,
    settings_from_args,
)
from megatron_s2.parallel.time_model import S2_SCHEDULES, Cluster
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.settings import PATTERN_FIELDS
from megatron_s2.training.environment import given
from megatron_s2.training.offload_arguments import add_offload_args

_S2_FLAG = "--s2-attention"
# Arguments that a checkpoint's attention depends on: those of S2, and Megatron's for sink logits.
_CHECKPOINTED = (
    "s2_attention",
    *(f"s2_{name}" for name in S2Settings.__dataclass_fields__),
    "s2_anneal_steps",
    "softmax_type",
)


def add_s2_args(parser: ArgumentParser) -> ArgumentParser:
    """Adds the `--s2-…` flags to Megatron's parser (an `extra_args_provider`).

    Flags that are not given are parsed as None, so that `validate_s2_args` can distinguish them from given
    ones; it sets their defaults.
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
        f"1 is dense, 0 window-only: nothing beyond window and sinks. Default {S2Settings.vert_stride}.",
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
    add("--s2-dense-layer-freq", type=int, help="n: every n-th layer keeps dense attention. Default 0: none.")
    add(
        "--s2-pattern-heads",
        type=int,
        help="Heads that strides, phases and dense heads are given for. By default the KV heads; or as many "
        "as --num-attention-heads, for patterns that differ within a KV group: keys and values are then "
        "repeated for the query heads.",
    )
    add(
        flag_name(PATTERN_FILE),
        metavar="FILE",
        help="JSON file with the pattern of every layer (docs/pattern-files.md), instead of all flags above.",
    )
    parser.set_defaults(s2_layers=None)
    add(
        "--s2-learnable-sink",
        action="store_true",
        default=None,
        help="Add a learned logit per head to the softmax, without a value and initialized to 0; the same as "
        "--softmax-type learnable.",
    )
    add(
        "--s2-anneal-steps",
        type=int,
        help="Number of steps in which attention narrows from dense to the pattern, for --finetune of a "
        "dense model: strides double from 1, while the window halves. Default 0: the pattern from the first "
        "step.",
    )
    add(
        "--s2-autotune",
        action="store_true",
        default=None,
        help="Measure once which tiles of the Triton kernels are fastest on this GPU; the rounding of "
        "results depends on the choice. Default: the shipped tiles.",
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
        choices=["auto", *S2_SCHEDULES],
        help="gather: ranks exchange the shards and window halos of all heads. a2a: each rank receives some "
        "heads of the whole sequence. Default auto: for each layer the one that the planner predicts to be "
        "faster (scripts/plan.py prints the reason).",
    )
    rates = Cluster()
    for name, kind, meaning in (
        ("gpus_per_node", int, "number of GPUs that share the fast link"),
        ("intra_gigabytes_per_s", float, "GB/s (10**9 bytes) between a GPU and its node, in each direction"),
        (
            "inter_gigabytes_per_s",
            float,
            "GB/s (10**9 bytes) between a GPU and other nodes, in each direction",
        ),
        ("chip_tflops", float, "peak rate of a GPU in 10**12 FLOP/s"),
        ("efficiency", float, "share of the peak that attention reaches"),
    ):
        default = getattr(rates, name)
        add(
            flag_name(f"s2_{name}"),
            type=kind,
            help=f"For the planner: {meaning}. Default {default} (DGX H100).",
        )


def validate_s2_args(args: Namespace, argv: Sequence[str] = ()) -> list[str]:
    """Checks the parsed S2 flags, and sets their defaults and the Megatron flags that S2 attention requires.

    Call it after parsing and before Megatron's own validation.

    Args:
        args: the parsed arguments, changed in place.
        argv: the command line, which distinguishes the user's flags from Megatron's defaults.

    Returns:
        The Megatron flags that were set.

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
        raise ValueError(
            f"--spec: must not be set with {_S2_FLAG}, which has a layer spec of its own; use one of the two"
        )
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
        _refuse_cuda_graphs(args, "--s2-anneal-steps: a CUDA graph keeps the attention")
    if args.dataloader_inter_document_masking:
        _refuse_cuda_graphs(args, "--dataloader-inter-document-masking: a CUDA graph keeps the documents")
    if args.seq_length is not None and args.seq_length < settings.block_size:
        raise ValueError(
            f"--seq-length {args.seq_length}: must be at least one block "
            f"(--s2-block-size {settings.block_size})"
        )
    if args.context_parallel_size > 1:
        _check_context_parallel(args)
    if args.s2_learnable_sink:
        args.softmax_type = "learnable"
    return set_required_args(args, argv, _S2_FLAG)


def _refuse_cuda_graphs(args: Namespace, beside: str) -> None:
    for is_set, flag in (
        (args.cuda_graph_impl != "none", f"--cuda-graph-impl {args.cuda_graph_impl}"),
        (args.enable_cuda_graph, "--enable-cuda-graph"),
        (args.external_cuda_graph, "--external-cuda-graph"),
    ):
        if is_set:
            raise ValueError(f"{flag}: must not be set with {beside} that it captured")


def _check_context_parallel(args: Namespace) -> None:
    ranks = args.context_parallel_size
    if args.s2_backend == "reference":
        raise ValueError(
            f"--s2-backend reference: must be auto, torch or triton with --context-parallel-size {ranks}"
        )
    if args.s2_autotune:
        raise ValueError(
            f"--s2-autotune: must not be set with --context-parallel-size {ranks}, which does not tune"
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


def set_required_args(args: Namespace, argv: Sequence[str], source: str) -> list[str]:
    """Sets the Megatron arguments that S2 attention requires, and returns them as flags.

    Args:
        args, argv: as in `validate_s2_args`.
        source: the flag that selects S2 attention.

    Raises:
        ValueError: the command line has dropout inside attention.
    """
    added = []
    if args.attention_dropout:
        if given(argv, "--attention-dropout") is not None:
            raise ValueError(
                f"--attention-dropout {args.attention_dropout}: must be 0 with {source}: S2 attention "
                "has no dropout inside the softmax"
            )
        args.attention_dropout = 0.0
        added.append("--attention-dropout 0")
    if args.create_attention_mask_in_dataloader:
        # The mask has seq x seq elements per sample, and S2 attention does not read it.
        args.create_attention_mask_in_dataloader = False
        added.append("--no-create-attention-mask-in-dataloader")
    packed = getattr(args, "dataloader_inter_document_masking", False)
    if packed and args.context_parallel_size > 1 and args.apply_rope_fusion:
        # The fused kernel assumes that each document is distributed over the ranks on its own.
        args.apply_rope_fusion = False
        added.append("--no-rope-fusion")
    return added


def load_s2_args(args: Namespace, saved: Namespace) -> None:
    """Sets the S2 arguments that were not given to those of a checkpoint, for `--use-checkpoint-args`.

    Call it before `validate_s2_args`.

    Args:
        args: the parsed arguments, changed in place.
        saved: the arguments in the checkpoint.
    """
    if not getattr(saved, "s2_attention", False):
        return
    args.s2_attention = True
    of_pattern = {f"s2_{name}" for name in PATTERN_FIELDS}
    for name in (n for n in (*_CHECKPOINTED, "s2_learnable_sink") if n in args and n.startswith("s2_")):
        if name in of_pattern and args.s2_pattern_file is not None:
            continue
        is_new_annealing = name == "s2_anneal_steps" and args.finetune
        if getattr(args, name) is None and not is_new_annealing:
            setattr(args, name, getattr(saved, name, None))
    args.softmax_type = saved.softmax_type if args.softmax_type == "vanilla" else args.softmax_type


def differences_from_checkpoint(args: Namespace, saved: Namespace) -> list[str]:
    """Returns one message for each difference between the attention of validated arguments and that of the
    arguments in a checkpoint."""
    names, differences = _CHECKPOINTED, []
    if any(getattr(a, "s2_layers", None) for a in (args, saved)) and getattr(saved, "s2_attention", False):
        names = [name for name in names if name.removeprefix("s2_") not in PATTERN_FIELDS]
        differences = pattern_differences(*(settings_from_args(Namespace(**vars(a))) for a in (args, saved)))
    ours, theirs = ({name: getattr(a, name, None) for name in names} for a in (args, saved))
    if bool(ours["s2_attention"]) != bool(theirs["s2_attention"]):
        given, trained = ("not given", "with") if theirs["s2_attention"] else ("given", "without")
        return [f"--s2-attention {given}: the checkpoint was trained {trained} it"]
    if not ours["s2_attention"]:
        return []
    differences += [
        (flag_name(name), ours[name], theirs[name])
        for name in names
        if name in vars(args) and ours[name] != theirs[name]
    ]
    return [f"{flag} {mine}: the checkpoint was trained with {its}" for flag, mine, its in differences]


def _layer_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


_layer_numbers.__name__ = "layer numbers"  # argparse names the type in its message
