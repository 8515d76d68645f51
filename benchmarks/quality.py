"""Quality of models that are trained with S2 attention, beside dense ones: lists of independent trainings.

Each training goes on from its last checkpoint, and one that has a stored row, of whatever machine, is not
repeated.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks import patterns, quality_continue, quality_needles, quality_scratch
from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.environment import ROOT
from benchmarks.options import add_integers
from benchmarks.quality_experiment import Experiment
from benchmarks.quality_training import Launcher, TrainingError
from benchmarks.results import newest_match

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (quality_scratch, quality_needles, quality_continue)
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    kinds = "; ".join(f"{name}: {experiment.help}" for name, experiment in EXPERIMENTS.items())
    add("experiment", choices=EXPERIMENTS, help=kinds)
    add("--sizes", nargs="+", metavar="NAME", help="sizes to train (default: all)")
    add("--variants", nargs="+", metavar="NAME", help="variants to train (default: all)")
    add_integers(parser, "--seeds", "numbers, such as 1,2", "seeds (default: those of each size)")
    add(
        "--work",
        type=Path,
        default=ROOT / "runs" / "quality",
        metavar="DIR",
        help="directory of data, checkpoints and logs (default: runs/quality)",
    )
    add("--toy", action="store_true", help="tiny sizes that take a minute and show nothing")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s")
    add(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter that trains, and whose packages' sources are the text (default: this one)",
    )
    add("--hf", type=Path, metavar="DIR", help="model of `continue`, made by scripts/get_small_model.sh DIR")
    add(
        "--pattern-file",
        type=Path,
        default=patterns.FILES / "b195-m2.json",
        metavar="FILE",
        help="calibrated pattern of `continue` (default: benchmarks/patterns/b195-m2.json)",
    )
    several = ", ".join(f"{experiment.cpu_ranks} for {name}" for name, experiment in EXPERIMENTS.items())
    text = f"processes of a training (default: 1, on a CPU {several}, if there are as many --threads)"
    add("--ranks", type=int, metavar="N", help=text)


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the row of each run that has none. One that fails is told of, and the others go on."""
    experiment = EXPERIMENTS[args.experiment]
    args.sizes = _chosen(args, "sizes", experiment.toy_sizes if args.toy else experiment.sizes)
    args.variants = _chosen(args, "variants", experiment.variants)
    if args.ranks is None:
        args.ranks = min(experiment.cpu_ranks, args.threads) if args.device == "cpu" else 1
    if args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: must be >= 1")
    if shutil.which(args.python) is None:
        raise ValueError(f"--python {args.python}: must be an interpreter, is not an executable file")
    launcher = Launcher(args.python, args.work.absolute(), args.device, args.ranks, args.threads)
    failures = []
    for one in experiment.runs(args, launcher):
        setting = {"experiment": experiment.name, **one.setting}
        if newest_match(stored, setting):
            continue
        print(f"{experiment.name}: {one.name}", file=sys.stderr, flush=True)
        try:
            yield setting | one.measure()
        except TrainingError as error:
            failures.append(f"{one.name} {error}")
    if failures:
        raise WrongResultError("; ".join(failures))


def _chosen(args: Namespace, option: str, names: tuple[str, ...]) -> list[str]:
    chosen = getattr(args, option) or list(names)
    if unknown := [name for name in chosen if name not in names]:
        toy = " with --toy" if args.toy and option == "sizes" else ""
        raise ValueError(f"--{option} {unknown[0]}: must be one of {', '.join(names)}{toy}")
    return chosen


def _by_experiment(rows: list[Row]) -> dict[str, list[Row]]:
    return {
        name: some for name in EXPERIMENTS if (some := [row for row in rows if row["experiment"] == name])
    }


def table(rows: list[Row]) -> str:
    return "\n\n".join(EXPERIMENTS[name].table(some) for name, some in _by_experiment(rows).items())


def plot(rows: list[Row], directory: Path) -> list[Path]:
    return [
        path
        for name, some in _by_experiment(rows).items()
        for path in EXPERIMENTS[name].plot(some, directory)
    ]


BENCHMARK = Benchmark(
    name="quality",
    help="quality of models trained with S2 attention beside dense ones",
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
    portable=True,
)
