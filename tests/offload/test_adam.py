"""Specification of the AdamW update: on one device the same bits however the state is cut, on two the same or
within the stated bound, and then the user is told.

The kernel runs in Triton's interpreter, in two processes, and is compiled for every chip without one. How
PyTorch's kernel rounds depends on its build and on the CPU; what is asserted of it holds for any.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import fma, round_fma_once
from selection import exhaustive

from megatron_s2.offload import adam
from megatron_s2.offload.adam import (
    CHUNK,
    AdamWSettings,
    State,
    check_gradient_scale,
    fused_update,
    update_on_cpu,
    update_on_gpu,
)
from megatron_s2.offload.rounding import rounding_bound, rounding_note, same_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = [torch.float16, torch.float32, *([] if INTERPRETED else [torch.bfloat16])]
on_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu
SETTINGS = {
    "first": AdamWSettings(1e-3, (0.9, 0.999), 1e-8, 0.01, 1),
    "late": AdamWSettings(3e-4, (0.9, 0.95), 1e-8, 0.1, 12345),
    "no decay": AdamWSettings(1e-2, (0.85, 0.95), 1e-6, 0.0, 3),
    "short memory": AdamWSettings(1e-3, (0.3, 0.4), 1e-8, 0.1, 2),
    "no memory": AdamWSettings(1e-3, (0.0, 0.0), 1e-8, 0.1, 2),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
each_scale = pytest.mark.parametrize("scale", [1.0, 65536 * 1.7, 0.3], ids="scale{}".format)


def sample(size: int, seed: int = 0) -> tuple[State, torch.Tensor]:
    """State and gradient `[size]` over many orders of magnitude, zeros and denormals among them."""
    generator = torch.Generator().manual_seed(seed)

    def wide() -> torch.Tensor:
        x = torch.randn(size, generator=generator)
        return x * 10.0 ** (torch.rand(size, generator=generator) * 12 - 10)

    state = State(wide(), wide(), wide().abs())
    gradient = wide()
    for x in (*state, gradient):
        x[::7] = 0
        x[1::31] = 1e-41
    return state, gradient


def copied(state: State) -> State:
    return State(*(x.clone() for x in state))


def updated(state, gradient, settings, scale=1.0, dtype=torch.bfloat16, update=update_on_cpu):
    """What the update makes of copies: state and weights."""
    state, weights = copied(state), torch.empty(gradient.numel(), dtype=dtype)
    on = "cpu" if update is update_on_cpu else DEVICE
    state, weights = State(*(x.to(on) for x in state)), weights.to(on)
    update(state, gradient.clone().to(on), weights, settings, scale)
    return [x.cpu() for x in (*state, weights)]


@pytest.fixture(autouse=True, scope="module")
def exact_interpreter():
    if INTERPRETED:
        round_fma_once()


def stated_order(state, gradient, settings, scale, dtype=torch.bfloat16):
    """The formula of the module's docstring, line by line, and the masters rounded to weights."""
    p, m, v, g = (x.numpy() for x in (*state, gradient))
    (beta1, beta2), f = settings.betas, np.float32
    g = g / f(scale)
    p = p * f(1 - settings.lr * settings.weight_decay)
    m = fma(f(1 - beta1), g - m, m) if f(1 - beta1) < 0.5 else fma(f(1 - beta1) - f(1), g - m, g)
    v = fma(f(1 - beta2) * g, g, v * f(beta2))
    root = np.sqrt(v) / f(np.sqrt(1 - beta2**settings.step)) + f(settings.eps)
    p = p + f(-settings.lr / (1 - beta1**settings.step)) * m / root
    after = [torch.from_numpy(x) for x in (p, m, v)]
    return [*after, after[0].to(dtype)]


def largest_excess(got, state, gradient, settings, scale):
    """How far the step of a state is from exact arithmetic, in the stated bounds: at most 1."""
    exact, bounds = rounding_bound(state, gradient, settings, scale)
    return max(((x - y).abs() / bound).max().item() for x, y, bound in zip(got, exact, bounds))


