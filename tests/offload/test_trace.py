"""Timelines: what was busy, the Chrome-trace file there and back, and the pictures made of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from megatron_s2.offload.trace import Event, bottleneck, busy_shares, read_trace, shifted, span, write_trace

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_trace.py"
PREDICTED = [
    Event("cpu", "update 0", 0.0, 0.002),
    Event("h2d", "weights 0", 0.002, 0.0025),
    Event("cpu", "update 1", 0.002, 0.004),
]
MEASURED = [Event("cpu", "update 0", 0.0, 0.0031234567), Event("nvme_read", "state 1", 0.001, 0.0095)]


def test_the_busiest_queue_is_named_and_overlaps_count_once():
    events = [
        Event("h2d", "state 0", 1.0, 2.0),
        Event("h2d", "state 1", 1.5, 2.5),
        Event("h2d", "state 2", 1.6, 1.7),
        Event("gpu", "update 0", 2.5, 3.0),
    ]
    assert span(events) == 2.0
    assert busy_shares(events) == {"h2d": 0.75, "gpu": 0.25}
    assert bottleneck(events) == "host to GPU is busiest, 75% of 2 s"


def test_nothing_has_no_bottleneck():
    assert span([]) == 0 and busy_shares([]) == {}
    with pytest.raises(ValueError, match="without events"):
        bottleneck([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("tpu", "update 0", 0, 1), "queue tpu: must be one of h2d, d2h, cpu, gpu, nvme_read, nvme_write"),
        (("cpu", "update 0", 2, 1), "event update 0: ends at 1, before its start at 2"),
    ],
)
def test_an_event_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Event(*fields)


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, {"predicted": PREDICTED, "measured": MEASURED, "empty": []})
    back = read_trace(path)
    assert list(back) == ["predicted", "measured", "empty"]
    assert back["empty"] == []
    for name, events in (("predicted", PREDICTED), ("measured", MEASURED)):
        assert [(e.queue, e.name) for e in back[name]] == [(e.queue, e.name) for e in events]
        times = [time for e in back[name] for time in (e.start, e.end)]
        assert times == pytest.approx([time for e in events for time in (e.start, e.end)], abs=1e-9)


def test_the_file_is_what_perfetto_reads(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, {"predicted": PREDICTED, "measured": MEASURED})
    rows = json.loads(path.read_text())["traceEvents"]
    named = {(row["pid"], row["args"]["name"]) for row in rows if row["name"] == "process_name"}
    assert named == {(0, "predicted"), (1, "measured")}
    threads = {(row["pid"], row["tid"]): row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    complete = [row for row in rows if row["ph"] == "X"]
    assert {row["ph"] for row in rows} == {"M", "X"}
    assert [(threads[row["pid"], row["tid"]], row["ts"], row["dur"]) for row in complete] == [
        ("cpu", 0, 2000),
        ("h2d", 2000, 500),
        ("cpu", 2000, 2000),
        ("cpu", 0, 3123.457),
        ("nvme_read", 1000, 8500),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"traceEvents": 5}',
        '{"traceEvents": [{"name": "update 0", "ph": "X", "pid": 0, "tid": 2, "ts": 0, "dur": 1}]}',
        '{"traceEvents": [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "a"}}, '
        '{"name": "update 0", "ph": "X", "pid": 0, "tid": 17, "ts": 0, "dur": 1}]}',
    ],
    ids=["empty", "a list", "no rows", "no process", "no such queue"],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}: is not a trace of an optimizer step"):
        read_trace(path)


def bars(axes) -> list[list[tuple[float, float]]]:
    """Start and end of the bars of each row, from the top."""
    rows = {}
    for collection in axes.collections:
        for bar in collection.get_paths():
            (left, bottom), (right, top) = bar.get_extents().get_points()
            rows.setdefault(round((bottom + top) / 2), []).append((left, right))
    return [sorted(rows[row]) for row in sorted(rows)]


def test_the_picture_has_a_panel_for_each_timeline_and_a_row_for_each_queue():
    pytest.importorskip("matplotlib")
    from megatron_s2.report.offload_timeline import timelines_figure

    figure = timelines_figure({"predicted": PREDICTED, "measured": MEASURED}, captions={"measured": "slow"})
    predicted, measured = figure.axes
    assert [label.get_text() for label in predicted.get_yticklabels()] == ["host to GPU", "CPU"]
    assert [label.get_text() for label in measured.get_yticklabels()] == ["CPU", "NVMe read"]
    h2d, cpu = bars(predicted)
    assert h2d == [pytest.approx((0.002, 0.0025))]
    assert cpu == [pytest.approx((0.0, 0.002)), pytest.approx((0.002, 0.004))]
    assert predicted.get_title(loc="left") == "predicted: CPU is busiest, 100% of 0.004 s"
    assert measured.get_title(loc="left") == "measured: slow"
    assert predicted.get_xlim() == measured.get_xlim() == (0, 0.0095)


def test_bars_too_narrow_to_tell_apart_are_joined_where_they_touch():
    pytest.importorskip("matplotlib")
    from megatron_s2.report.offload_timeline import timelines_figure

    touching = [Event("cpu", f"update {n}", n * 1e-3, (n + 1) * 1e-3) for n in range(1000)]
    apart = [Event("gpu", f"update {n}", n * 1e-3, (n + 0.5) * 1e-3) for n in range(1000)]
    cpu, gpu = bars(timelines_figure({"predicted": touching + apart}).axes[0])
    assert cpu == [pytest.approx((0, 1))]
    assert len(gpu) == 1000


def plot_trace(*argv):
    spec = importlib.util.spec_from_file_location("plot_trace", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(map(str, argv)))


def test_plot_trace_draws_and_names_the_bottleneck(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_trace(tmp_path / "trace.json", {"predicted": PREDICTED, "measured": MEASURED})
    plot_trace(tmp_path / "trace.json", "--output", tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert capsys.readouterr().out.splitlines() == [
        "predicted: CPU is busiest, 100% of 0.004 s",
        "measured: NVMe read is busiest, 89% of 0.0095 s",
    ]


@pytest.mark.parametrize(
    ("trace", "output", "message"),
    [
        ("missing.json", "a.png", "[Errno 2] No such file or directory: 'missing.json'"),
        ("trace.json", "a.gif", "--output a.gif: must end in .png or .svg"),
        ("empty.json", "a.png", "there are no events to draw"),
    ],
)
def test_plot_trace_ends_in_one_line(tmp_path, monkeypatch, capsys, trace, output, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_trace("trace.json", {"predicted": PREDICTED})
    write_trace("empty.json", {})
    with pytest.raises(SystemExit) as ended:
        plot_trace(trace, "--output", output)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_plan_model_simulator_and_trace_import_nothing_heavy():
    program = (
        "import sys, megatron_s2.offload.simulator\n"
        "import megatron_s2.report.offload_timeline\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "[]\n", done.stderr


def test_the_bottleneck_is_that_of_the_update():
    """Gradients may have left long before, beside backward."""
    events = [
        Event("gpu", "backward", 0.0, 9.0),
        Event("d2h", "gradients 1", 1.0, 9.5),
        Event("cpu", "update 1", 10.0, 11.0),
        Event("h2d", "weights 1", 11.0, 12.0),
        Event("cpu", "update 2", 11.0, 12.0),
    ]
    assert bottleneck(events) == "CPU is busiest, 100% of 2 s"
    assert bottleneck(shifted(events, 5.0)) == bottleneck(events)
    assert bottleneck(events[:2]) == "GPU is busiest, 95% of 9.5 s"
