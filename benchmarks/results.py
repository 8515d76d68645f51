"""Result rows on disk: `<directory>/<machine>/<benchmark>-<time>.jsonl`, one file per run, a row per line."""

import json
import re
from pathlib import Path

from benchmarks.benchmark import Row


class ResultFile:
    """The rows of one run, each on disk as soon as it is there; made with the first row."""

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
    """All rows of a benchmark by machine directory, oldest run first.

    A line without its end is what a run that was killed had begun, and no row.
    """
    rows: dict[Path, list[Row]] = {}
    for path in sorted(directory.glob(f"*/{benchmark}-*.jsonl")):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        rows.setdefault(path.parent, []).extend(json.loads(line) for line in lines)
    return rows
