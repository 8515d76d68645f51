"""Queues of tasks, a thread pool each, with an order that follows from the buffers that tasks use.

Every task names the buffers that it uses, with the content that it expects in each and the content that it
leaves there. It begins when the tasks submitted before it that use one of its buffers have ended. So no
dependency is written down that could be missing, and tasks cannot wait for each other in a circle. A task
that nevertheless finds a buffer in use, or with other content, ends the step with a `HazardError`: a mistake
in the schedule shows itself and cannot corrupt state unseen.

The backend decides where copies and kernels run: on CUDA streams, or in the pools' threads where there is no
GPU. Everything else is the same code.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import torch

from megatron_s2.offload.trace import Event

ON_DEVICE = ("h2d", "d2h", "gpu")  # queues with a CUDA stream
POLL_SECONDS = 5e-4  # short against the reduction and the copy of a bucket, milliseconds each


class HazardError(RuntimeError):
    """A task found a buffer in use or with unexpected content: a mistake in the schedule."""


@dataclass(eq=False)
class Buffer:
    """Memory, or a record in a file, that one task at a time uses.

    Its content is None where no task needs it, as after the failure of a task that would have changed it.
    """

    name: str
    content: Hashable = None
    user: str | None = None  # the task that is using it
    last_task: Task | None = None  # the latest task submitted that uses it; None once that has ended


# What a task expects in a buffer, and what it leaves there.
Access = tuple[Buffer, Hashable, Hashable]


@dataclass(eq=False)
class Task:
    """A function that a queue runs; made by `Queues.submit`."""

    queue: str
    name: str
    run: Callable[[], object]
    accesses: tuple[Access, ...]
    priority: tuple[bool, int]
    followers: list[Task] = field(default_factory=list)
    predecessors: int = 0
    running: bool = False

    def __str__(self) -> str:
        return f"{self.queue} {self.name}"

    def __lt__(self, other: Task) -> bool:
        return self.priority < other.priority


class Awaitable(Protocol):
    """An operation in progress, such as an asynchronous collective of `torch.distributed`, or a mark.

    On a GPU a collective must have `is_completed`, or `works` that have it.
    """

    def wait(self) -> object:
        """Makes the current stream, or this thread, wait for the end. Several threads may call it."""


class AwaitedOnce:
    """Waits for an operation only once; later calls of `wait` return when the first has. For collectives of
    gloo, each of whose waits copies the result again, over what may have been written there since.
    """

    def __init__(self, inner: Awaitable) -> None:
        self._inner: Awaitable | None = inner
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            if self._inner is not None:
                self._inner.wait()
                self._inner = None


class ThreadBackend:
    """Runs tasks in the queues' own threads, for machines without a GPU: host memory takes the GPU's place.

    Attributes:
        device: device of the gradients, the weights, and the state that the GPU updates.
    """

    device = torch.device("cpu")

    @contextmanager
    def context(self, task: Task) -> Iterator[None]:
        """Context in which a task's function runs; at its end everything that the function began is done."""
        yield

    def mark(self) -> Awaitable | None:
        """Returns a mark of what the caller has begun on the device so far."""
        return None

    def wait(self, mark: Awaitable | None) -> None:
        """Waits for a mark, or for the end of an operation, before the task begins anything else."""
        if mark is not None:
            mark.wait()


