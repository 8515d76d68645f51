"""Static throughput model of an H100: cycles of a loop from its machine code, and time of whole attention calls.

A program of 128 threads (one warpgroup) puts one warp on each of the four schedulers of a multiprocessor. One
iteration then costs, in cycles of the multiprocessor:

    products    FLOPs of all resident warpgroups at the dense rate of the tensor cores
    issue       instructions of the resident warps of a scheduler, one each cycle; or, if that takes longer, their
                exponentials at the rate of the special function units
    latency     what a warp waits for with nothing to overlap it: draining the tensor cores before their results
                are read, and shuffles that depend on each other

Triton's programs on Hopper have no schedule that alternates warpgroups between tensor cores and softmax, so the
three are added up. The model is held to a published number: `PROBE_TFLOPS` of a plain attention kernel, which
`probe` compiles in a version of its own. It must be within `TOLERANCE` of that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lib.sass import Code, Loop, disassemble, parse

MULTIPROCESSORS = 132  # H100 SXM5; NVIDIA H100 Tensor Core GPU Architecture, table 2
# 989.4 TFLOP/s dense in bf16 at 1830 MHz on 132 multiprocessors; same table.
TENSOR_FLOPS = 4096  # per cycle and multiprocessor
CLOCK = 1.59e9  # base clock of the H100 SXM5; under products of tiles it runs near that and not at its boost
SCHEDULERS = 4  # per multiprocessor, an instruction of a warp per cycle each
EXPONENTIAL_CYCLES = (
    8  # of a warp: 16 results per cycle and multiprocessor; CUDA C++ Programming Guide, cc 9.0
)
# Measured on Hopper by Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", 2025:
WAIT_CYCLES = 128  # latency of wgmma m64n256k16, the length of what a wait drains
# Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018; not measured on Hopper.
SHUFFLE_CYCLES = 23
LOAD_CYCLES = (
    800  # from device memory, at the start of a program, where nothing overlaps it; same order in both
)

# FlashAttention-2 on an H100 SXM5 at head_dim 128, causal, in TFLOP/s of visible pairs: (forward, backward) by
# tokens. 16K: Shah et al., "FlashAttention-3", 2024, figures 5 and 6. Longer: its curves, extrapolated towards
# those without a causal mask (370 and 322), which they approach as the share of diagonal tiles falls.
FLASH2 = {16384: (335, 295), 65536: (360, 312), 131072: (365, 318)}

# Triton's fused attention, forward, head_dim 128, one sequence of 16384 tokens, 16 heads, not causal, on an H100:
# pytorch/benchmark, pull request 2391.
PROBE_TFLOPS = 476.8
TOLERANCE = 0.15


def cycles(loop: Loop, warps: int, programs: int = 1) -> float:
    """Cycles in which a multiprocessor does one iteration of each of its `programs` resident programs."""
    groups = warps // 4
    products = groups * programs * loop.tensor_flops / TENSOR_FLOPS
    resident = warps * programs / SCHEDULERS
    issue = resident * max(loop.size, EXPONENTIAL_CYCLES * loop.exponentials)
    return products + issue + loop.waits * WAIT_CYCLES + _dependent_shuffles(loop) * SHUFFLE_CYCLES


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
