"""Launches of Triton kernels by keyword, and tables that the kernels read on the device."""

import ast
import weakref
from pathlib import Path

import torch

import megatron_s2
from megatron_s2.kernels import triton_args
from megatron_s2.kernels.triton_args import KernelArgs
from megatron_s2.kernels.triton_pattern import KernelPattern
from megatron_s2.pattern import S2Pattern

CPU = torch.device("cpu")


def test_every_kernel_is_launched_by_keyword():
    """Of two arguments in the wrong order, such as strides, nothing else would notice."""
    files = Path(megatron_s2.__file__).parent.rglob("*.py")
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if _is_launch(node)]
    assert len({ast.unparse(call.func.value) for call in calls}) == 8
    assert [ast.unparse(call) for call in calls if call.args] == []


def _is_launch(node: ast.AST) -> bool:
    """Whether a node is `…_kernel…[grid](…)`."""
    launched = node.func if isinstance(node, ast.Call) else None
    return isinstance(launched, ast.Subscript) and "_kernel" in ast.unparse(launched.value)


def test_a_table_that_a_cuda_graph_reads_is_never_dropped(monkeypatch):
    def table_made(first: int) -> weakref.ref:
        return weakref.ref(triton_args._on_device(((first, 1, 0, 0),), CPU))

    monkeypatch.setattr(triton_args, "_is_capturing", lambda device: True)
    captured = table_made(10_001)
    monkeypatch.setattr(triton_args, "_is_capturing", lambda device: False)
    eager = table_made(10_002)
    for first in range(1000):
        table_made(first)
    assert captured() is not None
    assert eager() is None


def test_the_layers_of_a_packed_micro_batch_share_programs_and_tables():
    """Other layers have other tensors, and patterns with other phases."""

    def launched(layer: int) -> list[object]:
        pattern = S2Pattern(num_kv_heads=2, block_size=16, local_blocks=2, vert_stride=4, layer=layer)
        tensor = torch.empty(1, 300, 2, 16)
        args = KernelArgs(
            tensor, tensor, tensor, KernelPattern.of(pattern), 1.0, packed=((0, 7), (7, 190), (190, 300))
        )
        programs = [args.query_programs(32), args.key_programs(32), args.shard_key_programs(32)[0]]
        return [*programs, *(args.program_args(of_launch)["p_tiles"] for of_launch in programs)]

    first, again = launched(0), launched(2)
    assert [len(programs) for programs in first[:3]] == [11, 11, 3]
    assert all(table.tolist() == [list(row) for row in rows] for rows, table in zip(first[:3], first[3:]))
    assert all(one is other for one, other in zip(first, again))
