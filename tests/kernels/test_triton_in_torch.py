"""Specification of the Triton operators inside PyTorch: compiled, checkpointed, counted, autotuned.

Run as `test_triton.py` is.
"""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from attention_cases import packed, random_mask, s2
from selection import exhaustive, thinned
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import DEVICE, INTERPRETED, case, cut, on_device

from megatron_s2 import BlockMaskPattern, S2Pattern, s2_attention
from megatron_s2.kernels.autotune import Autotuner
from megatron_s2.kernels.compare import Results, require_equal
from megatron_s2.kernels.triton_pattern import KernelPattern, mask_tables
from megatron_s2.kernels.triton_support import capability_of
from megatron_s2.kernels.tuning import KERNELS, Tuning, candidates

SMALL = case(s2(), "s2", cut(32, 32), queries=40, sink_logits=True)
SMALL_MASK = case(random_mask(2, 3), "mask", cut(32, 32), queries=40, sink_logits=True)


@on_device
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [(s2(), "sequence first"), *exhaustive((random_mask(2, 3), "batch first"))],
    ids=["s2 sequence first", "mask batch first"],
)
def test_operators_pass_the_checks_of_torch_library(pattern, layout):
    one = case(pattern, "", cut(32, 32), queries=20, layout=layout, sink_logits=True)
    inputs = one.inputs(torch.float32)
    q, k, v, sink_logits = (inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits"))
    masked = isinstance(pattern, BlockMaskPattern)
    tables = mask_tables(pattern, q.device) if masked else (None, None)
    rest = (*tables, KernelPattern.of(pattern).code, 0, 0.25, "", 0, one.tuning.code)
    torch.library.opcheck(torch.ops.megatron_s2.attention_forward, (q, k, v, sink_logits, *rest))
    out, lse = (x.detach() for x in s2_attention(q, k, v, pattern, backend="triton"))
    detached = (x.detach() for x in (q, k, v))
    torch.library.opcheck(
        torch.ops.megatron_s2.attention_backward,
        (inputs["dout"], inputs["dlse"], *detached, out, lse, *rest),
    )


def through(attend, one) -> Results:
    """Results and gradients of one call."""
    inputs = one.inputs(torch.float32)
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits")]
    out, lse = attend(*tensors)
    gradients = torch.autograd.grad([out, lse], tensors, [inputs["dout"], inputs["dlse"]])
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dsink_logits"), (out, lse, *gradients)))


@on_device
@pytest.mark.parametrize("one", [SMALL, *exhaustive(SMALL_MASK)], ids=lambda one: one.special)
def test_torch_compile_captures_a_full_graph_and_changes_no_bit(one):
    attend = one.attention("triton")
    eager = through(attend, one)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    require_equal(through(compiled, one), eager, most=0)


@on_device
@pytest.mark.parametrize(
    ("one", "use_reentrant"),
    [(SMALL, False), (SMALL_MASK, True), *exhaustive((SMALL, True), (SMALL_MASK, False))],
    ids=lambda value: value.special if hasattr(value, "special") else f"reentrant {value}",
)
def test_activation_checkpointing_changes_no_bit(one, use_reentrant):
    attend = one.attention("triton")

    def recomputed(*tensors):
        return checkpoint(attend, *tensors, use_reentrant=use_reentrant)

    require_equal(backward(recomputed, one), backward(attend, one), most=0)


def backward(attend, one) -> Results:
    """Gradients of one call, accumulated in its inputs: a reentrant checkpoint refuses autograd.grad."""
    inputs = one.inputs(torch.float32)
    tensors = {name: inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits")}
    out, lse = attend(*tensors.values())
    torch.autograd.backward([out, lse], [inputs["dout"], inputs["dlse"]])
    return {"out": out, "lse": lse} | {f"d{name}": x.grad for name, x in tensors.items()}


@on_device
@pytest.mark.exhaustive
@pytest.mark.parametrize("pattern", [s2(1, sink_blocks=1), random_mask(1, 4)], ids=["s2", "mask"])
def test_the_numerical_gradient_agrees(pattern):
    """float32 limits it: differences of 1e-2 leave an error of about 1e-3."""
    one = case(pattern, "", cut(16, 16), queries=45, dim=3, v_dim=2, q_start=3, sink_logits=True)
    inputs = one.inputs(torch.float32)
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "v", "sink_logits")]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that float32 is not double
        assert torch.autograd.gradcheck(
            one.attention("triton"), tensors, eps=1e-2, atol=2e-2, rtol=1e-2, fast_mode=True
        )