class CudaBackend(ThreadBackend):
    """Runs the tasks of h2d, d2h and gpu on a CUDA stream each.

    Workers wait, streams never do: a worker launches nothing before what it needs is done, and then waits for
    the end of what it launched. That costs 10 or 20 us against the milliseconds of a transfer, and order and
    hazards are those of the threads. A wait launched on a stream could also hold up backward: with
    CUDA_DEVICE_MAX_CONNECTIONS=1 all streams share one hardware queue, where a wait for a reduction that has
    not ended blocks every later launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {queue: torch.cuda.Stream(device) for queue in ON_DEVICE}

    @contextmanager
    def context(self, task: Task) -> Iterator[None]:
        stream = self._streams.get(task.queue)
        if stream is None:
            yield
            return
        # A worker starts on GPU 0, and going back there from a stream would create a context on it.
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            try:
                yield
            finally:
                self.mark().synchronize()

    def mark(self) -> torch.cuda.Event:
        point = torch.cuda.Event(blocking=True)
        point.record(torch.cuda.current_stream(self.device))
        return point

    def wait(self, mark: torch.cuda.Event | Awaitable) -> None:
        if isinstance(mark, torch.cuda.Event):
            mark.synchronize()
            return
        # The `wait` of a collective is one on the stream. Where it failed, Megatron's own gets the error.
        works = getattr(mark, "works", [mark])
        while not all(work.is_completed() for work in works):
            time.sleep(POLL_SECONDS)


def default_backend() -> ThreadBackend:
    """Returns the backend of the current GPU, or that of threads where there is none."""
    if torch.cuda.is_available():
        return CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    return ThreadBackend()


class Queues:
    """Runs tasks; of those that may begin, a queue takes the one that was submitted first.

    Methods may be called from any thread. The wait for tasks is one C call, so a signal handler that raises
    there, as for Ctrl-C, leaves no lock behind.

    Args:
        workers: number of threads of each queue.
        backend: where the queues' operations run.
        threads: number of PyTorch's threads inside a task, by queue; 1 by default.
    """

    def __init__(
        self, workers: Mapping[str, int], backend: ThreadBackend, threads: Mapping[str, int] | None = None
    ) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._submitted = 0
        self._ready: dict[str, list[Task]] = {queue: [] for queue in workers}  # heaps
        self._unfinished: set[Task] = set()
        self._waiting: list[SimpleQueue[None]] = []  # one for each thread that waits for all tasks
        self._error: BaseException | None = None
        self._closed = False
        self._events: list[Event] = []
        self._begin = time.perf_counter()
        before = torch.get_num_threads()
        self._pools = {
            queue: _started_pool(f"offload-{queue}", count, (threads or {}).get(queue, 1))
            for queue, count in workers.items()
        }
        # Each worker has set its own number of threads, and with it that of threads started later.
        torch.set_num_threads(before)

    def submit(
        self,
        queue: str,
        name: str,
        run: Callable[[], object],
        accesses: Sequence[Access] = (),
        low_priority: bool = False,
    ) -> None:
        """Submits a function to a queue. After an error nothing new begins until `join` has raised it.

        Args:
            queue: name of the queue.
            name: name of the event.
            run: function called in a worker.
            accesses: the buffers that it uses, which no other task uses while it runs.
            low_priority: whether it runs only when no other task of the queue may begin.

        Raises:
            RuntimeError: the queues are closed.
        """
        with self._lock:
            task = Task(queue, name, run, tuple(accesses), (low_priority, self._submitted))
            self._submitted += 1
            if self._closed:
                raise RuntimeError(f"{task}: the queues are closed")
            if self._error is not None:
                return
            self._unfinished.add(task)
            for earlier in self._predecessors(task):
                earlier.followers.append(task)
                task.predecessors += 1
            for buffer, _, _ in task.accesses:
                buffer.last_task = task
            if not task.predecessors:
                self._enqueue(task)

    def join(self) -> None:
        """Waits until everything submitted has ended. `abandon` must follow where the wait is interrupted.

        Raises:
            BaseException: the error of the first task that failed, once the tasks that ran beside it have
                ended; those that had not begun are dropped.
        """
        self._wait()
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self, reason: BaseException) -> None:
        """Drops the tasks that have not begun, because of `reason`, and waits for those that run."""
        self._fail(reason)
        self._wait()
        with self._lock:
            self._error = None

    def restart_clock(self) -> None:
        """Forgets the events so far; later ones count from now."""
        with self._lock:
            self._events.clear()
            self._begin = time.perf_counter()

    def events(self) -> list[Event]:
        """Events since the clock was restarted, in the order of their starts."""
        with self._lock:
            return sorted(self._events, key=lambda event: event.start)

    def close(self) -> None:
        """Drops the tasks that have not begun and ends the threads. A `join` that waits for those tasks
        raises RuntimeError."""
        with self._lock:
            self._closed = True
            unfinished = bool(self._unfinished)
        if unfinished:
            self._fail(RuntimeError("the queues were closed before all was done"))
        for pool in self._pools.values():
            pool.shutdown()

    def _predecessors(self, task: Task) -> set[Task]:
        """Tasks that a new one waits for."""
        return {buffer.last_task for buffer, _, _ in task.accesses} & self._unfinished

    def _enqueue(self, task: Task) -> None:
        heapq.heappush(self._ready[task.queue], task)
        self._pools[task.queue].submit(self._perform_next, task.queue)

    def _perform_next(self, queue: str) -> None:
        """Runs a queue's next task in a worker, unless all were dropped, and lets its followers begin."""
        ready = self._ready[queue]
        try:
            with self._lock:
                while ready and ready[0] not in self._unfinished:
                    heapq.heappop(ready)
                if not ready:
                    return
                task = heapq.heappop(ready)
                _acquire(task)
        except HazardError as hazard:
            self._fail(hazard)
            return
        error, start = None, time.perf_counter()
        try:
            with self._backend.context(task):
                task.run()
        except BaseException as raised:
            error = raised
        end = time.perf_counter()
        with self._lock:
            _release(task, failed=error is not None)
            times = (max(moment - self._begin, 0.0) for moment in (start, end))
            self._events.append(Event(task.queue, task.name, *times))
            if error is not None:
                self._drop(error)
            self._unfinished.discard(task)
            try:
                for follower in task.followers:
                    follower.predecessors -= 1
                    if not follower.predecessors and follower in self._unfinished:
                        self._enqueue(follower)
            except RuntimeError as ending:  # the interpreter ends, and its pools take nothing any more
                self._drop(ending)
            self._wake()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._drop(error)
            self._wake()

    def _drop(self, error: BaseException) -> None:
        """Keeps the first error, and drops the tasks that have not begun."""
        if self._error is None:
            self._error = error
        elif error is not self._error:
            self._error.add_note(f"then: {error!r}")
        self._unfinished = {task for task in self._unfinished if task.running}

    def _wait(self) -> None:
        ended: SimpleQueue[None] = SimpleQueue()
        with self._lock:
            self._waiting.append(ended)
            self._wake()
        ended.get()

    def _wake(self) -> None:
        if not self._unfinished:
            for ended in self._waiting:
                ended.put(None)
            self._waiting.clear()


