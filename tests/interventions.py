"""What tests change in the process of a training before it begins."""

import os
import signal
import threading
from collections.abc import Callable


def hybrid_device_optimizer_on_cpu() -> None:
    """Megatron's HybridDeviceOptimizer asks where weights are: here, on what the CPU runtime calls a GPU."""
    import torch
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_s2 import pretrain

    original, validate = HybridDeviceOptimizer._get_sub_optimizer_param_groups, pretrain.validate_offload_args

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
    pretrain.validate_offload_args = choose


def kill_step(nth: int, delay: float) -> None:
    """Kill it some seconds after the nth step of the optimizer began."""
    from megatron_s2.offload.executor import Executor

    _kill_in(Executor, "step", nth, delay)


def kill_store(nth: int, delay: float) -> None:
    """The same, of a write to NVMe."""
    from megatron_s2.offload.nvme import NvmeTier

    _kill_in(NvmeTier, "store", nth, delay)


def kill_save(nth: int, delay: float) -> None:
    """The same, of a save."""
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
