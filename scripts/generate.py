"""Generate text with S2 attention and its small KV cache, from a Hugging Face directory or a checkpoint.

A single prompt is continued on the terminal token by token. Several prompts form a batch; their
continuations are printed when all have ended, labelled `[1]`, `[2]` and so on. Text is written to stdout;
times and the size of the cache to stderr.

On several ranks, `torchrun --nproc-per-node 4 scripts/generate.py --tensor-model-parallel-size 2
--context-parallel-size 2 …` spreads the model over two, and the keys and values of the context over two.
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
    from megatron_s2.errors import InputError
    from megatron_s2.generation.generate_text import generate_text
    from megatron_s2.generation.ranks import launched_ranks
    from megatron_s2.training.refusal import refuse

    try:
        generate_text(args)
    except ValueError as error:
        if launched_ranks() > 1:
            refuse(str(error))
        raise InputError(" ".join(str(error).split())) from error


def arguments() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory with S2 settings in config.json, or any with --s2-pattern-file",
    )
    model.add_argument(
        "--load", type=Path, metavar="CKPT", help="Megatron checkpoint, the directory of --save"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times for a batch",
    )
    prompt.add_argument(
        "--prompt-file",
        action="append",
        metavar="FILE",
        help="file with a text to continue from its end; if it is named *.jsonl, several prompts, one "
        '{"prompt": TEXT} per line; may be given several times for a batch',
    )
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="largest number of tokens to generate per prompt (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0, the default, is greedy",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most likely tokens (default: all)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities reach P (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--ignore-eos", action="store_true", help="continue after the end-of-text token")
    add(
        "--s2-pattern-file",
        metavar="FILE",
        help="pattern file (docs/pattern-files.md) by which a model that was trained dense attends",
    )
    add(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks over which heads and matrices are spread, as in training (default: %(default)s)",
    )
    add(
        "--context-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks over which the keys and values of every head are spread, for a context that one does not "
        "hold (default: %(default)s)",
    )
    add("--tokenizer-model", metavar="DIR", help="tokenizer to use instead of the model's")
    add("--token-ids", action="store_true", help="use no tokenizer; prompts and output are token ids")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
