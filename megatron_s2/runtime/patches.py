"""Every workaround for a defect of Megatron or of its wheel, one named function each.

Each function says what is broken, in which version it was seen, and what it touches. Each may be called
twice. `apply_patches` calls them all and is the only thing an entry point needs; call it before `pretrain()`.
"""

import logging
import warnings
from importlib.util import find_spec

import torch


def apply_patches(cpu: bool) -> None:
    """Applies every workaround; `cpu` adds those that are right only without a GPU."""
    skip_compiling_dataset_helpers()
    let_distributed_optimizer_resume_with_torch_adam()
    if cpu:
        let_pretrain_start_without_cuda()
        skip_jit_warmup()


def quiet_known_warnings() -> None:
    """Silences, on every rank, warnings that tell nothing a user could act on; all others still show.

    Megatron says about ten times at import that Transformer Engine and Apex are not installed (which
    implementation runs is decided by flags, and this package says it once), that it assumes rank 0 where
    there is one process, that parts this package doesn't use are experimental, and that its distributed
    optimizer looks at the `.grad` of views. Touches the filters of
    `warnings` and one logger of torch. Call it before importing Megatron.
    """
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "Only transformer-engine>=.* supports MoE experts",
        ".*'pin_memory' argument is set as true but no accelerator is found",
        "Could not determine rank from torch.distributed",
        "MimoModelConfig is experimental",
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime is found" not in record.getMessage()
    )


def skip_compiling_dataset_helpers() -> None:
    """`compile_helpers()` ends the process with status 1 when installed from the wheel (seen in 0.19.2).

    It runs `make` in `megatron/core/datasets`, but the wheel ships the compiled `helpers_cpp` and no
    Makefile. Where that module is there, there is nothing to compile. Touches
    `megatron.core.datasets.utils.compile_helpers`.
    """
    from megatron.core.datasets import utils

    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def let_distributed_optimizer_resume_with_torch_adam() -> None:
    """`DistributedOptimizer.state_dict()` fails before the first step without TE and Apex (seen in 0.19.2).

    It asserts that all parameters share one `step`, but torch's Adam has no `step` until it has stepped, and
    that is exactly the state in which a resumed run asks for the template to load into. Here the inner
    optimizer then reports step 0 for every parameter; loading replaces it. Touches
    `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict`.
    """
    from megatron.core.optimizer import distrib_optimizer

    original = distrib_optimizer.DistributedOptimizer.state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(original, "before_megatron_s2"):
        return

    def state_dict(self):
        if self.optimizer.state:
            return original(self)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            for parameter in parameters:
                self.optimizer.state[parameter]["step"] = torch.tensor(0.0)
            return original(self)
        finally:
            self.optimizer.state.clear()

    state_dict.before_megatron_s2 = original
    distrib_optimizer.DistributedOptimizer.state_dict = state_dict


def let_pretrain_start_without_cuda() -> None:
    """`pretrain()` gives no way to pass `allow_no_cuda` to `initialize_megatron` (seen in 0.19.2).

    So the call asserts that CUDA is available. Touches `megatron.training.training.initialize_megatron`.
    """
    from functools import partial

    from megatron.training import training

    if not isinstance(training.initialize_megatron, partial):
        training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)


def skip_jit_warmup() -> None:
    """The warm-up of fused functions changes the initial weights where CPU and "GPU" share a generator.

    It draws random inputs whose size depends on the tensor parallel size, so the weights drawn after it
    would too; and without a GPU nothing is fused. Touches
    `megatron.training.training.set_jit_fusion_options`.
    """
    from megatron.training import training

    training.set_jit_fusion_options = lambda *args, **kwargs: None
