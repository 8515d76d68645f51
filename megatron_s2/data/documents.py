"""The one reader of raw text: a JSON-lines file or a directory of text files, as a stream of documents."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from megatron_s2.errors import InputError

JSON_LINES = (".jsonl", ".json")


@dataclass
class Tally:
    """What a pass over a corpus met. Sizes are bytes of UTF-8 text."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    undecodable: int = 0
    unreadable: int = 0
    repeated: int = 0

    def skipped(self) -> str:
        """The skipped ones in words: `skipped 2 empty, 1 undecodable, 0 unreadable, 0 repeated`."""
        kinds = [field.name for field in fields(self) if field.name not in ("documents", "bytes")]
        return "skipped " + ", ".join(f"{getattr(self, kind)} {kind}" for kind in kinds)


@dataclass(frozen=True)
class Corpus:
    """Where documents come from, and which of them.

    `path` is either a file of JSON lines (.jsonl or .json), each line an object whose `json_key`
    holds the text of one document; or a directory, walked recursively in sorted order. There, each
    file whose name matches the glob `pattern` is one document, except .jsonl files, which are read
    line by line. Names that match a glob of `exclude` are left out, directories with all they
    contain; so are names that begin with a dot, unless `pattern` does.

    Symbolic links are followed, but nothing is read twice: what has been reached by another path
    before is counted as repeated. Counted and skipped as well: documents of nothing but white space
    (empty), what is not UTF-8 or contains a NUL character (undecodable: not text), and what the
    user may not open (unreadable).

    Raises:
        InputError: `path` does not exist or is neither; while reading: a line that is no JSON
            object with a string under `json_key`, named as file:line.
    """

    path: str
    json_key: str = "text"
    pattern: str = "*"
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if not os.path.exists(self.path):
            raise InputError(f"--input {self.path}: does not exist; give a .jsonl file or a directory")
        if not os.path.isdir(self.path) and not self.path.endswith(JSON_LINES):
            raise InputError(
                f"--input {self.path}: must be a directory or a file of JSON lines named *.jsonl or *.json"
            )

    def read(self, tally: Tally) -> Iterator[str]:
        """Yield the documents in a fixed order, counting into `tally`."""
        whole_file_is_json = not os.path.isdir(self.path)
        for path in self.files(tally):
            try:
                file = open(path, "rb")  # noqa: SIM115 (opening and reading fail differently)
            except PermissionError:
                tally.unreadable += 1
                continue
            with file:
                if whole_file_is_json or path.endswith(".jsonl"):
                    texts = self._json_lines(path, file)
                else:
                    texts = [_decoded(file.read())]
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
        """Yield the paths of the files to read, each real file once, depth first in sorted order."""
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
        """Bytes of the files to read, before anything is skipped."""
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
            except ValueError as error:
                raise InputError(f"{where}: not a line of JSON: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: must be a JSON object, is {type(record).__name__}")
            if self.json_key not in record:
                raise InputError(f"{where}: has no key {self.json_key!r} (--json-key); it has {list(record)}")
            text = record[self.json_key]
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: {self.json_key!r} (--json-key) must hold a string, is {type(text).__name__}"
                )
            yield text


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _utf8_size(text: str | None) -> int | None:
    """Bytes of the text, or None for what is no text: NUL, or a lone surrogate that JSON can spell."""
    if text is None or "\0" in text:
        return None
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return None
