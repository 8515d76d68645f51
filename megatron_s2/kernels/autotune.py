"""Which of a few tiles are fastest on this GPU: measured once, then read from a file.

Off unless asked for (`tuning="autotune"`), since the bits of a result depend on the tiles. Each choice is a
JSON file of its own, written whole under another name and then renamed, so that several ranks may tune at
once: the first to finish decides for those of its file system, and ranks that cannot see its file may choose
otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from megatron_s2.kernels.tuning import Tiles

FOLDER_VARIABLE = "MEGATRON_S2_CACHE"


def cache_folder() -> Path:
    """Where choices are kept: $MEGATRON_S2_CACHE, else megatron_s2 in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_s2"


@dataclass(frozen=True)
class Key:
    """What the best tiles of a kernel depend on. `candidates` is part of it: another list, another choice."""

    kernel: str
    chip: str
    dtype: str
    head_dim: int
    v_head_dim: int
    block_size: int
    group: int  # query heads of a KV head
    mask: bool  # an arbitrary mask
    triton: str
    candidates: tuple[Tiles, ...]

    @property
    def file_name(self) -> str:
        """Differs where the key does."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


class Autotuner:
    """Chooses tiles by measuring, and remembers.

    Args:
        measure: seconds that one launch takes, given as a function without arguments; infinite where the
            chip cannot run it.
        folder: where choices are kept; `cache_folder()` when first needed, by default.
    """

    def __init__(self, measure: Callable[[Callable[[], None]], float], folder: Path | None = None) -> None:
        self._measure = measure
        self._folder = folder
        self._chosen: dict[Key, Tiles] = {}

    def choose(self, key: Key, launch: Callable[[Tiles], None]) -> Tiles:
        """The fastest of `key.candidates`; the first of them where several are equal."""
        if len(key.candidates) == 1:
            return key.candidates[0]
        if key not in self._chosen:
            path = (self._folder or cache_folder()) / key.file_name
            self._chosen[key] = _read(path, key.candidates) or self._measured(path, key, launch)
        return self._chosen[key]

    def _measured(self, path: Path, key: Key, launch: Callable[[Tiles], None]) -> Tiles:
        seconds = [self._measure(lambda tiles=tiles: launch(tiles)) for tiles in key.candidates]
        best = key.candidates[seconds.index(min(seconds))]
        if path.exists() and (of_another_rank := _read(path, key.candidates, warn=False)):
            return of_another_rank
        finite = [x if math.isfinite(x) else None for x in seconds]
        _write(path, {"key": asdict(key), "seconds": finite, "tiles": astuple(best)})
        return best


def _read(path: Path, candidates: Sequence[Tiles], warn: bool = True) -> Tiles | None:
    """The tiles of a file, None where there are none to be had."""
    try:
        tiles = Tiles(*json.loads(path.read_text(encoding="utf-8"))["tiles"])
        if tiles in candidates:
            return tiles
        reason = f"{tiles} is none of its candidates"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = repr(error)
    if warn:
        warnings.warn(f"autotuning: {path} is not used, measuring again: {reason}", stacklevel=2)
    return None


def _write(path: Path, choice: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            json.dump(choice, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"autotuning: {path} cannot be written, the choice is not kept: {error}", stacklevel=2)
