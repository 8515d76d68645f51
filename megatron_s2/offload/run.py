"""Offload in a training run: what the optimizers of one rank share, and what Megatron tells them.

Gradients stay as backward and its reductions left them. What Megatron would do to them later, in passes over
all of them (unscaling, the division by the number of tokens, clipping), is kept as one number for the update
to apply. So they may leave for the host as soon as they are reduced, during backward. Those that
`finalize_model_grads` still changes after their reduction wait for the step: see `leaves_late`.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_s2.offload.adam import AdamW, fused_update, same_bits, update_on_gpu
from megatron_s2.offload.arena import Arena, available_bytes, check_available
from megatron_s2.offload.executor import Executor
from megatron_s2.offload.nvme import Bandwidth, NvmeTier, measure_bandwidth
from megatron_s2.offload.plan import OffloadPlan, make_plan
from megatron_s2.offload.queues import AwaitedOnce, CudaBackend, ThreadBackend
from megatron_s2.offload.rates import DRIFT_STEPS, Machine, drifted, rates_of
from megatron_s2.offload.simulator import Simulation, auto_plan, simulate
from megatron_s2.offload.trace import of_update, shifted, write_trace

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_s2.offload.model import Rates
    from megatron_s2.offload.optimizer import OffloadedAdamW
    from megatron_s2.offload.settings import OffloadSettings

# Steps at rates that no longer hold cost more than measuring for half a second once in so many.
STEPS_BETWEEN_LOOKS = 100
_MARKS = (
    "sequence_parallel",
    "average_gradients_across_tp_domain",
    "shared",
    "shared_embedding",
    "flextron_router_pp_sync",
    "pipeline_parallel",
)


class OffloadError(ValueError):
    """The settings do not fit this machine or model: a budget, a directory, a file."""


class _Shard(NamedTuple):
    """Where the part of a model parameter that this rank updates is."""

    optimizer: OffloadedAdamW
    place: int
    start: int
    stop: int


@dataclass
class _Folded:
    """What gradients are still to be multiplied by."""

    loss_scale: float | None = None
    tokens: float | torch.Tensor = 1.0
    clip: float = 1.0
    norm: float = 0.0

    @property
    def before_clipping(self) -> float:
        """Makes the norm of what lies in the buffers that of the gradients."""
        return float(self.tokens) / (self.loss_scale or 1.0)


@dataclass
class _Built:
    """An optimizer's executor, and what is known of its steps."""

    executor: Executor
    rates: Rates | None
    predicted: Simulation | None = None
    seconds: list[float] = field(default_factory=list)
    usual: float | None = None


