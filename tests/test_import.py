"""`import megatron_s2` and the pattern are light: usable in a launcher or on a login node, in no time."""

import subprocess
import sys

from waiting import PATIENCE

HEAVY = ("torch", "numpy", "megatron", "triton", "transformers")
MOST_SECONDS = 0.5


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


def test_the_import_takes_less_than_half_a_second_of_cpu_time():
    timed = "import time; start = time.process_time(); import megatron_s2; megatron_s2.S2Pattern; "
    seconds = [float(run_python(timed + "print(time.process_time() - start)")) for _ in range(3)]
    assert min(seconds) < MOST_SECONDS, (
        f"import megatron_s2 took {', '.join(f'{s:.2f}' for s in seconds)} s of CPU time; "
        "`python -X importtime -c 'import megatron_s2; megatron_s2.S2Pattern'` shows which import is slow"
    )


def test_the_public_names_are_listed_and_unknown_ones_refused():
    told = run_python(
        "import megatron_s2\n"
        "print(set(megatron_s2.__all__) <= set(dir(megatron_s2)), hasattr(megatron_s2, 'S2Patern'))"
    )
    assert told.split() == ["True", "False"]
