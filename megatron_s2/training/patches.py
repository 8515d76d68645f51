"""Workarounds for defects of Megatron and of its wheel, one named function each.

The docstring of each function describes the defect, the version that it was seen in, and what the function
touches. Each function may be called twice. Entry points call `apply_patches` before `pretrain()`.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec

import torch

from megatron_s2.data.token_ids import PADDING_ID, Vocabulary
from megatron_s2.training.wrap import wrap_once


class EmptySplitError(ValueError):
    """A data set without tokens, which Megatron would try to repeat until there are enough."""


class TokenIdError(ValueError):
    """A sample has a token that the model does not have.

    A data loader's process hands an error on as the text of its traceback, whose end is the message.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def apply_patches(cpu: bool) -> None:
    """Applies the workarounds that every run needs; `cpu` adds those that are correct only without a GPU.

    `configure` applies the others, which depend on the arguments.
    """
    skip_compiling_dataset_helpers()
    let_distributed_optimizer_resume_with_torch_adam()
    keep_adam_step_when_distributed_optimizer_resumes()
    refuse_empty_splits()
    keep_padding_to_its_own_sample()
    rotate_packed_tokens_of_a_row()
    pass_rope_scaling_factor_on()
    log_the_loss_of_each_interval()
    end_without_saving_nowhere()
    accumulate_weight_gradients_without_apex()
    let_torch_norms_be_sequence_parallel()
    if cpu:
        let_pretrain_start_without_cuda()
        skip_jit_warmup()
        send_tokens_to_experts_on_a_cpu()


def quiet_known_warnings() -> None:
    """Silences warnings of Megatron and torch, on every rank, that do not require an action of the user.

    They are about Transformer Engine and Apex, which are not installed (the implementation depends on flags,
    and is printed once); rank 0, assumed for a single process; experimental parts that are not used here;
    `.grad` of views in the distributed optimizer; deprecated functions of torch in checkpoints and
    collectives; and a checkpoint that one process reads or writes. The same warnings of other modules are
    still shown, except those about collectives, which torch attributes to itself, and those that pass
    through the CPU runtime. Touches the filters of `warnings` and one logger of torch. Call it before
    importing Megatron.
    """
    for origin, message in (
        (r"megatron\.", "Transformer Engine and Apex are not installed"),
        (r"megatron\.", "Apex is not installed"),
        (r"megatron\.", "Only transformer-engine>=.* supports MoE experts"),
        (r"megatron\.", "Could not determine rank from torch.distributed"),
        (r"megatron\.", "MimoModelConfig is experimental"),
        (
            r"megatron\.|megatron_s2\.training\.cpu_runtime",
            r"The \.grad attribute of a Tensor that is not a leaf Tensor",
        ),
        (
            r"(torch|megatron)\.|megatron_s2\.training\.cpu_runtime",
            "Please use DTensor instead and we are deprecating",
        ),
        (r"torch\.", ".*'pin_memory' argument is set as true but no accelerator is found"),
        (r"torch\.", ".*assuming the intent is to (load|save) in a single process"),
        (r"torch\.", "The argument order of load has been changed"),
        (r"torch\.", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"),
    ):
        warnings.filterwarnings("ignore", message, module=origin)
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime is found" not in record.getMessage()
    )


def hide_transformer_engine() -> None:
    """Megatron uses Transformer Engine wherever it finds its package, even one that fails (seen in 0.19.2).

    The final norm of `--transformer-impl local` is Transformer Engine's, too, and raises where there is no
    GPU. And only an ImportError counts as "not installed": where a part of the installation is missing or has
    another version, Transformer Engine's loader raises AssertionError, FileNotFoundError or RuntimeError,
    which ends every import of Megatron. Here each import raises ImportError. Touches
    `sys.modules["transformer_engine"]`. Call it before importing Megatron, where the environment has no
    Transformer Engine that works.
    """
    sys.modules["transformer_engine"] = None


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
    that is the state in which a resumed run requests the template to load into. Here the inner
    optimizer then reports step 0 for every parameter; loading replaces it. Touches
    `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict`.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    def state_dict(original, self):
        if self.optimizer.state:
            return original(self)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            for parameter in parameters:
                self.optimizer.state[parameter]["step"] = torch.tensor(0.0)
            return original(self)
        finally:
            self.optimizer.state.clear()

    wrap_once(distrib_optimizer.DistributedOptimizer, "state_dict", state_dict)


