"""Rates are measured all at once, kept in a cache file per hardware, and measured again when steps drift."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import pytest
from waiting import PATIENCE

from megatron_s2.offload import rates
from megatron_s2.offload.model import Rates
from megatron_s2.offload.node import Node
from megatron_s2.offload.rates import Hardware, cached_rates, drifted, measure_rates, slowest

HARDWARE = Hardware(cpu="a CPU", cores=8, gpu=None, torch="2.15", threads=4, local_world_size=1)
ALONE = Node.detect()
RATES = Rates(cpu=1e9, gpu=2e9, h2d=3e9, d2h=4e9)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of cache files, which does not exist yet."""
    monkeypatch.setenv("MEGATRON_S2_CACHE", str(tmp_path / "made" / "for it"))
    return tmp_path / "made" / "for it"


@pytest.fixture
def calls(monkeypatch):
    """The numbers of threads that a stand-in for the measurement was called with."""
    calls = []

    def measure(threads, ready):
        ready()
        calls.append(threads)
        return replace(RATES, cpu=len(calls) * 1e9)

    monkeypatch.setattr(rates, "measure_rates", measure)
    return calls


def test_rates_are_positive_and_take_the_time_they_are_given():
    import torch

    before = torch.get_num_threads()
    began = time.perf_counter()
    measured = measure_rates(threads=1, seconds=0.1, elements=2**16)
    passed = time.perf_counter() - began
    assert all(1e5 < getattr(measured, name) < math.inf for name in ("cpu", "gpu", "h2d", "d2h"))
    assert measured.dram is None  # the others, measured at once, contain it
    assert passed >= 0.1
    assert torch.get_num_threads() == before


def test_an_interrupted_measurement_leaves_no_thread_that_waits(monkeypatch):
    """As by Ctrl-C when some queues have begun: they wait for the others."""
    submit, submitted, raised = ThreadPoolExecutor.submit, [], []
    together = threading.Barrier(4)

    def interrupted(pool, *call):
        if len(submitted) == 2:
            raise KeyboardInterrupt
        submitted.append(submit(pool, *call))
        return submitted[-1]

    def measure():
        try:
            measure_rates(threads=1, seconds=0.01, elements=64)
        except KeyboardInterrupt as error:
            raised.append(error)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    monkeypatch.setattr(threading, "Barrier", lambda parties: together)
    measuring = threading.Thread(target=measure)
    measuring.start()
    measuring.join(30)
    ended = not measuring.is_alive()
    together.abort()  # where it has not: the tests go on
    assert ended and raised and all(future.done() for future in submitted)


@pytest.mark.gpu
def test_on_a_gpu_its_updates_are_the_faster_ones():
    measured = measure_rates(threads=2)
    assert measured.gpu > measured.cpu
    assert min(measured.h2d, measured.d2h) > 1e9


def test_a_failing_queue_is_not_swallowed(monkeypatch):
    import torch

    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:  # the two warm-ups pass
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "_fused_adamw_", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure_rates(threads=1, seconds=0.05, elements=64)


def test_this_machine_has_a_name():
    here = Hardware.detect(threads=2, local_world_size=3)
    assert here.cpu and here.cores >= 1 and here.torch
    assert (here.threads, here.local_world_size) == (2, 3)


def test_rates_are_measured_once_and_remembered(folder, calls):
    assert cached_rates(HARDWARE, ALONE) == RATES
    assert cached_rates(HARDWARE, ALONE) == RATES
    assert calls == [4]
    assert [file.name for file in folder.iterdir()] == [HARDWARE.file_name]
    stored = json.loads((folder / HARDWARE.file_name).read_text())
    assert stored == {"hardware": asdict(HARDWARE), "rates": asdict(RATES)}


def test_again_measures_and_remembers_the_new(folder, calls):
    cached_rates(HARDWARE, ALONE)
    assert cached_rates(HARDWARE, ALONE, remeasure=True).cpu == 2e9
    assert cached_rates(HARDWARE, ALONE).cpu == 2e9
    assert calls == [4, 4]


@pytest.mark.parametrize("field", ["cpu", "cores", "gpu", "torch", "threads", "local_world_size"])
def test_another_machine_is_measured_itself(folder, calls, field):
    other = replace(HARDWARE, **{field: 2 if isinstance(getattr(HARDWARE, field), int) else "another"})
    cached_rates(HARDWARE, ALONE)
    cached_rates(other, ALONE)
    assert len(calls) == 2
    assert len(list(folder.iterdir())) == 2


