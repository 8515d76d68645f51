"""The quickstart's command line; what it does is measured by `scripts/bench.py quickstart` and stored."""

import json
import subprocess
from pathlib import Path

import pytest
from waiting import PATIENCE

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"


def quickstart(*words, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "--steps 0": "--steps 0: must be a whole number >= 1",
        "--steps many": "--steps many: must be a whole number >= 1",
        "--steps": "--steps: needs a value",
        "--data /nowhere": "--data /nowhere: does not exist",
        "--fast": "--fast: must be --steps, --out or --data",
    }.items(),
)
def test_bad_flags_are_refused_in_one_line(words, message, tmp_path):
    done = quickstart(*words.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_a_directory_with_the_users_own_files_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    done = quickstart("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --out {tmp_path}: must be a new or empty directory, or that of an earlier quickstart\n"
    )
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_help_shows_the_options():
    done = quickstart("--help")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--steps N", "--out DIR", "--data DIR_OR_JSONL"))


def test_the_stored_run_took_less_than_six_minutes_and_learnt_two_nats():
    row = json.loads(sorted(RESULTS.glob("quickstart-*.jsonl"))[-1].read_text().splitlines()[-1])
    assert row["machine"]["cores"] == 2
    assert row["steps"] == 165
    assert row["seconds"] < 360
    assert row["untrained_loss"] - row["validation_loss"] >= 2.0
