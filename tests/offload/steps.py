"""What tests of the executor and its tiers share: a small problem, its plain solution, an executor."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatron_s2.offload.adam import AdamWSettings
from megatron_s2.offload.executor import Executor
from megatron_s2.offload.plan import make_plan
from megatron_s2.offload.queues import CudaBackend, Task, ThreadBackend
from megatron_s2.offload.state import lay_out

SIZES = (100, 64 * 7, 1, 1000, 64 * 20, 33)
GROUPS = (0, 0, 1, 0, 1, 1)
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16)
ELEMENTS = 3008
STEPS = 3
NAMES = ("master", "exp_avg", "exp_avg_sq")
ON_NVME = {"subgroup_size": 128, "nvme": True, "ring_slots": 3, "host_budget": 16 * 128 * 9}
MIXED = ON_NVME | {"gpu_budget": 12 * 128 * 4}


class DelayedBackend(ThreadBackend):
    """Calls a function with each task, before and after the task's own, while the task holds its buffers."""

    def __init__(self, delay: Callable[[Task], object] | None) -> None:
        self._delay = delay

    @contextmanager
    def context(self, task: Task):
        if self._delay is None:
            yield
            return
        self._delay(task)
        yield
        self._delay(task)


def settings_of(step: int) -> list[AdamWSettings]:
    one = AdamWSettings(1e-3, (0.9, 0.95), 1e-8, 0.1, step)
    return [one, replace(one, lr=3e-3, weight_decay=0.0)]


def scale_of(step: int) -> float:
    return (1.0, 2.5, 0.7)[step % 3]


def weights_at_start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for n, dtype in zip(SIZES, DTYPES)]


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, generator=generator).to(torch.bfloat16) for n in SIZES]


def plain_solution(steps: int = STEPS) -> dict[str, torch.Tensor]:
    """AdamW over the whole flat array of each group by PyTorch, then cast; the truth."""
    weights = weights_at_start()
    parameters, elements = lay_out(weights, GROUPS)
    assert elements == ELEMENTS
    state = {name: torch.zeros(elements) for name in NAMES}
    for p in parameters:
        state["master"][p.start : p.stop] = p.weights
    for step in range(1, steps + 1):
        gradient = torch.zeros(elements)
        for p, g in zip(parameters, gradients_of(step)):
            gradient[p.start : p.stop] = g
        results = []
        for settings in settings_of(step):
            one = {name: x.clone() for name, x in state.items()}
            torch._fused_adamw_(
                *([one["master"]], [gradient.clone()], [one["exp_avg"]], [one["exp_avg_sq"]], []),
                [torch.tensor(float(step))],
                lr=settings.lr,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=torch.tensor(scale_of(step)),
            )
            results.append(one)
        for p in parameters:
            for name, x in state.items():
                x[p.start : p.end] = results[p.group][name][p.start : p.end]
    for n, p in enumerate(parameters):
        state[f"weights {n}"] = state["master"][p.start : p.stop].to(DTYPES[n])
    return state


def executor(tmp_path=None, *, delay=None, directories=1, gpu=False, backend=None, **plan) -> Executor:
    """Over the problem, with its masters set; closed by its caller."""
    backend = backend or (CudaBackend(torch.device("cuda", 0)) if gpu else DelayedBackend(delay))
    weights = [x.to(backend.device) for x in weights_at_start()]
    parameters, elements = lay_out(weights, GROUPS)
    plan = make_plan(elements, **{"subgroup_size": 256} | plan)
    folders = [tmp_path / str(n) for n in range(directories)] if plan.tiers.nvme else []
    for folder in folders:
        folder.mkdir(exist_ok=True)
    one = Executor(plan, parameters, backend, folders)
    one.parameters = parameters
    one.set_masters()
    return one


def flush_all(one: Executor, step: int, seed: int = 0) -> None:
    """In any order."""
    gradients = list(enumerate(gradients_of(step)))
    random.Random(seed).shuffle(gradients)
    for index, gradient in gradients:
        one.flush(index, gradient.to(one.parameters[index].weights.device))


def take_steps(one: Executor, steps=range(1, STEPS + 1), seed: int = 0) -> None:
    for step in steps:
        flush_all(one, step, seed + step)
        one.step(settings_of(step), scale_of(step))


def state_of(one: Executor) -> dict[str, torch.Tensor]:
    state = {name: one.read(name, 0, ELEMENTS) for name in NAMES}
    return state | {f"weights {n}": p.weights.to("cpu", copy=True) for n, p in enumerate(one.parameters)}


def require_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert torch.equal(x, expected[name]), f"{name}: {(x != expected[name]).sum()} of {x.numel()} differ"


def require_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within what `adam.rounding_bound` leaves two devices in these steps; weights one last place apart."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        last_place = torch.finfo(x.dtype).eps if name.startswith("weights") else 0.0
        torch.testing.assert_close(x, expected[name], rtol=1e-5 + last_place, atol=2e-5, msg=name)
