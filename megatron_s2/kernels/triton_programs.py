"""Programs of a launch: which tile of which document each computes, and tables of them on the device.

Tables are made by array operations, once for a micro-batch, and shared by all layers. An unpacked batch has
none: its programs are numbered as its tiles.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_s2.kernels.triton_capture import is_capturing, keep, require_no_capture
from megatron_s2.kernels.triton_pattern import KernelPattern


class Table:
    """Rows of integers that kernels read, copied to each device once.

    Args:
        rows: `[rows, columns]`.
    """

    def __init__(self, rows: np.ndarray):
        self.rows = np.ascontiguousarray(rows, dtype=np.int32)
        self._copies: dict[torch.device, tuple[Tensor, torch.cuda.Event | None]] = {}

    def on(self, device: torch.device) -> Tensor:
        """Returns the table on a device, int32.

        Raises:
            RuntimeError: it is not there yet, and a CUDA graph is being captured.
        """
        found = self._copies.get(device)
        if found is None:
            require_no_capture(device)
            found = self._copies[device] = self._copied_to(device)
        table, copied = found
        if is_capturing(device):
            keep(table)
        elif copied is not None and copied.query():
            self._copies[device] = table, None
        elif copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)  # another stream may have started the copy
        return table

    def _copied_to(self, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """The table on the device, and an event after its copy, for which the host does not wait."""
        table = torch.from_numpy(self.rows)
        if device.type != "cuda":
            return table.to(device), None
        with torch.cuda.device(device):
            table = table.pin_memory().to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return table, copied


class Programs:
    """The programs of a launch.

    Args:
        count: number of programs.
        table: rows of p_tiles (see `query_program` and `key_program`); None where nothing is packed.
    """

    def __init__(self, count: int, table: Table | None):
        self.count, self.table = count, table

    def arguments(self) -> dict[str, object]:
        """Returns keyword arguments of a kernel, without the table."""
        return {"p_tiles": None, "PACKED": self.table is not None}


class Documents:
    """The documents of a packed batch, or the one sequence of another; `documents_of` makes them.

    Args:
        starts, lengths: first token and number of tokens of each document, `[documents]`.
        packed: whether the batch is packed.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, packed: bool):
        self.starts, self.lengths, self.packed = starts, lengths, packed
        self.longest = int(lengths.max(initial=0))
        self._shards: dict[tuple[KernelPattern, int], np.ndarray] = {}
        self._equal_shards: dict[bytes, np.ndarray] = {}
        self._parts: dict[tuple[int, bool], list[Part]] = {}

    @cached_property
    def whole(self) -> Part:
        return Part(self, np.arange(len(self.starts)), fits=True)

    def parts(self, box: int, divided: bool) -> list[Part]:
        """Returns the documents of at least `box` tokens and the shorter ones, of which there may be none;
        with `divided` off all of them as one part, which fits if they all do."""
        key = box, divided
        if key not in self._parts:
            fits = self.lengths >= box
            if fits.all():
                self._parts[key] = [self.whole]
            elif divided and fits.any():
                self._parts[key] = [Part(self, np.flatnonzero(fits == x), x) for x in (True, False)]
            else:
                self._parts[key] = [Part(self, self.whole.chosen, fits=False)]
        return self._parts[key]

    def shards(self, pattern: KernelPattern, q_start: int) -> np.ndarray:
        """Returns, of each document, the shard tokens of the KV head that has the most, `[documents]`. Layers
        whose patterns differ in phases alone share it."""
        key = pattern, q_start
        if key not in self._shards:
            blocks = (q_start + self.lengths - 1) // pattern.block_size + 1
            tokens = pattern.shard_tokens(blocks).max(-1)
            self._shards[key] = self._equal_shards.setdefault(tokens.tobytes(), tokens)
        return self._shards[key]


class Part:
    """Some documents of a batch.

    Args:
        chosen: their indices.
        fits: whether each has the tokens of a box that tensor descriptors copy.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, fits: bool):
        self.documents, self.chosen, self.fits = documents, chosen, fits
        self._programs: dict[tuple[object, ...], Programs] = {}

    def query_programs(self, q_start: int, rows: int) -> Programs:
        """One program per tile of `rows` tokens. Tiles are aligned to absolute positions."""
        key = "query", q_start, rows
        if key not in self._programs:
            lengths = self.documents.lengths[self.chosen]
            counts = -(-(q_start + lengths) // rows) - q_start // rows
            self._programs[key] = self._tiles(counts)
        return self._programs[key]

    def shard_key_programs(self, pattern: KernelPattern, q_start: int, keys: int) -> Programs:
        """One program per tile of `keys` shard tokens."""
        tokens = self.documents.shards(pattern, q_start)
        key = "shard", q_start, keys, id(tokens)
        if key not in self._programs:
            self._programs[key] = self._tiles(-(-tokens[self.chosen] // keys), tokens)
        return self._programs[key]

    def key_programs(self, pattern: KernelPattern, q_start: int, keys: int, seq_k: int) -> Programs:
        """One program per tile of `keys` tokens of the window source, which has `seq_k`."""
        tokens = self.documents.shards(pattern, q_start)
        key = "key", q_start, keys, seq_k, id(tokens)
        if key not in self._programs:
            counts = self.documents.lengths[self.chosen] if self.documents.packed else np.array([seq_k])
            self._programs[key] = self._tiles(-(-counts // keys), tokens)
        return self._programs[key]

    def _tiles(self, counts: np.ndarray, shards: np.ndarray | None = None) -> Programs:
        """Programs of `counts` tiles of each document: its start, length and their number; where `shards` are
        given, also the shard tokens of the documents before it."""
        total = int(counts.sum())
        if not self.documents.packed:
            return Programs(total, None)
        columns = [self.documents.starts, self.documents.lengths]
        tile = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = [np.repeat(column[self.chosen], counts) for column in columns] + [tile]
        if shards is not None:
            rows.append(np.repeat((np.cumsum(shards) - shards)[self.chosen], counts))
        return Programs(total, Table(np.stack(rows, 1)))


@lru_cache(maxsize=64)
def documents_of(edges: tuple[int, ...], tokens: int) -> Documents:
    """Returns the documents of a batch, for equal ones the same object.

    Args:
        edges: start and stop of each packed document, one after another; empty where nothing is packed.
        tokens: number of query tokens.
    """
    starts, stops = np.array(edges or (0, tokens), dtype=np.int64).reshape(-1, 2).T
    return Documents(starts, stops - starts, bool(edges))
