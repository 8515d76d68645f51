"""The main function of a script, called in the process of the tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_main(name: str) -> Callable[[list[str]], None]:
    """Returns `main` of `scripts/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
