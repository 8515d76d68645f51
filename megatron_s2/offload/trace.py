"""Timelines of an optimizer step: events on queues, and the Chrome-trace file that Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

QUEUE_NAMES = {
    "h2d": "host to GPU",
    "d2h": "GPU to host",
    "cpu": "CPU",
    "gpu": "GPU",
    "nvme_read": "NVMe read",
    "nvme_write": "NVMe write",
}
QUEUES = tuple(QUEUE_NAMES)


@dataclass(frozen=True)
class Event:
    """A task of one queue, with its start and end.

    Raises:
        ValueError: there is no such queue, or the end is before the start.
    """

    queue: str  # one of `QUEUES`
    name: str  # kind of work and subgroup: state 12, weights 12, gradients 12, update 12
    start: float  # seconds from the beginning of the timeline
    end: float

    def __post_init__(self) -> None:
        if self.queue not in QUEUES:
            raise ValueError(f"queue {self.queue}: must be one of {', '.join(QUEUES)}")
        if not self.start <= self.end:
            raise ValueError(f"event {self.name}: ends at {self.end}, before its start at {self.start}")


def span(events: Sequence[Event]) -> float:
    """Seconds from the first start to the last end."""
    if not events:
        return 0.0
    return max(event.end for event in events) - min(event.start for event in events)


def busy_shares(events: Sequence[Event]) -> dict[str, float]:
    """Share of the span in which each queue that has events was busy; events that overlap count once."""
    whole = span(events)
    shares = {}
    for queue in QUEUES:
        of_queue = sorted((event.start, event.end) for event in events if event.queue == queue)
        if of_queue:
            busy, until = 0.0, of_queue[0][0]
            for start, end in of_queue:
                busy += max(0.0, end - max(start, until))
                until = max(until, end)
            shares[queue] = busy / whole if whole else 0.0
    return shares


def of_update(events: Sequence[Event]) -> list[Event]:
    """Events without those of backward and of gradients; all of them where there are no others."""
    rest = [event for event in events if event.name.split()[0] not in ("backward", "gradients")]
    return rest or list(events)


def shifted(events: Sequence[Event], seconds: float) -> list[Event]:
    """The same events, `seconds` later."""
    return [replace(event, start=event.start + seconds, end=event.end + seconds) for event in events]


def bottleneck(events: Sequence[Event]) -> str:
    """Names the busiest queue of the update, in one line.

    Raises:
        ValueError: there are no events.
    """
    events = of_update(events)
    shares = busy_shares(events)
    if not shares:
        raise ValueError("a timeline without events has no bottleneck")
    busiest = max(shares, key=shares.get)
    return f"{QUEUE_NAMES[busiest]} is busiest, {shares[busiest]:.0%} of {span(events):.4g} s"


def write_trace(path: str | Path, timelines: Mapping[str, Sequence[Event]]) -> None:
    """Writes timelines, such as `predicted` and `measured`, as Chrome-trace JSON: a process each, a thread
    per queue, times in microseconds to the nanosecond.

    Raises:
        OSError: the file cannot be written.
    """
    rows: list[dict[str, object]] = []
    for process, (name, events) in enumerate(timelines.items()):
        rows.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        rows.append(
            {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
        )
        used = {event.queue for event in events}
        for thread, queue in enumerate(QUEUES):
            if queue in used:
                where = {"ph": "M", "pid": process, "tid": thread}
                rows.append({**where, "name": "thread_name", "args": {"name": queue}})
                rows.append({**where, "name": "thread_sort_index", "args": {"sort_index": thread}})
        for event in events:
            start, end = round(event.start * 1e6, 3), round(event.end * 1e6, 3)
            rows.append(
                {
                    "ph": "X",
                    "pid": process,
                    "tid": QUEUES.index(event.queue),
                    "name": event.name,
                    "ts": start,
                    "dur": round(end - start, 3),
                }
            )
    Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}), encoding="utf-8")


def read_trace(path: str | Path) -> dict[str, list[Event]]:
    """Returns the timelines of a file that `write_trace` wrote, each in the order of its events' starts.

    Raises:
        ValueError: the file is not such a trace.
        OSError: the file cannot be read.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        names = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
        timelines: dict[str, list[Event]] = {name: [] for name in names.values()}
        for row in rows:
            if row["ph"] == "X":
                start, end = row["ts"] / 1e6, (row["ts"] + row["dur"]) / 1e6
                timelines[names[row["pid"]]].append(Event(QUEUES[row["tid"]], row["name"], start, end))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is not a trace of an optimizer step: {error!r}") from error
    return {name: sorted(events, key=lambda event: event.start) for name, events in timelines.items()}
