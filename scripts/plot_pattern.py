"""Draw what each KV head of a layer sees under an S2 pattern, and what the heads see together."""

import argparse
import sys
from pathlib import Path

from megatron_s2.pattern import S2Pattern
from megatron_s2.picture import draw_pattern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="a .png or .svg file")
    parser.add_argument("--num-query-groups", required=True, type=int, help="KV heads")
    parser.add_argument("--s2-block-size", type=int, default=64)
    parser.add_argument("--s2-local-blocks", type=int, default=8)
    parser.add_argument("--s2-vert-stride", type=int, default=16)
    parser.add_argument("--s2-sink-blocks", type=int, default=0)
    parser.add_argument("--s2-num-dense-heads", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=32, help="how many blocks to draw, default %(default)s")
    parser.add_argument("--layers", type=int, default=1, help="layers that see together, default %(default)s")
    args, _ = parser.parse_known_args()  # a whole training command line will do
    try:
        pattern = S2Pattern(
            num_kv_heads=args.num_query_groups,
            block_size=args.s2_block_size,
            local_blocks=args.s2_local_blocks,
            vert_stride=args.s2_vert_stride,
            sink_blocks=args.s2_sink_blocks,
            num_dense_heads=args.s2_num_dense_heads,
        )
        draw_pattern(pattern, args.output, num_blocks=args.blocks, num_layers=args.layers)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
