"""Specification of the executor: the bits of plain AdamW whatever the plan, no hazard, always an end."""

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from one_channel import Channel, Collective
from selection import exhaustive, thinned
from steps import (
    ELEMENTS,
    MIXED,
    NAMES,
    ON_NVME,
    executor,
    flush_all,
    gradients_of,
    plain_solution,
    require_close,
    require_same,
    scale_of,
    settings_of,
    state_of,
    take_steps,
)
from torch.distributed.distributed_c10d import _CoalescingManager
from waiting import PATIENCE, wait_until

from megatron_s2.offload.executor import Executor
from megatron_s2.offload.plan import make_plan
from megatron_s2.offload.queues import Buffer, CudaBackend, HazardError, Queues, ThreadBackend
from megatron_s2.offload.rounding import same_bits
from megatron_s2.offload.state import Parameter

FRACTIONS = (0.0, 0.25, 0.4, 0.5, 0.75, 1.0)
SUBGROUP_SIZES = (64, 192, 256, 1024, 3008)
TIERS = {
    "host": {},
    "gpu and host": {"gpu_budget": 12 * 800},
    "gpu": {"gpu_budget": 12 * ELEMENTS},
    "host and nvme": ON_NVME,
    "all three": MIXED,
    "nvme": ON_NVME | {"host_budget": 16 * 128 * 3},
}


@pytest.fixture(scope="module")
def truth():
    return plain_solution()


@pytest.fixture
def build(tmp_path):
    made = []

    def one(**plan):
        made.append(executor(tmp_path, **plan))
        return made[-1]

    yield one
    for executor_ in made:
        executor_.close()


@pytest.mark.parametrize(
    ("fraction", "subgroup_size"),
    thinned(
        product(FRACTIONS, SUBGROUP_SIZES),
        lambda case: (FRACTIONS.index(case[0]) + SUBGROUP_SIZES.index(case[1])) % 5 == 4,
    ),
)
def test_fraction_and_subgroup_size_change_no_bit(build, truth, fraction, subgroup_size):
    one = build(fraction=fraction, subgroup_size=subgroup_size)
    take_steps(one, seed=subgroup_size)
    require_same(state_of(one), truth)


