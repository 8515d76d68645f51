"""Trainings and evaluations of the quality benchmark: the real commands, which continue if interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from benchmarks.benchmark import Row
from benchmarks.environment import ROOT
from benchmarks.measure import OtherLoad, summary
from benchmarks.quality_text import Text
from megatron_s2.report.losses import TRAIN_LOSS, read_scalars

_CURVE_POINTS = 50
_SECONDS_TO_END = 30


class TrainingError(Exception):
    """A training or an evaluation failed; the message says where its log is."""


@dataclass(frozen=True)
class Launcher:
    """How processes are started.

    Args:
        python: interpreter with this package's requirements.
        work: directory of everything that is made.
        device: `cpu` or `cuda`.
        ranks: number of data-parallel processes of a training.
        threads: CPU threads of all ranks together.
    """

    python: str
    work: Path
    device: str
    ranks: int
    threads: int

    def sequences_per_rank(self, batch: int) -> int:
        """Returns the number of sequences of a step that each rank has.

        Raises:
            ValueError: the ranks cannot have equally many.
        """
        if batch % self.ranks:
            raise ValueError(f"--ranks {self.ranks}: must divide the {batch} sequences of a step")
        return batch // self.ranks

    def directory(self, experiment: str, setting: Row, fields: Sequence[str]) -> Path:
        """Returns the directory of a training, which has another name if one of these fields is another."""
        key = json.dumps([setting[name] for name in fields], sort_keys=True)
        words = [experiment, *(str(setting[name]) for name in ("size", "variant", "seed"))]
        return self.work / "-".join([*words, hashlib.sha256(key.encode()).hexdigest()[:8]])

    def environment(self, processes: int) -> dict[str, str]:
        """Returns the environment of one of several processes, which run this checkout's code."""
        environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(max(1, self.threads // processes)),
        }
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    def shown(self, words: Sequence[object]) -> str:
        """Returns a command as a row stores it: without the directories of this machine."""
        return shlex.join(map(str, words)).replace(str(self.work), "WORK")


@dataclass(frozen=True)
class Trained:
    """A complete training.

    Args:
        checkpoint: directory of Megatron's `--save`.
        command: what was run at its beginning, as a row stores it.
        losses: mean training loss of each of at most 50 equal stretches, by the last step of a stretch.
        step_seconds: median and spread, as `benchmarks.measure.summary` gives them.
        other_cpus: cores that other processes kept busy during its last part; None where that is not known.
    """

    checkpoint: Path
    command: str
    losses: dict[int, float]
    step_seconds: dict
    other_cpus: float | None


def train(
    launcher: Launcher,
    directory: Path,
    flags: Sequence[str],
    steps: int,
    save_interval: int,
    start: Path | None = None,
) -> Trained:
    """Trains, from the last checkpoint in `directory` if there is one.

    Args:
        directory: of this training alone: checkpoint, tensorboard and log.
        flags: Megatron's command line, without the number of steps and where to load, save and log.
        steps: number of steps in total.
        save_interval: steps from one checkpoint to the next; only the last one is kept.
        start: checkpoint whose weights the first step has; None for new ones.

    Raises:
        TrainingError: it ended with another status than 0.
        ValueError: another process trains in `directory`.
    """
    checkpoint, log = directory / "checkpoint", directory / "log.txt"
    words = [*flags, "--train-iters", steps, "--save", checkpoint, "--ckpt-format", "torch_dist"]
    words += ["--save-interval", save_interval, "--save-retain-interval", save_interval * (steps + 1)]
    words += ["--tensorboard-dir", directory / "tensorboard", "--log-interval", "1"]
    words += ["--log-timers-to-tensorboard"]
    launch = ["--standalone", "--nproc-per-node", launcher.ranks, "scripts/pretrain_gpt.py", *words]
    going_on = ["--load", checkpoint]  # from nothing, if there is no checkpoint
    beginning = going_on if start is None else ["--load", start, "--finetune"]
    step, other_cpus = _last_step(checkpoint), None
    if (step or 0) < steps:
        directory.mkdir(parents=True, exist_ok=True)
        command = [launcher.python, "-m", "torch.distributed.run", *launch]
        command += beginning if step is None else going_on
        with OtherLoad() as load, _only_one(directory) as lock, log.open("a") as output:
            _run(command, launcher.environment(launcher.ranks), output, lock, log)
        other_cpus = load.cpus()
    return _trained(directory, checkpoint, launcher.shown(["torchrun", *launch, *beginning]), other_cpus)


def train_by_recipe(
    launcher: Launcher,
    directory: Path,
    hf: Path,
    text: Text,
    pattern: Sequence[str],
    seq_length: int,
    flags: Sequence[str],
    steps: int,
    save_interval: int,
) -> Trained:
    """Makes a pretrained model sparse and trains it, by `examples/continue-pretraining/train.sh`.

    Args:
        directory: `--out` of the recipe, of this training alone; the result is in `exported`.
        hf: dense model.
        text: training and held-out data in its tokens.
        pattern: flags of the pattern.
        flags: what the training is given besides the recipe's own flags.
        steps, save_interval: as in `train`.

    Raises:
        TrainingError, ValueError: as `train`.
    """
    checkpoint, log = directory / "checkpoint", directory / "log.txt"
    words = ["examples/continue-pretraining/train.sh", "--hf", hf, "--out", directory]
    words += ["--data-prefix", text.train, "--eval-prefix", text.held_out, "--ranks", launcher.ranks]
    words += ["--seq-length", seq_length, *flags, "--train-iters", steps, "--log-interval", "1"]
    words += ["--save-interval", save_interval, "--save-retain-interval", save_interval * (steps + 1)]
    words += ["--log-timers-to-tensorboard", "--data-cache-path", launcher.work / "cache"]
    assigned = {"PATTERN": shlex.join(pattern), "SAMPLES": "1"}  # judged better by who calls this
    other_cpus = None
    if (_last_step(checkpoint) or 0) < steps or not (directory / "exported").exists():
        directory.mkdir(parents=True, exist_ok=True)
        environment = launcher.environment(launcher.ranks) | assigned
        environment["PATH"] = os.pathsep.join([str(Path(launcher.python).parent), environment["PATH"]])
        with OtherLoad() as load, _only_one(directory) as lock, log.open("a") as output:
            _run(["bash", *words], environment, output, lock, log)
        other_cpus = load.cpus()
    shown = [f"{name}={shlex.quote(value)}" for name, value in assigned.items()]
    command = " ".join([*shown, launcher.shown(["bash", *words])])
    for path in (hf, *(Path(word) for word in pattern if Path(word).is_absolute())):
        command = command.replace(str(path), path.name)
    return _trained(directory, checkpoint, command, other_cpus)


def _trained(directory: Path, checkpoint: Path, command: str, other_cpus: float | None) -> Trained:
    losses, seconds = (read_scalars(directory / "tensorboard", tag) for tag in (TRAIN_LOSS, "iteration-time"))
    return Trained(checkpoint, command, _curve(losses), summary(np.array(list(seconds.values()))), other_cpus)


def evaluate(
    launcher: Launcher,
    trained: Trained,
    data: Path,
    seq_length: int,
    samples: int | None,
    parts: int,
    log: Path,
) -> dict:
    """Returns the loss of a trained model, as scripts/eval_loss.py prints it.

    Args:
        data: prefix of the held-out dataset.
        samples: number of windows of `seq_length` tokens; None for all.
        parts: number of equal parts of a window whose losses are told apart.
        log: file that the output is added to.

    Returns:
        `loss`, in nats per token; `by_position`, that of each part; `evaluated_tokens`.

    Raises:
        TrainingError: it ended with another status than 0.
    """
    words = ["--load", trained.checkpoint, "--data-path", data, "--seq-length", seq_length]
    words += ["--micro-batch-size", 4, "--position-parts", parts]
    words += [] if samples is None else ["--samples", samples]
    printed = _printed(launcher, [ROOT / "scripts" / "eval_loss.py", *words], log)
    *_, total = re.finditer(r"^loss (\S+), perplexity \S+, over (\d+) tokens$", printed, re.MULTILINE)
    by_position = re.findall(r"^\d+ to \d+ +(\S+)$", printed, re.MULTILINE)
    return {
        "loss": float(total[1]),
        "by_position": [*map(float, by_position)],
        "evaluated_tokens": int(total[2]),
    }


def _printed(launcher: Launcher, words: Sequence[object], log: Path) -> str:
    """Runs Python in one process; returns its output, which `log` has, too."""
    with log.open("a+") as output:
        start = output.tell()
        _run([launcher.python, *words], launcher.environment(1), output, None, log)
        output.seek(start)
        return output.read()


def recalled(launcher: Launcher, trained: Trained, arguments: dict, log: Path) -> list[dict]:
    """Returns the cells of `benchmarks.quality_recall.recall` for a trained model; `log` and errors as in
    `evaluate`."""
    arguments = json.dumps({"checkpoint": str(trained.checkpoint), **arguments})
    printed = _printed(launcher, ["-m", "benchmarks.quality_recall", arguments], log)
    return json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("[{")))


def _last_step(checkpoint: Path) -> int | None:
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else None


def _curve(losses: dict[int, float]) -> dict[int, float]:
    steps = sorted(losses)
    stretches = np.array_split(steps, min(len(steps), _CURVE_POINTS))
    return {int(some[-1]): float(np.mean([losses[step] for step in some])) for some in stretches}


@contextmanager
def _only_one(directory: Path) -> Iterator[int]:
    """Holds a lock on a directory; yields the descriptor, which keeps it in a process that inherits it."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"--work: another process trains in {directory}; wait for its end, or give another"
            raise ValueError(message) from None
        yield lock.fileno()


def _run(
    command: Sequence[object], environment: dict[str, str], output: IO, lock: int | None, log: Path
) -> None:
    """Runs a command to its end; if this process is interrupted or terminated, all of its processes end."""
    inherited = () if lock is None else (lock,)
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        process_group=0,
    )
    with _ended_by_exceptions():
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                _end_group(process)
    if status:
        raise TrainingError(f"ended with status {status}, the log is {log}")


def _end_group(process: subprocess.Popen) -> None:
    """Ends a process and all others of its group."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Context in which SIGTERM raises SystemExit, with the status of a shell."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
