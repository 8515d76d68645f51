"""Compiles the Triton kernels ahead of time for each chip and writes what they take: no GPU is needed.

    python scripts/kernel_resources.py            writes docs/kernel-resources.md
    python scripts/kernel_resources.py --check    fails where a kernel does not fit or the table is stale

What a kernel takes depends on the Triton that compiles it. With any Triton, `--check` requires that each
shipped kernel fits its chip: hardly any local memory, few enough registers and shared memory for one
program, the tensor cores' instruction. The table must have the fingerprint of these kernels and tiles; its
numbers are compared only if the installed Triton is the one that it names.

`--chips`, `--head-dims` and `--shipped` compile a part of the table.
"""

import argparse
import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_s2.kernels import triton_common, triton_decode, triton_dkv, triton_dq, triton_forward
from megatron_s2.kernels.tuning import Tiles, candidates, tuning_for

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernel-resources.md"
HEAD_DIMS = (64, 128)
KERNELS = ("forward", "dq", "dkv shard", "dkv window")
DECODE = "decode split"
GROUP = 4
BLOCK = 64
MASK_HEAD_DIM = 128  # where the kernels are compiled for an arbitrary mask too


@dataclass(frozen=True)
class Chip:
    """What a chip offers one program: CUDA C++ Programming Guide, table of compute capabilities."""

    capability: int
    shared: int  # bytes of shared memory that one program can have
    tensor_core: str  # instruction of its tensor cores for large tiles in PTX


