"""A model of CUDA streams over one hardware queue, as with CUDA_DEVICE_MAX_CONNECTIONS=1.

The commands of all streams leave one channel in the order of their launch. A command that waits for something
holds up everything behind it, whatever its stream. Kernels and copies end where they begin; a collective runs
beside the channel, until the test ends it.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from waiting import wait_until


class Channel:
    """The hardware queue. `install` puts it under what `CudaBackend` uses of `torch.cuda`.

    Attributes:
        marks: number of events recorded so far, in any stream.
        waits: number of waits launched so far, in any stream.
    """

    def __init__(self) -> None:
        self.marks = self.waits = 0
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._held_by: threading.Event | None = None
        self._current = threading.local()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def launch(self, command: Callable[[], object]) -> None:
        self._commands.put(command)

    def launch_wait(self, event: threading.Event) -> None:
        self.waits += 1
        self.launch(lambda: self._hold(event))

    def settle(self) -> None:
        """Waits until all that was launched is done, or held up."""
        done = threading.Event()
        self.launch(done.set)
        wait_until(lambda: done.is_set() or self._held())

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def install(self, monkeypatch) -> None:
        channel = self

        class Event:
            def __init__(self, **_):
                self.over = threading.Event()

            def record(self, stream):
                channel.marks += 1
                channel.launch(self.over.set)

            def synchronize(self):
                self.over.wait()

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_event(self, event):
                channel.launch_wait(event.over)

        @contextmanager
        def inside(stream_or_device):
            yield

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", inside)
        monkeypatch.setattr(torch.cuda, "device", inside)

    def _hold(self, event: threading.Event) -> None:
        self._held_by = event
        event.wait()

    def _held(self) -> bool:
        return self._held_by is not None and not self._held_by.is_set()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            command()


class Collective:
    """A reduction in progress, whose `wait` is one of the stream, as NCCL's. Its result comes at its end."""

    def __init__(self, channel: Channel, result: Callable[[], object]) -> None:
        self._channel, self._result, self._over = channel, result, threading.Event()

    def is_completed(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        self._channel.launch_wait(self._over)

    def end(self) -> None:
        self._result()
        self._over.set()
