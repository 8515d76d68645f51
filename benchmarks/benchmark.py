"""The interface between benchmarks and their runner, `scripts/bench.py`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Row = dict
WRONG = "wrong: "  # prefix of `not_measured` in a row whose code, the project's own, is wrong or fails


class WrongResultError(Exception):
    """A function computes something else than it claims; the message says which, and by how much."""


def is_wrong(row: Row) -> bool:
    return (row.get("not_measured") or "").startswith(WRONG)


def require_none_wrong(rows: Iterable[Row]) -> None:
    """Raises WrongResultError, with all reasons, if some rows of a run are wrong."""
    if reasons := [row["not_measured"] for row in rows if is_wrong(row)]:
        raise WrongResultError("; ".join(dict.fromkeys(reasons)))


def _draw_nothing(rows: list[Row], directory: Path) -> list[Path]:
    return []


@dataclass(frozen=True)
class Benchmark:
    """One subcommand of the runner.

    Args:
        name: name of the subcommand and first part of the names of its result files.
        help: one line that says what is measured.
        add_arguments: adds the benchmark's options to a parser.
        run: `run(args, stored)` measures and yields each row as soon as it is complete. `stored` holds the
            rows that earlier runs of the same code left on the same machine. A wrong result becomes a row
            without times, and WrongResultError is raised after everything else is measured; ValueError is
            raised for options that are out of range or do not fit together.
        table: formats rows as text.
        plot: draws the rows of one machine into a directory and returns the paths of the pictures.
        takes_device: whether the subcommand has `--device`; if so, `args.device` is `cpu` or `cuda`.
        portable: whether results hold for other machines and other code, too: then `stored` has the rows of
            all of them, `plot` draws them together, and the results page has one section for them.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, list[Row]], Iterator[Row]]
    table: Callable[[list[Row]], str]
    plot: Callable[[list[Row], Path], list[Path]] = _draw_nothing
    takes_device: bool = True
    portable: bool = False
