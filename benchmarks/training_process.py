"""A Megatron training in a process of its own: the times of its steps, its losses, the memory it took.

Run as a module, this file is that process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import ROOT
from megatron_s2.report.losses import TRAIN_LOSS, read_scalars


@dataclass(frozen=True)
class Training:
    """What a training left; of one that failed, its status and output only.

    Args:
        status: of the process.
        output: all it printed.
        losses: of every iteration.
        step_seconds: whole iterations from one end to the next, with Megatron's synchronizations only.
        optimizer_seconds: of later iterations, where asked for, from the end of their backward and reduction
            to the end of the update and of what it copies; the GPU is synchronized before and after.
        host_peak_bytes: most resident memory there was (VmHWM); None where the system does not tell.
        gpu_peak_bytes: `torch.cuda.max_memory_allocated`; None without a GPU.
    """

    status: int
    output: str
    losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    optimizer_seconds: tuple[float, ...] = ()
    host_peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None

    @property
    def failure(self) -> str:
        """What a process that failed says of it: its last error, or else its last line."""
        lines = [f"status {self.status}, nothing printed", *filter(None, self.output.splitlines())]
        errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
        return [*lines, *errors][-1]


def train(
    flags: Sequence[str],
    warm_up: int,
    repeats: int,
    device: str,
    threads: int,
    time_optimizer: bool = True,
    gpu_memory: int | None = None,
) -> Training:
    """Trains with `flags` for `warm_up + 2 * repeats` iterations, without `time_optimizer` for
    `warm_up + repeats`, and waits for the end.

    The first iterations are not timed, the next `repeats` are timed as a whole, the last for their
    optimizer's part: timing that takes synchronizations which the others shall not have. Dense attention is
    SDPA's flash kernel or an error, never another. A training ends with this process, however that ends.

    Args:
        gpu_memory: bytes that PyTorch may take of the GPU; None for all.
    """
    inherited = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**inherited, "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same sums however many streams there are
    with tempfile.TemporaryDirectory() as directory:
        report, log = Path(directory) / "report.json", Path(directory) / "tensorboard"
        untimed = warm_up + repeats
        iterations = untimed + (repeats if time_optimizer else 0)
        own = ["--train-iters", str(iterations), "--log-interval", "1"]
        own += ["--log-timers-to-tensorboard", "--tensorboard-dir", str(log)]
        setting = [str(report), str(untimed), str(gpu_memory or 0)]
        process = [sys.executable, "-m", "benchmarks.training_process", *setting]
        ours_to_close, until_closed = os.pipe()[::-1]
        try:
            done = subprocess.run(
                [*process, *flags, *own],
                cwd=ROOT,
                env=environment,
                stdin=until_closed,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        finally:
            os.close(ours_to_close)
            os.close(until_closed)
        if done.returncode:
            return Training(done.returncode, done.stdout)
        losses, seconds = read_scalars(log, TRAIN_LOSS), read_scalars(log, "iteration-time")
        reported = json.loads(report.read_text())
        return Training(
            status=0,
            output=done.stdout,
            losses=tuple(losses[step] for step in sorted(losses)),
            step_seconds=tuple(seconds[step] for step in range(warm_up + 1, warm_up + repeats + 1)),
            optimizer_seconds=tuple(reported["optimizer_seconds"]),
            host_peak_bytes=reported["host_peak_bytes"],
            gpu_peak_bytes=reported["gpu_peak_bytes"],
        )


def _main(report: Path, untimed: int, gpu_memory: int, flags: Sequence[str]) -> None:
    from megatron_s2 import pretrain

    Thread(target=_end_with_stdin, daemon=True).start()
    patch, optimizer_seconds = pretrain.apply_patches, []

    def patch_and_time(**kwargs) -> None:
        patch(**kwargs)
        _time_optimizer(untimed, optimizer_seconds)

    pretrain.apply_patches = patch_and_time  # Megatron cannot be imported before a run is prepared
    on_gpu = torch.cuda.is_available()
    if gpu_memory:
        there_is = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / there_is))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        pretrain.main(flags)
    found = {
        "optimizer_seconds": optimizer_seconds,
        "host_peak_bytes": _peak_resident_bytes(),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    report.write_text(json.dumps(found))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


def _time_optimizer(untimed: int, seconds: list[float]) -> None:
    """Has each step after the first `untimed` append the seconds of Megatron's timer `optimizer`, which is
    switched on for these."""
    from megatron.training import get_timers, training

    plain, steps = training.train_step, 0

    def train_step(*args, **kwargs):
        nonlocal steps
        timers = get_timers()
        if steps == untimed:
            timers._log_level = 1  # as --timing-log-level 1 does for all steps
        done = plain(*args, **kwargs)
        if steps >= untimed:
            seconds.append(timers("optimizer").elapsed())
        steps += 1
        return done

    training.train_step = train_step


def _peak_resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else None


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
