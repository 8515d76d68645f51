"""Specification of context-parallel attention: in both schedules several ranks compute what one rank does.

Case ids: B batch, T tokens of the whole sequence, H KV heads, HQ query heads, D head_dim, the special
feature, the number of ranks and the schedule.
"""

from functools import cache
from itertools import product

import pytest
import torch
from attention_cases import Case, of_query_heads, packed, s2
from interpreter import quicken_interpreter
from largest_tensor import LargestTensor
from ranks import run_on_ranks
from selection import exhaustive, thinned
from transfers import Transfers

from megatron_s2 import S2Pattern
from megatron_s2.kernels.compare import attention_results, require_as_exact_as_plain, require_equal
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.gather_plan import GROUP_TOKENS, plan_gather
from megatron_s2.parallel.layout import Zigzag

SCHEDULES = ("gather", "a2a")
PACKED_OVER = Case(s2(), "packed over the chunks", sink_logits=True, **packed(70, 33, 130, 151))
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
    Case(s2(4, vert_stride=0, local_blocks=5), "window only", queries=240),
    Case(s2(4, vert_stride=(0, 4, 1, 0), sink_blocks=1), "window only mixed", queries=240, sink_logits=True),
    Case(s2(4, vert_stride=(0, 0, 3, 0)), "window only packed", **packed(205, 100, 7)),
    Case(s2(4, vert_stride=3, phases=(1, 1, 1, 0)), "neighbours of equal phase", queries=384),
    Case(s2(sink_blocks=1), "sink block", queries=384),
    Case(s2(sink_blocks=30), "sinks beyond the length", queries=384),
    Case(s2(3, sink_blocks=3, num_dense_heads=1), "sinks of both kinds", queries=360, sink_logits=True),
    Case(s2(), "packed many short", **packed(*range(1, 20), 2)),
    PACKED_OVER,
    Case(s2(4, num_dense_heads=1, sink_blocks=3), "packed dense heads", **packed(205, 100, 7)),
    of_query_heads(2, "of a group", queries=240, sink_logits=True),
    of_query_heads(2, "packed", **packed(205, 100, 7)),
    Case(s2(), "wider v", v_dim=24, queries=240),
    Case(s2(), "narrower v", v_dim=8, sink_logits=True, queries=240),
    Case(s2(), "sequence first", layout="sequence first", queries=240),
    Case(s2(), "scale", softmax_scale=0.7, queries=240),
]
# On four ranks those of the default suite, and the others; on three ranks all.
FEW = [
    case
    for case in CASES
    if case.queries in (24, 120)
    or case.special
    in (
        *("gqa", "KV heads that ranks share", "window over several chunks", "mixed strides"),
        *("window only", "window only mixed"),
        *("neighbours of equal phase", "sinks of both kinds", "packed over the chunks", "narrower v"),
        "query heads of a group",
    )
]
CASES_OF = {"P4": FEW, "P4 others": [case for case in CASES if case not in FEW], "P3": CASES}
ON_RANKS = [(runs, case) for runs, cases in CASES_OF.items() for case in cases]
NAMES = {"out", "dq", "dk", "dv", "dsink_logits"}
LOW_PRECISION = [
    Case(s2(4, num_dense_heads=1, sink_blocks=1), "everything", queries=768, sink_logits=True),
    Case(s2(4), "packed", **packed(200, 136, 400, 32)),
]
IN_TRITON = [
    Case(s2(2, sink_blocks=1), "gqa", batch=1, queries=128, sink_logits=True),
    Case(s2(2, local_blocks=3), "windows over several chunks", batch=1, queries=120),
    Case(s2(3, num_dense_heads=1), "dense head", batch=1, queries=144, group=1),
    Case(s2(3, vert_stride=(0, 4, 0)), "window only", batch=1, queries=144, group=1),
    Case(s2(2), "packed", **packed(70, 3, 100, 19)),
    Case(s2(2), "wider v", v_dim=24, batch=1, queries=96),
]
ALL_HELD = Case(s2(4, local_blocks=1, vert_stride=8), "memory", batch=1, queries=1152, group=1)
INTERPRETER = {"TRITON_INTERPRET": "1"}