# FLOPs.


COUNTED = {
    "q_start": {"queries": 50, "q_start": 37},
    "packed": packed(0, 40, 33),
    "batch": {"batch": 2, "queries": 50, "v_dim": 24},
}
SHORT_COUNTS = {("q_start", "s2"), ("packed", "mask"), ("batch", "s2")}


@on_device
@pytest.mark.parametrize(
    ("options", "pattern"),
    thinned(product(COUNTED, ("s2", "mask")), lambda count: not INTERPRETED or count in SHORT_COUNTS),
)
def test_the_flop_counter_counts_visible_pairs(options, pattern):
    patterns = {
        "s2": s2(3, sink_blocks=2, vert_stride=(1, 3, 5), phases=(0, 1, 3)),
        "mask": random_mask(3, 6),
    }
    one = case(patterns[pattern], "", cut(128, 128), **COUNTED[options])
    with FlopCounterMode(display=False) as counter:
        one.results("triton", torch.float32)
    forward = torch.ops.megatron_s2.attention_forward
    backward = torch.ops.megatron_s2.attention_backward
    counted = counter.get_flop_counts()["Global"]

    offsets = one.documents or (0, one.q_start + one.queries)
    lengths = [b - a for a, b in pairwise(offsets)]
    visible = [one.pattern.flops(n, 3 * one.group, one.dim, one.v_dim) for n in lengths]
    unseen = one.pattern.flops(one.q_start, 3 * one.group, one.dim, one.v_dim)
    assert counted[forward] == one.batch * (sum(x.forward for x in visible) - unseen.forward)
    assert counted[backward] == one.batch * (sum(x.backward for x in visible) - unseen.backward)


FIRST_CALL = f"""
import torch
from torch.utils.flop_counter import FlopCounterMode
from megatron_s2 import S2Pattern, s2_attention

pattern = S2Pattern(num_kv_heads=2, block_size=16, local_blocks=2, vert_stride=2)
q = torch.zeros(1, 20, 2, 16, device={DEVICE!r})
with FlopCounterMode(display=False) as counter:
    s2_attention(q, q, q, pattern, backend="triton")
assert counter.get_total_flops() == pattern.flops(20, 2, 16).forward, counter.get_flop_counts()
"""


@on_device
@pytest.mark.exhaustive
def test_the_flops_of_the_first_call_of_a_process_are_counted():
    subprocess.run([sys.executable, "-c", FIRST_CALL], env=os.environ, check=True)


# Autotuning.


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Keys and tiles of all measured launches; the last candidate of each kernel is the fastest."""
    from megatron_s2.kernels import triton_autotune

    measured = []

    class Recorder(Autotuner):
        def choose(self, key, launch):
            def recorded(tiles):
                measured.append((key, tiles))
                launch(tiles)

            return super().choose(key, recorded)

    def seconds(launch):
        launch()
        return 1 / len(measured)

    monkeypatch.setattr(triton_autotune, "AUTOTUNER", Recorder(seconds, tmp_path))
    return measured


@on_device
@pytest.mark.parametrize("pattern", [s2(1), *exhaustive(random_mask(1, 3))], ids=["s2", "mask"])
def test_autotuning_launches_all_candidates_and_uses_the_fastest(pattern, tuned):
    one = case(pattern, "", "autotune", queries=40)
    results = one.results("triton", torch.float16)
    chip = capability_of(torch.device(DEVICE)), one.dim, 2
    tried = [(kernel, tiles) for kernel in KERNELS for tiles in candidates(kernel, *chip)]
    assert [(key.kernel, tiles) for key, tiles in tuned] == tried
    assert {key.mask for key, _ in tuned} == {not isinstance(pattern, S2Pattern)}

    fastest = Tuning(*(candidates(kernel, *chip)[-1] for kernel in KERNELS))
    pinned = replace(one, tuning=fastest).results("triton", torch.float16)
    require_equal(results, pinned, most=0)
    require_equal(one.results("triton", torch.float16), pinned, most=0)
    assert len(tuned) == len(tried), "chosen once, and a pinned tuning asks for nothing"
