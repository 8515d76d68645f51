"""How long tests wait for what must come, however busy the machine is."""

import time
from collections.abc import Callable

# Seconds, a guard against hanging only: no single wait takes a tenth of it on a quiet machine.
PATIENCE = 1800.0


def wait_until(condition: Callable[[], object]) -> None:
    """Returns once `condition()` is true; raises TimeoutError if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {condition}")
        time.sleep(0.02)
