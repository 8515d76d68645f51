"""`import megatron_s2` and the pattern are light: usable in a launcher or on a login node."""

import subprocess
import sys

from waiting import PATIENCE

HEAVY = ("torch", "numpy", "megatron", "triton", "transformers")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
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