def keep_adam_step_when_distributed_optimizer_resumes() -> None:
    """A resume with the distributed optimizer and torch's Adam gets Adam's step count wrong (seen in 0.19.2).

    The step is saved once, with the parameter groups. On loading, all parameters get one and the same tensor
    for it, so each later update counts once per parameter; then `_set_main_param_and_optimizer_states` copies
    over it the 0 of the template that described what to load, so bias correction starts again; and for fp32
    parameters, which are views that require gradients, torch refuses the copy outside `no_grad` and the
    resume ends there. Here every parameter keeps the loaded step, as a tensor of its own. Touches that method
    of `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def set_states(original, self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        tensors = {name: tensor for name, tensor in tensors.items() if name != "step"}
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = tensors["step"] = state["step"].clone()
        with torch.no_grad():
            original(self, model_param, tensors)

    wrap_once(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)


def refuse_empty_splits() -> None:
    """`GPTDataset` counts epochs until there are enough tokens, and loops forever if there are none (0.19.2).

    That is so for a split without documents, such as 1 of 1000 parts of 400 documents, and for documents
    without tokens. Raises EmptySplitError there. Touches
    `megatron.core.datasets.gpt_dataset.GPTDataset._get_num_epochs`.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    def num_epochs(original, self, num_tokens_per_epoch):
        if num_tokens_per_epoch == 0:
            split = f"--split {self.config.split}: " if self.config.split else ""
            raise EmptySplitError(
                f"{split}the {self.index_split.name} split of {self.dataset_path} has no tokens; give it a "
                "larger share or none: --split 100,0,0 --eval-iters 0 trains on all"
            )
        return original(self, num_tokens_per_epoch)

    wrap_once(GPTDataset, "_get_num_epochs", num_epochs)


def refuse_tokens_beyond(vocabulary: Vocabulary) -> None:
    """A token without a row in the embedding is looked up as zeros on several tensor-parallel ranks (0.19.2).

    The run goes on, with a loss that looks right; on one rank it ends in an IndexError of torch. What is
    written without a record of its largest token id can be looked at only in part before the run, so here
    each sample is looked at. Raises TokenIdError. Touches
    `megatron.core.datasets.gpt_dataset.GPTDataset._query_document_sample_shuffle_indices`.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    def query(original, self, index):
        text, *others = original(self, index)
        for bad in (int(text.min(initial=0)), int(text.max(initial=0))):
            if not PADDING_ID <= bad < vocabulary.size and bad != self._pad_token_id:
                raise TokenIdError(vocabulary.refusal(f"the data at {self.dataset_path}", bad))
        return text, *others

    wrap_once(GPTDataset, "_query_document_sample_shuffle_indices", query)


def keep_padding_to_its_own_sample() -> None:
    """The padding of the first sample is left out of the loss of all later ones, too (seen in 0.19.2).

    `GPTDataset` keeps the first sample's loss mask for those that follow, and then writes that sample's
    padding into it. If the data contain the tokenizer's pad token, losses depend on which sample each rank
    happens to read first. Here what is kept is whole. Touches
    `megatron.core.datasets.gpt_dataset.GPTDataset.__getitem__`.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    def get_item(original, self, index):
        was_cached = self.masks_and_position_ids_are_cached
        sample = original(self, index)
        if self.masks_and_position_ids_are_cached and not was_cached:
            self.cached_loss_mask = torch.ones_like(self.cached_loss_mask)
        return sample

    wrap_once(GPTDataset, "__getitem__", get_item)


def let_eval_interval_be_unset(args: Namespace) -> None:
    """Without `--eval-interval`, its default, a run ends in `int // None` (seen in 0.19.2).

    Megatron documents: "If not set, evaluation will not run during training". The training loop does so, but
    the number of validation samples is divided by the interval. Here an interval that is not set, or 0,
    becomes one that no run reaches; evaluation after training, by `--eval-iters`, is not affected. Touches
    `args.eval_interval`; call it before Megatron validates the arguments.
    """
    args.eval_interval = args.eval_interval or sys.maxsize


def let_pretrain_start_without_cuda() -> None:
    """`pretrain()` has no argument for `allow_no_cuda` to `initialize_megatron` (seen in 0.19.2).

    So the call asserts that CUDA is available. Touches `megatron.training.training.initialize_megatron`.
    """
    from megatron.training import training

    def initialize_megatron(original, *args, **kwargs):
        return original(*args, **kwargs | {"allow_no_cuda": True})

    wrap_once(training, "initialize_megatron", initialize_megatron)


