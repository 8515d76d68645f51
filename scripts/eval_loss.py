"""Compute the loss and perplexity of a Megatron checkpoint or a Hugging Face model on an indexed dataset.

The tokens of the dataset, in order, are cut into windows of --seq-length tokens; the loss is the mean over
all tokens. Run it before and after a conversion, or with and without S2 attention, to see the difference.
With --position-parts it also prints the loss by position in the window: the far end is where attention that
sees too little of the past would show.

With --s2-pattern-file, once or several times, it judges patterns on a dense model as it is: a table of the
losses, dense first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.command import CommandParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)

    # Imports torch, which bad flags need not wait for.
    from megatron_s2.training.environment import Environment
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    if not Environment.detect().transformer_engine:
        hide_transformer_engine()
    from megatron_s2.data.token_ids import check_token_ids
    from megatron_s2.errors import InputError
    from megatron_s2.generation.decoding import beyond_positions
    from megatron_s2.generation.evaluation import (
        check_position_parts,
        compare_patterns,
        evaluate,
        load_hugging_face,
        load_megatron,
        windows,
    )

    def batches():
        return windows(args.data_path, args.seq_length, args.samples, args.micro_batch_size)

    try:
        if args.s2_pattern_file and not args.hf:
            raise ValueError("--s2-pattern-file: must be given with --hf")
        if args.position_parts is not None:
            if args.s2_pattern_file:
                raise ValueError("--position-parts: must not be given with --s2-pattern-file; leave one out")
            check_position_parts(args.position_parts, args.seq_length)
        batches()  # checks the flags and the data before a model is loaded
        model = load_hugging_face(args.hf, args.dtype) if args.hf else load_megatron(args.load)
        # What this does not look at is checked window by window.
        check_token_ids([("--data-path", args.data_path)], model.vocabulary)
        for note in (*model.notes, beyond_positions(args.seq_length, model.positions)):
            if note is not None:
                print(f"note: {note}", file=sys.stderr)
        if args.s2_pattern_file:
            print(compare_patterns(model, args.s2_pattern_file, args.seq_length, batches))
        else:
            found = evaluate(model.token_losses, batches(), args.position_parts or 1)
            if args.position_parts is not None:
                print(found.position_table())
            print(found)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory")
    model.add_argument(
        "--load", type=Path, metavar="CKPT", help="Megatron checkpoint, the directory of --save"
    )
    add = parser.add_argument
    add(
        "--s2-pattern-file",
        action="append",
        metavar="FILE",
        help="pattern file (docs/pattern-files.md) to judge on a dense model; may be given several times",
    )
    add("--data-path", required=True, metavar="PREFIX", help="prefix printed by scripts/preprocess_data.py")
    add("--seq-length", type=int, required=True, metavar="N", help="number of tokens of a window")
    add("--samples", type=int, metavar="N", help="number of windows to evaluate (default: all)")
    add(
        "--micro-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="number of windows per batch (default: 1)",
    )
    add(
        "--position-parts",
        type=int,
        metavar="N",
        help="also print the loss in each of N equal parts of the windows",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype of the weights of a Hugging Face model (default: as stored)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
