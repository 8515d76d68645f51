"""The gather schedule by groups of heads: the results of one gather, in the memory of one group."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from ranks import run_on_ranks
from selection import exhaustive

from megatron_s2 import S2Pattern
from megatron_s2.kernels.compare import require_equal
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.cost import AttentionCall, gather_backward_bytes
from megatron_s2.parallel.gather_plan import GROUP_TOKENS
from megatron_s2.parallel.planner import plan_layer

RANKS, TOKENS, DIM = 2, 2048, 32
DENSE = S2Pattern(num_kv_heads=8, block_size=16, local_blocks=2, vert_stride=1)
SPARSE = S2Pattern(num_kv_heads=8, block_size=16, local_blocks=2, vert_stride=8)
MIXED = S2Pattern(num_kv_heads=8, block_size=16, local_blocks=3, vert_stride=8, num_dense_heads=4)
PATTERNS = {"dense": DENSE, "sparse": SPARSE, "mixed": MIXED}
# One head at a time, dense heads four at a time (sparse ones all at once), all heads at once.
GROUP_SIZES = {"by head": 1, "by four": 4 * TOKENS, "at once": GROUP_TOKENS}


def shapes(group_tokens: int) -> AttentionCall:
    return AttentionCall(
        RANKS,
        TOKENS,
        1,
        query_heads=8,
        head_dim=DIM,
        v_head_dim=DIM,
        element_size=4,
        group_tokens=group_tokens,
    )


@dataclass
class Outcome:
    results: dict[str, torch.Tensor]
    backward_peak: int  # bytes above those at its start
    received: int
    predicted: int


def outcomes(rank: int, names: list[str]) -> dict[tuple[str, str], Outcome]:
    return {
        (name, size): outcome(rank, PATTERNS[name], group_tokens)
        for name in names
        for size, group_tokens in GROUP_SIZES.items()
    }


def outcome(rank: int, pattern: S2Pattern, group_tokens: int) -> Outcome:
    draw = torch.Generator().manual_seed(rank)
    q, k, v, dout = (torch.randn(1, TOKENS // RANKS, 8, DIM, generator=draw) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    group = ContextParallelGroup(torch.distributed.group.WORLD)
    out = context_parallel_attention(q, k, v, pattern, group, "gather", group_tokens=group_tokens)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    results = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
    received, predicted = group.traffic.received[0], group.traffic.predicted[0]
    # Gloo's thread may hold a message for some time after it has arrived: the least of several runs.
    peak = min(
        peak_bytes(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)) for _ in range(5)
    )
    return Outcome(results, peak, received, predicted)


def peak_bytes(function: Callable) -> int:
    """The most bytes of tensors that a function had allocated and not freed."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()  # noqa: F841  (alive as long as the profile)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.fixture(scope="module", params=["mixed", *exhaustive("dense", "sparse")])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def on_ranks(name, tmp_path_factory) -> list[dict[tuple[str, str], Outcome]]:
    return run_on_ranks(RANKS, outcomes, tmp_path_factory.mktemp("ranks"), [name])


@pytest.mark.parametrize("size", ["by head", "by four"])
def test_groups_of_heads_compute_what_one_gather_computes(on_ranks, name, size):
    for of_rank in on_ranks:
        got, exact = of_rank[name, size], of_rank[name, "at once"]
        require_equal(got.results, exact.results, most=1e-5)
        assert got.received == got.predicted


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_the_backward_takes_the_memory_that_the_planner_counts(on_ranks, name, size):
    counted = gather_backward_bytes(PATTERNS[name], shapes(GROUP_SIZES[size]))
    for rank, of_rank in enumerate(on_ranks):
        # A tenth: what a kernel copies of its queries is not counted. (With one to three heads the torch
        # backend copies keys, too, for its threads.)
        assert of_rank[name, size].backward_peak == pytest.approx(counted[rank], rel=0.1)


def test_a_dense_layer_of_a_million_tokens_needs_8_gigabytes_for_its_backward():
    """In one group of all heads the gradients of the shards took 17 GB of it."""
    dense = S2Pattern(num_kv_heads=8, block_size=64, local_blocks=16, vert_stride=1)
    call = AttentionCall(
        ranks=8, tokens=2**20, batch=1, query_heads=32, head_dim=128, v_head_dim=128, element_size=2
    )
    by_head, at_once = (
        plan_layer(dense, replace(call, group_tokens=size)).schedules["gather"].backward_bytes / 1e9
        for size in (GROUP_TOKENS, 8 * GROUP_TOKENS)
    )
    assert (round(by_head, 1), round(at_once, 1)) == (7.5, 22.0)
