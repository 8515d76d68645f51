"""Counts of an S2 pattern for many lengths at once, by array operations.

The formulas are those of `S2Pattern`, for arrays instead of integers; this module needs numpy.
"""

from __future__ import annotations

import numpy as np

from megatron_s2.pattern.s2_pattern import S2Pattern


def shard_sizes(pattern: S2Pattern, blocks: np.ndarray) -> np.ndarray:
    """`[heads, lengths]`, `pattern.shard_size(head, n)` for each n of `blocks` `[lengths]`."""
    firsts, steps = _shard_constants(pattern)
    strided = -(-(blocks - firsts) // steps)
    return np.clip(blocks, 0, pattern.sink_blocks) + np.maximum(strided, 0)


def visible_pairs(pattern: S2Pattern, lengths: np.ndarray) -> np.ndarray:
    """`[heads, lengths]`, `pattern.visible_pairs(length)` for each length.

    The pairs of all queries before a position are those of the whole rows before it and of the row that it
    cuts. All rows from j + L on see shard block j beyond their windows.
    """
    B, L, sinks = pattern.block_size, pattern.local_blocks, pattern.sink_blocks
    firsts, steps = _shard_constants(pattern)
    rows, cut = np.divmod(np.asarray(lengths, dtype=np.int64), B)

    seen = shard_sizes(pattern, rows - L)  # shard blocks that the last whole row sees beyond its window
    seen_sinks = np.minimum(seen, sinks)
    strided = seen - seen_sinks
    positions = seen_sinks * (seen_sinks - 1) // 2 + strided * firsts
    positions += steps * (strided * (strided - 1) // 2)
    ramp = np.minimum(rows, L)
    window = ramp * (ramp - 1) // 2 + (rows - ramp) * (L - 1)
    past = window + seen * (rows - L) - positions
    past_of_cut = shard_sizes(pattern, rows - L + 1) + np.minimum(rows, L - 1)
    triangles = rows * (B * (B + 1) // 2) + cut * (cut + 1) // 2
    return B * B * past + B * cut * past_of_cut + triangles


def _shard_constants(pattern: S2Pattern) -> tuple[np.ndarray, np.ndarray]:
    """`[heads, 1]`, the first strided block and the step of each KV head."""
    firsts = [pattern.first_strided(g) for g in range(pattern.num_kv_heads)]
    return np.array(firsts)[:, None], np.array(pattern.steps)[:, None]
