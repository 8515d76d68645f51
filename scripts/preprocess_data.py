"""Tokenize raw text into an indexed dataset for Megatron's `--data-path`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2.data.command import CommandParser, add_corpus_arguments, corpus_from, run_command
from megatron_s2.data.preprocess import TOKENIZER_TYPES, preprocess_data
from megatron_s2.data.tokenizer import beyond_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add_corpus_arguments(parser)
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="prefix of the files, P_text_document.bin, .idx and .ids (text: --json-key)",
    )
    parser.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="as for training")
    parser.add_argument(
        "--tokenizer-model", required=True, help="as for training: a directory, a file or a name on the Hub"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="append the end-of-document token to each document"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of processes that tokenize (default: one per CPU, %(default)s here)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)

    # Imports torch, which bad flags need not wait for.
    from megatron_s2.training.patches import hide_transformer_engine, quiet_known_warnings

    quiet_known_warnings()
    hide_transformer_engine()  # nothing here computes with it
    dataset = preprocess_data(
        corpus_from(args),
        args.output_prefix,
        args.tokenizer_type,
        args.tokenizer_model,
        append_eod=args.append_eod,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    print(
        f"{dataset.prefix}: {dataset.tally.documents} documents, {dataset.tokens} tokens ({dataset.dtype}), "
        f"{dataset.tally.bytes / 1e6:.1f} MB in {dataset.seconds:.1f} s; {dataset.tally.skipped()}"
    )
    note = beyond_model(Path(args.tokenizer_model), dataset.largest_token_id + 1, dataset.prefix)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
