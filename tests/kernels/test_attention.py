"""Specification of s2_attention: the torch backend equals dense masked attention.

Case ids read B batch, T queries, H KV heads, HQ query heads, D head_dim, then the special feature.
"""

import pytest
import torch
from attention_cases import Case, of_query_heads, packed, random_mask, s2
from largest_tensor import LargestTensor
from native_operators import require_native
from selection import exhaustive
from torch.autograd.graph import saved_tensors_hooks

from megatron_s2 import BlockMaskPattern, S2Pattern, s2_attention
from megatron_s2.kernels import torch_calls, torch_flash, torch_native
from megatron_s2.kernels.compare import (
    attention_results,
    require_as_exact_as_plain,
    require_equal,
)

WINDOW, SHARD = 32, 64  # tokens of the window and between two shard blocks in `s2()`

CASES = [
    *(Case(s2(), "gqa", group=group) for group in (1, 2, 4, 8)),
    *(
        Case(s2(), "length", queries=n, batch=1)
        for n in (1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, 47, SHARD, SHARD + 1, 96, 97, 128, 200, 256)
    ),
    Case(s2(local_blocks=1), "window of the diagonal", queries=130),
    Case(s2(local_blocks=20), "window beyond the length", queries=130),
    Case(s2(vert_stride=100), "shard beyond the length", queries=130),
    Case(s2(vert_stride=1), "dense"),
    Case(s2(4, vert_stride=(2, 4, 1, 3), phases=(0, 3, 0, 1)), "mixed strides", queries=200),
    Case(s2(4, num_dense_heads=2), "dense heads", queries=200),
    Case(s2(vert_stride=0), "window only", queries=200),
    Case(s2(4, vert_stride=(0, 4, 1, 0), sink_blocks=1), "window only mixed", queries=200, sink_logits=True),
    Case(s2(3, vert_stride=(4, 0, 0), sink_blocks=5), "window only packed", **packed(65, 0, 130)),
    Case(s2(4, vert_stride=(0, 0, 2, 1)), "window only q_start", q_start=130, queries=41),
    Case(s2(4, vert_stride=3, phases=(1, 1, 1, 0)), "neighbours of equal phase", queries=200),
    Case(s2(sink_blocks=1), "sink block", queries=200),
    Case(s2(sink_blocks=5), "more sinks than window", queries=200),
    Case(s2(sink_blocks=9), "sinks beyond the length"),
    Case(s2(), "sink logits", sink_logits=True),
    Case(s2(3, sink_blocks=3, num_dense_heads=1), "sinks of both kinds", queries=150, sink_logits=True),
    Case(s2(), "packed many short", **packed(*range(1, 20), 3, 40)),
    Case(s2(), "packed with empty", sink_logits=True, **packed(0, 70, 0, 0, 33, 0)),
    Case(s2(), "packed around window", **packed(WINDOW - 1, WINDOW, WINDOW + 1, 120)),
    Case(s2(), "packed one", **packed(111)),
    Case(s2(3, num_dense_heads=1, sink_blocks=3), "packed dense heads", **packed(65, 100)),
    Case(s2(), "q_start aligned", q_start=64),
    Case(s2(), "q_start inside window", q_start=16),
    Case(s2(), "q_start unaligned", q_start=77, sink_logits=True),
    Case(s2(), "q_start inside a block", q_start=130, queries=5),
    Case(s2(sink_blocks=4, num_dense_heads=1), "one query at the end", q_start=150, queries=1),
    Case(s2(), "unused keys", q_start=40, unused_keys=37),
    Case(s2(), "wider v", v_dim=24),
    Case(s2(), "narrower v", v_dim=8, sink_logits=True),
    Case(s2(), "odd head_dim", dim=11, v_dim=5),
    Case(s2(), "sequence first", layout="sequence first"),
    Case(s2(), "head_dim apart", layout="head_dim apart"),
    Case(s2(vert_stride=1), "dense head_dim apart", layout="head_dim apart"),
    Case(s2(), "scale", softmax_scale=0.7),
    Case(random_mask(2, 9), "mask", queries=130),
    Case(random_mask(3, 9), "mask", queries=60, q_start=55, sink_logits=True, group=1),
    Case(random_mask(2, 9), "mask packed", **packed(100, 0, 140, 7)),
    Case(random_mask(2, 1), "mask of one block", queries=10),
    of_query_heads(2, "in pairs", queries=130, sink_logits=True),
    of_query_heads(4, "packed", **packed(70, 0, 61)),
    Case(BlockMaskPattern(torch.eye(7, dtype=torch.bool).expand(2, 7, 7), 16), "mask of the diagonal"),
]  # fmt: skip

