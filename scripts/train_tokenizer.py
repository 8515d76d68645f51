"""Train a byte-level BPE tokenizer on raw text, for `--tokenizer-type HuggingFaceTokenizer`."""

import sys
from collections.abc import Sequence

from megatron_s2.data.command import CommandParser, add_corpus_arguments, corpus_from, run_command
from megatron_s2.data.tokenizer import train_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add_corpus_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of tokens, including the two special ones"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write the tokenizer to")
    parser.add_argument(
        "--max-bytes",
        type=int,
        help="number of bytes of text to train on, approximately, spread over the input (default: all)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args(argv)
    trained = train_tokenizer(
        corpus_from(args), args.vocab_size, args.output, max_bytes=args.max_bytes, overwrite=args.overwrite
    )
    print(
        f"{trained.directory}: {trained.vocab_size} tokens learnt from {trained.tally.documents} documents, "
        f"{trained.tally.bytes / 1e6:.1f} MB in {trained.seconds:.1f} s; {trained.tally.skipped()}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
