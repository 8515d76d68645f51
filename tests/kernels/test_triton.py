"""Specification of the Triton kernels: they give what dense masked attention gives, as exactly as PyTorch.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported: one
test runs this very file again in a process of its own. On a GPU (`pytest -m gpu`) the same tests run there.

Case ids read B batch, T queries, H KV heads, HQ query heads, D head_dim, then what is special.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_cases import Case, packed, random_mask, s2
from torch.utils.flop_counter import FlopCounterMode

from megatron_s2 import s2_attention
from megatron_s2.kernels.compare import attention_results, require_as_exact_as_plain, require_equal
from megatron_s2.kernels.tuning import Tiles, Tuning, tuning_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu
# The interpreter multiplies the bits of a bfloat16 as if they were integers.
LOW_PRECISION = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


def cut(rows: int, keys: int, span: int | None = None) -> Tuning:
    """The same tiles for every kernel."""
    return Tuning(*[Tiles(rows, keys, 4, 2)] * 3, span=span)


def case(pattern, special: str, tuning: Tuning, **others) -> Case:
    return Case(pattern, special, device=DEVICE, tuning=tuning, **{"batch": 1, **others})


CASES = [
    *(case(s2(), "gqa", cut(32, 32), batch=2, group=group) for group in (1, 2, 4)),
    *(
        case(s2(sink_blocks=1), f"tiles {rows}x{keys}", cut(rows, keys), queries=200)
        for rows, keys in ((16, 16), (16, 64), (64, 16), (128, 32), (32, 128), (128, 128))
    ),
    *(
        case(s2(1, block_size=block), f"block {block}", cut(*tiles), queries=6 * block + 7, group=1)
        for block, tiles in ((32, (64, 16)), (64, (32, 128)), (128, (128, 64)))
    ),
    *(case(s2(), "length", cut(64, 32), queries=n, group=1) for n in (1, 15, 16, 17, 33, 64, 65)),
    *(
        case(s2(1, sink_blocks=1, vert_stride=3), f"span {span}", cut(32, 32, span), queries=250)
        for span in (32, 50, 64)
    ),
    case(s2(local_blocks=1), "window of the diagonal", cut(64, 64), queries=130),
    case(s2(local_blocks=20), "window beyond the length", cut(64, 64), queries=130),
    case(s2(vert_stride=100), "shard beyond the length", cut(64, 64), queries=130),
    case(s2(vert_stride=1), "dense", cut(64, 32)),
    case(s2(4, vert_stride=(2, 4, 1, 3), phases=(0, 3, 0, 1)), "mixed strides", cut(64, 32), queries=200),
    case(s2(4, num_dense_heads=2), "dense heads", cut(64, 64, 64), queries=150, group=1),
    case(s2(sink_blocks=5), "more sinks than window", cut(64, 64), queries=200),
    case(s2(sink_blocks=9), "sinks beyond the length", cut(32, 64)),
    case(s2(), "sink logits", cut(32, 32), sink_logits=True),
    case(s2(3, sink_blocks=3, num_dense_heads=1), "all sinks", cut(64, 32), queries=150, sink_logits=True),
    case(s2(), "packed many short", cut(32, 32), **packed(*range(1, 6), 3, 40)),
    case(s2(), "packed with empty", cut(32, 64), sink_logits=True, **packed(0, 70, 0, 0, 33, 0)),
    case(s2(3, num_dense_heads=1, sink_blocks=3), "packed dense heads", cut(64, 32, 40), **packed(65, 100)),
    case(s2(), "packed one", cut(32, 32), **packed(111)),
    case(s2(), "q_start aligned", cut(32, 32), q_start=64),
    case(s2(), "q_start inside window", cut(64, 32), q_start=16),
    case(s2(), "q_start unaligned", cut(64, 32), q_start=77, sink_logits=True),
    case(s2(), "q_start inside a block", cut(32, 32), q_start=130, queries=5),
    case(s2(sink_blocks=4, num_dense_heads=1), "one query at the end", cut(64, 32), q_start=150, queries=1),
    case(s2(), "unused keys", cut(32, 32), q_start=40, unused_keys=37),
    case(s2(), "wider v", cut(32, 32), v_dim=24),
    case(s2(), "narrower v", cut(32, 32), v_dim=8, sink_logits=True),
    case(s2(), "padded", cut(32, 32), dim=24, v_dim=40),
    case(s2(), "odd head_dim", cut(32, 32), dim=11, v_dim=5),
    *(case(s2(1), "", cut(64, 32), group=1, queries=70, dim=dim) for dim in (64, 80, 96, 128, 192, 256)),
    case(s2(), "sequence first", cut(32, 32), batch=2, layout="sequence first"),
    case(s2(), "head_dim apart", cut(32, 32), batch=2, layout="head_dim apart"),
    case(s2(), "scale", cut(32, 32), softmax_scale=0.7),
]  # fmt: skip

# One for each kind of work the kernels do: numbers in low precision do not depend on more.
LOW_PRECISION_CASES = [
    case(s2(sink_blocks=1), "", cut(64, 32), queries=200),
    case(s2(3, num_dense_heads=1), "sinks", cut(32, 64, 64), queries=150, sink_logits=True, group=1),
    case(s2(), "packed", cut(32, 32), **packed(0, 70, 5, 33)),
    case(s2(), "q_start", cut(32, 32), q_start=77, v_dim=24, layout="sequence first"),
]


def require_right(case: Case, dtype: torch.dtype) -> None:
    """float32 to 1e-5, where rounding is luck and logic is not; lower precision by flash-attention's rule."""
    rounded = {name: x if x is None else x.double() for name, x in case.inputs(dtype).items()}
    exact = attention_results(case.attention("reference"), **rounded)
    if dtype == torch.float32:
        require_equal(case.results("triton", dtype), exact, most=1e-5)
    else:
        require_as_exact_as_plain(case.results("triton", dtype), case.results("plain", dtype), exact)


