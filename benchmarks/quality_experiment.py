"""The interface between the quality benchmark and its experiments."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.benchmark import Row
from benchmarks.quality_training import Launcher


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Args:
        name: what it is, such as `4M s2 seed 1`; unique in its experiment.
        setting: what a stored row must have in common with a new one to be used in its place.
        measure: trains and evaluates, going on where an interrupted call stopped; returns the rest of the
            row.
    """

    name: str
    setting: Row
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Experiment:
    """One of the experiments.

    Args:
        name: first argument of the command.
        help: one line that says what it shows.
        sizes, toy_sizes: names of the sizes, without and with `--toy`.
        variants: names of the variants.
        cpu_ranks: processes of a training on a CPU by default; each of several has the model and runs on one
            thread or more.
        runs: `runs(args, launcher)` yields the runs in their order. `args` has `sizes`, `variants`, `seeds`
            (None for the defaults of each size), `dtype` and `toy`.
        table: formats the experiment's rows as text.
        plot: draws the experiment's rows into a directory and returns the paths of the pictures.
    """

    name: str
    help: str
    sizes: tuple[str, ...]
    toy_sizes: tuple[str, ...]
    variants: tuple[str, ...]
    cpu_ranks: int
    runs: Callable[[Namespace, Launcher], Iterator[Run]]
    table: Callable[[list[Row]], str]
    plot: Callable[[list[Row], Path], list[Path]]