class Offload:
    """The optimizer offload of this rank.

    Args:
        settings: of the user.
        rank: of all.
        local_world_size: on this machine.
        say: what prints a line.
    """

    def __init__(
        self,
        settings: OffloadSettings,
        rank: int,
        local_world_size: int,
        say: Callable[[str], object] = print,
    ) -> None:
        self._settings, self._rank, self._local_world_size, self._say = settings, rank, local_world_size, say
        self._optimizers: list[OffloadedAdamW] = []
        self._built: dict[OffloadedAdamW, _Built] = {}
        self._early: dict[torch.nn.Parameter, _Shard] = {}
        self._folded = _Folded()
        self._flushes_in_backward = False
        self._available = available_bytes()  # before any rank has taken its part

    # What Megatron tells

    def register(self, optimizer: DistributedOptimizer) -> None:
        """A distributed optimizer is complete: from here on its gradients are taken when they are reduced."""
        inner = optimizer.optimizer
        self._optimizers.append(inner)
        ddp = optimizer.ddp_config
        config = optimizer.model_chunks[0].config
        if (
            ddp.num_distributed_optimizer_instances > 1
            or ddp.reduce_scatter_with_fp32_accumulation
            or max(config.gtp_weight_remat_size, config.expert_gtp_weight_remat_size) > 1
        ):
            return  # their reduction ends where only Megatron knows
        self._flushes_in_backward = ddp.overlap_grad_reduce
        named = {p: name for chunk in optimizer.model_chunks for name, p in chunk.named_parameters()}
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            if not leaves_late(named[parameter], parameter):
                where = optimizer._get_model_param_range_map(parameter)["param"]
                place = inner.place_of(inner.param_groups[group]["params"][order])
                self._early[parameter] = _Shard(inner, place, where.start, where.end)

    def begin_step(self) -> None:
        """Gradients are set to zero: what came of the ones before is dropped, if there was no step."""
        for optimizer in self._optimizers:
            optimizer.forget_gradients()
            self.executor_of(optimizer)
        self._folded = _Folded()

    def gradients_reduced(self, buckets: _ParamAndGradBucketGroup) -> None:
        """The reduction of a group of buckets has begun, or ended where nothing overlaps."""
        if buckets.grad_reduce_handle is not None and not torch.cuda.is_available():
            buckets.grad_reduce_handle = AwaitedOnce(buckets.grad_reduce_handle)
        for bucket in buckets.buckets:
            for parameter in bucket.params_list:
                if shard := self._early.get(parameter):
                    gradient = parameter.main_grad.detach().view(-1)[shard.start : shard.stop]
                    shard.optimizer.flush(shard.place, gradient, buckets.grad_reduce_handle)

    def set_loss_scale(self, scale: float) -> None:
        """Gradients are to be divided by the loss scale: that of the first optimizer, which the loss was
        multiplied by."""
        if self._folded.loss_scale is None:
            self._folded.loss_scale = scale

    def set_token_scale(self, factor: float | torch.Tensor) -> None:
        """Gradients are to be multiplied by one over the number of tokens."""
        self._folded.tokens = factor

    def set_clipping(self, most: float, norm: float | torch.Tensor) -> None:
        """Gradients are to be clipped to a norm of `most`; theirs is `norm`."""
        coefficient = most / (float(norm) + 1e-6)
        self._folded.clip = 1.0 if coefficient >= 1 else coefficient  # a NaN stays one

    def grad_norm(self, norm: float | torch.Tensor) -> float | torch.Tensor:
        """The norm of the gradients, from that of what lies in the buffers."""
        norm = norm * self._folded.before_clipping
        self._folded.norm = float(norm)
        return norm

    # What optimizers ask

    @property
    def gradient_scale(self) -> float:
        """What the update divides gradients by; infinity or NaN where their norm is."""
        factor = self._folded.before_clipping * self._folded.clip
        return 1 / factor if factor and math.isfinite(self._folded.norm) else math.inf

    def executor_of(self, optimizer: OffloadedAdamW) -> Executor | None:
        """Its executor, built when this is first asked for; None where this rank updates nothing.

        Raises:
            OffloadError: a budget, a directory or this machine cannot hold the state.
        """
        if not optimizer.elements:
            return None
        if optimizer not in self._built:
            try:
                self._built[optimizer] = self._build(optimizer)
            except ValueError as error:
                share = self._share(optimizer)
                of_share = f" (for {share:.0%} of this rank's parameters)" if share < 1 else ""
                raise OffloadError(f"{error}{of_share}") from error
            self._built[optimizer].executor.set_masters()
        return self._built[optimizer].executor

    def has_executor(self, optimizer: OffloadedAdamW) -> bool:
        """Whether there is one already."""
        return optimizer in self._built

    def read(self, optimizer: OffloadedAdamW, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of state, see `Executor.read`. With an NVMe tier it lies in a file there that has no name,
        since the copies of all state, which a checkpoint takes, may not fit into memory."""
        executor = self.executor_of(optimizer)
        out = None
        if executor.plan.tiers.nvme and stop > start:
            directory = self._settings.nvme_dirs[0]
            with tempfile.TemporaryFile(dir=directory) as file:
                try:  # writing to a hole that cannot be filled would end the process
                    os.posix_fallocate(file.fileno(), 0, 4 * (stop - start))
                except OSError as error:
                    raise OffloadError(
                        f"--s2-offload-nvme-dir {directory}: has no room for the copy of the state that a "
                        f"checkpoint takes: {error.strerror}"
                    ) from error
                out = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=stop - start)
        return executor.read(name, start, stop, out)

    def take_step(self, optimizer: OffloadedAdamW, settings: Sequence[AdamW], scale: float) -> None:
        """The step of an optimizer's executor, timed."""
        built = self._built[optimizer]
        begin = time.perf_counter()
        built.executor.step(settings, scale)
        built.seconds.append(time.perf_counter() - begin)
        step = settings[0].step
        is_power_of_two = step & (step - 1) == 0
        if self._settings.trace and is_power_of_two and self._rank == 0 and optimizer is self._optimizers[0]:
            measured, predicted = built.executor.events, built.predicted.events
            begins = [min(event.start for event in of_update(events)) for events in (measured, predicted)]
            predicted = shifted(predicted, begins[0] - begins[1])
            try:
                write_trace(self._settings.trace, {"predicted": predicted, "measured": measured})
            except OSError as error:
                self._say(f"megatron-s2: --s2-offload-trace {self._settings.trace}: not written: {error}")
        if len(built.seconds) == STEPS_BETWEEN_LOOKS:
            self._look(optimizer, built)
            built.seconds.clear()

    def close(self) -> None:
        """End what works, and let go of all memory and of the files on NVMe."""
        for built in self._built.values():
            built.executor.close()
        self._built.clear()
        self._optimizers.clear()
        self._early.clear()

    # Building

    def _build(self, optimizer: OffloadedAdamW) -> _Built:
        settings = self._settings
        share = self._share(optimizer)
        plan = make_plan(
            optimizer.elements,
            settings.gpu_fraction or 0.0,
            subgroup_size=settings.subgroup_size,
            gpu_budget=int(settings.gpu_budget * share),
            host_budget=None if settings.host_budget is None else int(settings.host_budget * share),
            nvme=bool(settings.nvme_dirs),
        )
        on_nvme = [s.size for s in plan.subgroups if s.tier == "nvme"]
        rates = None
        bandwidths = self._bandwidths() if on_nvme and (len(settings.nvme_dirs) > 1 or self._predicts) else []
        if self._predicts:
            rates = self._rates(bandwidths)
            if settings.gpu_fraction is None:
                plan = auto_plan(plan, rates)
        cuda = torch.cuda.is_available()
        backend = CudaBackend(torch.device("cuda", torch.cuda.current_device())) if cuda else ThreadBackend()
        check_available(plan.host_bytes, "arenas and ring", self._local_world_size, self._available)
        arena = Arena(plan, pinned=cuda, ranks=self._local_world_size, available=self._available)
        self._available -= plan.host_bytes * self._local_world_size
        tier = None
        if on_nvme:
            tier = NvmeTier(
                settings.nvme_dirs,
                on_nvme,
                plan.ring_slots,
                [min(b.read, b.write) for b in bandwidths] or None,
                pinned=cuda,
            )
        threads = settings.threads(self._local_world_size)
        update = update_on_gpu if settings.gpu_adam == "triton" else fused_update(settings.gpu_adam)
        executor = Executor(plan, optimizer.parameters, backend, arena, tier, threads, update)
        built = _Built(executor, rates, self._predict(plan, rates))
        if self._rank == 0:
            self._tell(built)
            if cuda and settings.gpu_adam == "triton" and not same_bits(backend.device):
                self._say("megatron-s2: CPU and GPU round differently here; results depend on the fraction")
        return built

    def _share(self, optimizer: OffloadedAdamW) -> float:
        return optimizer.elements / sum(one.elements for one in self._optimizers)

    @property
    def _predicts(self) -> bool:
        return self._settings.gpu_fraction is None or self._settings.trace is not None

    def _bandwidths(self) -> list[Bandwidth]:
        return [measure_bandwidth(directory) for directory in self._settings.nvme_dirs]

    def _rates(self, bandwidths: Sequence[Bandwidth] = (), again: bool = False) -> Rates:
        machine = Machine.here(self._settings.threads(self._local_world_size), self._local_world_size)
        rates = rates_of(machine, again=again)
        if bandwidths:
            read, write = sum(b.read for b in bandwidths), sum(b.write for b in bandwidths)
            rates = replace(rates, nvme_read=read, nvme_write=write)
        return rates

    def _predict(self, plan: OffloadPlan, rates: Rates | None) -> Simulation | None:
        if rates is None:
            return None
        return simulate(plan, rates, flush_in_backward=self._flushes_in_backward)

    def _tell(self, built: _Built) -> None:
        when = "during backward" if self._flushes_in_backward else "after backward (no --overlap-grad-reduce)"
        lines = [f"optimizer offload of rank 0: {built.executor.plan}", f"  gradients leave {when}"]
        if built.predicted is not None:
            lines.append(
                f"  predicted: {built.predicted.step_seconds:.4g} s a step beyond backward, "
                f"{built.predicted.bottleneck}"
            )
        self._say("\n".join(lines))

    def _look(self, optimizer: OffloadedAdamW, built: _Built) -> None:
        """Whether steps take as long as they used to; where not, measure again and plan anew."""
        latest = built.seconds[-DRIFT_STEPS:]
        if built.usual is None or self._settings.gpu_fraction is not None:
            built.usual = sorted(latest)[len(latest) // 2]
            return
        if not drifted(built.usual, latest):
            return
        bandwidths = self._bandwidths() if built.executor.plan.tiers.nvme else []
        built.rates = self._rates(bandwidths, again=True)
        built.executor.plan = auto_plan(built.executor.plan, built.rates)
        built.predicted = self._predict(built.executor.plan, built.rates)
        built.usual = None
        self._say(
            f"megatron-s2: rank {self._rank}: optimizer steps drifted; rates measured again, the GPU now "
            f"updates {built.executor.plan.fraction:.1%}"
        )


def leaves_late(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Megatron may still change a parameter's gradient after its data-parallel reduction: it sums
    some over tensor-parallel ranks (norms, biases and other vectors, routers), some over the ends of the
    pipeline (embeddings)."""
    return (
        parameter.dim() < 2
        or "position_embeddings" in name
        or any(getattr(parameter, mark, None) not in (None, False) for mark in _MARKS)
        or hasattr(parameter, "main_grad_copy_in_grad_buffer")
    )
