"""Static throughput model of an H100: cycles of a loop from its machine code, and time of whole attention
calls.

A program of 128 threads (one warpgroup) puts one warp on each of the four schedulers of a multiprocessor. One
iteration then costs, in cycles of the multiprocessor:

    products    FLOPs of all resident warpgroups at the dense rate of the tensor cores
    issue       instructions of the resident warps of a scheduler, one each cycle; or, if that takes longer,
                their exponentials at the rate of the special function units
    latency     where only one program is resident, what its warps wait for: draining the tensor cores before
                their results are read, and shuffles that depend on each other

Triton's programs on Hopper have no schedule that alternates warpgroups between tensor cores and softmax, and
barriers keep those of a program together, so the three are added up. What programs beside each other gain by
overlapping products and softmax, which nothing prevents, is not counted. The model is held to a published
number: `PROBE_TFLOPS` of a plain attention kernel, which `probe` compiles in a version of its own. It must
be within `TOLERANCE` of that."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl
from lib.sass import Code, Loop, disassemble, parse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_s2.pattern import S2Pattern

MULTIPROCESSORS = 132  # H100 SXM5; NVIDIA H100 Tensor Core GPU Architecture, table 2
# 989.4 TFLOP/s dense in bf16 at 1830 MHz on 132 multiprocessors; same table.
TENSOR_FLOPS = 4096  # per cycle and multiprocessor
CLOCK = 1.59e9  # base clock of the H100 SXM5; under products of tiles it runs near that and not at its boost
SCHEDULERS = 4  # per multiprocessor, an instruction of a warp per cycle each
EXPONENTIAL_CYCLES = (
    8  # of a warp: 16 results per cycle and multiprocessor; CUDA C++ Programming Guide, cc 9.0
)
# Measured on Hopper by Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking",
# 2025:
WAIT_CYCLES = 128  # latency of wgmma m64n256k16, the length of what a wait drains
# Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018; not measured on
# Hopper.
SHUFFLE_CYCLES = 23
LOAD_CYCLES = (
    800  # from device memory, at the start of a program, where nothing overlaps it; same order in both
)

MEMORY = 3.0e12  # bytes per second that a kernel that only reads reaches of the H100's 3.35 TB/s
# The last programs of forward, dQ and the window leave multiprocessors idle, up to 3% of the time when the
# longest start first (simulated); those of the shard, few and long, are simulated each time.
IMBALANCE = 1.03

# FlashAttention-2 on an H100 SXM5 at head_dim 128, causal, in TFLOP/s of visible pairs: (forward, backward)
# by tokens. 16K: Shah et al., "FlashAttention-3", 2024, figures 5 and 6. Longer: its curves, extrapolated
# towards those without a causal mask (370 and 322), which they approach as the share of diagonal tiles
# falls.
FLASH2 = {16384: (335, 295), 65536: (360, 312), 131072: (365, 318)}

# Triton's fused attention, forward, head_dim 128, one sequence of 16384 tokens, 16 heads, not causal, on an
# H100: pytorch/benchmark, pull request 2391.
PROBE_TFLOPS = 476.8
TOLERANCE = 0.15


def cycles(loop: Loop, warps: int, programs: int = 1) -> float:
    """Cycles in which a multiprocessor does one iteration of each of its `programs` resident programs."""
    groups = warps // 4
    products = groups * programs * loop.tensor_flops / TENSOR_FLOPS
    resident = warps * programs / SCHEDULERS
    issue = resident * max(loop.size, EXPONENTIAL_CYCLES * loop.exponentials)
    latency = loop.waits * WAIT_CYCLES + _dependent_shuffles(loop) * SHUFFLE_CYCLES
    return products + issue + (latency if programs == 1 else 0)


def _dependent_shuffles(loop: Loop) -> int:
    # A thread has two rows; their reductions over four lanes, two shuffles each, go side by side.
    return loop.count("SHFL") // 2


@triton.jit
def _probe_kernel(d_q, d_k, d_v, d_o, seq, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(1) * seq
    b_q = d_q.load([row + tl.program_id(0) * BM, 0])
    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for i_n in range(0, seq, BN):
        qk = tl.dot(b_q, tl.trans(d_k.load([row + i_n, 0])))
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        p = tl.exp2(qk * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.float16), d_v.load([row + i_n, 0]), acc * alpha[:, None])
        m_i = m_new
    d_o.store([row + tl.program_id(0) * BM, 0], (acc / l_i[:, None]).to(tl.float16))


def probe() -> Code:
    """Compiles plain attention, head_dim 128 in float16, with the tiles of the published number."""
    constants = {"BM": 128, "BN": 128, "D": 128}
    types = {"seq": "i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("d_q", "d_k", "d_v", "d_o"), "tensordesc<fp16[128, 128]>")
    names = _probe_kernel.arg_names
    source = ASTSource(
        _probe_kernel,
        {name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index("seq"),): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return parse(disassemble(binary.asm["cubin"]))


def predicted_probe(code: Code) -> float:
    """TFLOP/s of the probe at long sequences, where its loop is all of its time."""
    (loop,) = code.loops
    return 2 * loop.tensor_flops / cycles(loop, warps=8) * MULTIPROCESSORS * CLOCK / 1e12


# ---------------------------------------------------------------------------------------------------------
# A layer of S2 attention.


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's machine code, the warps of its programs, and how many programs a multiprocessor runs at a
    time."""

    code: Code
    warps: int
    programs: int

    def _cost(self, loop: Loop) -> float:
        return cycles(loop, self.warps, self.programs) / self.programs

    def costs(self) -> tuple[float, float, float, float]:
        """Cycles of an iteration over two tiles, over one, and over a masked one, and of what surrounds
        loops."""
        boxes = sorted((loop for loop in self.code.loops if loop.boxes), key=lambda loop: loop.size)
        single = next(loop for loop in boxes if loop.boxes == 2)
        pair = next((loop for loop in boxes if loop.boxes == 4), None)
        masked = max((loop for loop in self.code.loops if loop.boxes < 4), key=lambda loop: loop.size)
        around = LOAD_CYCLES / self.programs + self._issue(self.code.straight)
        pair_cost = 2 * self._cost(single) if pair is None else self._cost(pair)
        return pair_cost, self._cost(single), self._cost(masked), around

    def addition(self) -> float:
        """Cycles of an iteration of its loop without products."""
        (loop,) = self.code.others
        return self._issue(loop.size)

    def _issue(self, instructions: int) -> float:
        return instructions * self.warps / SCHEDULERS