# Bytes per thread: Triton 3.6 spills up to 48 in a few of these kernels, 3.8 and 3.9 nothing.
MOST_LOCAL = 64
REGISTERS = 64 * 1024  # of each of these chips' multiprocessors, 32 bits each
CHIPS = {
    "sm_80": Chip(80, 163 * 1024, "mma.sync"),
    "sm_90": Chip(90, 227 * 1024, "wgmma"),
    "sm_100": Chip(100, 227 * 1024, "tcgen05"),
}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    chip: str
    kernel: str
    head_dim: int
    tiles: Tiles
    shipped: bool = True  # or only tried by autotuning
    mask: bool = False  # for an arbitrary mask
    source: str = ""  # "window" or "shard": the pass over one source, as context parallelism has it

    def __str__(self) -> str:
        return f"{self.chip} {self.kernel} head_dim {self.head_dim}"

    @property
    def instruction(self) -> str:
        """The PTX instruction that multiplies. Decoding has too few rows, the query heads of one KV head, for
        the instruction for large tiles."""
        return "mma.sync" if self.kernel == DECODE else CHIPS[self.chip].tensor_core

    def what(self) -> str:
        """Returns the role of the kernel, as the table names it."""
        if self.source:
            return f"{self.source} pass"
        return "mask" if self.mask else "shipped" if self.shipped else "tried"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its chip."""

    case: Case
    registers: int  # per thread
    local: int  # bytes of local memory per thread (its stack): where spills go
    shared: int  # bytes per program
    tensor_core: bool

    @property
    def all_registers(self) -> int:
        """Number of registers of one program."""
        return self.registers * 32 * self.case.tiles.warps

    def problems(self) -> list[str]:
        """Returns a message for each limit of the chip that the kernel exceeds."""
        chip, where = CHIPS[self.case.chip], self.case
        checks = {
            f"{where}: spills {self.local} bytes per thread to local memory, at most {MOST_LOCAL}": self.local
            > MOST_LOCAL,
            f"{where}: {self.all_registers} registers, at most {REGISTERS}": self.all_registers > REGISTERS,
            f"{where}: shared memory {self.shared}, at most {chip.shared}": self.shared > chip.shared,
            f"{where}: no {where.instruction} in its PTX": not self.tensor_core,
        }
        return [problem for problem, found in checks.items() if found]

    def row(self) -> str:
        """Returns the line of the table."""
        case = self.case
        tiles = f"{case.tiles.rows} x {case.tiles.keys} | {case.tiles.warps} | {case.tiles.stages}"
        instruction = case.instruction if self.tensor_core else "none"
        return (
            f"| {case.chip} | {case.kernel} | {case.head_dim} | {case.what()} | {tiles} | {self.registers} "
            f"| {self.local} | {self.shared / 1024:.0f} KiB | `{instruction}` |"
        )


def _kernel(case: Case) -> tuple[triton.JITFunction, dict[str, object]]:
    """Returns the function and its constants: 32 query heads over 8 KV heads, bfloat16, blocks of 64."""
    kernel, head_dim, tiles = case.kernel, case.head_dim, case.tiles
    constants = {
        "D": head_dim, "DV": head_dim, "BD": head_dim, "BDV": head_dim, "BLOCK": BLOCK,
        "BM": tiles.rows, "BN": tiles.keys, "PACKED": False, "PREC": "tf32", "p_tiles": None,
    }  # fmt: skip
    if kernel == DECODE:
        few = {name: constants[name] for name in ("D", "BD", "BM", "BN", "PREC")}
        return triton_decode.s2_decode_kernel_split, few | {"HKV": 8, "HEADS": 8, "GROUP": GROUP}
    lists = {} if case.mask else dict.fromkeys(("p_starts", "p_list"))
    source = {"COMPACT": bool(case.source), "CSR": case.mask, **lists}
    if kernel in ("forward", "dq"):
        absent = [] if kernel == "dq" else ["p_sink"]
        row = {"H": 32, "GROUP": GROUP} | ({} if kernel == "dq" else {"HAS_SINK": False})
        row |= {"SHARD": case.source != "window", "WINDOW": case.source != "shard"}
        # In context parallelism each of dQ's passes adds to what is there, and the forward's second one.
        row["RESUME"] = case.source == "shard" or (kernel == "dq" and bool(case.source))
        absent += [] if row["RESUME"] else ["p_prev"]
        function = triton_dq.s2_bwd_kernel_dq if kernel == "dq" else triton_forward.s2_fwd_kernel
        return function, constants | source | row | dict.fromkeys(absent)
    if kernel == "dkv shard":
        return triton_dkv.s2_bwd_kernel_dkv_shard, constants | source | {"HKV": 8}
    return triton_dkv.s2_bwd_kernel_dkv_window, constants | {"HKV": 8, "ADD_SHARD": True} | (
        {"ADD_SHARD": False, "p_dks": None, "p_dvs": None} if case.source else {}
    )


def _type(name: str, constants: dict[str, object], source: str) -> str:
    if name in constants:
        return "constexpr"
    if source and name in ("p_o", "p_dq", "p_prev", "p_dk", "p_dv"):
        return "*fp32"  # parts of results
    if name.startswith("p_"):
        kind = {"p_heads": "i32", "p_starts": "i64", "p_list": "i32", "p_kept": "i32"} | dict.fromkeys(
            ("p_lse", "p_delta", "p_dks", "p_dvs", "p_part"), "fp32"
        )
        return "*" + kind.get(name, "bf16")
    return "fp32" if name == "scale" else "i32"


def compiled(case: Case) -> Resources:
    """Compiles one kernel for one chip and asks the binary what it takes."""
    function, constants = _kernel(case)
    chip, tiles = CHIPS[case.chip], case.tiles
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name[:2] in ("p_", "s_")}
    source = ASTSource(
        function,
        {name: _type(name, constants, case.source) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={key: value for key, value in aligned.items() if names[key[0]] not in constants},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", chip.capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    registers, stack, local = _resource_usage(binary.asm["cubin"])
    return Resources(
        case, registers, stack + local, binary.metadata.shared, case.instruction in binary.asm["ptx"]
    )


def _resource_usage(cubin: bytes) -> tuple[int, ...]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))


def cases(chips: Sequence[str], head_dims: Sequence[int], shipped: bool = False) -> list[Case]:
    """Returns all cases in the order of the table; with `shipped`, only the shipped tiles for S2 patterns."""
    found = []
    for chip, kernel, head_dim in product(chips, KERNELS, head_dims):
        tiles = candidates(kernel.split()[0], CHIPS[chip].capability // 10, head_dim, 2)
        found += [Case(chip, kernel, head_dim, x, x == tiles[0]) for x in tiles[: 1 if shipped else None]]
        if (
            not shipped and head_dim == MASK_HEAD_DIM and kernel != "dkv window"
        ):  # which is the same with a mask
            inside = {"keys": min(tiles[0].keys, BLOCK)} if "dkv" in kernel else {"rows": BLOCK}
            found.append(Case(chip, kernel, head_dim, replace(tiles[0], **inside), mask=True))
        passes = tuning_for(CHIPS[chip].capability // 10, head_dim, 2, passes=True)
        sources = kernel.split()[1:] or ["window", "shard"]
        tiles = getattr(passes, kernel.split()[0])
        found += [] if shipped else [Case(chip, kernel, head_dim, tiles, source=source) for source in sources]
    for chip, head_dim in product(chips, head_dims):
        found.append(Case(chip, DECODE, head_dim, triton_decode.decode_tiles(head_dim, GROUP, 2)))
    return found


def fingerprint() -> str:
    """Returns a hash of the kernels' code without its comments, and of the cases."""
    sources = [
        ast.unparse(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        for module in (triton_common, triton_forward, triton_dq, triton_dkv, triton_decode)
    ]
    text = "\n".join([*sources, *map(repr, cases(tuple(CHIPS), HEAD_DIMS))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _use_cache(folder: str) -> None:
    triton.knobs.cache.dir = folder


def measure(cases: Sequence[Case], jobs: int) -> list[Resources]:
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context("spawn"), _use_cache, (cache,)) as pool,
    ):
        return list(pool.map(compiled, cases))


def made_by(version: str) -> str:
    """Returns the sentence of the page that names its Triton."""
    return f"Compiled by Triton {version}."


def stale(text: str, rows: Sequence[Resources]) -> list[str]:
    """Returns messages about a page `text` of other kernels or tiles, and about rows that it lacks if the
    installed Triton is the one that it names."""
    found = []
    if fingerprint() not in text:
        found.append(f"{TABLE.name} is of other kernels or tiles: fingerprint {fingerprint()}")
    if made_by(triton.__version__) in text:
        table = text.splitlines()
        found += [f"{TABLE.name} is stale, now: {row.row()}" for row in rows if row.row() not in table]
    return found


def page(rows: Sequence[Resources]) -> str:
    """Returns the whole document."""
    lines = [
        "# What the Triton kernels take of each chip",
        "",
        "Written by `python scripts/kernel_resources.py`, which compiles them ahead of time (no GPU needed);",
        "its `--check` compiles again what ships. bfloat16, 32 query heads over 8 KV heads, blocks of 64,",
        "the tiles of",
        "`megatron_s2/kernels/tuning.py`: those shipped, those that autotuning tries beside them, the",
        "shipped ones as an arbitrary mask (`BlockMaskPattern`) has them, and those of the passes over one",
        "source each that context parallelism makes; at the end, the kernel that reads the cache for a",
        f"decoded token (`{DECODE}`), with the tiles of `megatron_s2/kernels/triton_decode.py`.",
        "Registers and local memory (spills) are per thread, shared memory per program. Another Triton gives",
        "other numbers: `bash scripts/test.sh --all` then compiles all that ships and asserts that it fits",
        "its chip. With the Triton named here it compiles four kernels and compares the fingerprint.",
        "",
        f"{made_by(triton.__version__)} Fingerprint of kernels and tiles: `{fingerprint()}`.",
        "",
        "| chip | kernel | head_dim | tiles | rows x keys | warps | stages | registers | local | shared "
        "| in PTX |",
        "| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *(row.row() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="with --check")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--shipped", action="store_true", help="neither what is only tried nor masks")
    parser.add_argument(
        "--jobs", type=int, default=2, help="kernels compiled at a time (default %(default)s)"
    )
    args = parser.parse_args(argv)
    part = len(args.chips) < len(CHIPS) or len(args.head_dims) < len(HEAD_DIMS) or args.shipped
    if part and not args.check:
        parser.error("--chips, --head-dims, --shipped: only with --check; the table is written as a whole")

    chosen = cases(args.chips, args.head_dims, args.shipped)
    if args.check:
        # Autotuning drops tiles that do not fit.
        chosen = [case for case in chosen if case.what() != "tried"]
    rows = measure(chosen, args.jobs)
    problems = [problem for row in rows for problem in row.problems()]
    if args.check:
        problems += stale(TABLE.read_text(encoding="utf-8"), rows)
    else:
        TABLE.write_text(page(rows), encoding="utf-8")
        print(page(rows))
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
