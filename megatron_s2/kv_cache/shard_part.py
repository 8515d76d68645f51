"""The part of every head's shard that one rank keeps when a cache is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_s2.pattern import S2Pattern


@dataclass(frozen=True)
class ShardPart(S2Pattern):
    """The pattern whose shards are one rank's parts of the shards of another pattern; see `shard_part`.

    Args:
        firsts: first strided block of each KV head that the rank keeps.
    """

    firsts: tuple[int, ...] = ()

    def first_strided(self, head: int) -> int:
        return super().first_strided(head) if self.is_window_only(head) else self.firsts[head]


def shard_part(pattern: S2Pattern, rank: int, ranks: int) -> S2Pattern:
    """Returns the pattern of what `rank` of `ranks` keeps: the window, and its part of every head's shard.

    The strided blocks of a head are dealt in turn, so the part is again evenly spaced, with a stride of
    `ranks` times the head's. Rank 0 also keeps the sinks. The parts of all ranks are disjoint, and together
    the whole shard; the window is the same on all.
    """
    if ranks == 1:
        return pattern
    heads = range(pattern.num_kv_heads)
    firsts = tuple(pattern.first_strided(g) + rank * pattern.steps[g] for g in heads)
    strides = tuple(ranks * stride for stride in pattern.strides)
    return ShardPart(
        num_kv_heads=pattern.num_kv_heads,
        block_size=pattern.block_size,
        local_blocks=pattern.local_blocks,
        vert_stride=strides,
        sink_blocks=0 if rank else pattern.sink_blocks,
        # Equal for heads of equal parts, and for no others: their first blocks are less than a stride apart.
        phases=tuple(-first % (stride or 1) for first, stride in zip(firsts, strides)),
        warn_lost=False,
        firsts=firsts,
    )
