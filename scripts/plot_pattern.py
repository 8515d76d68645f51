"""Draw the blocks that each head of an S2 layer sees, and those that the heads see together.

Takes the flags of a training run; flags that do not affect the pattern are ignored. With --s2-pattern-file it
draws the whole model: how much each head of each layer sees.
"""

import argparse
import sys
from pathlib import Path

from megatron_s2.data.command import CommandParser
from megatron_s2.layers.arguments import pattern_file_settings, settings_from_args
from megatron_s2.report.figure import SUFFIXES, check_picture
from megatron_s2.report.pattern_picture import draw_model, draw_pattern
from megatron_s2.training.arguments import add_s2_args


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, type=Path, help=f"a file ending in {' or '.join(SUFFIXES)}"
    )
    parser.add_argument("--num-layers", type=int, help="as for the training, default 1 or the file's")
    parser.add_argument("--num-attention-heads", type=int, help="as for the training")
    parser.add_argument("--num-query-groups", type=int, help="KV heads, default as many as heads")
    parser.add_argument(
        "--blocks",
        type=int,
        help="blocks to draw, default 32; of a whole model, length in blocks, default 128",
    )
    parser.add_argument(
        "--layers", type=int, default=1, help="S2 layers counted together, default %(default)s"
    )
    args, _ = add_s2_args(parser).parse_known_args()
    args.group_query_attention = args.num_query_groups is not None
    try:
        check_picture("--output", args.output)
        if args.s2_pattern_file is not None:
            kv_heads = args.num_query_groups or args.num_attention_heads
            settings = pattern_file_settings(args, args.num_layers, kv_heads)
            draw_model(settings, args.output, 128 if args.blocks is None else args.blocks)
            return
        args.num_layers = 1 if args.num_layers is None else args.num_layers
        settings = settings_from_args(args)
        draw_pattern(
            settings.first_pattern,
            args.output,
            num_blocks=32 if args.blocks is None else args.blocks,
            num_layers=args.layers,
            head_name="KV head" if settings.pattern_heads is None else "query head",
        )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