def require_same_bits(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


if not INTERPRETED:

    @each_setting
    @each_scale
    def test_it_is_adamw(settings, scale):
        state, gradient = (
            State(*(x.double() for x in sample(640)[0])),
            sample(640)[1].double(),
        )
        state = State(state.master.clamp(-10, 10), state.exp_avg.clamp(-1, 1), state.exp_avg_sq + 1e-2)
        gradient = gradient.clamp(-1, 1)
        p = torch.nn.Parameter(state.master.clone())
        p.grad = gradient / scale
        one = torch.optim.AdamW(
            [p],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        one.state[p] = {
            "step": torch.tensor(settings.step - 1.0),
            "exp_avg": state.exp_avg.clone(),
            "exp_avg_sq": state.exp_avg_sq.clone(),
        }
        one.step()
        expected = (p.detach(), one.state[p]["exp_avg"], one.state[p]["exp_avg_sq"])
        got = updated(State(*(x.float() for x in state)), gradient.float(), settings, scale)
        for x, y in zip(got, expected):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-7)

    @each_setting
    @each_scale
    def test_the_bound_is_close(settings, scale):
        """The stated order comes near it; a constant that is wrong in its fifth digit exceeds it."""
        state, gradient = sample(64 * 500)
        state.exp_avg[::3] = 0
        after = stated_order(state, gradient, settings, scale)[:3]
        assert 0.1 < largest_excess(after, state, gradient, settings, scale) <= 1
        lr, betas = settings.lr * (1 + 1e-4), [beta + 1e-5 for beta in settings.betas]
        for other in (
            {"lr": lr},
            {"betas": (betas[0], settings.betas[1])},
            {"betas": (settings.betas[0], betas[1])},
        ):
            wrong = stated_order(state, gradient, replace(settings, **other), scale)[:3]
            assert largest_excess(wrong, state, gradient, settings, scale) > 1, other

    @pytest.mark.parametrize("threads", [1, 2, 3])
    @pytest.mark.parametrize("cut", [64, 192, 1024])
    def test_cuts_and_threads_change_no_bit(cut, threads):
        state, gradient = sample(64 * 33)
        whole = updated(state, gradient, SETTINGS["late"], 3.1)
        torch.set_num_threads(threads)
        try:
            parts = [
                updated(state.cut(a, a + cut), gradient[a : a + cut], SETTINGS["late"], 3.1)
                for a in range(0, gradient.numel(), cut)
            ]
        finally:
            torch.set_num_threads(1)
        require_same_bits([torch.cat(x) for x in zip(*parts)], whole)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_weights_may_take_the_place_of_the_gradient(dtype, monkeypatch):
        monkeypatch.setattr("megatron_s2.offload.adam.CHUNK", 128)
        state, gradient = sample(64 * 9)
        expected = updated(state, gradient, SETTINGS["first"], 2.0, dtype)
        weights = gradient.view(dtype)[: gradient.numel() - 5]
        update_on_cpu(state, gradient, weights, SETTINGS["first"], 2.0)
        require_same_bits([*state, weights], [*expected[:3], expected[3][:-5]])
        require_same_bits([weights], [state.master[:-5].to(dtype)])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_a_gradient_that_is_kept_stays_and_gives_the_same_bits(dtype, monkeypatch):
        monkeypatch.setattr("megatron_s2.offload.adam.CHUNK", 128)
        state, gradient = sample(64 * 9)
        gradient[-5:] = 0
        gradient = gradient.to(dtype)
        expected = updated(state, gradient.float(), SETTINGS["late"], 2.0)
        before, weights = gradient.clone(), torch.empty(64 * 9 - 5, dtype=torch.bfloat16)
        update_on_cpu(state, gradient[:-5], weights, SETTINGS["late"], 2.0, keep_gradient=True)
        require_same_bits([*state, weights, gradient], [*expected[:3], expected[3][:-5], before])

    def test_a_slice_longer_than_a_chunk():
        state, gradient = sample(CHUNK + 64)
        whole = updated(state, gradient, SETTINGS["first"])
        tail = updated(state.cut(CHUNK, CHUNK + 64), gradient[CHUNK:], SETTINGS["first"])
        require_same_bits([x[CHUNK:] for x in whole], tail)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"lr": -1.0}, "lr -1.0: must be >= 0"),
            ({"eps": float("nan")}, "eps nan: must be >= 0"),
            ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\): must be >= 0 and below 1"),
            ({"step": 0}, "step 0: must be >= 1"),
        ],
    )
    def test_settings_out_of_range_are_refused(change, message):
        with pytest.raises(ValueError, match=message):
            AdamWSettings(**{"lr": 1.0} | change)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e-46, 1e39])
    def test_a_scale_that_would_destroy_the_state_is_refused(scale):
        with pytest.raises(ValueError, match=r"gradient_scale .*: must be positive and finite"):
            check_gradient_scale(scale)

    def test_a_ragged_slice_is_refused():
        state, gradient = sample(65)
        with pytest.raises(ValueError, match="65 elements with 65 weights: must be a multiple of 64"):
            update_on_cpu(state, gradient, torch.empty(65), SETTINGS["first"])

    @pytest.mark.parametrize("cpu", ["here", *exhaustive("default")])
    def test_the_kernel_in_the_interpreter(cpu):
        """Beside this CPU's update, and beside PyTorch's build without AVX, which rounds otherwise."""
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", __file__],
            env=os.environ
            | {"TRITON_INTERPRET": "1"}
            | ({} if cpu == "here" else {"ATEN_CPU_CAPABILITY": cpu}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]

    @pytest.mark.parametrize("chip", [80, 90, 100], ids="sm_{}".format)
    def test_compiled_it_rounds_as_written(chip):
        """Three IEEE divisions, one root, fma only where the order has it, no flush of denormals."""
        from triton import compile as compile_kernel
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from megatron_s2.offload.adam_kernel import adamw_kernel

        names = adamw_kernel.arg_names
        constants = {"SCALED": True, "DECAYED": True, "FROM_MEAN": True, "BLOCK": 128}
        kinds = {"p_gradient": "*fp32", "p_weights": "*bf16", "size": "i64"}
        source = ASTSource(
            adamw_kernel,
            {
                name: "constexpr"
                if name in constants
                else kinds.get(name, "*fp32" if name.startswith("p_") else "fp32")
                for name in names
            },
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        ptx = compile_kernel(
            source,
            target=GPUTarget("cuda", chip, 32),
            options={"num_warps": 4, "enable_fp_fusion": False},
        ).asm["ptx"]
        found = {
            name: len(re.findall(rf"^\s+{re.escape(name)}\s", ptx, re.MULTILINE))
            for name in ("fma.rn.f32", "div.rn.f32", "sqrt.rn.f32", "mul.f32", "mul.rn.f32")
        }
        assert found["fma.rn.f32"] == 2 and found["div.rn.f32"] == 3 and found["sqrt.rn.f32"] == 1, found
        assert found["mul.f32"] + found["mul.rn.f32"] == 4, found
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)
        assert ".ftz" not in ptx and "approx" not in ptx


