"""The host-time benchmark: a row for each number of documents, measured once, without a GPU."""

from conftest import rows_in


def test_rows_hold_the_time_of_unpacked_and_packed_layers(bench, tmp_path, monkeypatch, capsys):
    from benchmarks import host_time

    monkeypatch.setattr(host_time, "TOKENS", 4096)
    options = ["host-time", "--repeats", "3", "--threads", "1", "--out", str(tmp_path)]
    assert bench.main(options) == bench.main(options) == 0
    rows = rows_in(tmp_path)
    assert [row["documents"] for row in rows] == [1, 64, 512]
    assert all(row["seconds"]["repeats"] == 3 and row["seconds"]["median"] > 0 for row in rows)
    assert "4096 tokens, 512 documents: " in capsys.readouterr().out
