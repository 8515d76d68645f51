"""What the command-line scripts share: flags that select a corpus, one-line errors, exit statuses."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_s2.data.documents import Corpus
from megatron_s2.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, `error: …`, without the usage text."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `corpus_from` reads."""
    parser.add_argument(
        "--input", required=True, metavar="FILE.jsonl|DIR", help="JSON lines, or a directory of text files"
    )
    parser.add_argument(
        "--json-key", default="text", help="key of the text in a JSON line (default: %(default)s)"
    )
    parser.add_argument(
        "--pattern",
        default="*",
        metavar="GLOB",
        help="names of the files to read in a directory (default: all)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="names of files and directories to skip; may be given several times",
    )


def corpus_from(args: argparse.Namespace) -> Corpus:
    """Returns the corpus that the flags of `add_corpus_arguments` select."""
    return Corpus(args.input, json_key=args.json_key, pattern=args.pattern, exclude=tuple(args.exclude))


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)` and returns the exit status of the process.

    The status is 0 if `main` returns; 2, after `error: …` on stderr, for bad input or a file that cannot be
    read or written; 130 after Ctrl-C; 143 after SIGTERM, which also unwinds the stack so that cleanup runs.
    `main` should import slow modules in its body, where Ctrl-C is handled.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(argv)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
