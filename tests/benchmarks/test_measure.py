"""Times are taken in turns, memory is counted above the inputs."""

from types import SimpleNamespace

import numpy as np
import pytest


def test_functions_take_turns_after_a_call_that_does_not_count(bench):
    from benchmarks.measure import interleaved_times

    calls = []

    def stages(name):
        calls.append(name)
        yield
        yield

    times = interleaved_times({"a": lambda: stages("a"), "b": lambda: stages("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert {name: seconds.shape for name, seconds in times.items()} == {"a": (2, 2), "b": (2, 2)}
    assert all((np.diff(seconds) >= 0).all() for seconds in times.values())


def test_the_work_of_others_is_counted_and_ones_own_is_not(bench, monkeypatch, tmp_path):
    from benchmarks import measure

    ticks, stat = measure.os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr(measure.time, "perf_counter", iter([0.0, 10.0]).__next__)
    names = ("user", "system", "children_user", "children_system")
    own = iter([SimpleNamespace(**dict(zip(names, x))) for x in ((1.0, 1.0, 0.0, 0.0), (5.0, 2.0, 2.0, 1.0))])
    monkeypatch.setattr(measure.os, "times", own.__next__)
    stat.write_text(f"cpu {2 * ticks} 0 0 {50 * ticks} 0 0 0 0 0 0\ncpu0 1\n")
    with measure.OtherLoad() as load:  # 15 seconds more of user and system, 8 of them one's own, in 10
        stat.write_text(f"cpu {14 * ticks} 0 {3 * ticks} {99 * ticks} {9 * ticks} 0 0 0 0 0\ncpu0 1\n")
    assert (load.cpus(), load.cpus(own_seconds=3.0)) == (0.7, 0.4)


def test_a_system_that_does_not_tell_how_busy_it_is(bench, monkeypatch, tmp_path):
    from benchmarks import measure

    monkeypatch.setattr(measure, "_STAT", tmp_path / "absent")
    with measure.OtherLoad() as load:
        pass
    assert load.cpus(1.0) is None


def allocate_64_mib(inputs_mib: int):
    inputs = bytearray(inputs_mib << 20)
    return lambda: [len(inputs), b"x" * (64 << 20)]


def test_peak_memory_is_counted_above_the_inputs(bench):
    from benchmarks.measure import peak_memory

    peak = peak_memory(allocate_64_mib, 200)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 60 << 20 < peak < 70 << 20


def test_long_runs_on_a_gpu_are_few_and_timed_by_the_wall(bench, monkeypatch):
    from benchmarks import measure

    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "_LONG", 0.0)
    runs = []
    assert len(measure.cuda_times(lambda: runs.append(1), repeats=7)) == len(runs) == 3
    assert len(measure.cuda_times(lambda: runs.append(1), repeats=1)) == 1


@pytest.mark.gpu
def test_on_a_gpu_times_and_memory_are_those_of_the_device(bench):
    import torch

    from benchmarks.measure import cuda_peak_memory, cuda_times

    x = torch.ones(1 << 24, device="cuda")
    seconds = cuda_times(lambda: x + x, repeats=7)
    assert len(seconds) >= 7 and 1e-6 < np.median(seconds) < 1e-1
    assert cuda_peak_memory(lambda: x + x) == x.nbytes
