"""`import megatron_s2` and the pattern are light: usable in a launcher or on a login node."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "megatron", "triton", "transformers")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_and_its_pattern_import_nothing_heavy():
    imported = run_python(
        "import sys, megatron_s2\n"
        "p = megatron_s2.S2Pattern(num_kv_heads=8, block_size=64, local_blocks=8, vert_stride=16)\n"
        "p.visible_pairs(1 << 20), p.kv_tokens(1 << 20), p.flops(1 << 20, 32, 128), p.coverage(2)\n"
        "p.tp_slice(1, 4).row_blocks(0, 100), p.column_rows(0, 3, 200), p.describe()\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    assert imported.split() == []


def test_the_public_names_are_listed_and_unknown_ones_refused():
    told = run_python(
        "import megatron_s2\n"
        "print(set(megatron_s2.__all__) <= set(dir(megatron_s2)), hasattr(megatron_s2, 'S2Patern'))"
    )
    assert told.split() == ["True", "False"]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = (ROOT / "megatron_s2").rglob("*.py")
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports_of(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that a source imports anywhere, in functions and for type checkers, too."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise ValueError("relative import: write the whole name")
    found = set()
    for name in named:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def test_no_files_import_each_other_in_a_circle():
    files = modules()
    graph = {name: imports_of(file.read_text(), set(files)) - {name} for name, file in files.items()}
    assert graph["megatron_s2.layers.specs"] > {"megatron_s2.layers.core_attention"}
    TopologicalSorter(graph).prepare()


def test_a_circle_through_a_function_is_found():
    known = {"a", "a.b", "a.c"}
    graph = {
        "a.b": imports_of("def f():\n    from a import c\n", known),
        "a.c": imports_of(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import g\n", known
        ),
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
