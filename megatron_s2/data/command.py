"""What the data commands share: the flags that name a corpus, one-line errors, clean exits."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_s2.data.documents import Corpus
from megatron_s2.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, `error: …`, without the usage text."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `corpus_from` reads."""
    parser.add_argument(
        "--input", required=True, metavar="FILE.jsonl|DIR", help="JSON lines, or a directory of text files"
    )
    parser.add_argument("--json-key", default="text", help="key of the text in a line (default: %(default)s)")
    parser.add_argument(
        "--pattern",
        default="*",
        metavar="GLOB",
        help="names of the files of a directory to read (default: all)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="names of files and directories to leave out; may be given several times",
    )


def corpus_from(args: argparse.Namespace) -> Corpus:
    """The corpus that the flags of `add_corpus_arguments` name."""
    return Corpus(args.input, json_key=args.json_key, pattern=args.pattern, exclude=tuple(args.exclude))


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status of the process.

    0 when it returns; 2 after `error: …` on stderr for bad input or a file that cannot be read or
    written; 130 after Ctrl-C. SIGTERM unwinds the same way, with 143, so that cleaning up happens.
    `main` should import what is slow to import in its own body: only there is Ctrl-C handled.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(argv)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
