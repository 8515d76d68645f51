"""The quickstart as a user runs it, with its environment already installed: its time and its losses."""

import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.environment import ROOT
from megatron_s2.report.losses import Losses

_SCRIPT = ROOT / "scripts" / "quickstart.sh"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=150, help="as for the quickstart (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields one row, whatever is stored: seconds from start to end, and losses in nats per token."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["bash", str(_SCRIPT), "--steps", str(args.steps), "--out", f"{directory}/quickstart"]
        start = time.monotonic()
        done = subprocess.run(command, check=False)
        seconds = time.monotonic() - start
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


BENCHMARK = Benchmark(
    name="quickstart",
    help="the quickstart's time and losses",
    add_arguments=add_arguments,
    run=run,
    table=table,
    takes_device=False,
)
