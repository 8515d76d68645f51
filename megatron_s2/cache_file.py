"""JSON files in the user's cache folder that remember what was measured on this machine.

Each measurement has a file of its own, whose name is a hash of what the measurement depends on. A file is
written under another name and then renamed, so that several ranks may measure at once and none reads half a
file. A file that cannot be read or written costs a warning, never the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER_VARIABLE = "MEGATRON_S2_CACHE"


def cache_folder() -> Path:
    """Returns $MEGATRON_S2_CACHE, else megatron_s2 in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_s2"


def cache_file_name(what: str, key: Mapping[str, object]) -> str:
    """Returns the file name of a measurement.

    Args:
        what: what was measured; the first part of the name.
        key: what the measurement depends on, as JSON values.
    """
    text = json.dumps(key, sort_keys=True)
    return f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def read_cache_file[T](path: Path, parse: Callable[[dict], T], what: str, warn: bool = True) -> T | None:
    """Returns `parse` of a file's content; None where there is no file or its content is not usable.

    Args:
        parse: raises ValueError, KeyError or TypeError for content that it cannot use.
        what: first word of the warning.
        warn: whether an unusable file is worth a warning.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if warn:
            warnings.warn(f"{what}: {path} is not used, measuring again: {error!r}", stacklevel=3)
        return None


def write_cache_file(path: Path, content: Mapping[str, object], what: str) -> None:
    """Writes a file whole or, with a warning that begins with `what`, not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{what}: {path} cannot be written, the result is not kept: {error}", stacklevel=3)
