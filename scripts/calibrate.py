"""Choose the attention pattern of a dense model by what it costs on your text, within a budget.

Writes a pattern file (docs/pattern-files.md) for training, conversion, evaluation and generation: for
each layer a window and sinks, for each KV head a stride, dense or window-only. What is made small is how
far predictions on rows of sampled texts are from the dense model's, plus --needle-weight times the loss of
answers about needles hidden in others, which ordinary text does not show. How it is found and what it
reached: docs/choosing-a-pattern.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.command import CommandParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)

    # Imports torch, which bad flags need not wait for.
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    hide_transformer_engine()  # nothing here computes with it
    from megatron_s2.calibration.calibrate import Settings, calibrate
    from megatron_s2.calibration.source import load_source
    from megatron_s2.data.output import check_file_writable
    from megatron_s2.data.token_ids import check_token_ids
    from megatron_s2.errors import InputError
    from megatron_s2.generation.decoding import beyond_positions
    from megatron_s2.pattern.pattern_file import write_pattern_file
    from megatron_s2.report.figure import check_picture
    from megatron_s2.report.frontier import draw_frontier, frontier_table

    names = [name for name in Settings.__dataclass_fields__ if name != "data_path"]
    try:
        settings = Settings(data_path=args.data_path, **{name: getattr(args, name) for name in names})
        for flag, path in (("--output", args.output), ("--resume", args.resume)):
            if path is not None:
                check_file_writable(flag, path)
        if args.plot is not None:
            check_picture("--plot", args.plot)
        source = load_source(args.hf, args.load, args.dtype)
        check_token_ids([("--data-path", args.data_path)], source.vocabulary)
        if (note := beyond_positions(args.seq_length, source.model.positions)) is not None:
            print(f"note: {note}", file=sys.stderr)
        done = calibrate(source, settings, args.resume, lambda line: print(line, file=sys.stderr, flush=True))
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_pattern_file(args.output, done.settings, note=done.summary, made_with=done.made_with)
    print(frontier_table(done.points))
    print(f"{args.output}: {done.summary}")
    if args.plot is not None:
        xlabel = f"budget in shares of dense {settings.cost_name}"
        draw_frontier(done.points, args.plot, xlabel, "divergence from dense, nats per token")


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory of a dense model")
    model.add_argument(
        "--load", type=Path, metavar="CKPT", help="Megatron checkpoint, the directory of --save"
    )
    add = parser.add_argument
    add("--data-path", required=True, metavar="PREFIX", help="prefix printed by scripts/preprocess_data.py")
    add("--seq-length", type=int, required=True, metavar="N", help="number of tokens of a text")
    add("--budget", type=float, required=True, metavar="F", help="share of dense attention, such as 0.25")
    add(
        "--of",
        choices=["kv", "flops"],
        default="kv",
        help="budget of keys and values that the last token sees, or of query-key pairs (default: kv)",
    )
    add("--samples", type=int, default=12, metavar="M", help="number of texts (default: %(default)s)")
    add("--needles", type=int, default=12, metavar="K", help="number of needles (default: %(default)s)")
    add(
        "--needle-weight",
        type=float,
        default=0.1,
        metavar="W",
        help="weight of the needles' loss against that of the texts (default: %(default)s)",
    )
    add(
        "--moves",
        type=int,
        default=8,
        metavar="N",
        help="plans to propose and measure (default: %(default)s)",
    )
    add("--block-size", type=int, default=64, metavar="B", help="tokens per block (default: %(default)s)")
    add("--seed", type=int, default=0, help="of texts and needles (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="FILE", help="pattern file to write")
    add("--resume", type=Path, metavar="FILE", help="keep the state there, and continue from it")
    add("--plot", type=Path, metavar="FILE", help="draw budgets against losses into a .png or .svg file")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype of the weights (default: as stored)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
