"""Ask a model for needles hidden in your text, densely and by one or several attention patterns.

A needle is a statement (a code in a sentence, an assignment, …) that is put at each
depth of a text of each length and asked for at its end; it is found if greedy decoding gives exactly the
answer. Needs no training: it says what a pattern costs a model before anything is converted. The patterns
are those of --s2-pattern-file, which may be given several times, of the other --s2-… flags, and of the
model if it has one.
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
    from megatron_s2.errors import InputError

    try:
        ask(args)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def ask(args: argparse.Namespace) -> None:
    from megatron_s2.calibration.candidates import cost_of
    from megatron_s2.calibration.judge import answer
    from megatron_s2.calibration.layered_model import pattern_attention
    from megatron_s2.calibration.needles import needle_grid
    from megatron_s2.calibration.source import load_source
    from megatron_s2.data.token_ids import check_token_ids
    from megatron_s2.generation.decoding import beyond_positions
    from megatron_s2.report.figure import check_picture
    from megatron_s2.report.retrieval import Asked, draw_retrieval, retrieval_table

    if args.plot is not None:
        check_picture("--plot", args.plot)
    source = load_source(args.hf, args.load, args.dtype)
    patterns = {"dense": None} | given_patterns(args, source)
    tokenizer = source.required_tokenizer()
    check_token_ids([("--data-path", args.data_path)], source.vocabulary)
    if (note := beyond_positions(max(args.lengths), source.model.positions)) is not None:
        print(f"note: {note}", file=sys.stderr)
    needles = needle_grid(tokenizer, args.data_path, args.lengths, args.depths, args.kinds, args.seed)
    asked = []
    for name, settings in patterns.items():
        attend = pattern_attention(settings)
        for needle in needles:
            got = answer(source.model, needle, attend)
            asked.append(Asked(name, got.kind, got.length, got.depth, got.found, got.log_prob))
            if sys.stderr.isatty():
                print(
                    f"{len(asked)} of {len(patterns) * len(needles)}", end="\r", file=sys.stderr, flush=True
                )
    longest = max(args.lengths)
    print(
        retrieval_table(
            asked, {name: cost_of(settings, longest, "kv") for name, settings in patterns.items()}
        )
    )
    if args.plot is not None:
        draw_retrieval(asked, args.plot)


def given_patterns(args: argparse.Namespace, source) -> dict:
    """Returns the settings of the patterns that flags ask for, by name."""
    from megatron_s2.layers.arguments import from_s2_fields
    from megatron_s2.pattern import S2Settings
    from megatron_s2.pattern.pattern_file import read_pattern_file
    from megatron_s2.pattern.settings import PATTERN_FIELDS

    sizes = {"num_layers": source.model.num_layers, "num_kv_heads": source.model.num_kv_heads}
    patterns = {}
    if source.settings is not None:
        patterns["the model's"] = source.settings
    if any(getattr(args, f"s2_{name}", None) is not None for name in PATTERN_FIELDS):
        settings = from_s2_fields(S2Settings, args, **sizes)
        patterns[settings.first_pattern.describe()] = settings
    for file in args.s2_pattern_file:
        patterns[Path(file).name] = read_pattern_file(file, **sizes, num_query_heads=source.model.num_heads)
    return patterns


def arguments() -> CommandParser:
    from megatron_s2.training.arguments import add_s2_args

    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory")
    model.add_argument(
        "--load", type=Path, metavar="CKPT", help="Megatron checkpoint, the directory of --save"
    )
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="your text: prefix printed by scripts/preprocess_data.py",
    )
    add(
        "--lengths",
        type=_lengths,
        required=True,
        metavar="N,N,…",
        help="tokens of a text with needle and question",
    )
    add(
        "--depths",
        type=_depths,
        default="0.05,0.15,0.25,0.35,0.45,0.55,0.65,0.75,0.85,0.95",
        metavar="D,D,…",
        help="places of the needles, as shares of the text (default: ten from 0.05 to 0.95)",
    )
    add(
        "--kinds",
        type=_kinds,
        default="code,assignment,comment,entry",
        metavar="KIND,…",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=0, help="of texts, names and values (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="write heat maps of length x depth to a .png or .svg file")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype of the weights (default: as stored)",
    )
    add_s2_args(parser)
    add(
        "--s2-pattern-file",
        action="append",
        default=[],
        metavar="FILE",
        help="pattern file (docs/pattern-files.md); may be given several times",
    )
    return parser


def _lengths(text: str) -> list[int]:
    return _numbers(text, int, lambda length: length >= 1, "numbers of tokens, such as 2048,4096")


def _depths(text: str) -> list[float]:
    return _numbers(
        text, float, lambda depth: 0 <= depth <= 1, "numbers between 0 and 1, such as 0.1,0.5,0.9"
    )


def _numbers[T](text: str, kind: type[T], is_allowed, expected: str) -> list[T]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(is_allowed, numbers)):
        raise argparse.ArgumentTypeError(f"{text}: must be {expected}")
    return numbers


def _kinds(text: str) -> list[str]:
    from megatron_s2.calibration.needles import KINDS

    kinds = text.split(",")
    if not set(kinds) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text}: must be one or more of {','.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    sys.exit(run_command(main))
