"""Reads raw text, a JSON-lines file or a directory of text files, as a stream of documents."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from megatron_s2.errors import InputError

JSON_LINES = (".jsonl", ".json")


@dataclass
class Tally:
    """Counts of one pass over a corpus: documents, their size in bytes of UTF-8, and what was skipped."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    undecodable: int = 0
    unreadable: int = 0
    repeated: int = 0

    def skipped(self) -> str:
        """Returns a summary such as `skipped 2 empty, 1 undecodable, 0 unreadable, 0 repeated`."""
        kinds = [field.name for field in fields(self) if field.name not in ("documents", "bytes")]
        return "skipped " + ", ".join(f"{getattr(self, kind)} {kind}" for kind in kinds)


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    `path` is a file of JSON lines (.jsonl or .json), each an object with the text of one document under
    `json_key`; or a directory, which is walked recursively in sorted order. In a directory, each file whose
    name matches the glob `pattern` is one document, except .jsonl and .json files, which are read line by
    line as they are alone. Files and directories whose names match a glob of `exclude` are skipped, and so
    are names that begin with a dot, unless `pattern` does. A byte order mark at the beginning of a file is no
    part of its text.

    Symbolic links are followed, but no file is read twice: one that was already reached by another path
    counts as repeated. Also skipped and counted are documents of white space (empty), those that are not
    UTF-8 or contain a NUL character (undecodable), and files without read permission (unreadable).

    Raises:
        InputError: `path` does not exist or is of another kind; while reading, a line is not a JSON object
            with a string under `json_key`. The message names file and line.
    """

    path: str
    json_key: str = "text"
    pattern: str = "*"
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if not os.path.exists(self.path):
            raise InputError(f"--input {self.path}: does not exist; give a .jsonl file or a directory")
        if not os.path.isdir(self.path) and not _has_json_lines(self.path):
            raise InputError(
                f"--input {self.path}: must be a directory or a file of JSON lines named *.jsonl or *.json"
            )

    def read(self, tally: Tally) -> Iterator[str]:
        """Yields the documents in a fixed order and counts them in `tally`."""
        for path in self.files(tally):
            try:
                file = open(path, "rb")  # noqa: SIM115 (opening and reading fail differently)
            except PermissionError:
                tally.unreadable += 1
                continue
            with file:
                is_text = not _has_json_lines(path)
                texts = [_decoded(file.read())] if is_text else self._json_lines(path, file)
                for text in texts:
                    size = _utf8_size(text)
                    if size is None:
                        tally.undecodable += 1
                    elif not text or text.isspace():
                        tally.empty += 1
                    else:
                        tally.documents += 1
                        tally.bytes += size
                        yield text

    def files(self, tally: Tally) -> Iterator[str]:
        """Yields the paths of the files to read, each file once, depth first in sorted order."""
        seen = set()
        pending = [self.path]
        while pending:
            path = pending.pop()
            is_directory = os.path.isdir(path)
            if not is_directory and not os.path.isfile(path):
                continue
            if path != self.path and not self._selects(os.path.basename(path), is_directory):
                continue
            real = os.path.realpath(path)
            if real in seen:
                tally.repeated += 1
                continue
            seen.add(real)
            if not is_directory:
                yield path
                continue
            try:
                names = os.listdir(path)
            except PermissionError:
                tally.unreadable += 1
                continue
            pending.extend(os.path.join(path, name) for name in sorted(names, reverse=True))

    def size(self) -> int:
        """Returns the total size of the files to read in bytes."""
        return sum(os.path.getsize(path) for path in self.files(Tally()))

    def _selects(self, name: str, is_directory: bool) -> bool:
        if any(fnmatchcase(name, glob) for glob in self.exclude):
            return False
        if name.startswith(".") and not self.pattern.startswith("."):
            return False
        return is_directory or fnmatchcase(name, self.pattern)

    def _json_lines(self, path: str, file) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not a line of JSON: {error}{self._hint(path)}") from error
            if not isinstance(record, dict):
                raise InputError(
                    f"{where}: must be a JSON object, is {type(record).__name__}{self._hint(path)}"
                )
            if self.json_key not in record:
                raise InputError(f"{where}: has no key {self.json_key!r} (--json-key); it has {list(record)}")
            text = record[self.json_key]
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: {self.json_key!r} (--json-key) must hold a string, is {type(text).__name__}"
                )
            yield text

    def _hint(self, path: str) -> str:
        """Returns what to do about a file of a directory that has no JSON lines."""
        return "" if path == self.path else f"; --exclude '*{os.path.splitext(path)[1]}' skips such files"


def _has_json_lines(path: str) -> bool:
    return path.lower().endswith(JSON_LINES)


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _utf8_size(text: str | None) -> int | None:
    """Returns the size of a text in bytes; None if it has a NUL or, from JSON, a lone surrogate."""
    if text is None or "\0" in text:
        return None
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return None