# One case for each path through the backend: numbers in low precision do not depend on more.
LOW_PRECISION_CASES = [
    Case(s2(), queries=200),
    Case(s2(3, sink_blocks=3, num_dense_heads=1), "sinks of both kinds", queries=150, sink_logits=True),
    Case(s2(), "packed", **packed(0, 70, 5, 33, 100)),
    Case(s2(3, vert_stride=(0, 4, 1), sink_blocks=1), "window only mixed", queries=150),
    Case(s2(), "q_start", q_start=77, sink_logits=True),
    Case(s2(), "narrower v", v_dim=8, layout="sequence first"),
    Case(random_mask(2, 9), "mask", queries=130),
]


def native(patch):
    """The operators in C++."""
    require_native()


def native_row_by_row(patch):
    """The smallest tasks."""
    require_native()
    patch.setattr(torch_native, "_MOST_ROWS", 1)


def native_bfloat16(patch):
    """Products in bfloat16, as on CPUs with instructions for it."""
    require_native()
    patch.setattr(torch_native, "_multiplies_bfloat16", lambda: True)


def from_python(patch):
    """Without a compiler: the calls one after another."""
    patch.setattr(torch_native, "load", lambda: None)


def row_by_row(patch):
    """The smallest parts of Band calls."""
    from_python(patch)
    patch.setattr(torch_calls, "_MAX_WINDOW_ELEMENTS", 1)


def without_flash_kernel(patch):
    """The path of devices without a flash kernel that returns log-sum-exp, with small score matrices."""
    from_python(patch)
    patch.setattr(torch_flash, "_cpu_forward", torch_flash._matmul_forward)
    patch.setattr(torch_flash, "_cpu_backward", torch_flash._matmul_backward)
    patch.setattr(torch_flash, "_MAX_SCORES", 4000)


PATHS = [
    native,
    from_python,
    *exhaustive(native_row_by_row, native_bfloat16, row_by_row, without_flash_kernel),
]