def skip_jit_warmup() -> None:
    """The warm-up of fused functions changes the initial weights on the CPU (seen in 0.19.2).

    It draws random inputs whose size depends on the tensor parallel size, from the generator that CPU and
    "GPU" share, so the weights drawn after it would depend on that size, too; and without a GPU nothing is
    fused. Touches `megatron.training.training.set_jit_fusion_options`.
    """
    from megatron.training import training

    training.set_jit_fusion_options = lambda *args, **kwargs: None


def send_tokens_to_experts_on_a_cpu() -> None:
    """`--moe-token-dispatcher-type alltoall` ends in a TypeError on a CPU (seen in 0.19.2).

    The numbers of tokens that each rank gets must be numpy arrays, and become some only when they are copied
    from a GPU. Touches `maybe_move_tensor_to_cpu` of `megatron.core.transformer.moe.token_dispatcher`.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def move(original, tensor, as_numpy=False, record_stream=False):
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    wrap_once(token_dispatcher, "maybe_move_tensor_to_cpu", move)


def rotate_packed_tokens_of_a_row() -> None:
    """Rotary embedding misplaces packed documents under context parallelism, and waits for the device and
    rotates one document after another in every layer (seen in 0.19.2).

    It assumes that each document is split over the ranks on its own, but the batches of
    `--dataloader-inter-document-masking` split the row of all documents as one sequence
    (`use_per_sequence_balancing`), because documents have any length. Here each token gets the angle of its
    position in its document, from one table for all layers, by the formula of Megatron's
    `_apply_rotary_pos_emb_bshd`. Touches `_apply_rotary_pos_emb_thd` of
    `megatron.core.models.common.embeddings.rope_utils`.
    """
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_s2.layers.packed_row import packed_row

    def rotate(
        original,
        t,
        cu_seqlens,
        freqs,
        rotary_interleaved=False,
        mla_rotary_interleaved=False,
        mscale=1.0,
        cp_group=None,
    ):
        cos, sin = packed_row(cu_seqlens).rotary_table(cu_seqlens, freqs, t.dtype, mscale, cp_group)
        x, rest = t[:, None].split([cos.shape[-1], t.shape[-1] - cos.shape[-1]], -1)
        if mla_rotary_interleaved:
            x = torch.cat([x[..., ::2], x[..., 1::2]], -1)
        x = x * cos + rope_utils._rotate_half(x, rotary_interleaved) * sin
        return torch.cat([x, rest], -1)[:, 0]

    wrap_once(rope_utils, "_apply_rotary_pos_emb_thd", rotate)


def pass_rope_scaling_factor_on() -> None:
    """`--rope-scaling-factor` does not arrive in the model, which always scales by 8 (seen in 0.19.2).

    A Llama 3.2, whose factor is 32, would be trained with wrong rotary angles. Touches
    `megatron.training.argument_utils.gpt_config_from_args`.
    """
    from megatron.training import argument_utils

    def gpt_config_from_args(original, args, *others, **named):
        config = original(args, *others, **named)
        config.rope_scaling_factor = args.rope_scaling_factor
        return config

    wrap_once(argument_utils, "gpt_config_from_args", gpt_config_from_args)


def log_the_loss_of_each_interval() -> None:
    """With `--log-interval 1` the second loss of a launch is the mean of its first two (seen in 0.19.2).

    Megatron logs the first iteration of a launch too, and does not reset its sums there because its interval
    has not ended. Where it has ended, as every interval of one iteration, the sums are reset here. Touches
    `megatron.training.training.training_log`.
    """
    from megatron.training import get_args, training

    def reset_at_the_end(original, loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        if iteration % get_args().log_interval == 0:
            kwargs["is_first_iteration"] = False
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    wrap_once(training, "training_log", reset_at_the_end)


def end_without_saving_nowhere() -> None:
    """A NaN in the loss of a run without `--save` is hidden by a TypeError (seen in 0.19.2).

    Megatron saves a checkpoint before it ends such a run, and joins paths to `None`. Touches
    `megatron.training.training.save_checkpoint_and_time`, for runs without `--save`.
    """
    from megatron.training import get_args, training
    from megatron.training.utils import print_rank_0

    def save(original, iteration, *args, **kwargs):
        if get_args().save is None and not kwargs.get("non_persistent_ckpt"):
            print_rank_0(f"megatron-s2: no --save: the state of iteration {iteration} is lost")
            return
        original(iteration, *args, **kwargs)

    wrap_once(training, "save_checkpoint_and_time", save)


def accumulate_weight_gradients_without_apex() -> None:
    """A model of Transformer Engine's layers cannot be built without Apex (seen in 0.19.2).

    Gradient accumulation fusion, which is on by default, stands for two things: kernels of Transformer Engine
    in its own layers, and Apex's extension in Megatron's `ColumnParallelLinear`, which raises RuntimeError
    without it. The LM head is one in every model, and the flag that turns the extension off turns those
    kernels off, too. Here Megatron's own linear layers are built with the fusion off where the extension is
    not installed; the configuration, which they keep, and all other layers are as they were. Touches
    `__init__` of `ColumnParallelLinear`, and of `RowParallelLinear`, whose backward pass would raise, in
    `megatron.core.tensor_parallel.layers`.
    """
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return

    def construct(original, self, *args, config, **kwargs):
        unfused = copy.copy(config)
        unfused.gradient_accumulation_fusion = False
        original(self, *args, config=unfused, **kwargs)
        self.config = config

    wrap_once(layers.ColumnParallelLinear, "__init__", construct)
    wrap_once(layers.RowParallelLinear, "__init__", construct)


def let_torch_norms_be_sequence_parallel() -> None:
    """`--sequence-parallel` ends in an assertion with torch's norms (seen in 0.19.2).

    Experts under tensor parallelism are trained only with it, so that they would need Transformer Engine or
    Apex. A norm of a rank's own tokens needs nothing but its weight marked, whose gradient Megatron then sums
    over the ranks. Touches `WrappedTorchNorm.__new__` of `megatron.core.transformer.torch_norm`.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new(original, cls, config, *args, **kwargs):
        alone = copy.copy(config)
        alone.sequence_parallel = False
        norm = original(cls, alone, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    wrap_once(WrappedTorchNorm, "__new__", new)


def let_resumes_change_the_learning_rate() -> None:
    """`--override-opt-param-scheduler` with another rate ends in a KeyError on resume (seen in 0.19.2).

    Parameter groups of optimizer and checkpoint are matched by everything that the scheduler reads, the
    rates among them, and the group in the checkpoint would then bring its old rates with it. Here groups that
    agree in everything else get the optimizer's rates before they are matched. Touches
    `MegatronOptimizer._filter_and_reorder_param_groups` of `megatron.core.optimizer.optimizer` and
    `DistributedOptimizer.load_state_dict` of its neighbour `distrib_optimizer`.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    rates = {"max_lr", "min_lr", "start_wd", "end_wd"}
    role_keys = [key for key in optimizer.param_group_identifier_keys if key not in rates]
    role_keys.append("default_config")  # False for groups of --decoupled-lr, which no other key tells apart

    def role(group: dict) -> tuple:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in role_keys)

    def with_rates_of(current: list[dict], saved: list[dict]) -> list[dict]:
        groups = {role(group): group for group in current}
        if len(groups) < len(current):
            return saved  # groups that differ in their rates alone cannot be told apart
        return [
            group | {key: its[key] for key in rates if key in its}
            if (its := groups.get(role(group))) is not None
            else group
            for group in saved
        ]

    def reorder(original, current_groups, state_dict_groups):
        return original(current_groups, with_rates_of(current_groups, state_dict_groups))

    def load_state_dict(original, self, state_dict):
        if "optimizer" in state_dict:
            inner = state_dict["optimizer"]
            inner["param_groups"] = with_rates_of(self.optimizer.param_groups, inner["param_groups"])
        return original(self, state_dict)

    wrap_once(optimizer.MegatronOptimizer, "_filter_and_reorder_param_groups", reorder)
    wrap_once(distrib_optimizer.DistributedOptimizer, "load_state_dict", load_state_dict)


def escape_help_texts(parser: ArgumentParser) -> None:
    """`--help` ends with `unsupported format character` (seen in 0.19.2).

    A help text of Megatron has a bare per cent sign. Touches the help of those options of `parser` that
    argparse cannot format.
    """
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help:
            try:
                formatter._expand_help(action)
            except (ValueError, TypeError, KeyError):
                action.help = action.help.replace("%", "%%")
