"""Offload in training: what the optimizers of one rank share, and how their gradients get to the executor.

Gradients stay as backward and its reductions left them. What Megatron would do to them later, in passes over
all of them (unscaling, the division by the number of tokens, clipping), becomes one number that the update
applies. So gradients may leave for the host as soon as they are reduced, during backward. Those that
`finalize_model_grads` changes after their reduction leave with the step: see `leaves_late`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_s2.offload.host_memory import available_bytes
from megatron_s2.offload.model import Rates
from megatron_s2.offload.node import Node
from megatron_s2.offload.nvme import measure_bandwidth
from megatron_s2.offload.optimizer import OffloadedAdamW
from megatron_s2.offload.queues import AwaitedOnce
from megatron_s2.offload.rates import Hardware, cached_rates
from megatron_s2.offload.session import OffloadError, Session
from megatron_s2.offload.settings import OffloadSettings

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

STEPS_BETWEEN_CHECKS = 100  # a measurement of half a second costs little against so many steps
# Attributes of parameters whose gradients Megatron sums again after their data-parallel reduction.
_SUMMED_AGAIN = (
    "sequence_parallel",
    "average_gradients_across_tp_domain",
    "shared",
    "shared_embedding",
    "flextron_router_pp_sync",
    "pipeline_parallel",
)


class _Shard(NamedTuple):
    """The part of a model parameter that this rank updates."""

    optimizer: OffloadedAdamW
    index: int
    start: int
    stop: int


@dataclass
class _GradientScale:
    """Factors by which the update multiplies gradients, and the norm that they then have."""

    loss_scale: float | None = None
    tokens: float | torch.Tensor = 1.0
    clip_coefficient: float = 1.0
    norm: float = 0.0

    @property
    def before_clipping(self) -> float:
        """Norm of the gradients over the norm of the content of the gradient buffers."""
        return float(self.tokens) / (self.loss_scale or 1.0)


class OffloadManager:
    """The optimizer offload of this rank.

    Args:
        settings: the user's choices.
        rank: global rank of this process.
        log: function called with each status line.
        detect_node: function that returns the node; called with the first optimizer, on all ranks.
    """

    def __init__(
        self,
        settings: OffloadSettings,
        rank: int,
        log: Callable[[str], object] = print,
        detect_node: Callable[[], Node] = Node.detect,
    ) -> None:
        self._settings, self._rank, self._log, self._detect_node = settings, rank, log, detect_node
        self._node: Node | None = None
        self._threads = 1
        self._rates: Rates | None = None
        self._shares: list[float] | None = None
        self._constructed = self._begun = 0  # optimizers of Megatron, and calls of `begin_step`
        self._optimizers: list[OffloadedAdamW] = []
        self._early: dict[
            torch.nn.Parameter, _Shard
        ] = {}  # parameters whose gradients are flushed when reduced
        self._master_of: dict[torch.nn.Parameter, tuple[OffloadedAdamW, torch.Tensor]] = {}  # with its shard
        self._scale = _GradientScale()
        self._late_reason: str | None = None
        self._available = available_bytes()  # before any rank has allocated anything

    # Called by Megatron's hooks

    def register(self, optimizer: DistributedOptimizer) -> None:
        """Registers a complete distributed optimizer, whose gradients are flushed once they are reduced. With
        the first one the ranks of each node measure its rates together: every rank of Megatron has one, if
        only without parameters.

        Raises:
            OffloadError: a directory for state on NVMe cannot be used.
        """
        self._constructed += 1
        if self._node is None:
            self._node = self._detect_node()
            self._threads = self._settings.cpu_threads or self._node.own_cores
            self._measure()
        inner = optimizer.optimizer
        if inner is None:
            return
        self._optimizers.append(inner)
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            self._master_of[parameter] = inner, inner.param_groups[group]["params"][order]
        unknown_end = _flag_of_unknown_end(optimizer)
        overlap = optimizer.ddp_config.overlap_grad_reduce
        self._late_reason = unknown_end or (None if overlap else "no --overlap-grad-reduce")
        if unknown_end:
            return
        named = {p: name for chunk in optimizer.model_chunks for name, p in chunk.named_parameters()}
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            if not leaves_late(named[parameter], parameter):
                shard = optimizer._get_model_param_range_map(parameter)["param"]
                index = inner.shard_index(inner.param_groups[group]["params"][order])
                self._early[parameter] = _Shard(inner, index, shard.start, shard.end)

    def master_norms(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The L2 norm `[1]` of the masters that this rank holds, by model parameter, on its device."""
        return {
            parameter: inner.state[shard]["master_param"].norm().view(1).to(parameter.device)
            for parameter, (inner, shard) in self._master_of.items()
        }

    def begin_step(self) -> None:
        """Drops the gradients of a step that did not happen; called when gradients are set to zero."""
        for optimizer in self._optimizers:
            optimizer.forget_gradients()
            optimizer.build()
        self._scale = _GradientScale()
        self._begun += 1
        if self._constructed and self._begun % (STEPS_BETWEEN_CHECKS * self._constructed) == 0:
            self._check_drift()

    def gradients_reduced(self, buckets: _ParamAndGradBucketGroup) -> None:
        """Flushes the gradients of a group of buckets whose reduction has begun, or ended where nothing
        overlaps."""
        if buckets.grad_reduce_handle is not None and not torch.cuda.is_available():
            buckets.grad_reduce_handle = AwaitedOnce(buckets.grad_reduce_handle)
        parameters = [p for bucket in buckets.buckets for p in bucket.params_list if p in self._early]
        if not parameters:
            return
        reduced = buckets.grad_reduce_handle or self._early[parameters[0]].optimizer.executor.mark()
        for parameter in parameters:
            shard = self._early[parameter]
            gradient = parameter.main_grad.detach().view(-1)[shard.start : shard.stop]
            shard.optimizer.flush(shard.index, gradient, reduced)

    def set_loss_scale(self, scale: float) -> None:
        """Sets the loss scale that the update divides gradients by. Only the first call of a step counts:
        the first optimizer's scale is the one that multiplied the loss."""
        if self._scale.loss_scale is None:
            self._scale.loss_scale = scale

    def set_token_scale(self, factor: float | torch.Tensor) -> None:
        """Sets the factor, one over the number of tokens, that the update multiplies gradients by."""
        self._scale.tokens = factor

    def set_clipping(self, max_norm: float, norm: float | torch.Tensor) -> None:
        """Sets the clip coefficient of the update for gradients of norm `norm`."""
        coefficient = max_norm / (float(norm) + 1e-6)
        self._scale.clip_coefficient = 1.0 if coefficient >= 1 else coefficient  # a NaN stays one

    def grad_norm(self, norm: float | torch.Tensor) -> float | torch.Tensor:
        """Returns the norm of the gradients, given that of the content of the gradient buffers."""
        norm = norm * self._scale.before_clipping
        self._scale.norm = float(norm)
        return norm

    # Called by the optimizers

    def gradient_scale(self) -> float:
        """What the update divides gradients by; infinity or NaN where their norm is not finite."""
        factor = self._scale.before_clipping * self._scale.clip_coefficient
        return 1 / factor if factor and math.isfinite(self._scale.norm) else math.inf

    def open_session(self, optimizer: OffloadedAdamW) -> Session:
        """Builds the session of a registered optimizer.

        Raises:
            OffloadError, TierError: as `Session`.
        """
        session = Session(
            self._settings,
            self._rank,
            self._node,
            self._threads,
            self._log,
            optimizer.parameters,
            optimizer.elements,
            share=optimizer.elements / sum(one.elements for one in self._optimizers),
            available=self._available,
            rates=self._rates,
            shares=self._shares,
            late_reason=self._late_reason,
            traced=self._rank == 0 and optimizer is self._optimizers[0],
        )
        self._available -= session.executor.plan.host_bytes * self._node.ranks
        return session

    def close(self) -> None:
        """Ends all threads, and frees all memory and the files on NVMe."""
        for optimizer in self._optimizers:
            optimizer.close()
        self._optimizers.clear()
        self._early.clear()

    # Rates, together with the other ranks of this node

    def _measure(self, remeasure: bool = False) -> None:
        """Measures what an automatic fraction, predictions and the placement on NVMe need."""
        settings, node = self._settings, self._node
        predicts = settings.gpu_fraction is None or settings.trace is not None
        directories = settings.nvme_dirs if predicts or len(settings.nvme_dirs) > 1 else ()
        try:
            bandwidths = [measure_bandwidth(directory, node) for directory in directories]
        except ValueError as error:
            raise OffloadError(str(error)) from error
        self._shares = [min(bandwidth) for bandwidth in bandwidths] or None
        if predicts:
            self._rates = cached_rates(Hardware.detect(self._threads, node.ranks), node, remeasure)
        if predicts and bandwidths:
            read, write = map(sum, zip(*bandwidths))
            self._rates = replace(self._rates, nvme_read=read, nvme_write=write)

    def _check_drift(self) -> None:
        """Measures and plans again where steps of a rank no longer take as long as they used to."""
        if self._settings.gpu_fraction is not None:
            return
        sessions = [session for one in self._optimizers if (session := one.build())]
        drifted = [session.drifted() for session in sessions]
        if any(self._node.exchange(any(drifted))):
            self._measure(remeasure=True)
            for session in sessions:
                session.replan(self._rates)


