"""The device itself: what it is, and what it reaches on plain work, as ceilings for everything else."""

from __future__ import annotations

import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.benchmark import Benchmark, Row
from benchmarks.measure import cuda_times, interleaved_times, summary

_SIZES = {"cpu": (512, 2**22), "cuda": (8192, 2**32)}  # of the matrices; bytes that are copied
_ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=10, help="timed runs (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """One row, unless it is stored."""
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be >= 1")
    setting = {"device": args.device, "repeats": args.repeats}
    if any(setting.items() <= row.items() for row in stored):
        return
    size, copied = _SIZES[args.device]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    works = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = _times(works, args)
    yield setting | {
        **(_of_gpu() if args.device == "cuda" else {}),
        "product": {"size": size, "dtype": str(dtype).removeprefix("torch."), "flops": 2 * size**3},
        "product_seconds": seconds["product"],
        "copied_bytes": copied,
        "copy_seconds": seconds["copy"],
    }


def _times(works: dict, args: Namespace) -> dict[str, dict]:
    if args.device == "cpu":

        def once(work):
            work()
            yield

        found = interleaved_times({name: partial(once, work) for name, work in works.items()}, args.repeats)
        return {name: summary(seconds[:, 0]) for name, seconds in found.items()}
    found = {}
    for name, work in works.items():
        work()
        found[name] = summary(cuda_times(work, args.repeats))
    return found


def _of_gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    said = None
    if smi := shutil.which("nvidia-smi"):
        words = [smi, f"--query-gpu={_ASKED}", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": {"asked": _ASKED, "said": said},
    }


def table(rows: list[Row]) -> str:
    newest = {row["device"]: row for row in rows}
    lines = []
    for row in newest.values():
        machine, product = row["machine"], row["product"]
        name = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        rate = product["flops"] / row["product_seconds"]["median"] / 1e12
        moved = 2 * row["copied_bytes"] / row["copy_seconds"]["median"] / 1e9
        lines.append(
            f"{name}: {rate:.4g} TFLOP/s in a {product['dtype']} product of size {product['size']}, "
            f"{moved:.4g} GB/s read and written by a copy of {row['copied_bytes'] / 2**20:.0f} MiB"
        )
        if row["device"] == "cuda":
            smi = row["nvidia_smi"]
            lines.append(
                f"  compute capability {row['compute_capability']}, {row['multiprocessors']} "
                f"multiprocessors, {row['memory_bytes'] / 2**30:.0f} GiB, CUDA {row['cuda']}; "
                f"nvidia-smi {smi['asked']}: {smi['said'] or 'not there'}"
            )
    return "\n".join(lines)


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Two numbers need no picture."""
    return []


BENCHMARK = Benchmark(
    name="device",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
    takes_device=True,
)
