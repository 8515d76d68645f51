"""Runs a script in the process of a test."""

from collections.abc import Callable, Sequence

from megatron_s2.data.command import run_command


def exit_status(main: Callable, argv: Sequence[str]) -> int:
    """Returns the exit status of a script, also where argparse ends it because of bad flags."""
    try:
        return run_command(main, argv)
    except SystemExit as exit_:
        return exit_.code