@on_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_reference(case):
    require_right(case, torch.float32)


@on_device
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LOW_PRECISION_CASES if INTERPRETED else CASES, ids=str)
def test_low_precision_is_as_exact_as_plain_pytorch(case, dtype):
    require_right(case, dtype)


@on_device
@pytest.mark.parametrize(
    "dtype", [torch.float32] if INTERPRETED else [torch.float32, *LOW_PRECISION], ids=str
)
@pytest.mark.parametrize("dim", [16] if INTERPRETED else [64, 128, 256])
def test_the_shipped_tiles(dim, dtype):
    require_right(case(s2(3, num_dense_heads=1), "as shipped", None, queries=300, dim=dim), dtype)


@on_device
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_through_one_result_alone(through):
    one = case(s2(), "", cut(32, 32), sink_logits=True)
    only = {"out": through == "out", "lse": through == "lse"}
    require_equal(one.results("triton", torch.float32, **only), one.results("reference", **only), most=1e-5)


@on_device
def test_two_runs_give_the_same_bits():
    twice = case(s2(3, sink_blocks=3, num_dense_heads=1), "", cut(64, 32, 64), queries=200, sink_logits=True)
    first, second = (twice.results("triton", torch.float32) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@on_device
def test_sink_logits_may_be_strided():
    strided = case(s2(), "", cut(32, 32), sink_logits=True)
    inputs = strided.inputs(torch.float32)
    apart = torch.stack([inputs["sink_logits"]] * 2, 1)[:, 0]
    same = strided.attention("triton")(*(inputs[x] for x in ("q", "k", "v", "sink_logits")))
    assert torch.equal(strided.attention("triton")(*(inputs[x] for x in "qkv"), apart)[1], same[1])


@on_device
@pytest.mark.parametrize("shape", [(0, 40), (2, 0)], ids=["no sequence", "no token"])
def test_nothing_in_nothing_out(shape):
    q, k = (torch.randn(*shape, heads, 16, requires_grad=True, device=DEVICE) for heads in (4, 2))
    out, lse = s2_attention(q, k, k, s2(), backend="triton")
    (out.sum() + lse.sum()).backward()
    assert out.shape == q.shape and lse.shape == (shape[0], 4, shape[1]) and not k.grad.any()


@on_device
def test_upstream_gradients_may_be_expanded():
    inputs = case(s2(), "", cut(32, 32)).inputs(torch.float32)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")

    def gradients(backend: str):
        out, lse = s2_attention(q, k, v, s2(), backend=backend)
        return torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))

    for got, expected in zip(gradients("triton"), gradients("reference")):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@on_device
