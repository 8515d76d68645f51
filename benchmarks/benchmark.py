"""What the runner needs to know about a benchmark."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Row = dict
WRONG = "wrong: "  # begins `not_measured` of a row where what the project answers for is wrong or fails


class WrongResultError(Exception):
    """What was to be measured computes something else than it claims; says what and by how much."""


def is_wrong(row: Row) -> bool:
    return (row.get("not_measured") or "").startswith(WRONG)


def require_none_wrong(rows: Iterable[Row]) -> None:
    """To be called when all is measured.

    Raises:
        WrongResultError: with what the rows say that are wrong.
    """
    if said := [row["not_measured"] for row in rows if is_wrong(row)]:
        raise WrongResultError("; ".join(dict.fromkeys(said)))


@dataclass(frozen=True)
class Benchmark:
    """One entry of the registry.

    Args:
        name: subcommand of the runner and first part of the names of its result files.
        help: what is measured, in a line.
        add_arguments: adds the benchmark's own options.
        run: `run(args, stored)` measures, giving each row when it is complete; `stored` are rows that earlier
            runs of the same code on the same machine left. What is wrong gets a row without times that says
            so, and WrongResultError is raised when all else is measured; ValueError for options that do not
            fit together.
        table: rows as text for people.
        plot: draws the rows of one machine into a directory and returns the pictures' paths.
        takes_device: `args.device` says where to measure, `cpu` or `cuda`.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, list[Row]], Iterator[Row]]
    table: Callable[[list[Row]], str]
    plot: Callable[[list[Row], Path], list[Path]]
    takes_device: bool = False
