"""The benchmark of patterns: a row for each, dense first; texts and needles are the same for all."""

import pytest
from conftest import rows_in
from tiny_model import DATA, make_tiny_model

from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file

KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "patterns_code", "model", "layers", "kv_heads"),
    *("dtype", "data", "seq_length", "texts", "kinds", "pattern", "pattern_hash"),
    *("kv", "flops", "loss", "over_dense", "needles", "seconds"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("patterns")
    make_tiny_model(directory)
    (directory / "files").mkdir()
    settings = S2Settings(2, 2, block_size=16, local_blocks=2, vert_stride=0, sink_blocks=1)
    write_pattern_file(directory / "files" / "calibrated-a.json", settings)
    return directory


def test_rows_tables_and_pictures(bench, directory, tmp_path, capsys):
    words = f"patterns --hf {directory / 'model'} --data-path {directory / DATA} --seq-length 256 --texts 2"
    words += (
        f" --kinds code --pattern-files {directory / 'files'} --threads 1 --dtype float32 --out {tmp_path}"
    )
    words = [*words.split(), "--only", "uniform w2 v32 s1", "calibrated-a"]
    assert bench.main(words) == 0
    rows = rows_in(tmp_path)
    assert [row["pattern"] for row in rows] == ["dense", "uniform w2 v32 s1", "calibrated-a"]
    for row in rows:
        assert row.keys() == KEYS
        assert row["over_dense"] == pytest.approx(row["loss"] - rows[0]["loss"])
        assert [needle["depth"] for needle in row["needles"]] == pytest.approx(
            [n / 10 + 0.05 for n in range(10)]
        )
    assert rows[0]["kv"] == 1 and rows[2]["kv"] == pytest.approx(3 / 16)
    printed = capsys.readouterr().out
    assert "codes found" in printed and "calibrated-a" in printed
    assert bench.main(words) == 0
    assert len(rows_in(tmp_path)) == 3 and "nothing new" in capsys.readouterr().out
    assert bench.main(["plot", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*/patterns.png"))) == 1


def test_an_unknown_pattern_is_refused(bench, directory, tmp_path, capsys):
    words = ["patterns", "--hf", str(directory / "model"), "--data-path", str(directory / DATA)]
    words += ["--out", str(tmp_path), "--only", "best", "--pattern-files", str(directory / "files")]
    assert bench.main(words) == 2
    assert capsys.readouterr().err.startswith("error: --only best: must be one of dense, uniform w8 v16 s0,")
