"""Draw the blocks that each KV head of an S2 layer sees, and those that the heads see together.

Takes the flags of a training run; flags that do not affect the pattern are ignored.
"""

import argparse
import sys
from pathlib import Path

from megatron_s2.data.command import CommandParser
from megatron_s2.layers.arguments import settings_from_args
from megatron_s2.report.figure import SUFFIXES, check_picture
from megatron_s2.report.pattern_picture import draw_pattern
from megatron_s2.training.arguments import add_s2_args


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, type=Path, help=f"a file ending in {' or '.join(SUFFIXES)}"
    )
    parser.add_argument("--num-layers", type=int, default=1, help="as for the training, default %(default)s")
    parser.add_argument("--num-attention-heads", type=int, help="as for the training")
    parser.add_argument("--num-query-groups", type=int, help="KV heads, default as many as heads")
    parser.add_argument("--blocks", type=int, default=32, help="blocks to draw, default %(default)s")
    parser.add_argument(
        "--layers", type=int, default=1, help="S2 layers counted together, default %(default)s"
    )
    args, _ = add_s2_args(parser).parse_known_args()
    args.group_query_attention = args.num_query_groups is not None
    try:
        check_picture("--output", args.output)
        pattern = settings_from_args(args).first_pattern
        draw_pattern(pattern, args.output, num_blocks=args.blocks, num_layers=args.layers)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
