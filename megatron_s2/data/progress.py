"""A progress line on stderr: documents, megabytes, megabytes per second."""

import sys
import time


class Progress:
    """A context manager that shows the progress of a pass over documents.

    On a terminal it rewrites one line five times a second; to a file it writes a line every ten seconds.
    The final state is always shown, even if the pass ends early.
    """

    def __init__(self, label: str):
        self._label = label
        self._stream = sys.stderr
        self._interval = 0.2 if self._stream.isatty() else 10.0
        self._documents = 0
        self._bytes = 0

    def __enter__(self) -> "Progress":
        self._start = self._shown = time.monotonic()
        return self

    def __exit__(self, *exception) -> None:
        self._show(last=True)

    @property
    def seconds(self) -> float:
        """Seconds since the pass started."""
        return time.monotonic() - self._start

    def add(self, documents: int, size: int) -> None:
        """Adds `documents` documents of `size` bytes in total."""
        self._documents += documents
        self._bytes += size
        if time.monotonic() - self._shown >= self._interval:
            self._show(last=False)

    def _show(self, last: bool) -> None:
        self._shown = time.monotonic()
        megabytes = self._bytes / 1e6
        rate = megabytes / max(self.seconds, 1e-9)
        line = f"{self._label}: {self._documents} documents, {megabytes:.1f} MB, {rate:.1f} MB/s"
        if self._stream.isatty():
            line = f"\r\x1b[K{line}" + ("\n" if last else "")
        else:
            line += "\n"
        self._stream.write(line)
        self._stream.flush()
