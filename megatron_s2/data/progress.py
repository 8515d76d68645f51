"""A progress line on stderr: documents, megabytes, megabytes per second."""

import sys
import time


class Progress:
    """Shows how far a pass over documents has come; a context manager.

    On a terminal one line is rewritten five times a second; elsewhere (a log file) a new line is
    written every ten seconds. The last state is always shown, also when the pass ends early.
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
        """Seconds since the pass began."""
        return time.monotonic() - self._start

    def add(self, documents: int, size: int) -> None:
        """Count `documents` more documents of `size` bytes together."""
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
