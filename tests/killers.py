"""Let this process kill itself at some point of a training: soon after something began for the nth time."""

import os
import signal
import threading
from collections.abc import Callable


def kill_step(nth: int, delay: float) -> None:
    from megatron_s2.offload.executor import Executor

    _kill_in(Executor, "step", nth, delay)


def kill_store(nth: int, delay: float) -> None:
    from megatron_s2.offload.nvme import NvmeTier

    _kill_in(NvmeTier, "store", nth, delay)


def kill_save(nth: int, delay: float) -> None:
    from megatron.training import training

    _kill_in(training, "save_checkpoint", nth, delay)


def _kill_in(owner: object, name: str, nth: int, delay: float) -> None:
    original, left = getattr(owner, name), [nth]

    def and_die(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            _soon(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return original(*args, **kwargs)

    setattr(owner, name, and_die)


def _soon(delay: float, what: Callable[[], None]) -> None:
    timer = threading.Timer(delay, what)
    timer.daemon = True
    timer.start()
