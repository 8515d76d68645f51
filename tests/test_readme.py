"""The README's numbers are those of stored benchmark rows, and the rows meet what the project promises."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
README = (ROOT / "README.md").read_text()


def stored(implementation: str, seq_length: int, which: str) -> dict:
    """The last stored row of a case; batch 1."""
    rows = [json.loads(line) for file in sorted(RESULTS.glob("attention-*.jsonl")) for line in file.open()]
    return [
        row
        for row in rows
        if (row["implementation"], row["seq_length"], row["pass"]) == (implementation, seq_length, which)
        and row["batch"] == 1
    ][-1]


def milliseconds(row: dict) -> float:
    return row["seconds"]["median"] * 1000


def test_each_measured_row_is_a_stored_one():
    table = re.findall(
        r"^\| (\d+) \| (forward[ +a-z]*) \| (.*?) \| (.*?) \| (.*?) \| (.*?)x \|$", README, re.M
    )
    assert len(table) == 4
    for tokens, which, ours, dense, speedup, bound in table:
        which = which.replace(" ", "")
        row = stored("s2-torch", int(tokens), which)
        assert ours == f"{milliseconds(row):.1f} ms"
        assert bound == f"{row['speedup_bound']:.1f}"
        if dense == "not measured":
            continue
        other = stored("sdpa", int(tokens), which)
        assert dense == f"{milliseconds(other):.1f} ms"
        assert speedup == f"{milliseconds(other) / milliseconds(row):.1f}x"


def test_the_torch_backend_is_four_times_faster_than_dense_attention_in_a_fifth_more_memory():
    ours, dense = (stored(name, 16384, "forward+backward") for name in ("s2-torch", "sdpa"))
    assert (ours["heads"], ours["kv_heads"], ours["head_dim"]) == (8, 2, 64)
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
