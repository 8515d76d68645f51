"""Result rows on disk: `<directory>/<machine>/<benchmark>-<time>.jsonl`, a file per run, a row per line."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.benchmark import Row


class ResultFile:
    """The file of one run; `facts` go into every row. It is created with the first row, and each row is on
    disk once `append` returns."""

    def __init__(self, directory: Path, benchmark: str, facts: dict):
        self.facts = {"benchmark": benchmark, **facts}
        time = re.sub(r"[^0-9T]", "", facts["date"].removesuffix("+00:00"))
        self.path = directory / facts["machine"]["name"] / f"{benchmark}-{time}.jsonl"

    def append(self, row: Row) -> Row:
        """Stores a row and returns it as it is stored."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**self.facts, **row})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return json.loads(line)


def read_rows(directory: Path, benchmark: str) -> dict[Path, list[Row]]:
    """Reads all rows of a benchmark, by directory of the machine, oldest run first.

    A last line without a newline was cut off when its run was killed; it is left out.
    """
    rows: dict[Path, list[Row]] = {}
    for path in sorted(directory.glob(f"*/{benchmark}-*.jsonl")):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        rows.setdefault(path.parent, []).extend(json.loads(line) for line in lines)
    return rows


def read_all_rows(directory: Path, benchmark: str) -> list[Row]:
    """Reads all rows of a benchmark, of whatever machine, oldest first."""
    rows = [row for some in read_rows(directory, benchmark).values() for row in some]
    return sorted(rows, key=lambda row: row["date"])


def newest_match(rows: Iterable[Row], setting: Row) -> Row | None:
    """Returns the last row that has all items of `setting`, or None."""
    return next((row for row in reversed(list(rows)) if setting.items() <= row.items()), None)
