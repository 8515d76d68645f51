"""Convert checkpoints: a Hugging Face directory to one that Megatron loads, and back."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.command import CommandParser, run_command
from megatron_s2.training.arguments import add_s2_args

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)

    # Imports torch: bad flags need not wait for it.
    from megatron_s2.training.patches import quiet_known_warnings

    quiet_known_warnings()
    from megatron_s2.checkpoint.convert import RESUME, to_hugging_face, to_megatron

    if args.direction == "hf-to-megatron":
        lines = to_megatron(args.input, args.output, args)
        print(f"{args.output}: load it with --load {args.output} and the flags in {args.output / RESUME}:")
        print("\n".join(lines))
        return
    done = to_hugging_face(
        args.input,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        vocab_size=args.vocab_size,
        family=args.family,
    )
    attention = "dense attention" if done.settings is None else "S2 attention (s2_attention in config.json)"
    tokenizer = "no tokenizer" if done.tokenizer is None else f"tokenizer from {done.tokenizer}"
    print(
        f"{args.output}: {done.model.family} ({done.reason}), {done.model.num_layers} layers, {attention}, "
        f"{tokenizer}"
    )


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True, parser_class=CommandParser)
    there = directions.add_parser("hf-to-megatron", help="for --load of a training")
    _add_places(there, "directory with config.json and safetensors", "checkpoint to write, a new directory")
    add_s2_args(there)
    back = directions.add_parser("megatron-to-hf", help="for transformers")
    _add_places(back, "checkpoint: what --save or hf-to-megatron wrote", "a new directory")
    back.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of all weights (default: each has the one that it has in the checkpoint)",
    )
    back.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="most bytes of a file, such as 5GB or 200MB (default: %(default)s)",
    )
    back.add_argument(
        "--vocab-size",
        type=_positive,
        help="tokens without padding, where neither the checkpoint nor the model it came from says others",
    )
    back.add_argument(
        "--family",
        choices=["llama", "mistral"],
        help="which of the two a model is, because in Megatron they are the same (default: what the model it "
        "came from says, or llama)",
    )
    return parser


def _add_places(parser: CommandParser, source: str, output: str) -> None:
    parser.add_argument("--input", required=True, type=Path, metavar="DIR", help=source)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=output)


def _positive(text: str) -> int:
    """Raises ValueError unless `text` is a whole number >= 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "whole number >= 1"  # argparse names the type in its message


def _bytes(text: str) -> int:
    """Raises ValueError unless `text` is a positive number with a unit of `_UNITS`."""
    number, unit = re.fullmatch(r"(\d+)([A-Z]*)", text.upper()).groups() if text[:1].isdigit() else ("", "")
    size = int(number) * _UNITS.get(unit, 0)
    if size <= 0:
        raise ValueError(text)
    return size


_bytes.__name__ = "size"


if __name__ == "__main__":
    sys.exit(run_command(main))