def _started_pool(name: str, workers: int, threads: int) -> ThreadPoolExecutor:
    """Returns a pool whose threads run and have each set their number of PyTorch's threads."""

    def set_threads() -> None:
        torch.get_num_threads()  # takes over the process's number, which would undo a number set before
        torch.set_num_threads(threads)

    pool = ThreadPoolExecutor(workers, name, set_threads)
    started = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(started.wait)
        started.wait()
    except BaseException:
        started.abort()  # else threads that have begun would wait forever
        raise
    return pool


def _acquire(task: Task) -> None:
    """Takes all buffers of a task, or none.

    Raises:
        HazardError: one is in use, or holds other content.
    """
    for buffer, expects, _ in task.accesses:
        if buffer.user is not None:
            raise HazardError(f"{task}: {buffer.name} is in use by {buffer.user}")
        if buffer.content != expects:
            raise HazardError(f"{task}: {buffer.name} holds {buffer.content}, not {expects} as expected")
    for buffer, _, _ in task.accesses:
        buffer.user = str(task)
    task.running = True


def _release(task: Task, failed: bool) -> None:
    for buffer, expects, leaves in task.accesses:
        if leaves != expects:
            buffer.content = None if failed else leaves
        buffer.user = None
        if buffer.last_task is task:
            buffer.last_task = None