def test_a_second_derivative_is_refused():
    inputs = case(s2(), "", cut(32, 32)).inputs(torch.float32)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out = s2_attention(q, k, v, s2(), backend="triton")[0]
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@on_device
@pytest.mark.parametrize("layout", ["batch first", "sequence first"])
def test_the_operators_keep_what_torch_library_asks_of_them(layout):
    from megatron_s2.kernels import triton_backend

    one = case(s2(), "", cut(32, 32), queries=40, layout=layout, sink_logits=True)
    inputs = one.inputs(torch.float32)
    q, k, v, sink_logits = (inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits"))
    shape, code = triton_backend._shape_of(one.pattern), one.tuning.encode()
    torch.library.opcheck(
        torch.ops.megatron_s2.attention_forward, (q, k, v, sink_logits, shape, 0.25, [], 0, code)
    )
    out, lse = (x.detach() for x in s2_attention(q, k, v, one.pattern, backend="triton"))
    torch.library.opcheck(
        torch.ops.megatron_s2.attention_backward,
        (
            inputs["dout"],
            inputs["dlse"],
            *(x.detach() for x in (q, k, v)),
            out,
            lse,
            shape,
            0.25,
            [],
            0,
            code,
        ),
    )


@on_device
@pytest.mark.parametrize(
    "change, allowed",
    [
        ({"dtype": torch.float64}, "q torch.float64: must be float16, bfloat16 or float32"),
        ({"dim": 257}, "q (1, 8, 4, 257): must have at most 256 as head_dim"),
        ({"v_dim": 300}, "v (1, 8, 2, 300): must have at most 256 as head_dim"),
        ({"pattern": random_mask(2, 1)}, "pattern BlockMaskPattern: must be an S2Pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_kernels_do_not_take_is_refused(change, allowed):
    dtype = change.pop("dtype", torch.float32)
    few = replace(case(s2(), "", cut(32, 32), queries=8), **change)
    with pytest.raises(ValueError) as error:
        few.results("triton", dtype)
    assert str(error.value).startswith(allowed) and "use backend torch" in str(error.value)


@on_device
@pytest.mark.parametrize(
    "options",
    [{"q_start": 37}, packed(0, 70, 33), {"batch": 2, "v_dim": 24}],
    ids=["q_start", "packed", "batch"],
)
def test_pytorch_counts_the_flops_of_visible_pairs_alone(options):
    one = case(s2(3, sink_blocks=2, vert_stride=(1, 3, 5), phases=(0, 1, 3)), "", cut(32, 32), **options)
    one.results("triton", torch.float32)  # the first call brings the operators with their formulas
    with FlopCounterMode(display=False) as counter:
        one.results("triton", torch.float32)
    forward = torch.ops.megatron_s2.attention_forward
    backward = torch.ops.megatron_s2.attention_backward
    counted = counter.get_flop_counts()["Global"]

    offsets = one.documents or (0, one.q_start + one.queries)
    lengths = [b - a for a, b in pairwise(offsets)]
    visible = [one.pattern.flops(n, 3 * one.group, one.dim, one.v_dim) for n in lengths]
    unseen = one.pattern.flops(one.q_start, 3 * one.group, one.dim, one.v_dim)
    assert counted[forward] == one.batch * (sum(x.forward for x in visible) - unseen.forward)
    assert counted[backward] == one.batch * (sum(x.backward for x in visible) - unseen.backward)


if INTERPRETED:

    @pytest.fixture
    def visits(monkeypatch):
        """Visible pairs of every tile that the row kernels and the column kernels visit."""
        from megatron_s2.kernels import triton_columns, triton_rows

        found = {"forward": [], "dq": [], "dkv": []}

        def data(x):
            return x.handle.data

        def count_row_tile(*args):
            rows, keys, mask = len(data(args[3])), data(args[7]), args[10]
            pairs = (
                rows * keys.sum() if mask is None else np.broadcast_to(data(mask), (rows, len(keys))).sum()
            )
            found["forward" if args[4] is None else "dq"].append(int(pairs))
            return row_tile(*args)

        def count_column_tile(*args):
            keys, rows, mask = len(data(args[2])), data(args[11]), args[14]
            pairs = keys * rows.sum() if mask is None else (data(mask) & rows[None, :]).sum()
            found["dkv"].append(int(pairs))
            return column_tile(*args)

        row_tile, column_tile = triton_rows._tile, triton_columns._column_tile
        monkeypatch.setattr(triton_rows, "_tile", count_row_tile)
        monkeypatch.setattr(triton_columns, "_column_tile", count_column_tile)
        return found

    VISITED = [s2(1), s2(1, sink_blocks=2, local_blocks=1), s2(1, vert_stride=1), s2(1, local_blocks=5)]

    @pytest.mark.parametrize("tiles", [(16, 16), (64, 32), (32, 64)], ids=str)
    @pytest.mark.parametrize("pattern", VISITED, ids=lambda pattern: pattern.describe())
    def test_every_visible_pair_is_visited_once_and_no_tile_without_one(pattern, tiles, visits):
        seen = case(pattern, "", cut(*tiles, span=64), queries=192, group=1)
        seen.results("triton", torch.float32)
        (pairs,) = pattern.visible_pairs(seen.queries)
        for kernel, tile_pairs in visits.items():
            assert min(tile_pairs) > 0, kernel
            # A key tile wider than a block counts what lies past the end of the shard: zeros, never stored.
            assert sum(tile_pairs) == pairs or (kernel == "dkv" and tiles[1] > pattern.block_size), kernel

    @pytest.mark.parametrize("block", [16, 32])
    @pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
    def test_tiles_of_a_block_visit_the_blocks_of_the_pattern(kernel, block, visits):
        pattern = s2(3, sink_blocks=1, num_dense_heads=1, block_size=block)
        seen = case(pattern, "", cut(block, block), queries=6 * block, group=1)
        seen.results("triton", torch.float32)
        blocks = sum(pattern.visible_blocks(head, row) for head in range(3) for row in range(6))
        assert len(visits[kernel]) == blocks


if not INTERPRETED:

    def test_every_test_of_this_file_in_the_interpreter():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]

    def test_a_cpu_without_the_interpreter_is_refused():
        q = torch.zeros(1, 8, 2, 16)
        with pytest.raises(ValueError, match=r"q on cpu: must be on a CUDA device .* use backend torch"):
            s2_attention(q, q, q, s2(), backend="triton")

    def test_tuning_is_for_the_triton_backend_alone():
        q = torch.zeros(1, 8, 2, 16)
        with pytest.raises(ValueError, match=r"tuning .*: must be None with backend torch"):
            s2_attention(q, q, q, s2(), tuning=tuning_for(9, 16, 2))

    @pytest.mark.parametrize(
        "bad",
        [(24, 32, 4, 2), (8, 32, 4, 2), (32, 0, 4, 2), (32, 32, 3, 2), (32, 32, 4, 0)],
        ids=str,
    )
    def test_tiles_out_of_range_are_refused(bad):
        with pytest.raises(ValueError, match=r"^(rows|keys|warps|stages) \d+: must be"):
            Tiles(*bad)

    def test_tuning_survives_its_encoding():
        for tuning in (tuning_for(9, 128, 2), replace(tuning_for(8, 128, 4), span=100)):
            assert Tuning.decode(tuning.encode()) == tuning

    def test_long_shard_columns_are_cut_where_there_are_few_of_them():
        tuning = tuning_for(9, 128, 2)
        assert [tuning.splits(columns, 65536) for columns in (1, 64, 1024, 100_000)] == [64, 32, 2, 1]
        assert tuning.splits(1, 100) == 1
