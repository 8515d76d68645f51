"""Plan context parallelism: what each schedule moves, computes and keeps per layer, and which one is chosen.

Takes the flags of Megatron and of megatron-s2. Needs no GPU and no process group, for any number of ranks.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_s2.data.command import CommandParser
from megatron_s2.layers.arguments import cluster_from_args, settings_from_args
from megatron_s2.parallel.planner import ModelPlan, plan_model
from megatron_s2.report.context_parallel_plan import as_json, table
from megatron_s2.report.figure import check_picture
from megatron_s2.training.arguments import add_s2_args


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.plot:
            check_picture("--plot", args.plot)
        plan = planned(args, args.context_parallel_size)
        if args.plot:
            plot(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(json.dumps(as_json(plan), indent=1) if args.json else table(plan))


def plot(args: argparse.Namespace) -> None:
    from megatron_s2.report.context_parallel_picture import draw_plans, plan_sizes

    sizes = plan_sizes(args.context_parallel_size, args.seq_length)
    draw_plans([planned(args, size) for size in sizes], args.plot)


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("the training, flags as in Megatron").add_argument
    model("--seq-length", type=int, required=True, help="tokens of a sequence")
    model("--num-layers", type=int, required=True)
    model("--hidden-size", type=int, help="needed without --kv-channels")
    model("--num-attention-heads", type=int, required=True)
    model("--num-query-groups", type=int, help="KV heads; default as many as attention heads")
    model("--group-query-attention", action="store_true", help="implied by --num-query-groups")
    model("--kv-channels", type=int, help="size of a head; default hidden size / attention heads")
    model("--micro-batch-size", type=int, default=1, help="sequences, default %(default)s")
    model("--tensor-model-parallel-size", type=int, default=1, help="default %(default)s")
    model("--context-parallel-size", type=int, required=True)
    parser.set_defaults(element_size=2)
    element = parser.add_mutually_exclusive_group()
    element.add_argument("--bf16", dest="element_size", action="store_const", const=2, help="the default")
    element.add_argument("--fp16", dest="element_size", action="store_const", const=2)
    element.add_argument("--fp32", dest="element_size", action="store_const", const=4)
    element.add_argument("--bytes-per-element", dest="element_size", type=int)
    output = parser.add_argument_group("output").add_argument
    output("--json", action="store_true", help="JSON instead of the table")
    output("--plot", metavar="FILE", type=Path, help="draw bytes and time over the ranks to a .png or .svg")
    return add_s2_args(parser)


def planned(args: argparse.Namespace, context_parallel: int) -> ModelPlan:
    if args.num_query_groups is not None:
        args.group_query_attention = True
    elif args.group_query_attention:
        args.num_query_groups = 1  # as in Megatron
    heads, hidden = args.num_attention_heads, args.hidden_size
    if args.kv_channels is None and (hidden is None or heads < 1 or hidden % heads):
        raise ValueError(
            f"--hidden-size {hidden}: must be a multiple of --num-attention-heads {heads}, or --kv-channels "
            "be given"
        )
    return plan_model(
        settings_from_args(args),
        seq_length=args.seq_length,
        num_attention_heads=heads,
        head_dim=hidden // heads if args.kv_channels is None else args.kv_channels,
        context_parallel=context_parallel,
        tensor_parallel=args.tensor_model_parallel_size,
        micro_batch=args.micro_batch_size,
        element_size=args.element_size,
        schedule=args.s2_cp_schedule or "auto",
        cluster=cluster_from_args(args),
    )


if __name__ == "__main__":
    sys.exit(main())
