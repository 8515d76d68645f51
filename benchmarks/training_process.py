"""A Megatron training in a process of its own: times of its steps, losses, peak memory.

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
from benchmarks.measure import OtherLoad, status_bytes
from megatron_s2.report.losses import TRAIN_LOSS, read_scalars

# The same implementation of each layer on every machine and no dropout, so that runs can be compared. The
# learning rate is small enough that a last bit which Adam rounds differently moves 16-bit weights little.
MODEL_FLAGS = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --transformer-impl local "
    "--no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --seed 1234 --bf16 --micro-batch-size 1 "
    "--lr 3e-5 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0"
)


@dataclass(frozen=True)
class Training:
    """Results of a training; of one that failed, `status`, `output` and `other_cpus` only.

    Args:
        status: exit status of the process.
        output: all that it printed.
        losses: loss of every iteration.
        step_seconds: seconds of each timed iteration, with Megatron's synchronizations only.
        optimizer_seconds: seconds of the optimizer step in later iterations, from the end of backward and
            gradient reduction to the end of the update and its copies, with the GPU synchronized at both.
        host_peak_bytes: peak resident memory (VmHWM); None where the system does not say.
        gpu_peak_bytes: `torch.cuda.max_memory_allocated`; None without a GPU.
        other_cpus: cores that other processes kept busy meanwhile; None where the system does not say.
    """

    status: int
    output: str
    losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    optimizer_seconds: tuple[float, ...] = ()
    host_peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    other_cpus: float | None = None

    @property
    def failure(self) -> str:
        """Last error that a failed process printed, or its last line."""
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
    """Trains in a process of its own, which ends with this one, however that ends.

    Dense attention is SDPA's flash kernel or an error, never another kernel.

    Args:
        flags: Megatron's command line, without the number of iterations and where to log.
        warm_up: number of iterations that are not timed.
        repeats: number of iterations that are timed as a whole.
        time_optimizer: whether the optimizer is timed, in `repeats` more iterations, because that
            synchronizes the GPU.
        gpu_memory: bytes that PyTorch may take of the GPU; None for all.
    """
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = str(threads)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same sums however many streams there are
    untimed = warm_up + repeats
    with tempfile.TemporaryDirectory() as directory:
        report, log = Path(directory) / "report.json", Path(directory) / "tensorboard"
        command = [sys.executable, "-m", "benchmarks.training_process"]
        command += [str(report), str(untimed), str(gpu_memory or 0), *flags]
        command += ["--train-iters", str(untimed + (repeats if time_optimizer else 0)), "--log-interval", "1"]
        command += ["--log-timers-to-tensorboard", "--tensorboard-dir", str(log)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # Its stdin is closed at the end of the block, or with this process, and that ends it.
        with (
            OtherLoad() as load,
            subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, **output) as process,
        ):
            text = process.stdout.read()
        if process.returncode:
            return Training(process.returncode, text, other_cpus=load.cpus())
        losses, seconds = read_scalars(log, TRAIN_LOSS), read_scalars(log, "iteration-time")
        measured = json.loads(report.read_text())
    return Training(
        status=0,
        output=text,
        losses=tuple(losses[step] for step in sorted(losses)),
        step_seconds=tuple(seconds[step] for step in range(warm_up + 1, untimed + 1)),
        optimizer_seconds=tuple(measured["optimizer_seconds"]),
        host_peak_bytes=measured["host_peak_bytes"],
        gpu_peak_bytes=measured["gpu_peak_bytes"],
        other_cpus=load.cpus(),
    )


def _main(report: Path, untimed: int, gpu_memory: int, flags: Sequence[str]) -> None:
    from megatron_s2 import pretrain

    Thread(target=_end_with_stdin, daemon=True).start()
    apply_patches, optimizer_seconds = pretrain.apply_patches, []

    def apply_patches_and_time(**kwargs) -> None:
        apply_patches(**kwargs)
        _time_optimizer(untimed, optimizer_seconds)

    pretrain.apply_patches = apply_patches_and_time  # Megatron cannot be imported before a run is prepared
    if gpu_memory:
        total_memory = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / total_memory))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        pretrain.main(flags)
    measured = {
        "optimizer_seconds": optimizer_seconds,
        "host_peak_bytes": status_bytes("VmHWM"),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    report.write_text(json.dumps(measured))


def _end_with_stdin() -> None:
    """Ends this process when the one that started it closes the other end of stdin, or is gone."""
    sys.stdin.read()
    os._exit(1)


def _time_optimizer(untimed: int, seconds: list[float]) -> None:
    """Makes each training step after the first `untimed` append the seconds of Megatron's timer `optimizer`,
    which is switched on for these steps only."""
    from megatron.training import get_timers, training

    original, steps = training.train_step, 0

    def train_step(*args, **kwargs):
        nonlocal steps
        timers = get_timers()
        if steps == untimed:
            timers._log_level = 1  # as --timing-log-level 1 does for all steps
        result = original(*args, **kwargs)
        if steps >= untimed:
            seconds.append(timers("optimizer").elapsed())
        steps += 1
        return result

    training.train_step = train_step


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
