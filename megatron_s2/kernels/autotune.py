"""Autotuning: the fastest of a few tiles is measured once and then read from a file.

It is off by default (`tuning="autotune"` turns it on), because the bits of a result depend on the tiles. Each
choice is a JSON file, written under another name and then renamed, so that several ranks may tune at once.
The first to finish decides for all ranks that share its file system; other ranks may choose differently.
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
    """Returns the folder of the files: $MEGATRON_S2_CACHE, or megatron_s2 in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_s2"


@dataclass(frozen=True)
class Key:
    """Everything on which the fastest tiles of a kernel depend, the list of candidates included.

    Args:
        chip: name of the GPU.
        group: query heads per KV head.
        mask: whether the pattern is an arbitrary mask.
        triton: version of Triton.
        candidates: tiles to choose from.
    """

    kernel: str
    chip: str
    dtype: str
    head_dim: int
    v_head_dim: int
    block_size: int
    group: int
    mask: bool
    triton: str
    candidates: tuple[Tiles, ...]

    @property
    def file_name(self) -> str:
        """Name of the file, different for each key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


class Autotuner:
    """Chooses tiles by measuring them, and stores its choices.

    Args:
        measure: returns the seconds that a launch takes, or infinity if the GPU cannot run it. The launch is
            a function without arguments.
        folder: folder of the files; by default `cache_folder()` at the first choice.
    """

    def __init__(self, measure: Callable[[Callable[[], None]], float], folder: Path | None = None) -> None:
        self._measure = measure
        self._folder = folder
        self._chosen: dict[Key, Tiles] = {}

    def choose(self, key: Key, launch: Callable[[Tiles], None]) -> Tiles:
        """Returns the fastest of `key.candidates`, and of equally fast ones the first."""
        if len(key.candidates) == 1:
            return key.candidates[0]
        if key not in self._chosen:
            path = (self._folder or cache_folder()) / key.file_name
            self._chosen[key] = _read(path, key.candidates) or self._measured(path, key, launch)
        return self._chosen[key]

    def _measured(self, path: Path, key: Key, launch: Callable[[Tiles], None]) -> Tiles:
        seconds = [self._measure(lambda tiles=tiles: launch(tiles)) for tiles in key.candidates]
        best = key.candidates[seconds.index(min(seconds))]
        if path.exists() and (chosen_by_other := _read(path, key.candidates, warn=False)):
            return chosen_by_other
        finite = [x if math.isfinite(x) else None for x in seconds]
        _write(path, {"key": asdict(key), "seconds": finite, "tiles": astuple(best)})
        return best


def _read(path: Path, candidates: Sequence[Tiles], warn: bool = True) -> Tiles | None:
    """Returns the tiles in a file, or None if there is no file with one of the candidates."""
    try:
        tiles = Tiles(*json.loads(path.read_text(encoding="utf-8"))["tiles"])
        if tiles in candidates:
            return tiles
        reason = f"{tiles} is not one of the candidates"
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