def compute(
    rank: int,
    ranks: int,
    cases: list[tuple[Case, torch.dtype]],
    backend: str = "auto",
    group_tokens: int = GROUP_TOKENS,
) -> dict:
    """Results and traffic of this rank, by (case id, schedule, dtype)."""
    group = torch.distributed.group.WORLD
    if backend == "triton":
        quicken_interpreter()
    return {
        (str(case), schedule, dtype): one_case(
            case, ContextParallelGroup(group), schedule, dtype, backend, group_tokens
        )
        for case, dtype in cases
        for schedule in SCHEDULES
        if schedule == "gather" or case.pattern.num_kv_heads * case.group >= ranks
    }


def one_case(
    case: Case,
    group: ContextParallelGroup,
    schedule: str,
    dtype: torch.dtype,
    backend: str,
    group_tokens: int,
) -> dict:
    positions = torch.as_tensor(Zigzag(group.ranks, case.queries).positions(group.rank))
    inputs = case.inputs(dtype)
    tokens = {
        name: inputs[name] if case.documents is None else inputs[name][None]
        for name in ("q", "k", "v", "dout")
    }
    leaves = {name: x.transpose(0, 1)[positions].transpose(0, 1) for name, x in tokens.items()}
    dout = leaves.pop("dout")
    leaves |= {} if inputs["sink_logits"] is None else {"sink_logits": inputs["sink_logits"]}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = context_parallel_attention(
        **{name: leaves.get(name) for name in ("q", "k", "v", "sink_logits")},
        pattern=case.pattern,
        group=group,
        schedule=schedule,
        softmax_scale=case.softmax_scale,
        documents=case.documents and tuple(zip(case.documents, case.documents[1:])),
        backend=backend,
        group_tokens=group_tokens,
    )
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    results = {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}
    return results | {"traffic": group.traffic}


def joined(parts: list[dict[str, torch.Tensor]], case: Case) -> dict[str, torch.Tensor]:
    """Joins the results of all ranks to those of one rank."""
    order = torch.cat(
        [torch.as_tensor(Zigzag(len(parts), case.queries).positions(r)) for r in range(len(parts))]
    )
    results = {}
    for name in NAMES & parts[0].keys():
        if name == "dsink_logits":
            results[name] = sum(part[name] for part in parts)
        else:
            rows = torch.cat([part[name] for part in parts], 1)
            results[name] = torch.empty_like(rows).index_copy_(1, order, rows)
            results[name] = results[name] if case.documents is None else results[name][0]
    return results


def compute_and_watch(rank: int, ranks: int, cases: list[Case]) -> dict:
    """The rank's part of these cases, the largest tensors of `ALL_HELD`, and what reads the device."""
    cases = [(case, torch.float64) for case in cases]
    cases += [(case, dtype) for case in LOW_PRECISION for dtype in (torch.float32, torch.bfloat16)]
    more = {
        "largest": [largest_tensor(rank, ALL_HELD, x, "torch") for x in SCHEDULES],
        "reads": reads_of_the_device(PACKED_OVER),
    }
    return compute(rank, ranks, cases) | more


