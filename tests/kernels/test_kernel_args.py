"""Specification of what the host does for the Triton kernels: launches by keyword, on the device of the
tensors, few of them; tables on the device, copied once.

The kernels are replaced by what records their launches, so neither a GPU nor the interpreter is needed.
"""

import ast
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import random_mask, s2

import megatron_s2
from megatron_s2.kernels import (
    triton_args,
    triton_capture,
    triton_dkv,
    triton_dq,
    triton_forward,
    triton_programs,
)
from megatron_s2.kernels.triton_args import KernelArgs
from megatron_s2.kernels.triton_dkv import launch_dkv
from megatron_s2.kernels.triton_dq import launch_delta, launch_dq
from megatron_s2.kernels.triton_forward import launch_forward
from megatron_s2.kernels.triton_pattern import KernelPattern, mask_tables
from megatron_s2.kernels.triton_programs import Table
from megatron_s2.kernels.triton_support import require_supported
from megatron_s2.kernels.tuning import tuning_for
from megatron_s2.pattern import S2Pattern

CPU = torch.device("cpu")


def test_every_kernel_is_launched_by_keyword_on_the_device_of_its_tensors():
    """Of two arguments in the wrong order, such as strides, nothing else would notice; nor, with one GPU, of
    a launch on the current device."""
    calls, guarded = [], []
    for file in Path(megatron_s2.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        calls += [node for node in nodes if _is_launch(node)]
        guards = [node for node in nodes if isinstance(node, ast.With) and _is_guard(node)]
        guarded += [node for guard in guards for node in ast.walk(guard) if _is_launch(node)]
    kernels = {ast.unparse(call.func.value) for call in calls}
    assert len(kernels) == 8
    assert [ast.unparse(call) for call in calls if call.args] == []
    # The optimizer's kernel runs in a stream of its caller, whose device is the current one.
    assert kernels - {ast.unparse(call.func.value) for call in guarded} == {"adamw_kernel"}


def _is_launch(node: ast.AST) -> bool:
    """Whether a node is `…_kernel…[grid](…)`."""
    launched = node.func if isinstance(node, ast.Call) else None
    return isinstance(launched, ast.Subscript) and "_kernel" in ast.unparse(launched.value)


def _is_guard(node: ast.With) -> bool:
    return ast.unparse(node.items[0]).startswith("torch.cuda.device_of(")


# Launches.


@pytest.fixture
def launches(monkeypatch):
    """Name, grid and arguments of each launch; the kernels are not run."""
    found = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda **arguments: found.append((self.name, grid, arguments))

    for module in (triton_forward, triton_dq, triton_dkv):
        for name in vars(module):
            if name.startswith("s2_"):
                monkeypatch.setattr(module, name, Recorder(name))
    return found


def run(pattern, q_shape, kv_heads=2, **call) -> None:
    """Forward and backward in bfloat16, with the tiles of Hopper."""
    batch, tokens, heads, dim = q_shape
    q, out, dout, dq = (torch.empty(q_shape, dtype=torch.bfloat16) for _ in range(4))
    k, v, dk, dv = (torch.empty(batch, tokens, kv_heads, dim, dtype=torch.bfloat16) for _ in range(4))
    lse, delta, lse2 = (torch.empty(batch, heads, tokens) for _ in range(3))
    mask = None if isinstance(pattern, S2Pattern) else mask_tables(pattern, CPU)
    tuning = tuning_for(9, dim, 2)
    args = KernelArgs(q, k, v, KernelPattern.of(pattern), 0.1, tuning=tuning, mask=mask, **call)
    launch_forward(args, out, lse)
    launch_delta(dout, out, lse, delta, lse2)
    launch_dq(args, dout, lse2, delta, dq)
    launch_dkv(args, dout, lse2, delta, dk, dv)


KINDS = {
    "s2": (s2(2, block_size=64, sink_blocks=1), (1, 1000, 4, 64), {}),
    "wide heads": (s2(2, block_size=64), (1, 1000, 4, 192), {}),
    "packed, some short": (s2(2, block_size=64), (1, 1000, 4, 64), {"edges": (0, 900, 900, 1000)}),
    "packed, short, wide heads": (s2(2, block_size=64), (1, 1000, 4, 192), {"edges": (0, 990, 990, 1000)}),
    "mask": (random_mask(2, 16, 64), (1, 1000, 4, 64), {}),
}


@pytest.mark.parametrize(("pattern", "shape", "call"), KINDS.values(), ids=KINDS)
def test_a_call_is_a_few_launches(launches, pattern, shape, call):
    run(pattern, shape, **call)
    forward = [grid for name, grid, _ in launches if name == "s2_fwd_kernel"]
    assert 1 <= len(forward) <= 5 and 4 <= len(launches) - len(forward) <= 8
    assert all(min(grid) >= 1 for _, grid, _ in launches)


def test_short_documents_have_launches_of_their_own_and_the_others_descriptors(launches):
    run(s2(2, block_size=64), (1, 1000, 4, 64), edges=(0, 900, 900, 930, 930, 1000))
    rows = {True: [], False: []}
    for _, _, arguments in (launch for launch in launches if launch[0] == "s2_fwd_kernel"):
        rows[arguments["DESC"]] += arguments["p_tiles"].tolist()
        assert (arguments["d_q"] is not None) == arguments["DESC"]
    assert rows == {
        True: [*([0, 900, tile] for tile in range(15)), *([930, 70, tile] for tile in range(2))],
        False: [[900, 30, 0]],
    }


def test_no_axis_of_a_grid_but_the_first_grows_with_batch_times_heads(launches):
    run(s2(2), (40_000, 2, 4, 16))
    assert max(max(grid[1:]) for _, grid, _ in launches) < 1 << 16
    many = torch.empty(1 << 16, 1, 1, 16)
    with pytest.raises(
        ValueError, match=r"must have at most 65535 sequences with backend triton; use backend torch"
    ):
        require_supported(many, many)


def test_the_layers_of_a_packed_micro_batch_share_programs_and_copy_nothing(launches, monkeypatch):
    """Other layers have other tensors, and patterns with other phases."""
    pattern = S2Pattern(num_kv_heads=2, block_size=64, local_blocks=2, vert_stride=4)
    run(pattern, (1, 1000, 4, 64), edges=(0, 900, 900, 930, 930, 1000))
    first = list(launches)
    launches.clear()
    run(pattern.for_layer(2), (1, 1000, 4, 64), edges=(0, 900, 900, 930, 930, 1000))
    launches.clear()
    monkeypatch.setattr(Table, "_copied_to", lambda self, device: pytest.fail("copied again"))
    run(pattern.for_layer(2), (1, 1000, 4, 64), edges=(0, 900, 900, 930, 930, 1000))
    tables = [[arguments.get("p_tiles") for _, _, arguments in run] for run in (first, launches)]
    assert sum(table is not None for table in tables[0]) >= 5
    assert all(one is other for one, other in zip(*tables))


# What is kept between calls.


def forward(**inputs) -> KernelArgs:
    """One launch of forward over an unpacked sequence, in bfloat16 unless `inputs` says otherwise."""
    q, k, v = (inputs.pop(name, None) for name in "qkv")
    q = torch.empty(1, 200, 4, 64, dtype=torch.bfloat16) if q is None else q
    k, v = (torch.empty_like(q)[:, :, :2] if x is None else x for x in (k, v))
    tuning = tuning_for(9, 64, q.element_size())
    args = KernelArgs(q, k, v, KernelPattern.of(s2(2, block_size=64)), 0.1, tuning=tuning, **inputs)
    launch_forward(args, torch.empty_like(q), torch.empty(1, 4, 200))
    return args


def test_a_launch_has_its_own_tensors_and_the_arguments_of_a_first_one(launches):
    first, second = forward(), forward()
    (_, _, one), (_, _, other) = launches
    assert first.layout is second.layout
    assert other["p_q"] is second.q and other["d_q"].base is second.q and other["d_v"].base is second.v
    assert one["d_q"].base is first.q and one["d_q"] is not other["d_q"]
    differ = {name for name in one if one[name] is not other[name]}
    assert differ == {"p_q", "p_k", "p_v", "p_ks", "p_vs", "p_o", "p_lse", "d_q", "d_k", "d_v"}


def test_no_tensor_of_a_call_outlives_it(launches):
    args = forward()
    kept = [weakref.ref(x) for x in (args.q, args.k, args.v, *launches[0][2].values()) if torch.is_tensor(x)]
    table = launches[0][2]["p_heads"]
    del args
    launches.clear()
    assert {ref() for ref in kept} == {None, table}


def wide() -> torch.Tensor:
    """Queries of more memory than they need."""
    return torch.empty(1, 200, 4, 128, dtype=torch.bfloat16)


CHANGES = {
    "strides": (lambda: None, lambda: wide()[..., :64]),
    "alignment of the address": (lambda: wide()[..., :64], lambda: wide()[..., 1:65]),
    "alignment of the strides": (lambda: None, lambda: torch.empty(1, 200, 4, 68).bfloat16()[..., :64]),
    "dtype": (lambda: None, lambda: torch.empty(1, 200, 4, 64)),
}


@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_layout_changes_the_launch(launches, monkeypatch, before, after):
    monkeypatch.setattr(triton_args, "INTERPRETED", False)  # which copies tiles of 32 bits too
    forward(q=before())
    args = forward(q=after())
    (_, _, first), (_, _, second) = launches
    for name, x in (("q", args.q), ("k", args.k), ("v", args.v)):
        assert [second[f"s_{name}{dim}"] for dim in "bth"] == [*x.stride()[:3]]
    fits = args.q.data_ptr() % 16 == 0 and args.q.stride(2) % 8 == 0 and args.q.dtype == torch.bfloat16
    assert first["DESC"] and second["DESC"] == fits
    if fits:
        assert second["d_q"].strides[1:] == [args.q.stride(2), args.q.stride(1), 1]


def test_a_change_of_the_device_changes_the_launch():
    one, other = (torch.empty(1, 200, 2, 64, device=device) for device in ("cpu", "meta"))
    pattern = KernelPattern.of(s2(2, block_size=64))
    layouts = [KernelArgs(x, x, x, pattern, 0.1).layout for x in (one, other)]
    assert [layout.device.type for layout in layouts] == ["cpu", "meta"]


def test_a_launch_in_a_captured_graph_keeps_its_tables(launches, monkeypatch):
    forward()
    capture(monkeypatch, True)
    forward()
    capture(monkeypatch, False)
    table = launches[1][2]["p_heads"]
    assert triton_capture._CAPTURED[table.data_ptr()] is table


# Tables.


def table_made(first: int) -> weakref.ref:
    return weakref.ref(Table(np.array([[first, 1, 0, 0]])).on(CPU))


def capture(monkeypatch, capturing: bool) -> None:
    for module in (triton_args, triton_capture, triton_programs):
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing)


def test_a_table_that_a_cuda_graph_reads_is_never_dropped(monkeypatch):
    captured = Table(np.array([[1, 1, 0, 0]]))
    captured.on(CPU)
    capture(monkeypatch, True)
    kept = weakref.ref(captured.on(CPU))
    capture(monkeypatch, False)
    del captured
    assert kept() is not None
    assert table_made(2)() is None


def test_a_table_that_a_cuda_graph_would_have_to_copy_is_refused(monkeypatch):
    capture(monkeypatch, True)
    with pytest.raises(RuntimeError, match="run the same call once before the capture"):
        table_made(1)
    with pytest.raises(RuntimeError, match="run the same call once before the capture"):
        monkeypatch.setattr(
            "megatron_s2.kernels.triton_pattern.require_no_capture", triton_capture.require_no_capture
        )
        mask_tables(random_mask(1, 3), CPU)
