"""Convert a Hugging Face directory to a Megatron checkpoint, and back."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_s2.checkpoint.families import ambiguous_families
from megatron_s2.checkpoint.longer_context import SCALINGS, LongerContext
from megatron_s2.data.command import CommandParser, run_command
from megatron_s2.training.arguments import add_s2_args

_CONTEXT = [field.name for field in fields(LongerContext)]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)

    # Imports torch, which bad flags need not wait for.
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    hide_transformer_engine()  # nothing here computes with it
    from megatron_s2.checkpoint.convert import RESUME, left_out, to_hugging_face, to_megatron

    if args.direction == "hf-to-megatron":
        context = LongerContext(**{name: getattr(args, name) for name in _CONTEXT})
        imported = to_megatron(args.input, args.output, args, context)
        print(f"{args.output}: load it with --load {args.output} and the flags in {args.output / RESUME}:")
        print("\n".join(imported.flags))
        if names := left_out(args.input):
            print(f"not copied from {args.input}: {', '.join(names)}")
        for note in (imported.note_on_sinks, imported.note):
            _print_note(note)
        return
    exported = to_hugging_face(
        args.input,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        vocab_size=args.vocab_size,
        family=args.family,
    )
    attention = (
        "dense attention" if exported.settings is None else "S2 attention (s2_attention in config.json)"
    )
    tokenizer = "no tokenizer" if exported.tokenizer is None else f"tokenizer from {exported.tokenizer}"
    print(
        f"{args.output}: {exported.model.family} ({exported.family_source}), "
        f"{exported.model.num_layers} layers, {attention}, {tokenizer}"
    )
    _print_note(exported.note)


def _print_note(note: str | None) -> None:
    if note is not None:
        print(f"note: {note}", file=sys.stderr)


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True, parser_class=CommandParser)
    import_parser = directions.add_parser("hf-to-megatron", help="write a checkpoint for --load")
    _add_paths(import_parser, "directory with config.json and safetensors", "checkpoint, a new directory")
    _add_context(import_parser)
    add_s2_args(import_parser)
    export_parser = directions.add_parser("megatron-to-hf", help="write a directory for transformers")
    _add_paths(export_parser, "checkpoint written by --save or hf-to-megatron", "a new directory")
    export_parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of all weights (default: that of each in the checkpoint)",
    )
    export_parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest size of a file, such as 5GB or 200MB (default: %(default)s)",
    )
    export_parser.add_argument(
        "--vocab-size",
        type=_positive,
        help="number of tokens without padding, where neither the checkpoint nor the config.json of the "
        "model it began with contains it, or the tokenizer has more tokens than they say",
    )
    export_parser.add_argument(
        "--family",
        choices=ambiguous_families(),
        help="family of a model, of those that are the same in Megatron (default: that of the model it began "
        "with, or the first)",
    )
    return parser


def _add_context(parser: CommandParser) -> None:
    group = parser.add_argument_group("longer context", "other rotary positions than those of the model")
    group.add_argument(
        "--max-position-embeddings", type=_positive, metavar="N", help="number of positions to train with"
    )
    group.add_argument("--rotary-base", type=_positive, metavar="N", help="base of the rotary frequencies")
    group.add_argument(
        "--rope-scaling", choices=SCALINGS, help="scaling of the rotary frequencies, in place of the model's"
    )
    group.add_argument(
        "--rope-scaling-factor", type=_factor, metavar="F", help="how many times the original context"
    )


def _add_paths(parser: CommandParser, source: str, output: str) -> None:
    parser.add_argument("--input", required=True, type=Path, metavar="DIR", help=source)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=output)


def _positive(text: str) -> int:
    """Returns a whole number >= 1, or raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _factor(text: str) -> float:
    """Returns a finite number >= 1, or raises ValueError."""
    number = float(text)
    if not 1 <= number < math.inf:
        raise ValueError(text)
    return number


_factor.__name__ = "number >= 1"
_positive.__name__ = "whole number >= 1"  # argparse names the type in its message


def _bytes(text: str) -> int:
    """Returns the number of bytes in a size such as 200MB, or raises ValueError."""
    number, unit = re.fullmatch(r"(\d+)([A-Z]*)", text.upper()).groups() if text[:1].isdigit() else ("", "")
    size = int(number) * _UNITS.get(unit, 0)
    if size <= 0:
        raise ValueError(text)
    return size


_bytes.__name__ = "size"


if __name__ == "__main__":
    sys.exit(run_command(main))
