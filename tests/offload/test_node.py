"""Specification of a node: whose its cores are, and that its ranks find each other."""

import os
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks

from megatron_s2.offload.node import Node, share_of_cores

CORES = [frozenset(range(14 * n, 14 * n + 14)) for n in range(8)]
ALL = frozenset(range(112))


@pytest.mark.parametrize(("cores", "shares"), [
    (CORES, [14] * 8),
    ([ALL] * 8, [14] * 8),
    ([CORES[0]] * 8, [1] * 8),
    ([CORES[0]] * 3, [4] * 3),
    ([CORES[0] | CORES[1]] * 4 + [CORES[2] | CORES[3]] * 4, [7] * 8),
    ([ALL] * 16 * 8, [1] * 16 * 8),
    ([CORES[0], CORES[0] | CORES[1]], [7, 21]),
    ([frozenset({3})] * 3, [1] * 3),
    ([frozenset(range(6))] * 3, [2] * 3),
], ids=["bound to cores of their own", "not bound", "all bound to the same", "14 among three",
        "bound to two NUMA nodes", "more ranks than cores", "one within the other's", "one core", "thirds"],
)  # fmt: skip
def test_ranks_divide_only_the_cores_that_they_share(cores, shares):
    assert [share_of_cores(cores, index) for index in range(len(cores))] == shares


def test_one_that_is_alone_has_all_its_cores():
    alone = Node.detect()
    assert (alone.ranks, alone.index, alone.own_cores) == (1, 0, len(os.sched_getaffinity(0)))
    assert alone.exchange("value") == ["value"]


def detect(rank: int) -> tuple:
    """Ranks 0 and 2 are bound to the first core, rank 1 is not bound; rank 0 is in one more group."""
    torch.distributed.new_group([0])
    usable = sorted(os.sched_getaffinity(0))
    if rank != 1:
        os.sched_setaffinity(0, usable[:1])
    node = Node.detect()
    return node.index, [len(cores) for cores in node.cores], node.exchange(10 * rank), len(usable)


def test_ranks_of_a_machine_find_each_other_and_exchange_masks_and_values(tmp_path):
    for rank, (index, cores, values, usable) in enumerate(run_on_ranks(3, detect, tmp_path)):
        assert index == rank and cores == [1, usable, 1] and values == [0, 10, 20]


def on_two_machines(rank: int) -> tuple:
    """Each pair of ranks believes to be on a machine of its own."""
    Path.read_text = lambda self: f"machine {rank % 2}"
    node = Node.detect()
    values = [node.exchange((rank, n)) for n in range(1 + 3 * (rank % 2))]  # more on one than on the other
    return node.index, node.ranks, values


def test_nodes_exchange_values_on_their_own(tmp_path):
    first, second, third, fourth = run_on_ranks(4, on_two_machines, tmp_path)
    assert first == (0, 2, [[(0, 0), (2, 0)]]) and third == (1, 2, first[2])
    assert second == (0, 2, [[(1, n), (3, n)] for n in range(4)]) and fourth == (1, 2, second[2])
