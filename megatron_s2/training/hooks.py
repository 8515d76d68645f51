"""Features for which Megatron 0.19 has no argument: optimizer offload, FLOPs of S2, and traffic in its log.

The docstring of each function names what it touches. A second call replaces the settings of the first.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from megatron_s2.layers.packed_row import packed_row
from megatron_s2.offload.manager import OffloadManager
from megatron_s2.offload.optimizer import OffloadedAdamW
from megatron_s2.parallel.collectives import Traffic
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.annealing import Annealing
from megatron_s2.training.wrap import replace_class, unwrap, wrap_once


def use_offload(offload: OffloadManager | None) -> None:
    """Replaces `HybridDeviceOptimizer` by `OffloadedAdamW`; None restores it.

    `offload` is called with each `DistributedOptimizer`, when gradients are set to zero, and with each group
    of buckets whose reduction has started. What Megatron applies to all gradients after their reduction is
    recorded, and the update applies it: unscaling (infinities are still checked), the division by the number
    of tokens, and clipping. Norms are corrected accordingly and computed in float32 (Megatron's functions for
    environments without Transformer Engine compute those of 16-bit gradients in 16 bits). A checkpoint copies
    each state tensor once, where Megatron would request it twice. `--log-params-norm` reads norms of the
    master weights, because these are not where it expects them.

    Touches `HybridDeviceOptimizer` of `megatron.core.optimizer` and of its module `distrib_optimizer`; there
    `DistributedOptimizer.__init__`, `zero_grad`, `_get_main_param_and_optimizer_states` and
    `_unscale_main_grads_and_check_for_nan`; `main_param` of parameters, where it is None;
    `get_grad_norm_fp32` and `clip_grad_by_total_norm_fp32` of its module `optimizer`;
    `DistributedDataParallel.scale_gradients`; `start_grad_sync` of `_ParamAndGradBucketGroup`; and
    `calc_params_l2_norm` of `megatron.training.training`.
    """
    from megatron.core import optimizer as package
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.training import training

    class OffloadedOptimizer(OffloadedAdamW):
        def __init__(self, params, *, lr, betas, eps, weight_decay, **of_hybrid_device_optimizer):
            super().__init__(
                params,
                offload.open_session,
                offload.gradient_scale,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
            )

    def construct(original, self, inner, *args, **kwargs):
        original(self, inner, *args, **kwargs)
        for chunk in self.model_chunks if inner is not None else ():
            for parameter in chunk.parameters():
                if getattr(parameter, "main_param", parameter) is None:
                    del parameter.main_param, parameter.main_param_sharded
        offload.register(self)

    def copies_of_state(original, self, model_param):
        group, order = self.model_param_group_index_map[model_param]
        copies = dict(self.optimizer.state[self.optimizer.param_groups[group]["params"][order]])
        copies["param"] = copies.pop("master_param")
        return copies

    def zero_grad(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        offload.begin_step()

    def check_for_inf(original, self):
        scaler = self.grad_scaler
        self.grad_scaler = SimpleNamespace(inv_scale=torch.ones_like(scaler.scale))
        try:
            found_inf = original(self)
        finally:
            self.grad_scaler = scaler
        offload.set_loss_scale(scaler.scale.item())
        return found_inf

    def norm(original, grads_for_norm, *args, **kwargs):
        norms = [
            grad
            if grad.dtype == torch.float32
            else torch.linalg.vector_norm(grad, dtype=torch.float32).view(1)
            for grad in grads_for_norm
        ]
        return offload.grad_norm(original(norms, *args, **kwargs))

    def clip(original, parameters, max_norm, total_norm, use_decoupled_grad=False):
        offload.set_clipping(max_norm, total_norm)

    def scale(original, self, scaling_factor):
        offload.set_token_scale(scaling_factor)

    def params_norm(original, model, *args, **kwargs):
        # The norm of all masters is that of their norms. Shards of other ranks are None here, as in Megatron.
        norms = offload.master_norms()
        trained = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.main_param, parameter.main_param_sharded = norms.get(parameter), True
        try:
            return original(model, *args, **kwargs)
        finally:
            for parameter in trained:
                del parameter.main_param, parameter.main_param_sharded

    def start_grad_sync(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        offload.gradients_reduced(self)

    distributed = distrib_optimizer.DistributedOptimizer
    classes = [(package, "HybridDeviceOptimizer"), (distrib_optimizer, "HybridDeviceOptimizer")]
    wrappers = {
        (distributed, "__init__"): construct,
        (distributed, "zero_grad"): zero_grad,
        (distributed, "_get_main_param_and_optimizer_states"): copies_of_state,
        (distributed, "_unscale_main_grads_and_check_for_nan"): check_for_inf,
        (optimizer, "get_grad_norm_fp32"): norm,
        (optimizer, "clip_grad_by_total_norm_fp32"): clip,
        (DistributedDataParallel, "scale_gradients"): scale,
        (training, "calc_params_l2_norm"): params_norm,
        (_ParamAndGradBucketGroup, "start_grad_sync"): start_grad_sync,
    }
    if offload is None:
        for owner, name in [*classes, *wrappers]:
            unwrap(owner, name)
        return
    for owner, name in classes:
        replace_class(owner, name, OffloadedOptimizer)
    for (owner, name), wrapper in wrappers.items():
        wrap_once(owner, name, wrapper)


def count_s2_flops(settings: S2Settings | Annealing) -> None:
    """Lets `--log-throughput` count the FLOPs of S2 attention instead of those of dense causal attention.

    Megatron's formula takes the sum of squared sequence lengths and halves it for the causal mask. Here each
    length, packed documents included, contributes twice the number of query-key pairs that core attention
    computes, mean over layers and heads. Touches `num_floating_point_operations` and
    `update_seqlen_stats_from_cu_seqlens` of `megatron.training.training`.
    """
    from megatron.training import training

    def count_visible(
        original, args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None
    ):
        if seqlen_squared_sum_in_batch is None:
            seqlen_squared_sum_in_batch = batch_size * 2 * float(settings.mean_pairs(args.seq_length))
        return original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)

    def update_visible(original, cu_seqlens):
        original(cu_seqlens)
        if cu_seqlens is not None and cu_seqlens.numel() > 1:
            lengths = np.diff(packed_row(cu_seqlens).edges)
            more = 2 * settings.mean_pairs(lengths) - lengths * lengths
            training._seqlen_stats_in_iteration[1] += float(more.sum())

    wrap_once(training, "num_floating_point_operations", count_visible)
    wrap_once(training, "update_seqlen_stats_from_cu_seqlens", update_visible)


def log_context_parallel_traffic(traffic: Traffic) -> None:
    """Logs the bytes that S2 attention receives under context parallelism, beside the planner's prediction.

    Each step the bytes of each layer go to the log writers. With `--log-throughput` the last rank also prints
    their sums, over itself and the ranks that hold the other pipeline stages of the same tokens. Touches
    `training_log` of `megatron.training.training`.
    """
    from megatron.core import mpu
    from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training
    from megatron.training.utils import print_rank_last

    def of_all_stages(layers: int) -> Traffic:
        counts = [[of_layer.get(n, 0) for n in range(1, layers + 1)] for of_layer in vars(traffic).values()]
        table = torch.tensor(counts, device=torch.cuda.current_device())
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.all_reduce(table, group=mpu.get_pipeline_model_parallel_group())
        return Traffic(*({n: count for n, count in enumerate(row, 1) if count} for row in table.tolist()))

    def log_traffic_too(original, loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        settings = get_args()
        prints = settings.log_throughput and iteration % settings.log_interval == 0
        writes = iteration % settings.tensorboard_log_interval == 0
        if prints or writes:
            whole = of_all_stages(settings.num_layers)
            if writes:
                write(whole, iteration)
            if prints:
                print_rank_last(f" {whole}")
        traffic.clear()
        return result

    def write(whole: Traffic, iteration: int) -> None:
        values = {
            f"s2-context-parallel/{what}{where}": count
            for what, counts in vars(whole).items()
            for where, count in [
                *((f"-layer-{layer}", n) for layer, n in counts.items()),
                ("", sum(counts.values())),
            ]
        }
        if (writer := get_tensorboard_writer()) is not None:
            for name, count in values.items():
                writer.add_scalar(name, count, iteration)
        if (writer := get_wandb_writer()) is not None:
            writer.log(values, iteration)

    wrap_once(training, "training_log", log_traffic_too)
