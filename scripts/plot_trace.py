"""Draw the timelines of an optimizer step from a trace file, and name the bottleneck of each."""

import argparse
import sys
from pathlib import Path

from megatron_s2.data.command import CommandParser
from megatron_s2.offload.trace import bottleneck, read_trace
from megatron_s2.report.figure import check_picture
from megatron_s2.report.offload_timeline import draw_timelines


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="a Chrome-trace file, predicted and measured")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .png or .svg file")
    parser.add_argument("--title", help="above the picture")
    args = parser.parse_args(argv)
    try:
        check_picture("--output", args.output)
        timelines = read_trace(args.trace)
        draw_timelines(timelines, args.output, args.title)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    for name, events in timelines.items():
        print(f"{name}: {bottleneck(events) if events else 'no events'}")


if __name__ == "__main__":
    sys.exit(main())