def test_the_ranks_of_a_node_measure_together_keep_the_slowest_and_write_once(folder, monkeypatch):
    """Whoever comes first waits, and the others find what one has measured."""
    together, given, lock = threading.Barrier(3), {}, threading.Lock()
    begun, ended, written = [], [], []

    def exchange(index, value):
        given[index] = value
        together.wait(PATIENCE)
        values = [given[n] for n in range(3)]
        together.wait(PATIENCE)
        return values

    def measure(threads, ready):
        index = int(threading.current_thread().name)
        time.sleep(0.05 * index)  # to allocate and to warm up
        ready()
        with lock:
            begun.append(time.perf_counter())
        time.sleep(0.2)
        with lock:
            ended.append(time.perf_counter())
        return replace(RATES, cpu=(3 - index) * 1e9, gpu=(1 + index) * 1e9)

    write = rates.write_cache_file
    monkeypatch.setattr(rates, "measure_rates", measure)
    monkeypatch.setattr(rates, "write_cache_file", lambda *args: (written.append(args[0]), write(*args)))

    def all_ranks(**how):
        nodes = [Node(n, (frozenset({0}),) * 3, partial(exchange, n)) for n in range(3)]
        found = [None] * 3

        def one(n):
            found[n] = cached_rates(HARDWARE, nodes[n], **how)

        ranks = [threading.Thread(target=one, args=(n,), name=str(n)) for n in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(PATIENCE)
        return found

    expected = replace(RATES, cpu=1e9, gpu=1e9)
    assert all_ranks() == [expected] * 3
    assert len(begun) == 3 and max(begun) < min(ended)
    assert [path.name for path in written] == [HARDWARE.file_name]
    assert all_ranks() == [expected] * 3 and len(begun) == 3
    assert all_ranks(remeasure=True) == [expected] * 3 and len(begun) == 6 and len(written) == 2


def test_the_slowest_rank_counts_in_each_rate():
    other = Rates(cpu=2e9, gpu=1e9, h2d=4e9, d2h=3e9)
    assert slowest([RATES, other]) == Rates(cpu=1e9, gpu=1e9, h2d=3e9, d2h=3e9)
    assert slowest([replace(RATES, dram=5e9), replace(other, dram=4e9)]).dram == 4e9


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"rates": {"cpu": 1}}', '{"rates": {"cpu": -1, "gpu": 1, "h2d": 1, "d2h": 1}}', "[1]"],
)
def test_a_broken_file_is_a_warning_and_replaced(folder, calls, text):
    folder.mkdir(parents=True)
    (folder / HARDWARE.file_name).write_text(text)
    with pytest.warns(UserWarning, match=rf"offload: .*{HARDWARE.file_name} is not used"):
        assert cached_rates(HARDWARE, ALONE) == RATES
    assert cached_rates(HARDWARE, ALONE) == RATES
    assert calls == [4]


def test_a_folder_that_cannot_be_written_is_a_warning(folder, calls):
    folder.parent.write_text("")
    with pytest.warns(UserWarning, match="cannot be written, the result is not kept"):
        assert cached_rates(HARDWARE, ALONE) == RATES
    assert calls == [4]


def test_the_folder_is_that_of_the_user(tmp_path, monkeypatch, calls):
    monkeypatch.delenv("MEGATRON_S2_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached_rates(HARDWARE, ALONE)
    assert (tmp_path / "xdg" / "megatron_s2" / HARDWARE.file_name).exists()
    monkeypatch.setenv("MEGATRON_S2_CACHE", str(tmp_path / "own"))
    cached_rates(HARDWARE, ALONE)
    assert (tmp_path / "own" / HARDWARE.file_name).exists()


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([1.2] * 5, False),
        ([0.8] * 5, False),
        ([1.3] * 5, True),
        ([0.7] * 5, True),
        ([9.0, 9.0, 1.0, 1.0, 1.0], False),
        ([9.0] * 50 + [1.0] * 5, False),
        ([1.0] * 50 + [9.0] * 3, True),
    ],
    ids=[
        "a little slower",
        "a little faster",
        "slower",
        "faster",
        "outliers",
        "long ago",
        "three of five",
    ],
)
def test_drift_is_the_median_of_five_steps_off_by_a_quarter(measured, expected):
    assert drifted(1.0, measured) is expected
