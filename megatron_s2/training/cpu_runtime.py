"""Runs unmodified Megatron on the CPU, by replacing functions of `torch.cuda` with CPU equivalents.

Megatron takes devices, streams and random states from `torch.cuda`, and creates tensors with `device="cuda"`.
This module replaces the former and redirects the latter to the CPU. In Megatron itself it replaces one name
(`_share_rng_with_megatron`). The flags that a run needs without a GPU are in `environment.py`.
"""

import os
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

_MEMORY_STATISTICS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "device_memory_used",
)
_NO_OPS = (
    "set_device",  # there is one device
    "synchronize",  # operations on the CPU are synchronous
    "set_stream",
    "empty_cache",  # there is no caching allocator
    "ipc_collect",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
)


class _Stream:
    """A stream of a device whose operations are synchronous: there is never anything to wait for."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event of a device whose operations are synchronous: it is always complete."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event) -> float:
        return 0.0


_DEVICES = {torch.device, str, int}  # what may name one


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Replaces CUDA devices by the CPU in the arguments of every torch function that this thread calls.

    An integer device is a GPU by torch's convention, and is replaced, too. `Tensor.type()` returns
    `torch.cuda.FloatTensor` and the like, because Megatron's optimizers and gradient clipping compare this
    string to distinguish full from half precision.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if not _DEVICES.isdisjoint(map(type, args)):
            takes_index = func is torch.Tensor.to
            args = [
                torch.device("cpu") if _is_cuda(arg) or (takes_index and type(arg) is int) else arg
                for arg in args
            ]
        if not kwargs:
            return func(*args)
        kwargs = dict(kwargs)
        device = kwargs.get("device")
        if _is_cuda(device) or type(device) is int:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinned memory needs a GPU
        return func(*args, **kwargs)


def enable_cpu_runtime() -> None:
    """Replaces `torch.cuda` by CPU equivalents in this process, and redirects tensors in this thread.

    Call it before Megatron builds anything; a second call has no effect. `torch.cuda.is_available()` remains
    False, so that code with a CPU path takes it.

    Raises:
        ValueError: there is a GPU, which would become inaccessible.
    """
    if getattr(torch.cuda, "_replaced_by_megatron_s2", False):
        return
    if torch.cuda.is_available():
        raise ValueError("enable_cpu_runtime: there is a GPU, which the CPU runtime would make inaccessible")

    for name in _NO_OPS:
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name in _MEMORY_STATISTICS:
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    torch.cuda.mem_get_info = lambda *args, **kwargs: (0, 0)

    # Megatron initializes model parallelism only if there is at least one device.
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *args: "cpu"
    torch.cuda.get_device_capability = lambda *args: (0, 0)
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )

    torch.cuda.Stream = _Stream
    torch.cuda.Event = _Event
    stream = _Stream()
    torch.cuda.current_stream = lambda *args: stream
    torch.cuda.default_stream = lambda *args: stream
    torch.cuda.stream = lambda *args: nullcontext()
    torch.cuda.nvtx.range_push = lambda *args: None
    torch.cuda.nvtx.range_pop = lambda *args: None

    # CPU and "GPU" share one generator: operations on the "GPU" draw from the CPU's, so Megatron's RNG
    # trackers must save, fork and restore its state.
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = module.manual_seed
    torch.cuda.default_generators = (torch.default_generator,)

    # Megatron requires this variable for tensor parallelism on GPUs older than Blackwell, which is what the
    # device properties above describe.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Compiling Megatron's pointwise functions takes half a minute and does not make them faster on a CPU.
    # `--disable-jit-fuser` has no effect on functions that are decorated at import.
    torch.compiler.set_stance("force_eager")

    _CpuInsteadOfCuda().__enter__()
    _share_rng_with_megatron()
    torch.cuda._replaced_by_megatron_s2 = True


def _share_rng_with_megatron() -> None:
    """Makes Megatron set random states at once.

    It sets them through `torch.cuda._lazy_call`, which defers the call until CUDA is initialized. The name is
    replaced in Megatron's module, which has imported it.
    """
    from megatron.core.tensor_parallel import random

    random._lazy_call = lambda callback: callback()
