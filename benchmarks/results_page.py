"""docs/results.md from the stored rows: targets on a GPU, what was measured, what bounds it.

`python -m benchmarks.results_page` writes it.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from benchmarks.benchmark import Row
from benchmarks.environment import ROOT
from benchmarks.registry import BENCHMARKS
from benchmarks.results import read_all_rows, read_rows
from benchmarks.targets import TARGETS, Rows
from megatron_s2.data.output import check_file_writable
from megatron_s2.errors import InputError

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
RECORD = "record.tsv"  # written by scripts/gpu_record.sh into a machine's directory, a line per stage
_INTRO = """\
# Measured results

Written by `python -m benchmarks.results_page` from the rows in [benchmarks/results]({results}); nothing here
is an estimate. `bash scripts/gpu_record.sh` measures on a GPU and rewrites this page.

## Targets on one GPU (H200 class)

The bound is what the ratio would be at equal efficiency, by formula: the exact FLOPs of dense over ours (of a
step with all products and recomputation), for decoding the bytes of the full cache over those of ours.
"""
_NO_GPU = "**No GPU has been measured yet**: there are no rows of one.\n"


def page(results: Path, link: str) -> str:
    """Returns the page, made of the rows in a directory and nothing else.

    Args:
        link: path of the directory in the page's links.
    """
    machines: dict[str, Rows] = {}
    portable = [name for name, benchmark in BENCHMARKS.items() if benchmark.portable]
    for name in (name for name in BENCHMARKS if name not in portable):
        for machine, rows in read_rows(results, name).items():
            machines.setdefault(machine.name, {})[name] = rows
    gpus = {name: rows for name, rows in machines.items() if _gpu(rows)}
    parts = [_INTRO.format(results=link)]
    parts += [f"### {_gpu(rows)}\n\n{_targets(rows)}" for rows in gpus.values()] or [_NO_GPU, _targets({})]
    for name in (*gpus, *sorted(machines.keys() - gpus.keys())):
        parts += _machine(results / name, machines[name])
        pictures = sorted((results / name).glob("*.png"))
        parts += [f"![{picture.stem}]({link}/{name}/{picture.name})\n" for picture in pictures]
    for name in portable:
        if rows := read_all_rows(results, name):
            parts += _portable(name, rows)
            pictures = sorted(results.glob(f"{name}-*.png"))
            parts += [f"![{picture.stem}]({link}/{picture.name})\n" for picture in pictures]
    return "\n".join(parts).rstrip() + "\n"


def _gpu(rows: Rows) -> str | None:
    """Returns the name of the GPU on which some rows were measured, if any were."""
    return next((row["machine"].get("gpu") for benchmark in rows.values() for row in benchmark), None)


def _targets(rows: Rows) -> str:
    lines = ["| target | measured, where weakest | bound | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(target.line(rows) for target in TARGETS)]) + "\n"


def _machine(directory: Path, rows: Rows) -> list[str]:
    """Returns the section of a machine: versions, and the tables of its rows."""
    name, machine = directory.name, next(iter(rows.values()))[0]["machine"]
    kind = _gpu(rows) or (
        f"{machine['cpu']}, {machine['cores']} cores. No GPU: these rows say nothing about one."
    )
    tables = {
        benchmark: BENCHMARKS[benchmark].table(of_benchmark) for benchmark, of_benchmark in rows.items()
    }
    if (directory / RECORD).exists():
        tables["record"] = _record_table(directory / RECORD)
    sections = [
        f"### {benchmark}, on {name}\n\n```text\n{table}\n```\n" for benchmark, table in tables.items()
    ]
    return [f"## {name}\n", f"{kind}\n", _versions(rows), *sections]


def _portable(name: str, rows: list[Row]) -> list[str]:
    """Returns the section of a benchmark whose rows hold for all machines."""
    by_machine: Rows = {}
    for row in rows:
        by_machine.setdefault(f"{name}, on {row['machine']['name']}", []).append(row)
    table = f"```text\n{BENCHMARKS[name].table(rows)}\n```\n"
    return [f"## {name}, on all machines\n", _versions(by_machine), table]


def _versions(rows: Rows) -> str:
    """Returns a line for each set of package versions and commit that rows were measured with."""
    benchmarks: dict[str, list[str]] = {}
    for name, row in ((name, row) for name, of_benchmark in rows.items() for row in of_benchmark):
        versions = (f"{package} {version}" for package, version in row["versions"].items() if version)
        commit, dirty = row["commit"]["hash"], row["commit"]["dirty"]
        text = f"commit {commit[:9] if commit else 'unknown'}{' and changes' if dirty else ''}"
        benchmarks.setdefault(f"{', '.join(versions)}; {text}", []).append(name)
    return "".join(f"- {', '.join(dict.fromkeys(names))}: {text}\n" for text, names in benchmarks.items())


def _record_table(path: Path) -> str:
    """Returns the last result of each stage of the record."""
    newest = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        _date, _setting, stage, _command, result, seconds, _limit, reason = line.split("\t")
        newest[stage] = f"{stage:<20} {result:<13} {seconds:>7} s  {reason}".rstrip()
    return "\n".join(newest.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: docs/results.md)")
    args = parser.parse_args(argv)
    try:
        check_file_writable("--page", args.page)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    link = os.path.relpath(args.results, args.page.parent)
    args.page.write_text(page(args.results, link), encoding="utf-8")
    print(args.page)


if __name__ == "__main__":
    main()
