"""Specification of context-parallel attention: whatever the schedule, several ranks compute what one does.

Case ids read B batch, T tokens of the whole sequence, H KV heads, HQ query heads, D head_dim, then what is
special, then the number of ranks and the schedule.
"""

import pytest
import torch
from kernels.attention_cases import Case, packed, s2
from ranks import run_on_ranks

from megatron_s2.kernels.compare import require_equal
from megatron_s2.parallel.attention import context_parallel_attention
from megatron_s2.parallel.exchange import Exchange
from megatron_s2.parallel.layout import Zigzag

RANKS = (2, 3, 4)
SCHEDULES = ("gather", "a2a")
# 24 tokens are two chunks for each of 2, 3 and 4 ranks; blocks have 16 and shards every fourth block.
CASES = [
    *(Case(s2(), "gqa", group=group, queries=384) for group in (2, 4)),
    *(Case(s2(), "length", queries=n, batch=1) for n in (24, 48, 120, 192, 408)),
    Case(s2(4), "several heads for each rank", queries=384, group=1),
    Case(s2(3), "KV heads that ranks share", queries=240),
    Case(s2(local_blocks=1), "window of the diagonal", queries=240),
    Case(s2(local_blocks=5), "window over several chunks", queries=240),
    Case(s2(local_blocks=40), "window beyond the length", queries=240),
    Case(s2(vert_stride=5), "stride that does not divide the chunk", queries=384),
    Case(s2(vert_stride=100), "shard beyond the length", queries=240),
    Case(s2(vert_stride=1), "dense", queries=264),
    Case(s2(4, vert_stride=(2, 4, 1, 3), phases=(0, 3, 0, 1)), "mixed strides", queries=360),
    Case(s2(4, num_dense_heads=2), "dense heads", queries=384),
    Case(s2(4, vert_stride=3, phases=(1, 1, 1, 0)), "neighbours of equal phase", queries=384),
    Case(s2(sink_blocks=1), "sink block", queries=384),
    Case(s2(sink_blocks=30), "sinks beyond the length", queries=384),
    Case(s2(3, sink_blocks=3, num_dense_heads=1), "sinks of both kinds", queries=360, sink_logits=True),
    Case(s2(), "packed many short", **packed(*range(1, 20), 2)),
    Case(s2(), "packed over the chunks", sink_logits=True, **packed(70, 33, 130, 151)),
    Case(s2(4, num_dense_heads=1, sink_blocks=3), "packed dense heads", **packed(205, 100, 7)),
    Case(s2(), "wider v", v_dim=24, queries=240),
    Case(s2(), "narrower v", v_dim=8, sink_logits=True, queries=240),
    Case(s2(), "sequence first", layout="sequence first", queries=240),
    Case(s2(), "scale", softmax_scale=0.7, queries=240),
]
NAMES = ("out", "dq", "dk", "dv", "dsink_logits")


def compute(rank: int, ranks: int, cases: list[Case], dtypes: list[torch.dtype]) -> dict:
    """The rank's part of all results, by (case id, schedule, dtype)."""
    group = torch.distributed.group.WORLD
    return {
        (str(case), schedule, dtype): one_case(case, Exchange(group), schedule, dtype)
        for case in cases
        for schedule in SCHEDULES
        for dtype in dtypes
        if schedule == "gather" or case.pattern.num_kv_heads * case.group >= ranks
    }


def one_case(case: Case, exchange: Exchange, schedule: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    mine = torch.as_tensor(Zigzag(exchange.ranks, case.queries).positions(exchange.rank))
    inputs = case.inputs(dtype)
    tokens = {
        name: inputs[name] if case.documents is None else inputs[name][None]
        for name in ("q", "k", "v", "dout")
    }
    leaves = {name: x.transpose(0, 1)[mine].transpose(0, 1) for name, x in tokens.items()}
    dout = leaves.pop("dout")
    leaves |= {} if inputs["sink_logits"] is None else {"sink_logits": inputs["sink_logits"]}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = context_parallel_attention(
        **{name: leaves.get(name) for name in ("q", "k", "v", "sink_logits")},
        pattern=case.pattern,
        exchange=exchange,
        schedule=schedule,
        softmax_scale=case.softmax_scale,
        documents=case.documents and tuple(zip(case.documents, case.documents[1:])),
    )
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def joined(parts: list[dict[str, torch.Tensor]], case: Case) -> dict[str, torch.Tensor]:
    """The results of all ranks as those of one."""
    order = torch.cat(
        [torch.as_tensor(Zigzag(len(parts), case.queries).positions(r)) for r in range(len(parts))]
    )
    results = {}
    for name in parts[0]:
        if name == "dsink_logits":
            results[name] = sum(part[name] for part in parts)
        else:
            rows = torch.cat([part[name] for part in parts], 1)
            results[name] = torch.empty_like(rows).index_copy_(1, order, rows)
            results[name] = results[name] if case.documents is None else results[name][0]
    return results


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"P{ranks}")
def on_ranks(request, tmp_path_factory):
    ranks = request.param
    directory = tmp_path_factory.mktemp(f"ranks{ranks}")
    return run_on_ranks(ranks, compute, directory, ranks, CASES, [torch.float64])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_computes(on_ranks, case, schedule):
    parts = [part.get((str(case), schedule, torch.float64)) for part in on_ranks]
    if parts[0] is None:
        assert case.pattern.num_kv_heads * case.group < len(on_ranks)
        return
    exact = case.results("reference", lse=False)
    exact.pop("lse")
    require_equal(joined(parts, case), exact)
