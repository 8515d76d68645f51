"""The plan of the a2a schedule: which heads each context-parallel rank computes, over the whole sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

_MAX_IMBALANCE = 1.02  # accepted without further splits of KV groups: each split sends a KV head once more
_MAX_SEARCH_STEPS = 20_000
_MAX_SEARCH_SIZE = 256  # shares x ranks; in larger problems the search finds nothing within its steps


@dataclass(frozen=True)
class HeadShare:
    """Query heads `start` .. `stop`-1 of KV head `kv_head`, computed by one rank."""

    kv_head: int
    start: int
    stop: int


@dataclass(frozen=True)
class HeadPlan:
    """The heads that each rank computes.

    Args:
        shares: `[ranks]`, the shares of each rank.
        costs: `[ranks]`, visible pairs over the query heads of each rank.
    """

    shares: tuple[tuple[HeadShare, ...], ...]
    costs: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Largest cost of a rank divided by the mean."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    def query_heads(self, rank: int) -> list[int]:
        """The query heads that a rank computes, in order."""
        return [h for share in self.shares[rank] for h in range(share.start, share.stop)]

    def kv_heads(self, rank: int) -> list[int]:
        """The KV head of each share of a rank."""
        return [share.kv_head for share in self.shares[rank]]

    def __str__(self) -> str:
        heads = [[f"{s.start}-{s.stop - 1} of KV {s.kv_head}" for s in shares] for shares in self.shares]
        return "; ".join(f"rank {rank}: query heads {', '.join(names)}" for rank, names in enumerate(heads))


@lru_cache(maxsize=256)
def assign_heads(pairs: tuple[int, ...], num_query_heads: int, ranks: int) -> HeadPlan:
    """Assigns KV groups to ranks such that the largest cost of a rank is small.

    Assigns by longest processing time first (Graham 1969), improves by moves and swaps between two ranks
    while one of them lowers the larger of the two costs, and searches all assignments for a better one, which
    is exact for few heads and ranks and is given up after `_MAX_SEARCH_STEPS` otherwise. With fewer KV groups
    than ranks, the query heads of each group are split into as many parts as needed. If the ranks remain
    uneven, groups are split into smaller parts, the most expensive groups first.

    Args:
        pairs: visible pairs of each KV head, for one query head.
        num_query_heads: number of query heads, a multiple of the number of KV heads.
        ranks: number of ranks.

    Raises:
        ValueError: fewer query heads than ranks.
    """
    if num_query_heads < ranks:
        raise ValueError(
            f"ranks {ranks}: must be at most the {num_query_heads} query heads (of a tensor-parallel rank) "
            "when heads move"
        )
    group = num_query_heads // len(pairs)
    best = None
    for attempt, parts in enumerate(_part_counts(pairs, group, ranks)):
        shares = [
            HeadShare(g, g * group + group * part // count, g * group + group * (part + 1) // count)
            for g, count in enumerate(parts)
            for part in range(count)
        ]
        plan = _assign(shares, pairs, group, ranks, search=attempt == 0)
        best = plan if best is None or plan.imbalance < best.imbalance else best
        if best.imbalance <= _MAX_IMBALANCE:
            break
    return best


def _part_counts(pairs: tuple[int, ...], group: int, ranks: int) -> Iterator[list[int]]:
    """Numbers of parts to split each KV group into: first as few as the ranks need, then such that no part
    costs more than the mean of the ranks, than half of it, and so on down to single query heads."""
    fewest = min(group, -(-ranks // len(pairs)))
    yield [fewest] * len(pairs)
    finer, parts = 1, []
    while fewest < group and parts != [group] * len(pairs):
        parts = [min(group, max(fewest, -(-finer * ranks * cost // sum(pairs)))) for cost in pairs]
        yield parts
        finer *= 2


def _assign(
    shares: list[HeadShare], pairs: tuple[int, ...], group: int, ranks: int, search: bool
) -> HeadPlan:
    cost = {share: pairs[share.kv_head] * (share.stop - share.start) for share in shares}
    assigned: list[list[HeadShare]] = [[] for _ in range(ranks)]
    by_load = [(0, 0, rank) for rank in range(ranks)]  # load, shares, rank: of equal loads an idle rank first
    for share in sorted(shares, key=cost.__getitem__, reverse=True):
        load, count, rank = heappop(by_load)
        assigned[rank].append(share)
        heappush(by_load, (load + cost[share], count + 1, rank))
    loads = [load for load, _, rank in sorted(by_load, key=lambda entry: entry[2])]
    _improve(assigned, loads, cost)
    if search:
        assigned = _search(assigned, cost)
    loads = [sum(cost[share] for share in shares) for shares in assigned]
    return HeadPlan(_contiguous(assigned, group), tuple(loads))


def _contiguous(assigned: list[list[HeadShare]], group: int) -> tuple[tuple[HeadShare, ...], ...]:
    """Renumbers the query heads of each group so that no rank has two shares of one KV head.

    Each rank keeps its number of query heads of the group, and receives the KV head only once.
    """
    numbered: Counter[int] = Counter()  # query heads of each KV head that earlier ranks have
    contiguous = []
    for shares in assigned:
        counts: Counter[int] = Counter()
        for share in shares:
            counts[share.kv_head] += share.stop - share.start
        starts = {g: g * group + numbered[g] for g in sorted(counts)}
        contiguous.append(tuple(HeadShare(g, start, start + counts[g]) for g, start in starts.items()))
        numbered += counts
    return tuple(contiguous)


def _improve(assigned: list[list[HeadShare]], loads: list[int], cost: dict[HeadShare, int]) -> None:
    """Lowers the largest load in place, by moves to and swaps with another rank, while that is possible."""
    while True:
        busiest = max(range(len(loads)), key=loads.__getitem__)
        best = None
        for other in range(len(loads)):
            if other == busiest or loads[other] == loads[busiest]:
                continue
            swaps = [None, *assigned[other]] if len(assigned[busiest]) > 1 else assigned[other]
            for given in assigned[busiest]:
                for taken in swaps:
                    shift = cost[given] - (cost[taken] if taken else 0)
                    larger = max(loads[busiest] - shift, loads[other] + shift)
                    if larger < (best[0] if best else loads[busiest]):
                        best = larger, other, given, taken, shift
        if best is None:
            return
        _, other, given, taken, shift = best
        assigned[busiest].remove(given)
        assigned[other].append(given)
        if taken:
            assigned[other].remove(taken)
            assigned[busiest].append(taken)
        loads[busiest] -= shift
        loads[other] += shift


def _search(assigned: list[list[HeadShare]], cost: dict[HeadShare, int]) -> list[list[HeadShare]]:
    """Returns the best assignment that branch and bound finds, or `assigned` if none is better.

    Takes the most expensive share first and the least loaded rank first; ranks of equal load are equivalent.
    """
    shares = sorted(cost, key=cost.__getitem__, reverse=True)
    ranks = len(assigned)
    best = max(sum(cost[share] for share in of_rank) for of_rank in assigned)
    bound = max(-(-sum(cost.values()) // ranks), cost[shares[0]])
    loads, owner, steps = [0] * ranks, [0] * len(shares), 0

    def assign_from(n: int) -> None:
        nonlocal assigned, best, steps
        if n == len(shares):
            best = max(loads)
            assigned = [[s for s, r in zip(shares, owner) if r == rank] for rank in range(ranks)]
            return
        tried = set()
        for rank in sorted(range(ranks), key=loads.__getitem__):
            load = loads[rank]
            if best == bound or steps >= _MAX_SEARCH_STEPS or load + cost[shares[n]] >= best:
                return
            if load not in tried:
                tried.add(load)
                steps += 1
                loads[rank], owner[n] = load + cost[shares[n]], rank
                assign_from(n + 1)
                loads[rank] = load

    if len(shares) * ranks <= _MAX_SEARCH_SIZE:
        assign_from(0)
    return assigned
