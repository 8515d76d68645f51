"""The README's numbers are those of stored benchmark rows, and the rows meet what the project promises."""

import json
import re
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
README = (ROOT / "README.md").read_text()


CASE = {"batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
COLUMNS = ("s2-torch", "sdpa", "flex")


def rows_of(implementation: str, seq_length: int, which: str, busy_loops: int = 0, **others) -> list[dict]:
    """All stored rows of an implementation at the README's case, oldest first."""
    rows = [json.loads(line) for file in sorted(RESULTS.glob("attention-*.jsonl")) for line in file.open()]
    asked = {"implementation": implementation, "seq_length": seq_length, "pass": which, **CASE, **others}
    return [row for row in rows if asked.items() <= row.items() and row.get("busy_loops", 0) == busy_loops]


def stored(implementation: str, seq_length: int, which: str, **others) -> dict:
    """The last that was measured."""
    return [row for row in rows_of(implementation, seq_length, which, **others) if row["seconds"]][-1]


def milliseconds(row: dict) -> float:
    return row["seconds"]["median"] * 1000


def test_each_measured_row_is_a_stored_one():
    table = re.findall(
        r"^\| (\d+) \| (forward[ +a-z]*) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?)x \|$", README, re.M
    )
    assert len(table) == 5
    for tokens, which, *times, speedup, bound in table:
        case, dates, medians = (int(tokens), which.replace(" ", "")), set(), {}
        for name, told in zip(COLUMNS, times):
            if told == "no backward":
                assert rows_of(name, *case)[-1]["not_measured"] == "no backward on cpu"
            elif told != "not measured":
                row = stored(name, *case)
                assert told == f"{milliseconds(row):.1f} ms"
                medians[name] = milliseconds(row)
                dates.add(row["date"])
        assert len(dates) == 1, "the times of a line are those of one run, taken in turns"
        assert bound == f"{stored('s2-torch', *case)['speedup_bound']:.1f}"
        dense = medians.get("sdpa")
        assert speedup == (f"{dense / medians['s2-torch']:.1f}x" if dense else "not measured")


def test_each_speedup_beside_busy_loops_is_of_stored_rows():
    table = re.findall(r"^\| (\d+) \|((?: [\w. ]+x? \|){5})$", README, re.M)
    assert len(table) == 4
    for tokens, cells in table:
        *told, bound = [cell.strip() for cell in cells.split("|")[:-1]]
        rows = []
        for cell, (dtype, busy) in zip(told, product(("float32", "bfloat16"), (0, 2)), strict=True):
            if cell != "not measured":
                asked = {"dtype": dtype, "busy_loops": busy}
                ours, dense = (
                    stored(name, int(tokens), "forward+backward", **asked) for name in ("s2-torch", "sdpa")
                )
                assert cell == f"{milliseconds(dense) / milliseconds(ours):.1f}x"
                rows.append(ours)
        assert {f"{row['speedup_bound']:.1f}x" for row in rows} == {bound}


def test_what_others_did_meanwhile_is_told_where_it_was_recorded():
    told = dict(re.findall(r"(\d+) tokens: (\d+\.\d+) cores", README))
    rows = {tokens: stored("s2-torch", tokens, "forward+backward") for tokens in (4096, 16384, 65536)}
    recorded = {str(tokens): str(row["other_cpus"]) for tokens, row in rows.items() if "other_cpus" in row}
    assert told == recorded and recorded
    assert not any(row["commit"]["dirty"] for row in rows.values())


def test_nothing_is_claimed_of_a_gpu_without_a_row():
    on_gpu = [row for row in README.splitlines() if row.startswith("| ") and "head_dim 128" in row]
    assert len(on_gpu) == 2 and all(row.count("not measured") == 5 for row in on_gpu)
    files = (ROOT / "benchmarks" / "results").glob("*/attention-*.jsonl")
    rows = [json.loads(line) for file in files for line in file.open()]
    measured = any(row["seconds"] for row in rows if row.get("device") == "cuda")
    assert not measured, "there are rows of a GPU now: the README must say what they say"


def test_the_torch_backend_is_four_times_faster_than_dense_attention_in_a_fifth_more_memory():
    ours, dense = (stored(name, 16384, "forward+backward") for name in ("s2-torch", "sdpa"))
    assert (ours["pattern"]["block_size"], ours["pattern"]["local_blocks"]) == (64, 8)
    assert set(ours["pattern"]["vert_stride"]) == {16}
    assert milliseconds(dense) / milliseconds(ours) >= 4
    peaks = [row["input_bytes"] + row["peak_bytes_above_inputs"] for row in (ours, dense)]
    assert peaks[0] <= 1.2 * peaks[1]
    assert f"{peaks[0] / 2**20:.0f} MiB, dense {peaks[1] / 2**20:.0f} MiB" in README


def test_the_quickstart_takes_what_its_stored_run_took():
    row = json.loads(sorted(RESULTS.glob("quickstart-*.jsonl"))[-1].read_text())
    assert f"takes {row['seconds']:.0f} s on two CPU cores" in README


def test_what_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