@pytest.fixture(params=PATHS, ids=lambda path: path.__name__)
def each_path(request, monkeypatch):
    request.param(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_equal_the_reference(case, each_path):
    require_equal(case.results("torch"), case.results("reference"))


@pytest.mark.parametrize(
    "case",
    [
        of_query_heads(3, "q_start", q_start=77, queries=60),
        Case(random_mask(6, 9), "mask", queries=130, group=1, kv_group=3, batch=1),
    ],
    ids=str,
)
def test_query_heads_of_a_group_may_see_different_blocks(case):
    """Beside plain attention with a mask for each query head, which repeats no pattern."""
    inputs = case.inputs(torch.float64)
    assert inputs["k"].shape[2] * 3 == inputs["q"].shape[2] == case.pattern.num_kv_heads
    require_equal(case.results("torch"), case.results("plain"))
    require_equal(case.results("reference"), case.results("plain"))


@pytest.mark.parametrize("through", ["lse", *exhaustive("out")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_out_or_lse_alone(case, through):
    one = {"out": through == "out", "lse": through == "lse"}
    require_equal(case.results("torch", **one), case.results("reference", **one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LOW_PRECISION_CASES, ids=str)
def test_low_precision_is_as_exact_as_plain_pytorch(case, dtype, each_path):
    rounded = {name: x if x is None else x.double() for name, x in case.inputs(dtype).items()}
    exact = attention_results(case.attention("reference"), **rounded)
    require_as_exact_as_plain(case.results("torch", dtype), case.results("plain", dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_out_has_the_dtype_of_q_and_lse_is_at_least_float32(backend, dtype):
    results = Case(s2(), sink_logits=True).results(backend, dtype)
    assert {name: x.dtype for name, x in results.items() if x.dtype != dtype} == (
        {"lse": torch.float32} if dtype == torch.bfloat16 else {}
    )


def test_the_numerical_gradient_agrees():
    case = Case(
        s2(sink_blocks=1, local_blocks=1, vert_stride=2),
        queries=33,
        batch=1,
        dim=3,
        v_dim=2,
        q_start=3,
        sink_logits=True,
    )
    inputs = case.inputs(torch.float64)
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits")]
    assert torch.autograd.gradcheck(case.attention("torch"), tensors)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_two_runs_give_the_same_bits(each_path, two_threads):
    case = Case(s2(4, sink_blocks=3, num_dense_heads=1), queries=300, sink_logits=True)
    first, second = (case.results("torch", torch.float32) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("shape", [(0, 40), (2, 0)], ids=["no sequence", "no token"])
def test_nothing_in_nothing_out(shape):
    q, k = (torch.randn(*shape, heads, 16, requires_grad=True) for heads in (4, 2))
    out, lse = s2_attention(q, k, k, s2())
    (out.sum() + lse.sum()).backward()
    assert out.shape == q.shape and lse.shape == (shape[0], 4, shape[1]) and not k.grad.any()


def test_return_lse_false_returns_out_alone():
    inputs = Case(s2()).inputs(torch.float32)
    q, k, v = (inputs[name] for name in "qkv")
    assert torch.equal(s2_attention(q, k, v, s2(), return_lse=False), s2_attention(q, k, v, s2())[0])


def test_upstream_gradients_may_be_expanded():
    def gradients(backend: str):
        inputs = Case(s2()).inputs(torch.float64)
        q, k, v = (inputs[name].requires_grad_() for name in "qkv")
        out, lse = s2_attention(q, k, v, s2(), backend=backend)
        return dict(zip("qkv", torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))))

    require_equal(gradients("torch"), gradients("reference"))


def test_a_second_derivative_is_refused():
    inputs = Case(s2()).inputs(torch.float64)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    (dq,) = torch.autograd.grad(s2_attention(q, k, v, s2())[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# Memory.


def widened(x: torch.Tensor) -> int:
    """Bytes of x with one more column, which carries the gradient of lse."""
    return x.nbytes // x.shape[-1] * (x.shape[-1] + 1)


@pytest.mark.parametrize(
    "pattern", [s2(), s2(sink_blocks=2), s2(num_dense_heads=1), s2(local_blocks=16)], ids=S2Pattern.describe
)
def test_no_tensor_outgrows_the_queries(pattern):
    case = Case(pattern, batch=1, queries=4096, group=2, dim=32, sink_logits=True)
    inputs = case.inputs(torch.float32)
    with LargestTensor() as largest:
        attention_results(case.attention("torch"), **inputs)
    assert largest.most <= widened(inputs["q"])


def test_without_a_flash_kernel_score_matrices_stay_bounded(monkeypatch):
    without_flash_kernel(monkeypatch)
    monkeypatch.setattr(torch_flash, "_MAX_SCORES", 1 << 18)
    monkeypatch.setattr(torch_calls, "_MAX_WINDOW_ELEMENTS", 1 << 16)
    from_python(monkeypatch)
    case = Case(s2(num_dense_heads=1), batch=1, queries=2048, group=2, dim=32)
    inputs = case.inputs(torch.float32)
    with LargestTensor() as largest:
        attention_results(case.attention("torch"), **inputs)
    assert largest.most <= widened(inputs["q"])


@pytest.mark.parametrize("sink_logits", [False, True], ids=["", "sink logits"])
def test_backward_saves_only_inputs_and_results(sink_logits):
    inputs = Case(s2(), sink_logits=sink_logits).inputs(torch.float32)
    given = {name: x.requires_grad_() for name, x in inputs.items() if name[0] != "d" and x is not None}
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        out, lse = s2_attention(*(inputs[name] for name in "qkv"), s2(), sink_logits=inputs["sink_logits"])
    assert sorted(kept) == sorted(x.data_ptr() for x in (*given.values(), out, lse))


# Bad input.

GOOD = {"q": (2, 40, 4, 16), "k": (2, 40, 2, 16), "v": (2, 40, 2, 16)}
PACKED = {"q": (40, 4, 16), "k": (40, 2, 16), "v": (40, 2, 16)}
OFFSETS = torch.tensor([0, 10, 40])

BAD_SHAPES = [
    ("q", {"q": (40, 4, 16)}, "must be [batch, seq, heads, head_dim]"),
    ("k", {"k": (2, 40, 32)}, "must be [batch, seq, heads, head_dim]"),
    ("v", {"v": (2, 40, 1, 2, 16)}, "must be [batch, seq, heads, head_dim]"),
    ("v", {"v": (2, 41, 2, 16)}, "must match k"),
    ("v", {"v": (2, 40, 1, 16)}, "must match k"),
    ("v", {"v": (2, 40, 2, 0)}, "head_dim >= 1"),
    ("q", {"q": (2, 40, 4, 0)}, "head_dim >= 1"),
    ("k", {"k": (2, 40, 2, 8)}, "head_dim of q, 16"),
    ("k", {"k": (1, 40, 2, 16), "v": (1, 40, 2, 16)}, "batch of q, 2"),
    ("k", {"q": (2, 40, 5, 16)}, "must divide the 5 heads of q"),
    ("pattern", {"k": (2, 40, 4, 16), "v": (2, 40, 4, 16)}, "must be for the 4 heads of k"),
    ("pattern", {"k": (2, 40, 0, 16), "v": (2, 40, 0, 16)}, "must be for the 0 heads of k"),
    ("q_start", {"q": (2, 41, 4, 16)}, "leave room for 41 queries in 40 keys"),
]  # fmt: skip


def refused(name: str, allowed: str, q, k, v, **others) -> None:
    arguments = {"pattern": s2(), **others}
    with pytest.raises(ValueError) as error:
        s2_attention(q, k, v, **arguments)
    assert str(error.value).startswith(f"{name} ") and allowed in str(error.value), error.value


@pytest.mark.parametrize("name, shapes, allowed", BAD_SHAPES, ids=lambda value: str(value))
def test_shapes_that_do_not_fit_are_refused(name, shapes, allowed):
    refused(name, allowed, **{x: torch.zeros(shape) for x, shape in (GOOD | shapes).items()})


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes_are_refused(name, dtype):
    tensors = {x: torch.zeros(shape) for x, shape in GOOD.items()}
    refused(name, "float16, bfloat16, float32 or float64", **tensors | {name: tensors[name].to(dtype)})


@pytest.mark.parametrize("name", "kv")
def test_a_dtype_or_device_that_differs_from_q_is_refused(name):
    tensors = {x: torch.zeros(shape) for x, shape in GOOD.items()}
    refused(name, "the same for q, k and v", **tensors | {name: tensors[name].double()})
    refused(name, "on the device of q, cpu", **tensors | {name: tensors[name].to("meta")})


@pytest.mark.parametrize(
    "others, allowed",
    [
        ({"sink_logits": torch.zeros(2)}, "must be [heads] = [4]"),
        ({"sink_logits": torch.zeros(4, 1)}, "must be [heads] = [4]"),
        ({"sink_logits": torch.zeros(4, dtype=torch.int32)}, "must be float16"),
        ({"sink_logits": torch.zeros(4, device="meta")}, "on the device of q, cpu"),
        ({"backend": "cuda"}, "must be auto, reference, torch or triton"),
        ({"q_start": -1}, "must be >= 0"),
        ({"q_start": 1}, "leave room for 40 queries in 40 keys"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(others, allowed):
    name = next(iter(others))
    refused(name, allowed, **{x: torch.zeros(shape) for x, shape in GOOD.items()}, **others)


@pytest.mark.parametrize(
    "cu_seqlens, allowed",
    [
        (torch.tensor([0, 10, 39]), "from 0 to 40 tokens"),
        (torch.tensor([1, 10, 40]), "from 0 to 40 tokens"),
        (torch.tensor([0, 30, 10, 40]), "must not decrease"),
        (torch.tensor([40]), "from 0 to 40 tokens"),
        (torch.tensor([], dtype=torch.int32), "from 0 to 40 tokens"),
        (torch.tensor([[0, 40]]), "must be int [documents + 1]"),
        (torch.tensor([0.0, 40.0]), "must be int [documents + 1]"),
    ],
    ids=lambda value: str(value).replace("\n", ""),
)  # fmt: skip
def test_bad_document_offsets_are_refused(cu_seqlens, allowed):
    tensors = {x: torch.zeros(shape) for x, shape in PACKED.items()}
    refused("cu_seqlens", allowed, **tensors, cu_seqlens=cu_seqlens)


def test_packed_inputs_have_no_batch_and_no_q_start():
    refused(
        "q",
        "[tokens, heads, head_dim] with cu_seqlens",
        **{x: torch.zeros(s) for x, s in GOOD.items()},
        cu_seqlens=OFFSETS,
    )
    tensors = {x: torch.zeros(shape) for x, shape in PACKED.items()}
    refused("q_start", "must be 0 with cu_seqlens", **tensors, cu_seqlens=OFFSETS, q_start=16)
    refused("k", "tokens of q, 40", **tensors | {x: torch.zeros(39, 2, 16) for x in "kv"}, cu_seqlens=OFFSETS)


def test_a_sequence_longer_than_the_mask_is_refused():
    tensors = {x: torch.zeros(shape) for x, shape in GOOD.items()}
    refused("pattern", "of 2 blocks: must have the 3 of 40 tokens", **tensors, pattern=random_mask(2, 2))