@each_setting
@each_scale
def test_the_cpu_keeps_within_the_bound(settings, scale):
    state, gradient = sample(64 * 50)
    got = updated(state, gradient, settings, scale)
    assert largest_excess(got[:3], state, gradient, settings, scale) <= 1
    require_same_bits(got[3:], [got[0].bfloat16()])


@on_device
@each_setting
@each_scale
@pytest.mark.parametrize("size", [64, 3 * 1024 + 64])
def test_the_kernel_follows_the_stated_order(settings, scale, size):
    state, gradient = sample(size)
    got = updated(state, gradient, settings, scale, DTYPES[-1], update_on_gpu)
    require_same_bits(got, stated_order(state, gradient, settings, scale, DTYPES[-1]))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_takes_ragged_slices_of_low_precision(dtype):
    """Neither what lies beyond a slice nor the gradient is touched."""
    state, gradient = sample(192)
    gradient = gradient.to(torch.float16)
    expected = stated_order(state, gradient.float(), SETTINGS["late"], 2.0, dtype)
    whole = State(*(x.clone().to(DEVICE) for x in state))
    weights = torch.full((192,), 7.0, dtype=dtype, device=DEVICE)
    source = gradient.clone().to(DEVICE)
    update_on_gpu(whole.cut(0, 101), source[:101], weights[:101], SETTINGS["late"], 2.0)
    for got, new, old in zip((*whole, weights), expected, (*state, torch.full((192,), 7.0, dtype=dtype))):
        require_same_bits([got.cpu()[:101], got.cpu()[101:]], [new[:101], old[101:]])
    require_same_bits([source.cpu()], [gradient])