@pytest.mark.parametrize(
    ("tiers", "fraction", "buffer_sets"),
    [  # a Latin square: all pairs of values
        (name, FRACTIONS[2 * ((n + m) % 3)], 1 + m) for n, name in enumerate(TIERS) for m in range(3)
    ],
)
def test_tiers_and_buffers_change_no_bit(build, truth, tiers, fraction, buffer_sets):
    one = build(**TIERS[tiers], fraction=fraction, buffer_sets=buffer_sets)
    take_steps(one)
    require_same(state_of(one), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("fraction", FRACTIONS[::2])
def test_a_gpu_changes_no_bit_where_it_rounds_as_the_cpu(build, truth, tiers, fraction):
    one = build(**tiers, fraction=fraction, gpu=True)
    take_steps(one)
    require = require_same if same_bits(torch.device("cuda")) else require_close
    require(state_of(one), truth)


def test_the_fraction_may_change_between_steps(build, truth):
    one = build(**MIXED)
    for step, fraction in ((1, 0.0), (2, 1.0), (3, 0.5)):
        one.plan = one.plan.with_fraction(fraction)
        take_steps(one, [step])
    require_same(state_of(one), truth)
    with pytest.raises(ValueError, match="must differ from the one before in devices only"):
        one.plan = make_plan(ELEMENTS, subgroup_size=256)
    flush_all(one, 4)
    with pytest.raises(ValueError, match="cannot change between a flush of gradients and its step"):
        one.plan = one.plan.with_fraction(0.2)


def test_gradients_are_left_as_they_were(build):
    one = build(fraction=0.5)
    given = gradients_of(1)
    for index, gradient in enumerate(given):
        one.flush(index, gradient)
    one.step(settings_of(1), 3.0)
    for gradient, before in zip(given, gradients_of(1)):
        assert torch.equal(gradient, before)


def test_gradients_may_come_from_many_threads(build, truth):
    one = build(fraction=0.5)
    for step in (1, 2, 3):
        threads = [
            threading.Thread(target=one.flush, args=(index, gradient))
            for index, gradient in enumerate(gradients_of(step))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.step(settings_of(step), scale_of(step))
    require_same(state_of(one), truth)


class Late:
    """A collective that takes some time; only then the gradients are what they should be."""

    def __init__(self, source: torch.Tensor, gradient: torch.Tensor) -> None:
        self._over = threading.Event()
        threading.Timer(0.02, self._end, (source, gradient)).start()

    def _end(self, source: torch.Tensor, gradient: torch.Tensor) -> None:
        source.copy_(gradient)
        self._over.set()

    def wait(self) -> None:
        self._over.wait()


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_every_use_of_a_gradient_waits_for_what_finishes_it(build, truth, tiers, fraction):
    one = build(**tiers, fraction=fraction)
    for step in (1, 2, 3):
        for index, gradient in enumerate(gradients_of(step)):
            source = torch.full_like(gradient, torch.nan)
            one.flush(index, source, after=Late(source, gradient))
        one.step(settings_of(step), scale_of(step))
    require_same(state_of(one), truth)


@pytest.fixture
def channel(monkeypatch):
    one = Channel()
    one.install(monkeypatch)
    yield one
    one.close()


def coalesced(work: Collective) -> _CoalescingManager:
    """The handle that Megatron has of the reductions of a bucket."""
    handle = _CoalescingManager()
    handle.append(work)
    return handle


def test_in_one_hardware_queue_a_wait_of_any_stream_holds_up_all_others(channel):
    """What the next test's model is made for."""
    reduction, kernels = Collective(channel, lambda: None), []
    channel.launch(lambda: kernels.append("before"))
    reduction.wait()
    channel.launch(lambda: kernels.append("behind"))
    channel.settle()
    assert kernels == ["before"]
    reduction.end()
    channel.settle()
    assert kernels == ["before", "behind"]


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_backward_goes_on_while_gradients_wait_for_their_reductions(channel, build, truth, tiers):
    """In one hardware queue: nothing is launched that waits, so no kernel of backward is held up."""
    backend = CudaBackend(torch.device("cuda", 0))
    backend.device = torch.device("cpu")
    one = build(backend=backend, **tiers, fraction=0.5)
    for step in (1, 2, 3):
        reductions, kernels, marks = [], [], channel.marks
        for index, gradient in enumerate(gradients_of(step)):
            source = torch.full_like(gradient, torch.nan)
            reductions.append(Collective(channel, lambda to=source, result=gradient: to.copy_(result)))
            one.flush(index, source, after=coalesced(reductions[-1]) if index % 2 else reductions[-1])
            channel.launch(partial(kernels.append, index))
        channel.settle()
        launched = len(kernels), channel.waits, channel.marks - marks
        for reduction in reductions:
            reduction.end()
        assert launched == (6, 0, 0)
        one.step(settings_of(step), scale_of(step))
        assert channel.waits == 0
    require_same(state_of(one), truth)


def test_a_flush_that_fails_was_none(build, truth, monkeypatch):
    one = build()
    gradients = gradients_of(1)
    with pytest.raises(ValueError, match="flush of parameter 0: must be contiguous with `after`"):
        one.flush(0, torch.zeros(200)[::2], after=Late(gradients[0], gradients[0]))

    def fail(self, after=None):
        raise ConnectionError("peer lost")

    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(ThreadBackend, "mark", fail)
        one.flush(0, gradients[0])
    take_steps(one)
    require_same(state_of(one), truth)


@pytest.mark.parametrize("tiers", [{}, MIXED], ids=["host", "all three"])
def test_a_skipped_step_leaves_everything_untouched(build, truth, tiers):
    one = build(**tiers, fraction=0.5)
    take_steps(one, [1])
    before = state_of(one)
    flush_all(one, 77)
    one.skip()
    require_same(state_of(one), before)
    one.flush(0, torch.full((100,), float("nan")))
    one.skip()
    take_steps(one, [2, 3])
    require_same(state_of(one), truth)


def test_a_step_waits_for_each_flush_on_its_own(tmp_path):
    """The last subgroup's gradients are slow; the first is updated meanwhile."""
    first_updated = threading.Event()

    def delay(task):
        if (task.queue, task.name) == ("d2h", "gradients 11"):
            assert first_updated.wait(PATIENCE)
        if (task.queue, task.name) == ("h2d", "weights 0"):
            first_updated.set()

    one = executor(tmp_path, delay=delay)
    for index, gradient in enumerate(gradients_of(1)):
        one.flush(index, gradient)
    one.step(settings_of(1))
    assert first_updated.is_set()
    one.close()


# Hazards


@pytest.mark.parametrize("first", [0, *exhaustive(*range(20, 200, 20))])
def test_no_schedule_meets_a_hazard(tmp_path, truth, first):
    """200 schedules: random delays on every queue, while buffers are held."""
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        lock = threading.Lock()

        def delay(task, rng=rng, lock=lock):
            with lock:
                seconds = rng.choice((0, 0, 0, 1e-4, 5e-4)) * (1 + (task.queue == rng.choice(("h2d", "d2h"))))
            if seconds:
                time.sleep(seconds)

        one = executor(
            tmp_path,
            delay=delay,
            **rng.choice(list(TIERS.values())),
            fraction=rng.choice(FRACTIONS),
            buffer_sets=rng.choice((1, 2, 3)),
            directories=rng.choice((1, 2, 3)),
        )
        steps = ThreadPoolExecutor(1).submit(take_steps, one, seed=seed)
        steps.result(PATIENCE)
        require_same(state_of(one), truth)
        one.close()


@pytest.mark.parametrize("queue, name, tiers", [
    ("gpu", "update", {}), ("d2h", "state", {}), ("h2d", "state", {}), ("h2d", "weights", {}),
    ("cpu", "update", {}), ("nvme_write", "state", ON_NVME), ("nvme_read", "state", ON_NVME),
    ("d2h", "gradients", TIERS["nvme"]),
])  # fmt: skip
def test_a_missing_dependency_is_found(build, monkeypatch, queue, name, tiers):
    """The check is not vacuous: where one kind of task waits for nothing, its hazard shows itself."""
    predecessors = Queues._predecessors

    def careless(self, task):
        mine = (task.queue, task.name.split()[0]) == (queue, name)
        return set() if mine else predecessors(self, task)

    def slow(task):
        time.sleep(0.002)

    one = build(**tiers, fraction=0.5, delay=slow)
    monkeypatch.setattr(Queues, "_predecessors", careless)
    with pytest.raises(HazardError, match=r"is in use by|holds .*, not .* as expected"):
        take_steps(one)


# Failures


class BrokenError(Exception):
    pass


def failing(queue, subgroup, at_end):
    calls = []

    def delay(task):
        if task.queue == queue and task.name.endswith(f" {subgroup}"):
            calls.append(task)
            if len(calls) == 1 + at_end:
                raise BrokenError(f"{queue} {subgroup}")

    return delay


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("queue, subgroup", [("h2d", 3), ("d2h", 4), ("cpu", 5), ("gpu", 6)])
def test_a_failure_ends_the_step_and_is_reported(build, queue, subgroup, at_end):
    one = build(subgroup_size=128, fraction=0.5, delay=failing(queue, subgroup, at_end))
    with pytest.raises(BrokenError, match=f"{queue} {subgroup}") as failure:
        take_steps(one)
    note = failure.value.__notes__[-1]
    assert "optimizer state: " in note
    if "is whole, as before this step" not in note:
        for call in (lambda: one.read("master", 0, 1), lambda: flush_all(one, 1), lambda: take_steps(one)):
            with pytest.raises(RuntimeError, match=r"a step failed with \d+ of 24 subgroups changed"):
                call()


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("queue", ["nvme_read", "h2d", "gpu", "d2h", "nvme_write"])
def test_a_step_that_changed_nothing_may_be_taken_again(build, truth, queue, at_end):
    """Two subgroups share one slot, so that the second has not begun when the first fails."""
    whole = queue in ("nvme_read", "h2d") or (queue == "gpu" and not at_end)
    ring = {"nvme": True, "ring_slots": 1, "host_budget": 16 * 1536}
    one = build(subgroup_size=1536, **ring, fraction=1.0, delay=failing(queue, 0, at_end))
    with pytest.raises(BrokenError) as failure:
        take_steps(one)
    assert ("is whole, as before this step" in failure.value.__notes__[-1]) == whole
    if whole:
        take_steps(one)
        require_same(state_of(one), truth)
    else:
        with pytest.raises(RuntimeError, match=r"a step failed with 1 of 2 subgroups changed \(first 0\)"):
            state_of(one)


@pytest.mark.parametrize("end", ["step", "skip"])
def test_a_failed_flush_leaves_the_state_whole(build, truth, end):
    one = build(subgroup_size=3008, delay=failing("d2h", 0, False))
    flush_all(one, 1)
    with pytest.raises(BrokenError):
        one.step(settings_of(1)) if end == "step" else one.skip()
    take_steps(one)
    require_same(state_of(one), truth)


@pytest.mark.parametrize("tier", ["nvme_read", "nvme_write"])
def test_a_failing_tier_ends_the_step(build, tier):
    one = build(**ON_NVME, delay=failing(tier, 7, True))
    with pytest.raises(BrokenError):
        take_steps(one)


def test_an_interruption_ends_the_step_with_all_queues_at_rest(build):
    """As by Ctrl-C, or a signal handler that raises."""
    interrupted = threading.Event()

    def delay(task):
        if task.name.startswith("update") and not interrupted.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
            assert interrupted.wait(PATIENCE)
        time.sleep(0.1)

    def interrupt(*_):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    one = build(delay=delay)
    flush_all(one, 1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as interruption:
            one.step(settings_of(1))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "optimizer state: " in interruption.value.__notes__[-1]
    count = len(one.events)
    time.sleep(0.5)
    assert len(one.events) == count


def test_two_failures_are_both_told():
    queues = Queues({"cpu": 1, "gpu": 1}, ThreadBackend())
    both = threading.Barrier(2)

    def fail():
        both.wait()
        raise BrokenError(threading.current_thread().name)

    for queue in ("cpu", "gpu"):
        queues.submit(queue, "update 0", fail)
    with pytest.raises(BrokenError) as failure:
        queues.join()
    assert len(failure.value.__notes__) == 1
    done = []
    queues.submit("cpu", "update 1", lambda: done.append(1))
    queues.join()
    assert done == [1]
    queues.close()
    with pytest.raises(RuntimeError, match="cpu update 2: the queues are closed"):
        queues.submit("cpu", "update 2", fail)


def test_a_step_that_is_closed_under_way_does_not_look_done(build):
    updating, failures = threading.Event(), []

    def delay(task):
        if task.queue == "cpu":
            updating.set()
            wait_until(lambda: one._queues._closed)

    one = build(delay=delay)
    flush_all(one, 1)

    def step():
        with pytest.raises(RuntimeError, match="the queues were closed before all was done") as failure:
            one.step(settings_of(1))
        failures.append(failure)

    stepping = threading.Thread(target=step)
    stepping.start()
    assert updating.wait(PATIENCE)
    one.close()
    stepping.join(PATIENCE)
    assert failures and not stepping.is_alive()


def test_a_worker_is_on_the_device_of_its_stream_before_it_takes_it(monkeypatch):
    """Or leaving the stream sends it back to GPU 0, where each rank of a machine would begin a context."""
    device, seen = torch.device("cuda", 3), []

    @contextmanager
    def told(what):
        seen.append(what)
        yield
        seen.append(("left", what))

    done = SimpleNamespace(record=lambda stream: None, synchronize=lambda: seen.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: done)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "device", told)
    monkeypatch.setattr(torch.cuda, "stream", told)
    with CudaBackend(device).context(SimpleNamespace(queue="h2d")):
        seen.append("task")
    assert seen == [device, "stream", "task", "synchronized", ("left", "stream"), ("left", device)]


def test_tasks_follow_one_another_by_the_buffers_they_share():
    """Each queue takes what may begin: `third` waits for the buffer of `first`, and `second` overtakes it."""
    queues = Queues({"h2d": 1, "d2h": 1}, ThreadBackend())
    buffer, go, order = Buffer("one"), threading.Event(), []
    queues.submit("h2d", "first", lambda: go.wait() and order.append("first"), [(buffer, None, 1)])
    queues.submit("d2h", "third", lambda: order.append("third"), [(buffer, 1, 2)])
    queues.submit("d2h", "second", lambda: order.append("second") or go.set(), [(Buffer("b"), None, 1)])
    queues.join()
    queues.close()
    assert order == ["second", "first", "third"] and buffer.content == 2


def test_what_runs_in_gaps_comes_last_and_the_rest_in_turn():
    queues = Queues({"h2d": 1}, ThreadBackend())
    go, order = threading.Event(), []
    queues.submit("h2d", "wait", go.wait)
    for n, low_priority in enumerate((True, False, False)):
        queues.submit("h2d", f"{n}", lambda n=n: order.append(n), low_priority=low_priority)
    go.set()
    queues.join()
    queues.close()
    assert order == [1, 2, 0]


def test_a_submission_that_is_interrupted_costs_no_later_task(monkeypatch):
    """As by Ctrl-C between a task's entry in its queue and the call of the pool."""
    queues, submit, done = Queues({"cpu": 1}, ThreadBackend()), ThreadPoolExecutor.submit, []

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupt)
    with pytest.raises(KeyboardInterrupt) as interruption:
        queues.submit("cpu", "update 0", lambda: done.append(0))
    queues.abandon(interruption.value)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    queues.submit("cpu", "update 1", lambda: done.append(1))
    queues.join()
    queues.close()
    assert done == [1]


def test_a_chain_of_any_length_is_dropped_at_once():
    """After an error, none of its tasks begins and none is waited for."""
    queues = Queues({"cpu": 1, "gpu": 1}, ThreadBackend())
    buffer, begun = Buffer("one"), []

    def fail():
        raise BrokenError

    queues.submit("cpu", "update 0", fail, [(buffer, None, 1)])
    for n in range(1, 20000):
        queue = ("cpu", "gpu")[n % 2]
        queues.submit(queue, f"update {n}", lambda n=n: begun.append(n), [(buffer, n, n + 1)])
    with pytest.raises(BrokenError) as failure:
        queues.join()
    queues.close()
    assert not begun and not hasattr(failure.value, "__notes__")


def test_workers_leave_the_threads_of_others_alone():
    before, inside = torch.get_num_threads(), []
    queues = Queues({"cpu": 1, "gpu": 1}, ThreadBackend(), {"cpu": 3})
    for queue in ("cpu", "gpu"):
        queues.submit(queue, "", lambda: inside.append(torch.get_num_threads()))
        queues.join()
    queues.close()
    assert inside == [3, 1] and torch.get_num_threads() == before


# What is refused


def test_gradients_missing_or_twice_are_refused(build, truth):
    one = build()
    one.flush(0, gradients_of(1)[0])
    with pytest.raises(ValueError, match="flush of parameter 0: was flushed before"):
        one.flush(0, torch.zeros(100))
    with pytest.raises(ValueError, match="parameter 1: source must have 448 elements on cpu, not 447"):
        one.flush(1, torch.zeros(447))
    one.flush(2, gradients_of(1)[2])
    with pytest.raises(ValueError, match="gradients of 4 of 6 parameters were not flushed, first 1"):
        one.step(settings_of(1))
    one.skip()
    take_steps(one)
    require_same(state_of(one), truth)


def test_settings_are_checked_before_anything_happens(build):
    one = build()
    flush_all(one, 1)
    before = state_of(one)
    with pytest.raises(ValueError, match="settings of 1 groups: parameters have 2"):
        one.step(settings_of(1)[:1])
    with pytest.raises(ValueError, match="gradient_scale 0"):
        one.step(settings_of(1), 0.0)
    require_same(state_of(one), before)
    one.step(settings_of(1), scale_of(1))
    require_same(state_of(one), plain_solution(1))


@pytest.mark.parametrize("parameters, message", [
    ([Parameter(3, torch.zeros(4))], "parameter 0 at 3: must begin at a multiple of 64 >= 0"),
    ([Parameter(0, torch.zeros(65)), Parameter(64, torch.zeros(4))], "parameter 1 at 64: .* >= 128"),
    ([Parameter(0, torch.zeros(4).double())], "parameter 0: weights must be flat"),
    ([Parameter(0, torch.zeros(65))], "plan of 64 elements: parameters have 128, padding included"),
    ([], "plan of 64 elements: parameters have 0"),
])  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(parameters, message):
    plan = make_plan(64)
    with pytest.raises(ValueError, match=message):
        Executor(plan, parameters, ThreadBackend())


# State at rest


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_state_written_is_state_read_and_stepped_from(build, truth, tiers):
    """Two steps here, moved over there, the third there."""
    source, target = build(fraction=0.5), build(**tiers, fraction=0.5)
    take_steps(source, [1, 2])
    for name in NAMES:
        whole = source.read(name, 0, ELEMENTS)
        for start in range(0, ELEMENTS, 300):
            target.write(name, start, whole[start : start + 300])
        assert torch.equal(target.read(name, 0, ELEMENTS), whole)
        assert torch.equal(target.read(name, 77, 1234), whole[77:1234])
    for p in target.parameters:
        p.weights.copy_(target.read("master", p.start, p.stop))
    require_same(state_of(target), state_of(source))
    take_steps(target, [3])
    require_same(state_of(target), truth)


def test_names_and_elements_that_are_not_there_are_refused(build):
    one = build()
    for name, start, stop in (("weights", 0, 1), ("master", -1, 3), ("master", 0, ELEMENTS + 1)):
        with pytest.raises(ValueError, match="must be of master, exp_avg, exp_avg_sq and in the state"):
            one.read(name, start, stop)


def test_the_timeline_names_what_each_queue_did(build):
    one = build(**MIXED, fraction=0.5)
    take_steps(one, [1])
    plan, seen = one.plan, {(event.queue, event.name) for event in one.events}
    for s in plan.subgroups:
        i, by_gpu = s.index, s.device == "gpu"
        assert (("gpu" if by_gpu else "cpu"), f"update {i}") in seen
        assert (
            (("h2d", f"state {i}") in seen) == (("d2h", f"state {i}") in seen) == (by_gpu and s.tier != "gpu")
        )
        assert (("h2d", f"weights {i}") in seen) == (("d2h", f"gradients {i}") in seen) == (not by_gpu)
        assert (("nvme_write", f"state {i}") in seen) == (s.tier == "nvme")
    starts = [event.start for event in one.events]
    assert starts == sorted(starts) and starts[0] >= 0
