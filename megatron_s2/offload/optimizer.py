"""AdamW whose state an executor holds: what takes the place of Megatron's `HybridDeviceOptimizer`.

Megatron's distributed optimizer gives it the parts of parameters that this rank updates, and asks its `state`
for masters and averages when it saves and loads. Nothing is allocated before that, or before the first
gradient: Megatron constructs it twice, first over whole parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

import torch

from megatron_s2.offload.adam import AdamW, check_gradient_scale
from megatron_s2.offload.flat import Parameter, lay_out

if TYPE_CHECKING:
    from megatron_s2.offload.executor import Executor
    from megatron_s2.offload.queues import Awaited
    from megatron_s2.offload.run import Offload

# Names in Megatron's checkpoints, and the executor's.
_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master_param": "master"}


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW (decoupled weight decay, arXiv 1711.05101) over parameters that Megatron calls shards.

    A step takes the gradients given to `flush`; of other parameters, their `decoupled_grad`, where Megatron's
    precision-aware optimizer puts it. It divides them by the run's gradient scale, and writes the shards.

    Args:
        params: parameter groups of flat, contiguous shards (or of whole parameters, for the first
            construction) on one device.
        run: what all optimizers of this rank share; it builds the executor.
        lr, betas, eps, weight_decay: of groups that do not say otherwise.

    Attributes:
        step_count: of steps that were not skipped.
        parameters: the shards in the flat state.
        elements: of the flat state, padding included.
    """

    def __init__(
        self,
        params: list[dict],
        run: Offload,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        for group in params:
            for shard in group["params"]:
                if not shard.is_leaf:
                    shard.retain_grad()  # a view of a float32 weight, which torch takes no other way
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._run = run
        self.step_count = 0
        shards = [(shard, n) for n, group in enumerate(self.param_groups) for shard in group["params"]]
        self._shards = [shard for shard, _ in shards]
        flat = [shard.detach().reshape(-1) for shard in self._shards]
        self.parameters, self.elements = lay_out(flat, [group for _, group in shards])
        self.state = {shard: _ShardState(self, p) for shard, p in zip(self._shards, self.parameters)}
        self._places = {shard: n for n, shard in enumerate(self._shards)}
        self._flushed: set[int] = set()  # of these places

    @property
    def executor(self) -> Executor | None:
        """Built when it is first asked for; None where this rank updates nothing."""
        return self._run.executor_of(self) if self.elements else None

    def place_of(self, shard: torch.Tensor) -> int:
        """A shard's place among all."""
        return self._places[shard]

    def flush(self, place: int, gradient: torch.Tensor, after: Awaited | None = None) -> None:
        """Take a shard's final gradient before the step: see `Executor.flush`. Once per step; later ones are
        ignored."""
        if place in self._flushed:
            return
        p = self.parameters[place]
        self.executor.flush(p.start, p.stop, gradient, after)
        self._flushed.add(place)

    def forget_gradients(self) -> None:
        """Drop the flushed gradients of a step that does not happen."""
        if self._flushed:
            self._flushed.clear()
            self.executor.skip()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update state and shards. With a gradient norm of infinity or NaN nothing happens but a message.

        Raises:
            ValueError: there is a closure, or a shard without gradient.
            Exception: see `Executor.step`.
        """
        if closure is not None:
            raise ValueError("closure: must be None")
        if not self.elements:
            self.step_count += 1
            return
        scale = self._run.gradient_scale
        try:
            check_gradient_scale(scale)
        except ValueError:
            print(
                "megatron-s2: the norm of the gradients is not finite; the step is skipped, and the "
                "optimizer's state stays as it is",
                file=sys.stderr,
                flush=True,
            )
            self.forget_gradients()
            return
        for place, shard in enumerate(self._shards):
            if place not in self._flushed:
                self.flush(place, _gradient_of(shard))
        settings = [
            AdamW(
                group["lr"],
                tuple(group["betas"]),
                group["eps"],
                group["weight_decay"],
                self.step_count + 1,
            )
            for group in self.param_groups
        ]
        self._run.take_step(self, settings, scale)
        self._flushed.clear()
        self.step_count += 1

    def read(self, name: str, p: Parameter) -> torch.Tensor:
        """A copy of a parameter's `master`, `exp_avg` or `exp_avg_sq`."""
        return self._run.read(self, name, p.start, p.stop)

    def state_dict(self) -> dict:
        """Groups and step. Masters and averages are not in it: Megatron takes them from `state`."""
        numbers = iter(range(len(self._shards)))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups
        ]
        return {
            "state": {n: {"step": torch.tensor(float(self.step_count))} for n in range(len(self._shards))},
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what groups have in common with those of a checkpoint, whichever optimizer wrote it, and the
        step."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in loaded.items() if k in group and k != "params"})
        steps = {int(group["step"]) for group in state_dict["param_groups"] if group.get("step") is not None}
        if len(steps) > 1:
            raise ValueError(f"step {sorted(steps)}: must be the same in all parameter groups")
        if steps:
            self.step_count = steps.pop()

    # What else Megatron asks of a HybridDeviceOptimizer.

    @property
    def sub_optimizers(self) -> list[OffloadedAdamW]:
        """Those whose state has the step."""
        return [self]

    def dummy_step(self) -> None:
        """State is there from the beginning."""

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """State is written when it is set."""

    def update_fp32_param_by_new_param(self) -> None:
        """Masters from the model's weights, after these were loaded without a state."""
        if self.elements and self._run.has_executor(self):
            self.executor.set_masters()


class _ShardState(MutableMapping):
    """A shard's `step`, `exp_avg`, `exp_avg_sq` and `master_param`: float32 tensors, copies of what is there.

    They must be copies, since what writes a checkpoint may be another process, and the state's memory is not
    shared with those.
    """

    def __init__(self, optimizer: OffloadedAdamW, parameter: Parameter) -> None:
        self._optimizer, self._parameter = optimizer, parameter

    def __getitem__(self, key: str) -> torch.Tensor:
        if key == "step":
            return torch.tensor(float(self._optimizer.step_count))
        return self._optimizer.read(_NAMES[key], self._parameter)

    def __setitem__(self, key: str, value: torch.Tensor | float) -> None:
        if key == "step":
            self._optimizer.step_count = int(value)
            return
        if value.numel() != self._parameter.weights.numel():
            raise ValueError(
                f"{key}: must have {self._parameter.weights.numel()} elements, not {value.numel()}"
            )
        self._optimizer.executor.write(_NAMES[key], self._parameter.start, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key}: optimizer state cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(("step", *_NAMES))

    def __len__(self) -> int:
        return 1 + len(_NAMES)


def _gradient_of(shard: torch.Tensor) -> torch.Tensor:
    gradient = getattr(shard, "decoupled_grad", None)
    if gradient is None:
        raise ValueError(f"shard of {shard.numel()} elements: has no gradient")
    return gradient