@on_device
def test_the_user_is_told_where_cpu_and_gpu_round_differently():
    state, gradient = sample(64 * 50)
    alike = all(
        torch.equal(x, y)
        for settings in SETTINGS.values()
        for x, y in zip(
            updated(state, gradient, settings, 0.3), stated_order(state, gradient, settings, 0.3), strict=True
        )
    )
    device = torch.device(DEVICE)
    assert same_bits(device, DTYPES[-1]) == alike
    note = rounding_note(device, DTYPES[-1])
    if alike:
        assert note is None
    else:
        assert "otherwise than the GPU does: results depend on --s2-offload-gpu-fraction" in note


@on_device
def test_a_last_bit_is_noticed_and_more_than_rounding_is_an_error(monkeypatch):
    constants, device = adam.kernel_constants, torch.device(DEVICE)
    monkeypatch.setattr(adam, "kernel_constants", lambda *args: constants(*args) | {"eps": 3e-8})
    assert not same_bits(device, DTYPES[-1])
    monkeypatch.setattr(adam, "kernel_constants", lambda *args: constants(*args) | {"beta2": 0.951})
    with pytest.raises(RuntimeError, match=r"master differs from the CPU's by .* times what rounding"):
        same_bits(device, DTYPES[-1])


@on_device
def test_slices_the_kernel_cannot_take_are_refused():
    state, gradient = (sample(128)[0], sample(128)[1])
    with pytest.raises(ValueError, match="slice of 64 elements: must be contiguous and of one size"):
        update_on_gpu(state, gradient[::2], torch.empty(64), SETTINGS["first"])


def multi_tensor_adam(
    chunk_size, overflow, tensors, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay
):
    """What Transformer Engine's and Apex's extensions compute with mode 1 and bias correction."""
    assert (mode, bias_correction, overflow.item()) == (1, 1, 0) and chunk_size > 0
    for gradient, master, exp_avg, exp_avg_sq in zip(*tensors, strict=True):
        exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
        master.sub_(lr * (exp_avg / (1 - beta1**step) / denominator + weight_decay * master))


@pytest.mark.parametrize("package", ["transformer_engine", "apex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_packages_kernels_take_the_same_step(monkeypatch, package, dtype):
    """With a stand-in for the extension, which Transformer Engine puts where only its own import finds it."""
    stand_in = SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    found = {"amp_C": stand_in}

    def import_module(name):
        if name == "transformer_engine.pytorch":
            found["transformer_engine_torch"] = stand_in
            return None
        if name not in found:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found[name]

    monkeypatch.setattr(adam, "import_module", import_module)
    generator = torch.Generator().manual_seed(0)
    state = State(*(torch.rand(640, generator=generator) for _ in range(3)))
    gradient = torch.randn(640, generator=generator).to(dtype)
    theirs, ours = copied(state), copied(state)
    weights = [torch.empty(640) for _ in range(2)]
    fused_update(package)(theirs, gradient, weights[0], SETTINGS["late"], 3.0)
    update_on_cpu(ours, gradient.float(), weights[1], SETTINGS["late"], 3.0)
    for a, b in zip((*theirs, weights[0]), (*ours, weights[1])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_package_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--s2-offload-gpu-adam apex: cannot be used here: No module named"):
        fused_update("apex")


@pytest.mark.parametrize("error", [AssertionError, FileNotFoundError, RuntimeError])
def test_a_package_that_is_installed_in_part_is_refused(monkeypatch, error):
    """As the loader of Transformer Engine says it."""

    def import_module(name):
        raise error("version mismatch")

    monkeypatch.setattr(adam, "import_module", import_module)
    message = "^--s2-offload-gpu-adam transformer_engine: cannot be used here: version mismatch$"
    with pytest.raises(ValueError, match=message):
        fused_update("transformer_engine")