def reads_of_the_device(case: Case) -> list[str]:
    """What waits for the device in forward and backward of both schedules, if tensors were on one."""
    with Transfers() as copies:
        for schedule in SCHEDULES:
            group = ContextParallelGroup(torch.distributed.group.WORLD)
            one_case(case, group, schedule, torch.float32, "torch", GROUP_TOKENS)
    return copies.to_host


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Returns the results of each rank by the name of a run in `CASES_OF`, computed once."""

    @cache
    def results(runs: str) -> list[dict]:
        ranks, directory = int(runs[1]), tmp_path_factory.mktemp("ranks")
        return run_on_ranks(ranks, compute_and_watch, directory, ranks, CASES_OF[runs])

    return results


@pytest.fixture
def four_ranks(computed):
    return computed("P4")


@pytest.fixture
def on_ranks(request, computed):
    return computed(request.param)


each_case = pytest.mark.parametrize(
    ("on_ranks", "case"),
    thinned(ON_RANKS, lambda run: run[0] == "P4"),
    indirect=["on_ranks"],
    ids=str,
)


def parts_of(on_ranks, case: Case, schedule: str, dtype=torch.float64) -> list[dict] | None:
    """The results of each rank, None for `a2a` with more ranks than query heads."""
    parts = [part.get((str(case), schedule, dtype)) for part in on_ranks]
    if None in parts:
        assert schedule == "a2a" and case.pattern.num_kv_heads * case.group < len(on_ranks)
        return None
    return parts


def without_lse(results: dict) -> dict:
    return {name: x for name, x in results.items() if name != "lse"}


@cache
def reference(case: Case) -> dict[str, torch.Tensor]:
    return without_lse(case.results("reference", lse=False))


@cache
def plain_and_exact(case: Case, dtype: torch.dtype) -> tuple[dict, dict]:
    plain = case.results("plain", dtype, lse=False)
    inputs = {name: x if x is None else x.to(dtype).double() for name, x in case.inputs(dtype).items()}
    exact = attention_results(case.plain_attention, **inputs | {"dlse": None})
    return without_lse(plain), without_lse(exact)


@each_case
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_ranks_compute_what_one_rank_computes(on_ranks, case, schedule):
    if parts := parts_of(on_ranks, case, schedule):
        require_equal(joined(parts, case), reference(case))


@pytest.mark.parametrize(
    ("cases", "group_tokens"),
    [(IN_TRITON[:1], 1), *exhaustive((IN_TRITON[:1], GROUP_TOKENS), (IN_TRITON[1:], 1))],
    ids=["by head", "at once", "all by head"],
)
def test_several_ranks_compute_what_one_rank_computes_in_triton(tmp_path, cases, group_tokens):
    todo = [(case, torch.float32) for case in cases]
    on_ranks = run_on_ranks(2, compute, tmp_path, 2, todo, "triton", group_tokens, env=INTERPRETER)
    for case, schedule in product(cases, SCHEDULES):
        inputs = {name: x if x is None else x.double() for name, x in case.inputs(torch.float32).items()}
        exact = attention_results(case.attention("reference"), **inputs | {"dlse": None})
        parts = parts_of(on_ranks, case, schedule, torch.float32)
        require_equal(joined(parts, case), without_lse(exact), most=1e-5)


@pytest.mark.parametrize("on_ranks", ["P4", *exhaustive("P3")], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_several_ranks_are_as_exact_as_plain_pytorch(on_ranks, case, schedule, dtype):
    got = joined(parts_of(on_ranks, case, schedule, dtype), case)
    require_as_exact_as_plain(got, *plain_and_exact(case, dtype))


@each_case
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bytes_counted_are_the_bytes_predicted(on_ranks, case, schedule):
    if parts := parts_of(on_ranks, case, schedule):
        traffics = [part["traffic"] for part in parts]
        assert all(traffic.received == traffic.predicted for traffic in traffics)
        assert sum(t.received[0] for t in traffics) == sum(t.sent[0] for t in traffics) > 0


def largest_tensor(rank: int, case: Case, schedule: str, backend: str) -> int:
    group = ContextParallelGroup(torch.distributed.group.WORLD)
    inputs = case.inputs(torch.float32)
    positions = torch.as_tensor(Zigzag(group.ranks, case.queries).positions(rank))
    q, k, v, dout = (inputs[name][:, positions] for name in ("q", "k", "v", "dout"))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with LargestTensor() as largest:
        out = context_parallel_attention(q, k, v, case.pattern, group, schedule, backend=backend)
        out.backward(dout)
    return largest.most


def test_no_schedule_waits_for_the_device(four_ranks):
    assert [part["reads"] for part in four_ranks] == [[]] * 4


ALL_KEYS = ALL_HELD.queries * ALL_HELD.pattern.num_kv_heads * ALL_HELD.dim * torch.float32.itemsize


def test_no_rank_holds_all_keys(four_ranks):
    assert all(max(part["largest"]) < ALL_KEYS for part in four_ranks)


def test_layers_of_equal_pattern_share_one_plan():
    plan_gather.cache_clear()
    pattern = S2Pattern(num_kv_heads=8, block_size=16, local_blocks=2, vert_stride=16)
    for layer in 2 * list(range(80)):
        local = pattern.for_layer(layer).tp_slice(0, 2)
        plan_gather(local, Zigzag(4, 1152), 1, ((0, 1152),))
    assert plan_gather.cache_info().misses == 2
