"""Draw the training and validation loss of a run from its tensorboard files."""

import sys
from pathlib import Path

from megatron_s2.data.command import CommandParser
from megatron_s2.report.figure import check_picture
from megatron_s2.report.losses import Losses, draw_losses


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--tensorboard-dir", required=True, type=Path, help="as given to the training")
    parser.add_argument("--output", required=True, type=Path, help="a .png or .svg file")
    parser.add_argument("--title", help="above the picture")
    args = parser.parse_args()
    try:
        check_picture("--output", args.output)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    try:
        losses = Losses.read(args.tensorboard_dir)
    except ValueError as error:
        parser.error(f"--tensorboard-dir {error}")
    try:
        draw_losses(losses, args.output, args.title)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(losses)


if __name__ == "__main__":
    sys.exit(main())
