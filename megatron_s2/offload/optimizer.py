"""AdamW whose state is in an executor; it replaces Megatron's `HybridDeviceOptimizer`.

Megatron's distributed optimizer passes it the parts of parameters that this rank updates, and asks its
`state` for masters and averages when it saves and loads. Nothing is allocated before that or before the first
gradient: Megatron constructs the optimizer twice, first over whole parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping

import torch

from megatron_s2.offload.adam import AdamWSettings, check_gradient_scale
from megatron_s2.offload.executor import Executor
from megatron_s2.offload.queues import Awaitable
from megatron_s2.offload.session import Session
from megatron_s2.offload.state import Parameter, lay_out

# Names in Megatron's checkpoints, and the executor's.
_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master_param": "master"}


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW (decoupled weight decay, arXiv 1711.05101) over the parameters that Megatron calls shards.

    A step takes the gradients given to `flush`; of other parameters, their `decoupled_grad`, where Megatron's
    precision-aware optimizer puts it. It divides them by the gradient scale and writes the shards.

    Args:
        params: parameter groups of flat, contiguous shards (or of whole parameters, for the first
            construction) on one device.
        open_session: function that builds the session of this optimizer.
        gradient_scale: function that returns what the current step divides gradients by.
        lr, betas, eps, weight_decay: settings of groups without their own.

    Attributes:
        step_count: number of steps that were not skipped.
        parameters: the shards in the flat state.
        elements: elements of the flat state, padding included.
    """

    def __init__(
        self,
        params: list[dict],
        open_session: Callable[[OffloadedAdamW], Session],
        gradient_scale: Callable[[], float],
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
        self._open_session, self._gradient_scale = open_session, gradient_scale
        self._session: Session | None = None
        self.step_count = 0
        shards = [(shard, n) for n, group in enumerate(self.param_groups) for shard in group["params"]]
        self._shards = [shard for shard, _ in shards]
        flat = [shard.detach().reshape(-1) for shard in self._shards]
        self.parameters, self.elements = lay_out(flat, [group for _, group in shards])
        self.state = {shard: _ShardState(self, p) for shard, p in zip(self._shards, self.parameters)}
        self._index = {shard: n for n, shard in enumerate(self._shards)}

    @property
    def executor(self) -> Executor | None:
        """The executor, built when it is first needed; None where this rank updates nothing."""
        return self.build().executor if self.elements else None

    def build(self) -> Session | None:
        """Returns the session, built when it is first needed; None where this rank updates nothing."""
        if self._session is None and self.elements:
            self._session = self._open_session(self)
        return self._session

    def shard_index(self, shard: torch.Tensor) -> int:
        """Index of a shard among all shards."""
        return self._index[shard]

    def flush(self, index: int, gradient: torch.Tensor, after: Awaitable | None = None) -> None:
        """Takes the final gradient of shard `index` before the step, see `Executor.flush`. Only the first
        call of a step counts."""
        if not self.executor.has_gradient(index):
            self.executor.flush(index, gradient, after)

    def forget_gradients(self) -> None:
        """Drops the flushed gradients of a step that does not happen."""
        if self._session is not None:
            self.executor.skip()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates state and shards. Where the norm of the gradients is infinite or NaN it only prints a line.

        Raises:
            ValueError: there is a closure, or a shard without gradient.
            Exception: see `Executor.step`.
        """
        if closure is not None:
            raise ValueError("closure: must be None")
        if not self.elements:
            self.step_count += 1
            return
        scale = self._gradient_scale()
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
        for index, shard in enumerate(self._shards):
            if not self.executor.has_gradient(index):
                self.flush(index, _gradient_of(shard))
        step = self.step_count + 1
        settings = [
            AdamWSettings(group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"], step)
            for group in self.param_groups
        ]
        self.build().step(settings, scale)
        self.step_count = step

    def read(self, name: str, p: Parameter) -> torch.Tensor:
        """Returns a copy of a parameter's `master`, `exp_avg` or `exp_avg_sq`."""
        return self.build().read(name, p.start, p.stop)

    def close(self) -> None:
        """Ends the session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def state_dict(self) -> dict:
        """Returns parameter groups and step. Masters and averages are not in it: Megatron reads `state`."""
        indices = iter(range(len(self._shards)))
        groups = [
            {**group, "params": [next(indices) for _ in group["params"]]} for group in self.param_groups
        ]
        return {
            "state": {n: {"step": torch.tensor(float(self.step_count))} for n in range(len(self._shards))},
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the step, and the settings that groups have in common with those of a checkpoint, whichever
        optimizer wrote it."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in loaded.items() if k in group and k != "params"})
        steps = {int(group["step"]) for group in state_dict["param_groups"] if group.get("step") is not None}
        if len(steps) > 1:
            raise ValueError(f"step {sorted(steps)}: must be the same in all parameter groups")
        if steps:
            self.step_count = steps.pop()

    # What else Megatron calls of a HybridDeviceOptimizer.

    @property
    def sub_optimizers(self) -> list[OffloadedAdamW]:
        """Optimizers whose state has the step."""
        return [self]

    def dummy_step(self) -> None:
        """Does nothing: state exists from the beginning."""

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Does nothing: state is written when it is set."""

    def update_fp32_param_by_new_param(self) -> None:
        """Sets masters to the model's weights, after these were loaded without a state."""
        if self._session is not None:
            self.executor.set_masters()


class _ShardState(MutableMapping):
    """A shard's `step`, `exp_avg`, `exp_avg_sq` and `master_param`: float32 tensors, copied from the state.

    They must be copies, since the writer of a checkpoint may be another process, which does not inherit the
    state's memory.
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
        elements = self._parameter.weights.numel()
        if value.numel() != elements:
            raise ValueError(f"{key}: must have {elements} elements, not {value.numel()}")
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
