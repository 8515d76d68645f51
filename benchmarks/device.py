"""The device itself: what it is, and what it reaches on plain work, as ceilings for everything else."""

from __future__ import annotations

import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.benchmark import Benchmark, Row
from benchmarks.measure import cuda_times, interleaved_times, summary
from benchmarks.options import require_positive
from benchmarks.results import newest_match

_SIZES = {"cpu": (512, 2**22), "cuda": (8192, 2**32)}  # size of the square matrices, copied bytes
_SMI_FIELDS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=10, help="timed runs (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields one row, unless it is stored."""
    require_positive(repeats=args.repeats)
    setting = {"device": args.device, "repeats": args.repeats}
    if newest_match(stored, setting):
        return
    size, copied_bytes = _SIZES[args.device]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    functions = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = _times(functions, args.device, args.repeats)
    yield setting | {
        **(_gpu_properties() if args.device == "cuda" else {}),
        "product": {"size": size, "dtype": str(dtype).removeprefix("torch."), "flops": 2 * size**3},
        "product_seconds": seconds["product"],
        "copied_bytes": copied_bytes,
        "copy_seconds": seconds["copy"],
    }


def _times(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict]:
    if device == "cuda":
        for function in functions.values():
            function()
        return {name: summary(cuda_times(function, repeats)) for name, function in functions.items()}

    def stage(function: Callable[[], object]) -> Iterator[None]:
        function()
        yield

    runs = {name: partial(stage, function) for name, function in functions.items()}
    return {name: summary(seconds[:, 0]) for name, seconds in interleaved_times(runs, repeats).items()}


def _gpu_properties() -> dict:
    properties = torch.cuda.get_device_properties(0)
    output = None
    if smi := shutil.which("nvidia-smi"):
        command = [smi, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": {"asked": _SMI_FIELDS, "said": output},
    }


def table(rows: list[Row]) -> str:
    lines = []
    for row in {row["device"]: row for row in rows}.values():
        machine, product = row["machine"], row["product"]
        name = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        rate = product["flops"] / row["product_seconds"]["median"] / 1e12
        bandwidth = 2 * row["copied_bytes"] / row["copy_seconds"]["median"] / 1e9
        lines.append(
            f"{name}: {rate:.4g} TFLOP/s in a {product['dtype']} product of size {product['size']}, "
            f"{bandwidth:.4g} GB/s read and written by a copy of {row['copied_bytes'] / 2**20:.0f} MiB"
        )
        if row["device"] == "cuda":
            smi = row["nvidia_smi"]
            lines.append(
                f"  compute capability {row['compute_capability']}, {row['multiprocessors']} "
                f"multiprocessors, {row['memory_bytes'] / 2**30:.0f} GiB, CUDA {row['cuda']}; "
                f"nvidia-smi {smi['asked']}: {smi['said'] or 'not there'}"
            )
    return "\n".join(lines)


BENCHMARK = Benchmark(name="device", help=__doc__, add_arguments=add_arguments, run=run, table=table)
