"""Scripts that run in the process of a test."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_s2.data.command import run_command

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_main(name: str) -> Callable[[list[str]], None]:
    """Returns `main` of `scripts/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def exit_status(main: Callable, argv: Sequence[str]) -> int:
    """Returns the exit status of a script, also where argparse ends it because of bad flags."""
    try:
        return run_command(main, argv)
    except SystemExit as exit_:
        return exit_.code
