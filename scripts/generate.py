"""Generate text with S2 attention and its small KV cache, from a Hugging Face directory or a checkpoint.

A single prompt is continued on the terminal token by token. Several make a batch, whose continuations are
printed when all have ended, one after the other, `[1]`, `[2]` and so on before them. Text goes to stdout;
times and the size of the cache to stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.command import CommandParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)

    # Imports torch: bad flags need not wait for it.
    from megatron_s2.training.patches import quiet_known_warnings

    quiet_known_warnings()
    from megatron_s2.errors import InputError
    from megatron_s2.generation.command import run

    try:
        run(args)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face directory whose config.json says s2"
    )
    model.add_argument("--load", type=Path, metavar="CKPT", help="Megatron checkpoint: what --save wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; several times for a batch"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="a prompt per line; blank lines do not count")
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw of the K most likely tokens (default: all)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw of those whose sum is P (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="the same seed draws the same text (default: %(default)s)")
    add("--ignore-eos", action="store_true", help="go on after the end of a text")
    add("--tokenizer-model", metavar="DIR", help="in place of the model's own tokenizer")
    add("--token-ids", action="store_true", help="no tokenizer: prompts and output are token ids")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