def predict(
    pattern: S2Pattern,
    tokens: int,
    kernels: Mapping[str, CompiledKernel],
    splits: Callable[[int, int], int],
    group: int = 4,
    head_dim: int = 128,
) -> tuple[float, float, float]:
    """Returns TFLOP/s of visible pairs, forward and backward, and both together over FlashAttention-2.

    Args:
        pattern: a pattern without sinks whose blocks have 64 tokens.
        tokens: length of the sequence, a key of `FLASH2`.
        kernels: the compiled kernels "forward", "dq", "dkv shard" and "dkv window", with tiles of 64 keys and
            of 64 tokens of two heads.
        splits: programs of a shard column, as `Tuning.splits`.
    """
    heads, blocks = pattern.num_kv_heads, tokens // pattern.block_size
    window = pattern.local_blocks
    rows = {"forward": 0.0, "dq": 0.0}
    for name in rows:
        pair, single, masked, around = kernels[name].costs()
        for head in range(heads):
            for block in range(blocks):
                low = max(0, block - window + 1)
                whole = _shard(pattern, head, low) + block - low
                tiles = whole // 2 * pair + whole % 2 * single + masked + around
                rows[name] += group / 2 * tiles

    parts, shard = _shard_parts(pattern, tokens, kernels["dkv shard"], splits, group)
    _, single, masked, around = kernels["dkv window"].costs()
    keys = parts * kernels["dkv window"].addition()
    for block in range(blocks):
        keys += heads * (group * (masked + min(window - 1, blocks - 1 - block) * single) + around)

    rate = MULTIPROCESSORS * CLOCK / IMBALANCE
    moved = 2 * parts * pattern.block_size * 2 * head_dim * 4  # parts of dK and dV, float32, written and read
    seconds = rows["forward"] / rate, (rows["dq"] + keys) / rate + shard / CLOCK + moved / MEMORY
    flops = pattern.flops(tokens, heads * group, head_dim)
    forward, backward = (x / s / 1e12 for x, s in zip((flops.forward, flops.backward), seconds))
    both = (flops.forward + flops.backward) / sum(seconds) / 1e12
    flash_forward, flash_backward = FLASH2[tokens]
    return forward, backward, both / (7 / (2 / flash_forward + 5 / flash_backward))


def _shard_parts(
    pattern: S2Pattern, tokens: int, kernel: CompiledKernel, splits: Callable[[int, int], int], group: int
) -> tuple[int, float]:
    """Number of parts of dK and dV that are written, and cycles until the last one is: programs begin in the
    order of their launch, each where one ends first."""
    heads, blocks = range(pattern.num_kv_heads), tokens // pattern.block_size
    columns = [_shard(pattern, head, max(0, blocks - pattern.local_blocks)) for head in heads]
    count = splits(max(columns) * len(heads), tokens)
    span = -(-blocks // count)
    _, single, _, around = kernel.costs()
    places, parts = [0.0] * (MULTIPROCESSORS * kernel.programs), 0
    for split, head in product(reversed(range(count)), heads):
        for n in range(columns[head]):
            seen = pattern.shard_block(head, n) + pattern.local_blocks
            rows = min(blocks, (split + 1) * span) - max(seen, split * span)
            if rows > 0:
                parts += 1
                cycles = (group * rows * single + around) * kernel.programs
                heapq.heapreplace(places, places[0] + cycles)
    return parts, max(places)


def _shard(pattern: S2Pattern, head: int, blocks: int) -> int:
    """Shard blocks of a head among the first `blocks`."""
    return max(0, -(-(blocks - pattern.first_strided(head)) // pattern.steps[head]))
