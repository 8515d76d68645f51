"""Autotuning: the fastest of a few tiles is measured once and then read from a file.

It is off by default (`tuning="autotune"` turns it on), because the bits of a result depend on the tiles. Each
choice is a cache file of its own. Several ranks may tune at once: the first to finish decides for all ranks
that share its file system; other ranks may choose differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from megatron_s2.cache_file import cache_file_name, cache_folder, read_cache_file, write_cache_file
from megatron_s2.kernels.tuning import Tiles

_WHAT = "autotuning"


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
        """Name of the cache file, different for each key."""
        return cache_file_name(self.kernel, asdict(self))


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
            self._chosen[key] = _read(path, key) or self._measured(path, key, launch)
        return self._chosen[key]

    def _measured(self, path: Path, key: Key, launch: Callable[[Tiles], None]) -> Tiles:
        seconds = [self._measure(lambda tiles=tiles: launch(tiles)) for tiles in key.candidates]
        best = key.candidates[seconds.index(min(seconds))]
        if chosen_by_other := _read(path, key, warn=False):
            return chosen_by_other
        finite = [x if math.isfinite(x) else None for x in seconds]
        write_cache_file(path, {"key": asdict(key), "seconds": finite, "tiles": astuple(best)}, _WHAT)
        return best


def _read(path: Path, key: Key, warn: bool = True) -> Tiles | None:
    """Returns the tiles in a file, or None if there is no file with one of the candidates."""

    def parse(content: dict) -> Tiles:
        tiles = Tiles(*content["tiles"])
        if tiles not in key.candidates:
            raise ValueError(f"{tiles} is not one of the candidates")
        return tiles

    return read_cache_file(path, parse, _WHAT, warn)
