"""Compiles the Triton kernels ahead of time for each chip and writes what they take: no GPU is needed.

    python scripts/kernel_resources.py            writes docs/kernel-resources.md
    python scripts/kernel_resources.py --check    fails where that table is stale or over a chip's limits

`--chips` and `--head-dims` check a part of the table.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_s2.kernels import triton_columns, triton_rows
from megatron_s2.kernels.tuning import Tiles, tuning_for

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernel-resources.md"
HEAD_DIMS = (64, 128)
KERNELS = ("forward", "dq", "dkv shard", "dkv window")


@dataclass(frozen=True)
class Chip:
    """What a chip offers one program: CUDA C++ Programming Guide, table of compute capabilities."""

    capability: int
    shared: int  # bytes of shared memory
    tensor_core: str  # instruction of its tensor cores in PTX


CHIPS = {
    "sm_80": Chip(80, 163 * 1024, "mma.sync"),
    "sm_90": Chip(90, 227 * 1024, "wgmma"),
    "sm_100": Chip(100, 227 * 1024, "tcgen05"),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its chip."""

    chip: str
    kernel: str
    head_dim: int
    tiles: Tiles
    registers: int  # per thread
    local: int  # bytes of local memory per thread (its stack): where spills go
    shared: int  # bytes per program
    tensor_core: bool

    def problems(self) -> list[str]:
        """What is wrong with it, for people; nothing if all is well."""
        chip, where = CHIPS[self.chip], f"{self.chip} {self.kernel} head_dim {self.head_dim}"
        checks = {
            f"{where}: spills {self.local} bytes per thread to local memory": self.local > 0,
            f"{where}: shared memory {self.shared}, at most {chip.shared}": self.shared > chip.shared,
            f"{where}: no {chip.tensor_core} in its PTX": not self.tensor_core,
        }
        return [problem for problem, found in checks.items() if found]

    def row(self) -> str:
        """Its line of the table."""
        tiles = f"{self.tiles.rows} x {self.tiles.keys} | {self.tiles.warps} | {self.tiles.stages}"
        instruction = CHIPS[self.chip].tensor_core if self.tensor_core else "none"
        return (
            f"| {self.chip} | {self.kernel} | {self.head_dim} | {tiles} | {self.registers} | {self.local} "
            f"| {self.shared / 1024:.0f} KiB | `{instruction}` |"
        )


def _kernel(kernel: str, head_dim: int, tiles: Tiles) -> tuple[triton.JITFunction, dict[str, object]]:
    """The function and its constants: GQA of 32 query heads over 8 KV heads, bfloat16, blocks of 64."""
    constants = {
        "D": head_dim, "DV": head_dim, "BD": head_dim, "BDV": head_dim, "BLOCK": 64,
        "BM": tiles.rows, "BN": tiles.keys, "PACKED": False, "PREC": "tf32", "p_tiles": None,
    }  # fmt: skip
    source = {"COMPACT": False, "CSR": False, "p_starts": None, "p_list": None}
    if kernel in ("forward", "dq"):
        absent = ["p_sink"] if kernel == "dq" else ["p_sink", "p_do", "p_delta"]
        row = {"H": 32, "GROUP": 4, "DQ": kernel == "dq", "HAS_SINK": False}
        return triton_rows.s2_row_kernel, constants | source | row | dict.fromkeys(absent)
    if kernel == "dkv shard":
        return triton_columns.s2_bwd_kernel_dkv_shard, constants | source | {"HKV": 8}
    return triton_columns.s2_bwd_kernel_dkv_window, constants | {"HKV": 8, "ADD_SHARD": True}


def _type(name: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name.startswith("p_"):
        kind = {"p_heads": "i32"} | dict.fromkeys(("p_lse", "p_delta", "p_dks", "p_dvs"), "fp32")
        return "*" + kind.get(name, "bf16")
    return "fp32" if name == "scale" else "i32"


def compiled(chip: str, kernel: str, head_dim: int, tiles: Tiles) -> Resources:
    """Compiles one kernel for one chip and asks the binary what it takes."""
    function, constants = _kernel(kernel, head_dim, tiles)
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name[:2] in ("p_", "s_")}
    source = ASTSource(
        function,
        {name: _type(name, constants) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={key: value for key, value in aligned.items() if names[key[0]] not in constants},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", CHIPS[chip].capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    registers, stack, local = _resource_usage(binary.asm["cubin"])
    return Resources(
        chip, kernel, head_dim, tiles, registers, stack + local, binary.metadata.shared,
        CHIPS[chip].tensor_core in binary.asm["ptx"],
    )  # fmt: skip


def _resource_usage(cubin: bytes) -> tuple[int, ...]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))


def shipped(chip: str, kernel: str, head_dim: int) -> Resources:
    """A kernel in the tiles it is launched with on the chip."""
    tuning = tuning_for(CHIPS[chip].capability // 10, head_dim, 2)
    return compiled(chip, kernel, head_dim, getattr(tuning, kernel.split()[0]))


def _use_cache(folder: str) -> None:
    triton.knobs.cache.dir = folder


def measure(chips: Sequence[str], head_dims: Sequence[int], jobs: int) -> list[Resources]:
    """All shipped kernels for these chips and head_dims, in the order of the table."""
    cases = list(product(chips, KERNELS, head_dims))
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context("spawn"), _use_cache, (cache,)) as pool,
    ):
        return list(pool.map(shipped, *zip(*cases)))


def page(rows: Sequence[Resources]) -> str:
    """The whole document."""
    lines = [
        "# What the Triton kernels take of each chip",
        "",
        "Written by `python scripts/kernel_resources.py`, which compiles them ahead of time (no GPU needed);",
        "its `--check` is a test. bfloat16, 32 query heads over 8 KV heads, blocks of 64, the tiles of",
        "`megatron_s2/kernels/tuning.py`. Registers and local memory (spills) are per thread, shared memory",
        f"per program. Triton {triton.__version__}.",
        "",
        "| chip | kernel | head_dim | rows x keys | warps | stages | registers | local | shared | in PTX |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *(row.row() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="with --check")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument(
        "--jobs", type=int, default=2, help="kernels compiled at a time (default %(default)s)"
    )
    args = parser.parse_args(argv)
    part = len(args.chips) < len(CHIPS) or len(args.head_dims) < len(HEAD_DIMS)
    if part and not args.check:
        parser.error("--chips and --head-dims: only with --check; the table is written as a whole")

    rows = measure(args.chips, args.head_dims, args.jobs)
    problems = [problem for row in rows for problem in row.problems()]
    if args.check:
        table = TABLE.read_text(encoding="utf-8").splitlines()
        problems += [f"{TABLE.name} is stale, now: {row.row()}" for row in rows if row.row() not in table]
    else:
        TABLE.write_text(page(rows), encoding="utf-8")
        print(page(rows))
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
