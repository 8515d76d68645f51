"""Times are taken in turns, memory is counted above the inputs."""

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


def allocate_64_mib(inputs_mib: int):
    inputs = bytearray(inputs_mib << 20)
    return lambda: [len(inputs), b"x" * (64 << 20)]


def test_peak_memory_is_counted_above_the_inputs(bench):
    from benchmarks.measure import peak_memory

    peak = peak_memory(allocate_64_mib, 200)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 60 << 20 < peak < 70 << 20


@pytest.mark.gpu
def test_on_a_gpu_times_and_memory_are_those_of_the_device(bench):
    import torch

    from benchmarks.measure import cuda_peak_memory, cuda_times

    x = torch.ones(1 << 24, device="cuda")
    seconds = cuda_times(lambda: x + x, repeats=7)
    assert len(seconds) >= 7 and 1e-6 < np.median(seconds) < 1e-1
    assert cuda_peak_memory(lambda: x + x) == x.nbytes
