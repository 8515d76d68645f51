"""Queues that work side by side, the tasks on them, and the buffers that tasks use.

Each queue has worker threads. A task begins when all that it comes after has ended and its queue has a free
worker; of those that could begin, the one submitted first, `LAST` ones after all others. A task can only come
after tasks submitted before it, so that something can always go on until all is done.

Every task names the buffers it uses, with what it expects in them and what it leaves there. One that finds
something else, or somebody else at work, ends the run with a `HazardError`: a missing dependency shows itself
and cannot corrupt state unseen.

What a queue's copies and kernels run on is the backend's: CUDA streams where there is a GPU, the worker
threads themselves where there is none. The rest is the same code.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from megatron_s2.offload.trace import Event

IN_TURN, LAST = range(2)
ON_DEVICE = ("h2d", "d2h", "gpu")  # queues with a CUDA stream


class HazardError(RuntimeError):
    """A task found a buffer in use, or without what it expects there: a mistake of the schedule."""


@dataclass(eq=False)
class Buffer:
    """Memory, or a record in a file, that one task at a time uses.

    Args:
        name: for messages.
        content: what is in it; None where nothing is that counts, `("half", what)` where a task failed that
            would have left that.
    """

    name: str
    content: Hashable = None
    user: str | None = None


class Use(NamedTuple):
    """What a task expects in a buffer, and what it leaves there."""

    buffer: Buffer
    expects: Hashable
    leaves: Hashable


@dataclass(eq=False)
class Task:
    """Something that a queue does; made by `Queues.submit`."""

    queue: str
    name: str
    run: Callable[[], object]
    uses: tuple[Use, ...]
    urgency: int
    number: int
    missing: int = 0
    followers: list[Task] = field(default_factory=list)
    begun: bool = False
    ended: bool = False


class Awaited(Protocol):
    """Something under way, such as an asynchronous collective of `torch.distributed`."""

    def wait(self) -> object:
        """Let the current stream, or this thread, wait for its end. May be called from several threads."""


class AwaitedOnce:
    """Passes the first `wait` on; later ones return when that has. For collectives of gloo: each wait of them
    copies the result to its place again, over what may have changed there.
    """

    def __init__(self, inner: Awaited) -> None:
        self._inner: Awaited | None = inner
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            if self._inner is not None:
                self._inner.wait()
                self._inner = None


class Backend(Protocol):
    """Where queues work.

    Attributes:
        device: of the gradients, the weights, and the state that the GPU updates.
    """

    device: torch.device

    def at_work(self, task: Task) -> AbstractContextManager[None]:
        """Around a task's function, in its worker; at its end everything that it began is done."""

    def mark(self, after: Awaited | None = None) -> object:
        """The point that the caller's work on the device has reached, or the end of `after`."""

    def wait(self, mark: object) -> None:
        """Let what a task begins from here on come after that point."""


class ThreadBackend:
    """The queues' own threads, for machines without a GPU: what would be its memory is the host's.

    Args:
        delay: called with the task before and after its function, while it holds its buffers. For tests.
    """

    device = torch.device("cpu")

    def __init__(self, delay: Callable[[Task], object] | None = None) -> None:
        self._delay = delay

    def at_work(self, task: Task) -> AbstractContextManager[None]:
        return nullcontext() if self._delay is None else self._delayed(task)

    def mark(self, after: Awaited | None = None) -> Awaited | None:
        return after

    def wait(self, mark: Awaited | None) -> None:
        if mark is not None:
            mark.wait()

    @contextmanager
    def _delayed(self, task: Task):
        self._delay(task)
        yield
        self._delay(task)


