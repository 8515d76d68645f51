"""Launches of Triton kernels by keyword, and tables that the kernels read on the device."""

import ast
import weakref
from pathlib import Path

import torch

import megatron_s2
from megatron_s2.kernels import triton_args

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