def _flag_of_unknown_end(optimizer: DistributedOptimizer) -> str | None:
    """Returns the flag, if any, with which only Megatron knows when a reduction has ended, since it leaves no
    handle to wait for."""
    ddp, config = optimizer.ddp_config, optimizer.model_chunks[0].config
    flags = {
        "--num-distributed-optimizer-instances": ddp.num_distributed_optimizer_instances > 1,
        "--ddp-reduce-scatter-with-fp32-accumulation": ddp.reduce_scatter_with_fp32_accumulation,
        "--tensor-parallel-num-weight-shards": config.gtp_weight_remat_size > 1,
        "--expert-tensor-parallel-num-weight-shards": config.expert_gtp_weight_remat_size > 1,
    }
    return next((flag for flag, given in flags.items() if given), None)


def leaves_late(name: str, parameter: torch.nn.Parameter) -> bool:
    """Returns whether Megatron may still change a parameter's gradient after its data-parallel reduction: it
    sums some over tensor-parallel ranks (norms, biases and other vectors, routers), some over the ends of the
    pipeline (embeddings)."""
    return (
        parameter.dim() < 2
        or "position_embeddings" in name
        or any(getattr(parameter, mark, None) not in (None, False) for mark in _SUMMED_AGAIN)
        or hasattr(parameter, "main_grad_copy_in_grad_buffer")
    )
