"""The quickstart as a person runs it, its environment already there: how long, and how much it learns."""

import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from megatron_s2.report.losses import Losses

_SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "quickstart.sh"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=150, help="as of the quickstart, default %(default)s")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """One row, whatever is stored: seconds from start to end, and the losses in nats per token."""
    with tempfile.TemporaryDirectory() as directory:
        words = ["bash", str(_SCRIPT), "--steps", str(args.steps), "--out", f"{directory}/quickstart"]
        begin = time.monotonic()
        done = subprocess.run(words, check=False)
        seconds = time.monotonic() - begin
        if done.returncode:
            raise WrongResultError(f"{_SCRIPT.name} ended with status {done.returncode}")
        losses = Losses.read(f"{directory}/quickstart/tensorboard")
    yield {
        "steps": max(losses.train),
        "seconds": seconds,
        "untrained_loss": losses.untrained,
        "validation_loss": losses.last_validation,
    }


def table(rows: list[Row]) -> str:
    return "\n".join(
        f"{row['steps']} steps in {row['seconds']:.0f} s; loss {row['untrained_loss']:.3f} untrained, "
        f"{row['validation_loss']:.3f} on validation"
        for row in rows
    )


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws nothing: the quickstart draws its own pictures."""
    return []


BENCHMARK = Benchmark(
    name="quickstart",
    help="the quickstart's time and losses",
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
)