class CudaBackend:
    """A CUDA stream for each of h2d, d2h and gpu. The worker waits for the end of what it began on it: 10 or
    20 us against the milliseconds of a transfer, and order and hazards are those of the threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {queue: torch.cuda.Stream(device) for queue in ON_DEVICE}
        self._waiting = torch.cuda.Stream(device)

    @contextmanager
    def at_work(self, task: Task):
        stream = self._streams.get(task.queue)
        if stream is None:
            yield
            return
        # A worker begins on GPU 0, and going back there from a stream would begin a context on it.
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            try:
                yield
            finally:
                done = torch.cuda.Event(blocking=True)
                done.record(stream)
                done.synchronize()

    def mark(self, after: Awaited | None = None) -> torch.cuda.Event:
        point = torch.cuda.Event()
        if after is None:
            point.record(torch.cuda.current_stream(self.device))
            return point
        with torch.cuda.device(self.device), torch.cuda.stream(self._waiting):
            after.wait()  # lets the stream wait, not this thread
            point.record(self._waiting)
        return point

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class Queues:
    """Runs tasks; every method may be called from any thread.

    Args:
        workers: how many threads each queue has.
        backend: where they work.
        threads: of PyTorch inside a task, by queue; 1 where not named.
    """

    def __init__(
        self, workers: Mapping[str, int], backend: Backend, threads: Mapping[str, int] | None = None
    ) -> None:
        self._backend = backend
        self._change = threading.Condition()
        self._ready: dict[str, list[tuple[int, int, Task]]] = {queue: [] for queue in workers}
        self._unfinished: set[Task] = set()
        self._running = 0
        self._submitted = 0
        self._error: BaseException | None = None
        self._closed = False
        self._events: list[Event] = []
        self._begin = time.perf_counter()
        started = threading.Barrier(sum(workers.values()) + 1)
        before = torch.get_num_threads()
        self._workers = [
            threading.Thread(
                target=self._work,
                args=(queue, (threads or {}).get(queue, 1), started),
                name=f"offload-{queue}-{n}",
                daemon=True,
            )
            for queue, count in workers.items()
            for n in range(count)
        ]
        for worker in self._workers:
            worker.start()
        started.wait()
        # Each worker has set its own number, and with it the one that threads to come would begin with.
        torch.set_num_threads(before)

    def submit(
        self,
        queue: str,
        name: str,
        run: Callable[[], object],
        *,
        after: Iterable[Task] = (),
        uses: Sequence[Use] = (),
        urgency: int = IN_TURN,
    ) -> Task:
        """Let a queue do something. After an error nothing new begins until `join` has raised it.

        Args:
            queue: which.
            name: of the event.
            run: what, called in a worker.
            after: tasks that end before.
            uses: of buffers, held while it runs.
            urgency: `IN_TURN` or `LAST` among those that could begin.

        Raises:
            RuntimeError: the queues are closed.
        """
        with self._change:
            if self._closed:
                raise RuntimeError(f"{queue} {name}: the queues are closed")
            task = Task(queue, name, run, tuple(uses), urgency, self._submitted)
            self._submitted += 1
            if self._error is not None:
                task.ended = True
                return task
            self._unfinished.add(task)
            for earlier in after:
                if not earlier.ended:
                    earlier.followers.append(task)
                    task.missing += 1
            if not task.missing:
                self._admit(task)
            return task

    def join(self) -> None:
        """Wait until everything submitted has ended.

        Raises:
            BaseException: what the first task that failed raised, once those that ran beside it have ended;
                what had not begun is dropped.
        """
        try:
            with self._change:
                self._change.wait_for(lambda: not self._unfinished)
        except BaseException as interruption:
            self.abandon(interruption)
            raise
        with self._change:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self, reason: BaseException) -> None:
        """Drop what has not begun, because of `reason`, and wait for what runs."""
        with self._change:
            self._fail(reason)
            self._change.wait_for(lambda: not self._running)
            self._error = None

    def restart_clock(self) -> None:
        """Forget the events so far; those to come count from now."""
        with self._change:
            self._events.clear()
            self._begin = time.perf_counter()

    def events(self) -> list[Event]:
        """What tasks did since the clock was restarted, in the order of their starts."""
        with self._change:
            return sorted(self._events, key=lambda event: event.start)

    def close(self) -> None:
        """Drop what has not begun, and end the workers. A `join` that waits for it raises a RuntimeError."""
        with self._change:
            self._closed = True
            if self._unfinished:
                self._fail(RuntimeError("the queues were closed before all was done"))
            self._change.notify_all()
        for worker in self._workers:
            worker.join()

    def _admit(self, task: Task) -> None:
        heapq.heappush(self._ready[task.queue], (task.urgency, task.number, task))
        self._change.notify_all()

    def _work(self, queue: str, threads: int, started: threading.Barrier) -> None:
        torch.get_num_threads()  # takes the process's number over, which would undo what follows later
        torch.set_num_threads(threads)
        started.wait()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._ready[queue])
                if self._closed:
                    return
                task = heapq.heappop(self._ready[queue])[2]
                try:
                    _take(task)
                except HazardError as error:
                    self._fail(error)
                    continue
                self._running += 1
            start = time.perf_counter()
            try:
                with self._backend.at_work(task):
                    task.run()
            except BaseException as error:
                self._end(task, start, error)
            else:
                self._end(task, start)

    def _end(self, task: Task, start: float, error: BaseException | None = None) -> None:
        with self._change:
            self._running -= 1
            _give_back(task, failed=error is not None)
            task.ended = True
            self._events.append(
                Event(
                    task.queue,
                    task.name,
                    max(start - self._begin, 0.0),
                    max(time.perf_counter() - self._begin, 0.0),
                )
            )
            self._unfinished.discard(task)
            if error is not None:
                self._fail(error)
            elif self._error is None:
                for follower in task.followers:
                    follower.missing -= 1
                    if not follower.missing:
                        self._admit(follower)
            self._change.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Drop what has not begun; what runs stays in the books until it ends."""
        if self._error is None:
            self._error = error
        elif error is not self._error:
            self._error.add_note(f"then: {error!r}")
        self._ready = {queue: [] for queue in self._ready}
        for task in self._unfinished:
            task.ended = not task.begun
        self._unfinished = {task for task in self._unfinished if not task.ended}
        self._change.notify_all()


def _take(task: Task) -> None:
    """Its buffers, all or none.

    Raises:
        HazardError: one is in use, or holds something else.
    """
    for buffer, expects, _ in task.uses:
        if buffer.user is not None:
            raise HazardError(f"{task.queue} {task.name}: {buffer.name} is in use by {buffer.user}")
        if buffer.content != expects:
            raise HazardError(
                f"{task.queue} {task.name}: {buffer.name} holds {buffer.content}, not {expects} as expected"
            )
    for use in task.uses:
        use.buffer.user = f"{task.queue} {task.name}"
    task.begun = True


def _give_back(task: Task, failed: bool) -> None:
    for buffer, expects, leaves in task.uses:
        if leaves != expects:
            buffer.content = ("half", leaves) if failed else leaves
        buffer.user = None
