"""Compiles the Triton kernels ahead of time for each chip and writes what they take: no GPU is needed.

    python scripts/kernel_resources.py            writes docs/kernel-resources.md
    python scripts/kernel_resources.py --check    fails where a kernel does not fit or the table is stale

What a kernel takes depends on the Triton that compiles it. With any Triton, `--check` requires that each
shipped kernel fits its chip: hardly any local memory, few enough registers and shared memory for one
program, the tensor cores' instruction; and on Hopper, that the loops of its machine code compute nothing
twice, multiply whole tiles, keep their registers, have their copies under way ahead of their use, and
execute few instructions. The table must have the fingerprint of these kernels and tiles; its numbers are
compared only if the installed Triton is the one that it names.

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
from lib.sass import Code, Loop, disassemble, parse
from lib.throughput import FLASH2, PROBE_TFLOPS, TOLERANCE, CompiledKernel, predict, predicted_probe, probe
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_s2.kernels import triton_common, triton_decode, triton_dkv, triton_dq, triton_forward
from megatron_s2.kernels.triton_support import takes_boxes
from megatron_s2.kernels.tuning import Tiles, box_rows, candidates, packed_heads, separate_dkv, tuning_for
from megatron_s2.pattern import S2Pattern

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernel-resources.md"
HEAD_DIMS = (64, 128)
KERNELS = ("forward", "dq", "dkv shard", "dkv window")
DECODE = "decode split"
GROUP = 4
BLOCK = 64
# Where the kernels are compiled for an arbitrary mask, and on Hopper in float16 and without descriptors, too.
MASK_HEAD_DIM = 128
OTHER_HEAD_DIMS = (80, 96, 192, 256)  # compiled for Hopper, whose machine code is checked
PATTERN = S2Pattern(num_kv_heads=8, block_size=BLOCK, local_blocks=8, vert_stride=16)  # of the prediction

# What the loops of a kernel may execute on Hopper, per warp: instructions for 64 keys (of dK and dV, 64
# rows) that all rows see, at head_dim 128 or less. Of the 400 for dK and dV, products, exponentials and
# conversions alone take 150.
MOST_INSTRUCTIONS = {"forward": 304, "dq": 310, "dkv shard": 400, "dkv window": 400}
MOST_WITH_POINTERS = {"forward": 410, "dq": 380, "dkv shard": 545, "dkv window": 545}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
if TRITON < (3, 8):
    MOST_INSTRUCTIONS |= {"dkv shard": 480, "dkv window": 480}
    MOST_WITH_POINTERS |= {"dkv shard": 600, "dkv window": 600}
if TRITON >= (3, 9):
    MOST_INSTRUCTIONS |= {"forward": 330, "dq": 330}
# Accesses of one iteration to local memory. A few scalars cost nothing to speak of, a tile that spills takes
# dozens.
MOST_LOCAL_IN_LOOP = 2 if TRITON >= (3, 8) else 4
# Of loops with pointers or wide heads; Triton 3.6 and 3.9 spill more there.
MOST_LOCAL_IN_HARD_LOOP = 8 if TRITON == (3, 8) else 24
NO_CODE = Code((), ())
WIDE = 128  # head_dim beyond which shared memory and registers do not allow all of this


@dataclass(frozen=True)
class Chip:
    """What a chip offers one program: CUDA C++ Programming Guide, table of compute capabilities."""

    capability: int
    shared: int  # bytes of shared memory that one program can have
    tensor_core: str  # instruction of its tensor cores for large tiles in PTX


# Bytes per thread: Triton 3.6 spills up to 48 in a few of these kernels, 3.8 and 3.9 nothing.
MOST_LOCAL = 64
# On Hopper what loops access is limited above; this is kept over them, once per program.
MOST_LOCAL_OF_LOOPS = 512
REGISTERS = 64 * 1024  # of each of these chips' multiprocessors, 32 bits each
HOPPER, WORKSTATION = "sm_90", "sm_120"
CHIPS = {
    "sm_80": Chip(80, 163 * 1024, "mma.sync"),
    "sm_90": Chip(90, 227 * 1024, "wgmma"),
    "sm_100": Chip(100, 227 * 1024, "tcgen05"),
    "sm_120": Chip(120, 99 * 1024, "mma.sync"),
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
    pointers: bool = False  # without tensor descriptors, as short documents and unaligned tensors have it
    dtype: str = "bf16"
    gradient: str = ""  # "dk" or "dv": the launch of dK and dV that computes that one

    def __str__(self) -> str:
        return f"{self.chip} {self.kernel} head_dim {self.head_dim}"

    @property
    def padded(self) -> int:
        """head_dim of its tiles."""
        return triton.next_power_of_2(self.head_dim)

    @property
    def boxes(self) -> dict[str, str]:
        """Types of the tensor descriptors by the name of their argument."""
        if self.pointers or not takes_boxes(CHIPS[self.chip].capability // 10):
            return {}
        rows, keys = self.tiles.rows, self.tiles.keys
        if "dkv" in self.kernel:
            boxes = dict.fromkeys(("d_q", "d_do"), (1, rows))
        elif keys <= BLOCK:
            pack = packed_heads(GROUP, rows, BLOCK)
            boxes = dict.fromkeys(("d_ks", "d_vs") if self.source == "shard" else ("d_k", "d_v"), (1, keys))
            boxes |= dict.fromkeys(box_rows(self.kernel, self.padded), (pack, rows // pack))
        else:
            boxes = {}
        return {
            name: f"tensordesc<{self.dtype}[1, {heads}, {tokens}, {self.padded}]>"
            for name, (heads, tokens) in boxes.items()
        }

    @property
    def instruction(self) -> str:
        """The PTX instruction that multiplies. Decoding has too few rows, the query heads of one KV head, for
        the instruction for large tiles."""
        return "mma.sync" if self.kernel == DECODE else CHIPS[self.chip].tensor_core

    def what(self) -> str:
        """Returns the role of the kernel, as the table names it."""
        if self.source:
            return f"{self.source} pass"
        if self.gradient:
            return f"{self.gradient} alone"
        if self.dtype != "bf16":
            return self.dtype
        if self.pointers:
            return "pointers"
        return "mask" if self.mask else "shipped" if self.shipped else "tried"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its chip."""

    case: Case
    registers: int  # per thread
    local: int  # bytes of local memory per thread (its stack): where spills go
    shared: int  # bytes per program
    tensor_core: bool
    code: Code = NO_CODE

    @property
    def all_registers(self) -> int:
        """Number of registers of one program."""
        return self.registers * 32 * self.case.tiles.warps

    @property
    def programs(self) -> int:
        """Number of programs that a multiprocessor runs at a time; each takes 1 KiB of shared memory more."""
        most_shared = CHIPS[self.case.chip].shared + 1024
        return max(1, min(most_shared // (self.shared + 1024), REGISTERS // self.all_registers))

    @property
    def whole(self) -> Loop | None:
        """The loop over tiles of which every row sees every key: that of the fewest instructions for a tile,
        among those with tensor descriptors if there are any."""
        return min(self.code.loops, key=lambda loop: (not loop.boxes, self.instructions(loop)), default=None)

    def instructions(self, loop: Loop) -> float:
        """Instructions of a warp for 64 keys, or for dK and dV for 64 rows."""
        tiles = self.case.tiles
        return loop.size * 64 / (_tiles(loop) * (tiles.rows if "dkv" in self.case.kernel else tiles.keys))

    def problems(self) -> list[str]:
        """Returns a message for each limit of the chip that the kernel exceeds."""
        chip, where = CHIPS[self.case.chip], self.case
        gated = self.case.chip == HOPPER and self.case.kernel != DECODE
        most_local = MOST_LOCAL_OF_LOOPS if gated else MOST_LOCAL
        checks = {
            f"{where}: no loop found in its machine code": gated and not self.code.loops,
            f"{where}: spills {self.local} bytes per thread to local memory, at most {most_local}": self.local
            > most_local,
            f"{where}: {self.all_registers} registers, at most {REGISTERS}": self.all_registers > REGISTERS,
            f"{where}: shared memory {self.shared}, at most {chip.shared}": self.shared > chip.shared,
            f"{where}: no {where.instruction} in its PTX": not self.tensor_core,
        }
        found = [problem for problem, exceeds in checks.items() if exceeds]
        return found + (self._loop_problems() if gated and self.code.loops else [])

    def _loop_problems(self) -> list[str]:
        case, tiles, found = self.case, self.case.tiles, []
        width, wide = (tiles.rows if "dkv" in case.kernel else tiles.keys), case.head_dim > WIDE
        shapes = {f"64x{n}x16" for n in (width, case.padded)}
        products = {"forward": 2, "dq": 3}.get(case.kernel, {"": 4, "dk": 3, "dv": 2}[case.gradient])
        for number, loop in enumerate(self.code.loops):
            where, scores = f"{case}, loop {number}", tiles.rows * tiles.keys * _tiles(loop)
            exponentials = loop.exponentials - (2 if case.kernel == "forward" else 0)  # two rescale
            flops = loop.tensor_flops * tiles.warps // 4
            computed = exponentials * 32 * tiles.warps
            expected = products * 2 * scores * case.padded
            idle = loop.ahead is not None and loop.ahead < 1 and self.programs == 1
            # The last keys of a shard that end within a tile of the pass over it.
            tail = case.source == "shard" and "dkv" not in case.kernel and number == 0
            most_local = MOST_LOCAL_IN_HARD_LOOP if wide or case.pointers else MOST_LOCAL_IN_LOOP
            checks = {
                f"{where}: {computed} exponentials for {scores} scores": computed != scores,
                f"{where}: {flops} FLOPs, its {products} products have {expected}": flops != expected,
                f"{where}: products {dict(loop.products)}, not all of {sorted(shapes)}": not shapes
                >= set(loop.products),
                f"{where}: {loop.local} accesses to local memory, at most {most_local}": loop.local
                > most_local,
                f"{where}: waits for what it has just copied, with no other program to run": idle
                and not wide,
                f"{where}: no asynchronous copies": loop.ahead is None and not tail,
                f"{where}: no tensor descriptors": bool(case.boxes) and not loop.boxes and not tail,
            }
            found += [problem for problem, exceeds in checks.items() if exceeds]
        limits = MOST_WITH_POINTERS if case.pointers else MOST_INSTRUCTIONS
        most, count = limits[case.kernel], self.instructions(self.whole)
        if not wide and case.shipped and count > most:
            found.append(f"{case}: {count:.0f} instructions for 64 keys, at most {most}")
        return found

    def row(self) -> str:
        """Returns the line of the table."""
        case = self.case
        tiles = f"{case.tiles.rows} x {case.tiles.keys} | {case.tiles.warps} | {case.tiles.stages}"
        instruction = case.instruction if self.tensor_core else "none"
        loop = self.whole
        ahead = loop.ahead if loop and loop.ahead is not None and case.chip == HOPPER else ""
        loops = f"{'' if loop is None else round(self.instructions(loop))} | {ahead} | {self.programs}"
        return (
            f"| {case.chip} | {case.kernel} | {case.head_dim} | {case.what()} | {tiles} | {self.registers} "
            f"| {self.local} | {self.shared / 1024:.0f} KiB | `{instruction}` | {loops} |"
        )

    def for_prediction(self) -> CompiledKernel:
        return CompiledKernel(self.code, self.case.tiles.warps, self.programs)


def _tiles(loop: Loop) -> int:
    """Key tiles of one iteration: each has two copies by descriptor, of K and V or of q and dout."""
    return max(1, loop.boxes // 2)


def _kernel(case: Case) -> tuple[triton.JITFunction, dict[str, object]]:
    """Returns the function and its constants: 32 query heads over 8 KV heads, bfloat16, blocks of 64."""
    kernel, head_dim, tiles = case.kernel, case.head_dim, case.tiles
    constants = {
        "D": head_dim, "DV": head_dim, "BD": case.padded, "BDV": case.padded, "BLOCK": BLOCK,
        "BM": tiles.rows, "BN": tiles.keys, "PACKED": False, "PREC": "tf32", "p_tiles": None,
    }  # fmt: skip
    if kernel == DECODE:
        few = {name: constants[name] for name in ("D", "BD", "BM", "BN", "PREC")}
        return triton_decode.s2_decode_kernel_split, few | {"HKV": 8, "HEADS": 8, "GROUP": GROUP}
    lists = {} if case.mask else dict.fromkeys(("p_starts", "p_list"))
    source = {"COMPACT": bool(case.source), "CSR": case.mask, **lists}
    names = ("d_q", "d_do") if "dkv" in kernel else ("d_q", "d_k", "d_v", "d_ks", "d_vs")
    names += ("d_do",) if kernel == "dq" else ()
    constants |= {"DESC": bool(case.boxes)} | dict.fromkeys(name for name in names if name not in case.boxes)
    if kernel in ("forward", "dq"):
        absent = [] if kernel == "dq" else ["p_sink"]
        row = {"GROUP": GROUP, "PACK": packed_heads(GROUP, tiles.rows, BLOCK)} | (
            {} if kernel == "dq" else {"HAS_SINK": False}
        )
        row |= {"SHARD": case.source != "window", "WINDOW": case.source != "shard"}
        # In context parallelism each of dQ's passes adds to what is there, and the forward's second one.
        row["RESUME"] = case.source == "shard" or (kernel == "dq" and bool(case.source))
        absent += [] if row["RESUME"] else ["p_prev"]
        if kernel == "dq":  # the output is there unless a pass has its own kernel for delta
            absent += ["p_dlse"] + (["p_o", "p_lse"] if case.source else [])
        function = triton_dq.s2_bwd_kernel_dq if kernel == "dq" else triton_forward.s2_fwd_kernel
        return function, constants | source | row | dict.fromkeys(absent)
    constants |= {"GRAD_K": case.gradient != "dv", "GRAD_V": case.gradient != "dk"}
    if kernel == "dkv shard":
        return triton_dkv.s2_bwd_kernel_dkv_shard, constants | source | {"HKV": 8}
    return triton_dkv.s2_bwd_kernel_dkv_window, constants | {"ADD_SHARD": True} | (
        {"ADD_SHARD": False, "p_dks": None, "p_dvs": None} if case.source else {}
    )


def _type(name: str, constants: dict[str, object], case: Case) -> str:
    if name in constants:
        return "constexpr"
    if name in case.boxes:
        return case.boxes[name]
    if case.source and name in ("p_o", "p_dq", "p_prev", "p_dk", "p_dv"):
        return "*fp32"  # parts of results
    if name.startswith("p_"):
        kind = {"p_heads": "i32", "p_starts": "i64", "p_list": "i32", "p_kept": "i32"} | dict.fromkeys(
            ("p_lse", "p_lse2", "p_delta", "p_dks", "p_dvs", "p_part"), "fp32"
        )
        return "*" + kind.get(name, case.dtype)
    return "fp32" if name == "scale" else "i32"


def compiled(case: Case) -> Resources:
    """Compiles one kernel for one chip and asks the binary what it takes."""
    function, constants = _kernel(case)
    chip, tiles = CHIPS[case.chip], case.tiles
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name[:2] in ("p_", "s_")}
    source = ASTSource(
        function,
        {name: _type(name, constants, case) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={key: value for key, value in aligned.items() if names[key[0]] not in constants},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", chip.capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    registers, stack, local = _resource_usage(binary.asm["cubin"])
    code = parse(disassemble(binary.asm["cubin"]))
    used = case.instruction in binary.asm["ptx"]
    return Resources(case, registers, stack + local, binary.metadata.shared, used, code)


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
        role, capability = kernel.split()[0], CHIPS[chip].capability // 10
        tiles = candidates(role, capability, head_dim, 2)
        few = shipped or chip == WORKSTATION
        found += [Case(chip, kernel, head_dim, x, x == tiles[0]) for x in tiles[: 1 if few else None]]
        if few:
            continue
        if head_dim == MASK_HEAD_DIM:
            if kernel != "dkv window":  # which is the same with a mask
                found.append(Case(chip, kernel, head_dim, tiles[0], mask=True))
            if chip == HOPPER:
                found += [
                    Case(chip, kernel, head_dim, tiles[0], **x)
                    for x in ({"dtype": "fp16"}, {"pointers": True})
                ]
        passes = getattr(tuning_for(capability, head_dim, 2, passes=True), role)
        found += [
            Case(chip, kernel, head_dim, passes, source=source)
            for source in kernel.split()[1:] or ("window", "shard")
        ]
    if HOPPER in chips and not shipped and set(head_dims) == set(HEAD_DIMS):
        for kernel, head_dim in product(KERNELS, OTHER_HEAD_DIMS):
            (tiles, *_) = candidates(kernel.split()[0], 9, head_dim, 2)
            case = Case(HOPPER, kernel, head_dim, tiles)
            alone = "dkv" in kernel and separate_dkv(tiles, 2 * case.padded)
            found += [replace(case, gradient=x) for x in ("dv", "dk")] if alone else [case]
    for chip, head_dim in product(chips, head_dims):
        found.append(Case(chip, DECODE, head_dim, triton_decode.decode_tiles(head_dim, GROUP, 2)))
    return found


def fingerprint() -> str:
    """Returns a hash of the kernels (without comments, imports and launches), of the cases, and of the
    constants that these compile kernels with."""
    modules = triton_common, triton_forward, triton_dq, triton_dkv, triton_decode
    sources = [
        ast.unparse(node)
        for module in modules
        for node in _statements(module.__file__)
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and (not isinstance(node, ast.FunctionDef) or node.decorator_list)
    ]
    constants = "Case", "_kernel", "_type"
    sources += [ast.unparse(x) for x in _statements(__file__) if getattr(x, "name", None) in constants]
    text = "\n".join([*sources, *map(repr, cases(tuple(CHIPS), HEAD_DIMS))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _statements(path: str) -> list[ast.stmt]:
    return ast.parse(Path(path).read_text(encoding="utf-8")).body


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
        now = [row.row() for row in rows] + prediction(rows)
        found += [f"{TABLE.name} is stale, now: {line}" for line in now if line not in table]
    return found


def prediction(rows: Sequence[Resources]) -> list[str]:
    """Returns lines about the predicted speed of a layer on an H100; none if some of its kernels lack."""
    kernels = {
        row.case.kernel: row.for_prediction()
        for row in rows
        if row.case.chip == HOPPER and row.case.head_dim == 128 and row.case.what() == "shipped"
    }
    if not set(KERNELS) <= set(kernels):
        return []
    splits = tuning_for(9, 128, 2).splits
    probed = predicted_probe(probe())
    if abs(probed / PROBE_TFLOPS - 1) > TOLERANCE:
        return [
            f"No prediction: the model gives {probed:.0f} TFLOP/s where {PROBE_TFLOPS:.0f} were published."
        ]
    lines = [
        "## Predicted on an H100",
        "",
        "By the model of `scripts/lib/throughput.py`, whose constants have their sources there. For a plain",
        "attention kernel (forward, not causal, 16384 tokens, head_dim 128) it predicts",
        f"{probed:.0f} TFLOP/s where {PROBE_TFLOPS:.0f} were published: {probed / PROBE_TFLOPS - 1:+.0%}, of",
        f"{TOLERANCE:.0%} allowed. The last column divides ours by that error. No GPU has confirmed any of",
        "this. The model has no limit on what the L2 cache delivers: dK and dV ask it for about 23 bytes per",
        "cycle and multiprocessor. It lets two programs of a multiprocessor hide each other's waits, as dK",
        "and dV have them. FlashAttention-2's rates beyond 16384 tokens are extrapolated from its curves.",
        "",
        "32 query and 8 KV heads, blocks of 64, window of 8, stride 16, bfloat16; TFLOP/s of visible pairs,",
        "and those over FlashAttention-2's, forward and backward together.",
        "",
        "| tokens | forward | backward | FlashAttention-2 | over it | over it, less the probe's error |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tokens, flash in FLASH2.items():
        forward, backward, over = predict(PATTERN, tokens, kernels, splits)
        lines.append(
            f"| {tokens} | {forward:.0f} | {backward:.0f} | {flash[0]} and {flash[1]} | {over:.2f} "
            f"| {over * min(1, PROBE_TFLOPS / probed):.2f} |"
        )
    return lines


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
        "From the machine code, per warp: instructions for 64 keys that all rows see (of dK and dV, 64",
        "rows), how many iterations its copies are ahead while it waits for one, and how many programs a",
        "multiprocessor runs at a time. On Hopper the check also asserts that each loop computes nothing",
        "twice, multiplies whole tiles, hardly uses local memory, and has either copies ahead or another",
        "program to run.",
        "",
        f"{made_by(triton.__version__)} Fingerprint of kernels and tiles: `{fingerprint()}`.",
        "",
        "| chip | kernel | head_dim | tiles | rows x keys | warps | stages | registers | local | shared "
        "| in PTX | instructions | ahead | programs |",
        "| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
        *(row.row() for row in rows),
        "",
        *prediction(rows),
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
        print(page(rows))
        if not problems:
            TABLE.write_text(page(rows), encoding="utf-8")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
