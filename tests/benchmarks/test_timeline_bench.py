"""The timeline benchmark: a row holds both timelines of the traced step, the picture is made from it."""

import json
from types import SimpleNamespace

import pytest

TOY = ["timeline", "--device", "cpu", "--threads", "1", "--hidden-size", "64", "--num-layers", "1"]


@pytest.fixture
def timeline(bench):
    from benchmarks import offload_timeline

    return offload_timeline


def test_a_row_holds_both_timelines_and_draws_them(bench, timeline, monkeypatch, tmp_path, capsys):
    from megatron_s2.offload.trace import Event, write_trace

    steps = []

    def train(flags, warm_up, repeats, device, threads, time_optimizer):
        steps.append(warm_up + repeats)
        slow = [Event("d2h", "gradients 0", 0.0, 0.1), Event("cpu", "update 0", 0.1, 0.4)]
        quick = [Event("cpu", "update 0", 0.1, 0.3)]
        path = flags[flags.index("--s2-offload-trace") + 1]
        write_trace(path, {"predicted": quick, "measured": slow})
        return SimpleNamespace(status=0)

    monkeypatch.setattr(timeline, "train", train)
    options = [*TOY, "--out", str(tmp_path)]
    assert bench.main(options) == bench.main(options) == 0
    assert steps == [4], "the traced step is the last; what is stored is not measured again"
    (path,) = tmp_path.glob("*/timeline-*.jsonl")
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["seconds"] == pytest.approx({"predicted": 0.2, "measured": 0.3}), "without the flush"
    assert row["timelines"]["measured"][0] == ["d2h", "gradients 0", 0.0, 0.1]
    assert not any("trace" in word for word in row["flags"])
    assert "update 200.0 ms predicted, 300.0 ms measured, 1.50 of the prediction" in capsys.readouterr().out
    assert bench.main(["plot", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("timeline.png")


def test_a_training_that_fails_has_no_row(bench, timeline, monkeypatch, tmp_path, capsys):
    failed = SimpleNamespace(status=2, failure="error: no room")
    monkeypatch.setattr(timeline, "train", lambda *given, **more: failed)
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: ended with status 2: error: no room\n"
    assert not list(tmp_path.iterdir())
