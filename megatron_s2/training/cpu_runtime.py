"""Lets unmodified Megatron run where there is no GPU, by answering `torch.cuda` from the CPU.

Megatron asks `torch.cuda` for a device, for streams and for random states, and creates its tensors with
`device="cuda"`. Without a GPU, each of these questions has an obvious answer, and this module gives it. It
substitutes names in `torch.cuda` and steers tensor creation; of Megatron itself it touches one name (see
`_share_rng_with_megatron`). The command-line side is `runtime/flags.py`.
"""

import os
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

_MEMORY_QUESTIONS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "device_memory_used",
)
_NOTHING_TO_DO = (
    "set_device",  # there is one device
    "synchronize",  # an operation on the CPU has finished when its call returns
    "set_stream",
    "empty_cache",  # no caching allocator
    "ipc_collect",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
)


class _Stream:
    """A stream on a device where everything is already in order: waiting for it returns at once."""

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
    """An event that has always happened already."""

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


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every torch call of this thread.

    An integer device means a GPU by torch's convention, so it too becomes the CPU. `Tensor.type()` keeps
    answering `torch.cuda.FloatTensor`, because Megatron's optimizers and gradient clipping compare that
    string to tell full from half precision.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)

        takes_positional_index = func is torch.Tensor.to
        args = tuple(
            torch.device("cpu") if _is_cuda(arg) or (takes_positional_index and type(arg) is int) else arg
            for arg in args
        )
        device = kwargs.get("device")
        if _is_cuda(device) or type(device) is int:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning speeds up copies to a GPU; there is none
        return func(*args, **kwargs)


def enable_cpu_runtime() -> None:
    """Answers `torch.cuda` from the CPU, for this process and (tensor creation) this thread.

    Call it once, before Megatron builds anything; a second call changes nothing. `torch.cuda.is_available()`
    stays false, so code that honestly asks keeps its CPU path.

    Raises:
        ValueError: if there is a GPU, which this would hide.
    """
    if getattr(torch.cuda, "_answered_by_megatron_s2", False):
        return
    if torch.cuda.is_available():
        raise ValueError("enable_cpu_runtime: a GPU is available here, and the CPU runtime would hide it")

    for name in _NOTHING_TO_DO:
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name in _MEMORY_QUESTIONS:
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    torch.cuda.mem_get_info = lambda *args, **kwargs: (0, 0)

    # Megatron initialises model parallelism only where it counts at least one device.
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

    # One generator serves both: a random operation that Megatron believes to run on the GPU draws from the
    # CPU's, so that is the state its RNG trackers must save, fork and restore.
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = module.manual_seed
    torch.cuda.default_generators = (torch.default_generator,)

    # Megatron wants this set when tensor parallelism runs on a GPU older than Blackwell, to order kernels
    # in hardware queues; a CPU has none, and `get_device_properties` above says "older".
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Compiling Megatron's small pointwise functions costs half a minute at start and gains a CPU nothing;
    # `--disable-jit-fuser` comes too late for functions decorated at import.
    torch.compiler.set_stance("force_eager")

    _CpuInsteadOfCuda().__enter__()
    _share_rng_with_megatron()
    torch.cuda._answered_by_megatron_s2 = True


def _share_rng_with_megatron() -> None:
    """Megatron sets a GPU's random state through `torch.cuda._lazy_call`, which waits for CUDA to start.

    It holds the name by import, so it is replaced there: the state is set at once.
    """
    from megatron.core.tensor_parallel import random

    random._lazy_call = lambda callback: callback()
