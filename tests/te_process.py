"""Real Transformer Engine without a GPU: whole GPTs of its layers, built, loaded and called.

Megatron looks for Transformer Engine once, when it is imported, so all of this runs in a process of its own
(`in_te_process`). Modules are constructed as they are; what asks for a GPU there is told that there is one.
Their forward passes, CUDA kernels, are replaced by plain torch for one tensor-parallel rank; a call must fit
the signature of what it replaces.
"""

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from unittest import mock

import torch
from torch.nn import functional as F
from waiting import PATIENCE

from megatron_s2.training.environment import Environment, runnable_arguments


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)


def in_te_process(function: Callable, *arguments):
    """Returns `function(*arguments)`, called where Megatron uses Transformer Engine."""
    return _process().submit(_call, function, *arguments).result(PATIENCE)


def _call(function: Callable, *arguments):
    from megatron.training import training

    try:
        return function(*arguments)
    finally:
        training.destroy_global_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _start() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    from megatron_s2.training.patches import quiet_known_warnings

    quiet_known_warnings()
    Environment.detect = classmethod(lambda cls: cls(gpu=False, transformer_engine=True, apex=False))

    from transformer_engine import pytorch as te
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    construct = TransformerEngineBaseModule.__init__

    def construct_without_gpu(self, *args, **kwargs):
        with mock.patch("torch.cuda.is_available", lambda: True):
            construct(self, *args, **kwargs)

    TransformerEngineBaseModule.__init__ = construct_without_gpu
    for module, computed in (
        (te.Linear, _linear),
        (te.LayerNormLinear, _norm_linear),
        (te.RMSNorm, _rms_norm),
        (te.LayerNorm, _layer_norm),
    ):
        _compute(module, computed)


def _compute(module: type, computed: Callable) -> None:
    """Replaces the forward pass of a module by a function of the module and its input."""
    signature = inspect.signature(module.forward)
    input_name = list(signature.parameters)[1]

    def forward(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        if beyond := set(given) - {"self", input_name, "is_first_microbatch"}:
            raise TypeError(f"{module.__name__}: nothing here computes {beyond}")
        return computed(self, given[input_name])

    module.forward = forward


def _linear(module, inputs: torch.Tensor):
    output = F.linear(inputs, module.weight, module.bias if module.apply_bias else None)
    return (output, module.bias) if module.return_bias else output


def _norm_linear(module, inputs: torch.Tensor):
    weight, bias = module.layer_norm_weight + int(module.zero_centered_gamma), module.layer_norm_bias
    if module.normalization == "RMSNorm":
        return _linear(module, F.rms_norm(inputs, weight.shape, weight, module.eps))
    return _linear(module, F.layer_norm(inputs, weight.shape, weight, bias, module.eps))


def _rms_norm(module, inputs: torch.Tensor) -> torch.Tensor:
    weight = module.weight + int(module.zero_centered_gamma)
    return F.rms_norm(inputs, weight.shape, weight, module.eps)


def _layer_norm(module, inputs: torch.Tensor) -> torch.Tensor:
    weight = module.weight + int(module.zero_centered_gamma)
    return F.layer_norm(inputs, weight.shape, weight, module.bias, module.eps)


@dataclass(frozen=True)
class BuiltRank:
    """What one rank of a layout has built."""

    modules: dict[str, str]  # class of each module, by its path
    fuses: dict[str, bool]  # whether a linear layer's kernel accumulates its weight gradient, by its path
    parameters: dict[str, tuple[int, ...]]  # shapes
    sharded: dict[tuple, tuple]  # global and local shape of each piece in a checkpoint, by key and offset

    @property
    def keys(self) -> set[str]:
        """Keys in a checkpoint, in all layers of this rank."""
        return {key for key, _ in self.sharded}


def build(argv: list[str], ranks: int = 1, rank: int = 0) -> BuiltRank:
    """Builds the part of a GPT that one rank holds, as the training command does up to its first step."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.initialize import initialize_megatron

    from megatron_s2.training.configure import configure
    from megatron_s2.training.cpu_runtime import enable_cpu_runtime
    from megatron_s2.training.patches import apply_patches

    enable_cpu_runtime()
    apply_patches(cpu=True)
    argv, _ = runnable_arguments([*argv, "--fake-process-group"], Environment.detect())
    with mock.patch.dict("os.environ", WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK="0"):
        _, container = configure(argv)
        initialize_megatron(allow_no_cuda=True)
        builder = container.model.get_builder_cls()(container.model)
        chunks = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        return _described(unwrap_model(chunks))


def _described(chunks: list[torch.nn.Module]) -> BuiltRank:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    modules, fuses, parameters, sharded = {}, {}, {}, {}
    for chunk in chunks:
        for path, module in chunk.named_modules():
            modules[path] = type(module).__name__
            for name in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):
                if hasattr(module, name):
                    fuses[path] = getattr(module, name)
        parameters |= {path: tuple(parameter.shape) for path, parameter in chunk.named_parameters()}
        pieces = chunk.sharded_state_dict()
        apply_factories(pieces)
        for piece in nested_values(pieces):
            is_tensor = isinstance(piece, ShardedTensor)  # others are objects, such as extra states
            place = (piece.key if is_tensor else piece.unique_key, piece.global_offset)
            sharded[place] = (piece.global_shape, piece.local_shape if is_tensor else None)
    return BuiltRank(modules, fuses, parameters, sharded)


class _ComputedError(Exception):
    """Ends a run once it has computed the first gradients."""


def first_gradients(argv: list[str]) -> dict[str, torch.Tensor]:
    """Returns the gradient of each parameter before the first step, by the training command in this process.

    The step itself would call fused kernels of the optimizer.
    """
    from megatron.training import training

    from megatron_s2 import pretrain

    found = {}

    def keep(model, *args, **kwargs):
        for chunk in model:
            for name, parameter in chunk.module.named_parameters():
                found[name] = parameter.main_grad.clone()
        raise _ComputedError

    try:
        with mock.patch.object(training, "finalize_model_grads", keep):
            pretrain.train(argv)
    except _ComputedError:
        return found
    raise RuntimeError("the run ended before its first step")
