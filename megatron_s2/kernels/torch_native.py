"""Runs the calls of plans: on the CPU in one C++ operator (`torch_tasks.cpp`), elsewhere from Python.

From Python each call is a parallel region or several, and each region waits for its slowest thread: beside
other programs that takes several times as long. The operator has one region for all heads and documents. It
is compiled at the first call, for some twenty seconds, and kept in the user's cache folder; without a
compiler the calls run from Python, and a warning says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_s2.cache_file import cache_folder
from megatron_s2.kernels.numerics import compute_dtype
from megatron_s2.kernels.torch_calls import (
    BackwardTensors,
    ForwardTensors,
    Plan,
    Sources,
    backward_calls,
    forward_calls,
)
from megatron_s2.kernels.torch_plan import Band, Call, Causal
from megatron_s2.pattern import BlockPattern, S2Pattern

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("torch_tasks.cpp")
_FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")
_CAUSAL, _BAND, _PAST = range(3)  # kinds of calls in torch_tasks.cpp
_MOST_ROWS = 1024  # of a task
_TASKS_PER_THREAD = 4  # with equal tasks, a thread then waits for a fifth of the time at most


def run_forward(parts: Iterable[ForwardTensors]) -> None:
    """Runs `forward_calls` of all parts, which write to different tensors."""
    parts = list(parts)
    operators = _operators(parts)
    if operators is None:
        for part in parts:
            forward_calls(part)
    else:
        operators.forward(
            [part.q for part in parts],
            *_keys_and_calls(parts),
            [part.out for part in parts],
            [part.lse for part in parts],
            *_shape(parts),
        )


def run_backward(parts: Iterable[BackwardTensors]) -> None:
    """Runs `backward_calls` of all parts, which add to different tensors."""
    parts = list(parts)
    operators = _operators(parts)
    if operators is None:
        for part in parts:
            backward_calls(part)
    else:
        operators.backward(
            [part.dout for part in parts],
            [part.q for part in parts],
            *_keys_and_calls(parts),
            [part.out for part in parts],
            [part.lse for part in parts],
            [part.dq for part in parts],
            [x for part in parts for x in _tensors(part.grads)],
            *_shape(parts),
        )


def product_dtype(x: Tensor, pattern: BlockPattern, backward: bool = False) -> torch.dtype:
    """Returns the dtype of queries, keys and values in products: bfloat16 for such an `x` where the CPU has
    instructions for it, which sum in float32; else `compute_dtype`.

    In backward only if all heads are dense: on the short pieces of others PyTorch's kernel takes longer in
    bfloat16 than in float32.
    """
    is_fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and _multiplies_bfloat16()
    if not is_fast or not isinstance(pattern, S2Pattern) or load() is None:
        return compute_dtype(x.dtype)
    if backward and not all(map(pattern.is_dense, range(pattern.num_kv_heads))):
        return compute_dtype(x.dtype)
    return x.dtype


@cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


Parts = Sequence[ForwardTensors] | Sequence[BackwardTensors]


def _operators(parts: Parts):
    """Returns the C++ operators if they can run these parts, else None."""
    if not parts or parts[0].q.device.type != "cpu":
        return None
    if not all(isinstance(part.plan.pattern, S2Pattern) for part in parts):
        return None
    return load()


def _keys_and_calls(parts: Parts) -> tuple[list[Tensor], list[Tensor], list[int]]:
    sources = [x for part in parts for x in _tensors(part.sources)]
    tables = [_table(part.plan.calls, part.plan.pattern.block_size) for part in parts]
    return sources, tables, [start for part in parts for start in (part.plan.q_start, part.sources.start)]


def _tensors(sources: Sources) -> tuple[Tensor, ...]:
    return sources.k, sources.v, sources.k_shard, sources.v_shard


def _shape(parts: Parts) -> tuple[int, int, int, float]:
    """Tokens of a block, blocks of a window, rows of a task, softmax scale."""
    plan: Plan = parts[0].plan
    block = plan.pattern.block_size
    rows = sum(part.q.shape[0] * part.sources.k.shape[1] * part.q.shape[2] for part in parts)
    share = max(rows // (_TASKS_PER_THREAD * torch.get_num_threads()), 1)
    return (
        block,
        plan.pattern.local_blocks,
        min(-(-share // block) * block, _MOST_ROWS // block * block or block),
        plan.scale,
    )


def _table(calls: Sequence[Call], block: int) -> Tensor:
    """Calls as `torch_tasks.cpp` reads them: int64 `[calls, 6]`, kind, queries, source and keys."""

    def row(call: Call) -> tuple[int, ...]:
        if isinstance(call, Causal):
            return _CAUSAL, call.start, call.stop, 0, call.start, call.stop
        if isinstance(call, Band):
            return _BAND, call.first * block, call.last * block, 0, 0, 0
        return _PAST, call.start, call.stop, int(call.source == "shard"), call.keys_start, call.keys_stop

    return torch.tensor([row(call) for call in calls], dtype=torch.int64, device="cpu").view(-1, 6)


@cache
def load():
    """Returns the operators, compiled if they have not been; None, with a warning, if that fails."""
    try:
        torch.ops.load_library(library())
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # what the loader says
        warnings.warn(f"attention on the CPU runs without its C++ operators, slower: {reason}", stacklevel=2)
        return None
    operators = torch.ops.megatron_s2_cpu
    for operator in (operators.forward, operators.backward):
        torch.library.register_fake(operator.default.name())(lambda *_: None)  # they return nothing
    return operators


def library() -> Path:
    """Returns the path of the compiled operators. One process compiles them, and others wait for it.

    Machines that share a home folder share the file if they have the same architecture, C library and build
    of PyTorch: then one without a compiler uses what another has compiled.

    Raises:
        OSError: the cache folder is not writable.
        RuntimeError: there is no compiler, or it fails.
    """
    build = [torch.__version__, torch.version.git_version, platform.machine(), *platform.libc_ver()]
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), *build, *_FLAGS])
    path = cache_folder() / f"torch_tasks-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(path)
    return path


def compiler() -> list[str]:
    """Returns the words that start the C++ compiler: $CXX, by default g++.

    Its OpenMP is the one that PyTorch brings. With another there would be two pools of threads.
    """
    return shlex.split(os.environ.get("CXX") or "g++")


def _compile(path: Path) -> None:
    """Writes the file whole or not at all."""
    name, *options = compiler()
    if shutil.which(name) is None:
        raise RuntimeError(f"no C++ compiler, {name} is not on PATH")
    _log.warning("compiling the CPU operators of megatron_s2, once on this machine: about 20 s")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [name, *options, *_FLAGS, f"-I{root / 'include'}", str(_SOURCE), f"-L{root / 'lib'}"]
        command += ["-ltorch_cpu", "-lc10", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"status {done.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise RuntimeError(f"{name} fails: {reason[:300]}")
        built.rename(path)
