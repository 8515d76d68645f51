"""What tests change in the process of a training before it begins."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from waiting import PATIENCE


def hybrid_device_optimizer_on_cpu() -> None:
    """Megatron's HybridDeviceOptimizer asks where weights are: here, on what the CPU runtime calls a GPU."""
    import torch
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_s2.training import configure

    original, validate = (
        HybridDeviceOptimizer._get_sub_optimizer_param_groups,
        configure.validate_offload_args,
    )

    def groups(self, *args):
        torch.Tensor.is_cuda = property(lambda tensor: True)
        try:
            return original(self, *args)
        finally:
            del torch.Tensor.is_cuda

    def choose(args, argv):
        args.optimizer_cpu_offload = args.use_precision_aware_optimizer = True
        return validate(args, argv)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups
    configure.validate_offload_args = choose


def report_when_gradients_leave() -> None:
    """Print at the end how many gradients left for the host during backward, and how many later."""
    import torch

    from megatron_s2.offload.manager import OffloadManager
    from megatron_s2.offload.optimizer import OffloadedAdamW

    flush, close, counts = OffloadedAdamW.flush, OffloadManager.close, {"in backward": 0, "later": 0}

    def count(self, *args):
        counts["later" if torch._C._current_graph_task_id() == -1 else "in backward"] += 1
        flush(self, *args)

    def close_and_report(self):
        print(f"gradients left: {counts}")
        close(self)

    OffloadedAdamW.flush, OffloadManager.close = count, close_and_report


def report_memory_of_offload() -> None:
    """Print at the end how much the process has grown at most, in steps, since before state was allocated."""
    from megatron_s2.offload.executor import Executor
    from megatron_s2.offload.manager import OffloadManager

    build, step, close = OffloadManager.open_session, Executor.step, OffloadManager.close
    bytes_ = {"before": 0, "most": 0}

    def resident(name: str) -> int:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[name].split()[0])

    def build_and_note(self, *args):
        bytes_["before"] = resident("VmRSS")
        return build(self, *args)

    def step_and_note(self, *args):
        Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
        step(self, *args)
        bytes_["most"] = max(bytes_["most"], resident("VmHWM"))

    def close_and_report(self):
        print(f"offload took: {bytes_['most'] - bytes_['before']} bytes")
        close(self)

    OffloadManager.open_session, Executor.step, OffloadManager.close = (
        build_and_note,
        step_and_note,
        close_and_report,
    )


def signal_iteration(nth: int, number: int) -> None:
    """Send the process a signal when its nth iteration begins."""
    from megatron.training import training

    _at_call(training, "train_step", nth, lambda: os.kill(os.getpid(), number))


def wait_for_the_first_rank() -> None:
    """A rank that refuses gives rank 0 all the time of a test to do so before it."""
    from megatron_s2.training import refusal

    refusal._MESSAGE_SECONDS = PATIENCE


def kill_step(nth: int, delay: float) -> None:
    """Kill it some seconds after the nth step of the optimizer began."""
    from megatron_s2.offload.executor import Executor

    _at_call(Executor, "step", nth, lambda: _kill_in(delay))


def kill_store(nth: int, delay: float) -> None:
    """The same, of a write to NVMe."""
    from megatron_s2.offload.nvme import NvmeTier

    _at_call(NvmeTier, "store", nth, lambda: _kill_in(delay))


def kill_save(nth: int, delay: float) -> None:
    """The same, of a save."""
    from megatron.training import training

    _at_call(training, "save_checkpoint", nth, lambda: _kill_in(delay))


def _at_call(owner: object, name: str, nth: int, do: Callable[[], None]) -> None:
    original, left = getattr(owner, name), [nth]

    def and_do(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            do()
        return original(*args, **kwargs)

    setattr(owner, name, and_do)


def _kill_in(delay: float) -> None:
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
