"""Specification of the Triton kernels: they equal dense masked attention, as exactly as PyTorch does.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported. One
test therefore runs all files `test_triton*.py` again in a subprocess. On a GPU (`pytest -m gpu`) they run on
it.

Case ids read B batch, T queries, H KV heads, HQ query heads, D head_dim, then the special feature.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import Case, packed, random_mask, s2
from selection import exhaustive, thinned
from triton_cases import DEVICE, INTERPRETED, LOW_PRECISION, case, cut, on_device, require_right

from megatron_s2 import S2Pattern, s2_attention
from megatron_s2.kernels.compare import require_equal
from megatron_s2.kernels.tuning import Tiles, Tuning, tuning_for

CASES = [
    *(case(s2(), "gqa", cut(32, 32), batch=2, group=group) for group in (1, 2, 4)),
    *(
        case(s2(sink_blocks=1), f"tiles {rows}x{keys}", cut(rows, keys), queries=queries)
        for rows, keys, queries in (
            *((16, 16, 120), (16, 64, 120), (64, 16, 120)),
            *((128, 32, 200), (32, 128, 200), (128, 128, 200)),
        )
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
    case(s2(4, vert_stride=(2, 4, 1, 3), phases=(0, 3, 0, 1)), "mixed strides", cut(64, 32), queries=150),
    case(s2(4, num_dense_heads=2), "dense heads", cut(64, 64, 64), queries=150, group=1),
    case(s2(1, vert_stride=0), "window only", cut(32, 64), queries=150),
    case(s2(4, vert_stride=(0, 4, 1, 0), sink_blocks=1), "window only mixed", cut(32, 64), queries=130),
    case(s2(3, vert_stride=(4, 0, 0), sink_blocks=3), "window only packed", cut(32, 32), **packed(65, 0, 90)),
    case(s2(2, vert_stride=(0, 2)), "boxes, window only", cut(16, 16), q_start=77, queries=60),
    case(s2(sink_blocks=5), "more sinks than window", cut(64, 64), queries=200),
    case(s2(sink_blocks=9), "sinks beyond the length", cut(32, 64)),
    case(s2(), "sink logits", cut(32, 32), sink_logits=True),
    case(s2(3, sink_blocks=3, num_dense_heads=1), "all sinks", cut(64, 32), queries=150, sink_logits=True),
    case(s2(), "packed many short", cut(32, 32), **packed(*range(1, 6), 3, 40)),
    case(s2(), "packed with empty", cut(32, 64), sink_logits=True, **packed(0, 70, 0, 0, 33, 0)),
    case(s2(3, num_dense_heads=1, sink_blocks=3), "packed dense heads", cut(64, 32, 40), **packed(65, 100)),
    case(s2(), "packed one", cut(32, 32), **packed(111)),
    case(s2(), "q_start aligned", cut(32, 32), q_start=64),
    case(s2(2, sink_blocks=1), "q_start, span", cut(32, 32, 40), queries=150, q_start=70),
    case(s2(), "q_start inside window", cut(64, 32), q_start=16),
    case(s2(), "q_start unaligned", cut(64, 32), q_start=77, sink_logits=True),
    case(s2(), "q_start inside a block", cut(32, 32), q_start=130, queries=5),
    case(s2(sink_blocks=4, num_dense_heads=1), "one query at the end", cut(64, 32), q_start=150, queries=1),
    case(s2(), "unused keys", cut(32, 32), q_start=40, unused_keys=37),
    case(s2(), "wider v", cut(32, 32), v_dim=24),
    case(s2(), "narrower v", cut(32, 32), v_dim=8, sink_logits=True),
    case(s2(), "padded", cut(32, 32), dim=24, v_dim=40),
    case(s2(), "odd head_dim, scale", cut(32, 32), dim=11, v_dim=5, softmax_scale=0.7),
    *(
        # A GPU's compiler takes minutes for larger tiles of 256 numbers in full precision.
        case(s2(1), "", cut(64, 32) if INTERPRETED or d <= 128 else cut(16, 16), group=1, queries=70, dim=d)
        for d in (64, 80, 96, 128, 192, 256)
    ),
    case(s2(), "sequence first", cut(32, 32), batch=2, layout="sequence first"),
    case(s2(), "head_dim apart", cut(32, 32), batch=2, layout="head_dim apart"),
    *(
        case(random_mask(2, 8), f"mask {rows}x{keys}", cut(rows, keys, 64), queries=120)
        for rows, keys in ((32, 16), (128, 64))
    ),
    case(random_mask(2, 8, 32), "mask of blocks 32", cut(16, 16), queries=150, group=1),
    case(random_mask(3, 9), "mask q_start", cut(32, 64), queries=60, q_start=55, sink_logits=True, group=1),
    case(random_mask(2, 9), "mask one query at the end", cut(64, 32), queries=1, q_start=142),
    case(random_mask(2, 5), "mask packed", cut(16, 64, 32), sink_logits=True, **packed(40, 0, 70, 7)),
    case(random_mask(1, 9), "mask unused keys", cut(64, 32), queries=70, q_start=40, unused_keys=31),
    # Key tiles of at most a block, and rows no longer than a document, are copied by tensor descriptors.
    *(case(s2(), f"boxes, group {group}", cut(32, 16), queries=90, group=group) for group in (1, 3, 4)),
    case(s2(2, 3, block_size=32, sink_blocks=1), "boxes of half a block", cut(32, 16), queries=150),
    case(s2(4, vert_stride=(2, 4, 1, 3), phases=(0, 3, 0, 1)), "boxes mixed", cut(16, 16), sink_logits=True),
    case(s2(), "boxes packed", cut(32, 16, 32), **packed(40, 70, 33, 0, 50)),
    case(s2(), "boxes packed, short", cut(32, 16), **packed(5, 40, 31)),
    case(s2(), "boxes q_start", cut(32, 16), q_start=77, queries=60, unused_keys=7),
    case(s2(), "boxes of wider v", cut(16, 16), queries=60, v_dim=24),
    case(s2(), "scale 0", cut(32, 32), queries=60, softmax_scale=0.0),
    case(s2(), "boxes, negative scale", cut(16, 16), queries=60, softmax_scale=-0.7),
    case(random_mask(2, 8), "mask boxes", cut(16, 16, 64), queries=120),
    case(random_mask(2, 9), "mask boxes q_start", cut(16, 16), queries=70, q_start=32, unused_keys=9),
]  # fmt: skip

# Each value of each parameter, and what is done in a way of its own.
SHORT = {
    *("span 50", "window only mixed", "all sinks", "packed with empty", "q_start unaligned"),
    *("odd head_dim, scale", "sequence first", "mask packed"),
    *("boxes, group 4", "boxes packed, short", "boxes, negative scale", "mask boxes q_start"),
}


def is_short(case: Case) -> bool:
    return not INTERPRETED or case.special in SHORT or case.queries in (1, 33)


# One for each kind of work the kernels do: numbers in low precision do not depend on more.
LOW_PRECISION_CASES = [
    case(s2(sink_blocks=1), "", cut(64, 32), queries=200),
    case(s2(3, num_dense_heads=1), "sinks", cut(32, 64, 64), queries=150, sink_logits=True, group=1),
    case(s2(), "packed", cut(32, 32), **packed(0, 70, 5, 33)),
    case(s2(), "q_start", cut(32, 32), q_start=77, v_dim=24, layout="sequence first"),
    case(random_mask(2, 5), "mask", cut(32, 32), queries=80),
    case(s2(), "boxes", cut(32, 16), queries=90),
]


@on_device
@pytest.mark.parametrize("case", thinned(CASES, is_short), ids=str)
def test_results_and_gradients_equal_the_reference(case):
    require_right(case, torch.float32)


@on_device
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case",
    thinned(LOW_PRECISION_CASES, lambda case: case.special in ("sinks", "boxes")) if INTERPRETED else CASES,
    ids=str,
)
def test_low_precision_is_as_exact_as_plain_pytorch(case, dtype):
    require_right(case, dtype)


@on_device
@pytest.mark.parametrize(
    "dtype", [torch.float32] if INTERPRETED else [torch.float32, *LOW_PRECISION], ids=str
)
@pytest.mark.parametrize("dim", [16] if INTERPRETED else [64, 128, 256])
def test_the_shipped_tiles(dim, dtype):
    require_right(case(s2(3, num_dense_heads=1), "as shipped", None, queries=160, dim=dim), dtype)


@on_device
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_through_out_or_lse_alone(through):
    one = case(s2(), "", cut(32, 32), queries=50, sink_logits=True)
    only = {"out": through == "out", "lse": through == "lse"}
    require_equal(one.results("triton", torch.float32, **only), one.results("reference", **only), most=1e-5)


@on_device
def test_two_runs_give_the_same_bits():
    twice = case(s2(3, sink_blocks=3, num_dense_heads=1), "", cut(64, 32, 32), queries=80, sink_logits=True)
    first, second = (twice.results("triton", torch.float32) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@on_device
def test_sink_logits_may_be_strided():
    strided = case(s2(), "", cut(32, 32), queries=50, sink_logits=True)
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
    inputs = case(s2(), "", cut(32, 32), queries=50).inputs(torch.float32)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")

    def gradients(backend: str):
        out, lse = s2_attention(q, k, v, s2(), backend=backend)
        return torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))

    for got, expected in zip(gradients("triton"), gradients("reference")):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@on_device
def test_a_second_derivative_is_refused():
    inputs = case(s2(), "", cut(32, 32), queries=50).inputs(torch.float32)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out = s2_attention(q, k, v, s2(), backend="triton")[0]
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="gradient of S2 attention has none itself; use backend torch"
    ):
        dq.sum().backward()


if INTERPRETED:

    @pytest.fixture
    def visits(monkeypatch):
        """Visible pairs of every tile that each kernel visits."""
        from megatron_s2.kernels import triton_dkv, triton_dq, triton_forward

        found = {"forward": [], "dq": [], "dkv": []}

        def count(kernel, module, function, rows, keys):
            original = getattr(module, function)
            names = original.arg_names

            def counted(*args):
                given = {name: data(x) for name, x in zip(names, args)}
                mask = given.get("mask")
                for name in keys:
                    tile = (len(given[rows]), len(given[name]))
                    pairs = tile[0] * tile[1] if mask is None else np.broadcast_to(mask, tile).sum()
                    found[kernel].append(int(pairs))
                return original(*args)

            monkeypatch.setattr(module, function, counted)

        def data(x):
            return x.handle.data if hasattr(x, "handle") else x

        count("forward", triton_forward, "_attend", "b_q", ["b_k"])
        count("forward", triton_forward, "_attend_pair", "b_q", ["b_k", "b_k2"])
        count("dq", triton_dq, "_add_dq", "b_q", ["b_k"])
        count("dkv", triton_dkv, "_add_dkv", "b_k", ["b_q"])
        return found

    VISITED = {
        "s2": s2(1),
        "sinks": s2(1, sink_blocks=2, local_blocks=1),
        "dense": s2(1, vert_stride=1),
        "window": s2(1, local_blocks=5),
        "mask": random_mask(1, 12),
    }

    SHORT_VISITS = {"sinks": (64, 32), "mask": (32, 64)}

    @pytest.mark.parametrize(
        ("name", "tiles"),
        [
            *SHORT_VISITS.items(),
            *exhaustive(
                *product(("s2", "sinks", "window", "mask"), [(16, 16)]),
                *(("s2", (32, 64)), ("dense", (32, 64)), ("window", (64, 32))),
            ),
        ],
        ids=str,
    )
    def test_every_visible_pair_is_visited_once_and_no_tile_is_empty(name, tiles, visits):
        pattern = VISITED[name]
        seen = case(pattern, "", cut(*tiles, span=64), queries=192, group=1)
        seen.results("triton", torch.float32)
        (pairs,) = pattern.visible_pairs(seen.queries)
        for kernel, tile_pairs in visits.items():
            assert min(tile_pairs) > 0, kernel
            # A key tile wider than a block counts what lies past the end of the shard: zeros, never stored.
            beyond = kernel == "dkv" and tiles[1] > pattern.block_size and isinstance(pattern, S2Pattern)
            assert sum(tile_pairs) == pairs or beyond, kernel

    @pytest.mark.parametrize(
        ("block", "mask"), [(16, False), (32, True), *exhaustive((32, False), (16, True))]
    )
    def test_tiles_of_a_block_visit_the_blocks_of_the_pattern(mask, block, visits):
        pattern = s2(3, sink_blocks=1, num_dense_heads=1, block_size=block)
        pattern = random_mask(3, 7, block) if mask else pattern
        seen = case(pattern, "", cut(block, block), queries=6 * block, group=1)
        seen.results("triton", torch.float32)
        blocks = sum(pattern.visible_blocks(head, row) for head in range(3) for row in range(6))
        assert {kernel: len(tiles) for kernel, tiles in visits.items()} == dict.fromkeys(visits, blocks)


if not INTERPRETED:

    @pytest.mark.parametrize("selected", ["not exhaustive", *exhaustive("exhaustive")])
    def test_all_triton_tests_pass_in_the_interpreter(selected):
        run = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", selected),
                *Path(__file__).parent.glob("test_triton*.py"),
            ],
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

    @pytest.mark.parametrize(
        "bad",
        [(24, 32, 4, 2), (8, 32, 4, 2), (32, 0, 4, 2), (32, 32, 3, 2), (32, 32, 4, 0)],
        ids=str,
    )
    def test_tiles_out_of_range_are_refused(bad):
        with pytest.raises(ValueError, match=r"^(rows|keys|warps|stages) \d+: must be"):
            Tiles(*bad)

    def test_tuning_decodes_to_what_was_encoded():
        for tuning in (tuning_for(9, 128, 2), replace(tuning_for(8, 128, 4), span=100)):
            assert Tuning.decode(tuning.code) == tuning

    def test_few_long_shard_columns_are_split():
        tuning = tuning_for(9, 128, 2)
        columns = 1, 64, 256, 512, 1024, 100_000
        assert [tuning.splits(n, 65536) for n in columns] == [64, 16, 8, 8, 4, 1]
        assert tuning.splits(1, 100) == 1
