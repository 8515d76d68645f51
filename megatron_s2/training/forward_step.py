"""Batches, loss, forward step and datasets of a GPT, which `megatron.training.pretrain` takes as arguments.

They follow the contract of Megatron's own `pretrain_gpt.py`, which is not part of the installed package.
"""

import json
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, training
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_s2.layers.packed_row import row_on_device

# A loss of more than this many times the largest one so far is a spike (`--check-for-spiky-loss`).
_SPIKE_FACTOR = 10
_OF_TOKENS = ("tokens", "labels", "loss_mask", "position_ids")
_TENSORS = (*_OF_TOKENS, "attention_mask")
_PACKING = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
_straggler_timer = StragglerDetector()


@dataclass(frozen=True)
class Batch:
    """The part of a micro-batch that a pipeline stage needs; other fields are None.

    Args:
        tokens, labels, position_ids: int64 `[batch, seq]`.
        loss_mask: float32 `[batch, seq]`.
        attention_mask: bool `[batch, 1, seq, seq]`, True where attention is masked.
        packed: boundaries of packed documents, if they must not attend to each other; batch is then 1.
    """

    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    packed: PackedSeqParams | None = None


def get_batch(data_iterator, vp_stage: int | None) -> Batch:
    """Reads a micro-batch on tensor-parallel rank 0 and broadcasts it to the tensor-parallel group.

    Stages in the middle of the pipeline need only the boundaries of packed documents.
    """
    args = get_args()
    has_ends = is_first_or_last_pipeline_stage(vp_stage)
    if not has_ends and not args.dataloader_inter_document_masking:
        return Batch()

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch, sample = None, {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {name: sample.get(name) for name in (*_TENSORS, *_PACKING)}
        batch = {name: t if t is None else t.cuda(non_blocking=True) for name, t in batch.items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.dataloader_inter_document_masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    packed = None
    if args.dataloader_inter_document_masking:
        # The loader's own tensor is on the host; other tensor-parallel ranks receive theirs on the device.
        offsets = sample["cu_seqlens"] if tp_rank == 0 else batch["cu_seqlens"].cpu()
        packed = packed_sequences(offsets.numpy(), args.seq_length)
        batch |= {name: batch[name].view(1, -1) for name in _OF_TOKENS if batch[name] is not None}
    if not has_ends:
        return Batch(packed=packed)
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    return Batch(**{name: batch[name] for name in _TENSORS}, packed=packed)


def packed_sequences(offsets: np.ndarray, seq_length: int) -> PackedSeqParams:
    """Returns the document boundaries of a micro-batch for attention, and counts them for the throughput.

    The host keeps them beside the device's (`PackedRow`), so that no layer waits for the device.

    Args:
        offsets: `[batch, offsets]`, of the documents of each sample, from 0 to `seq_length`, which may recur.
        seq_length: tokens per sample.
    """
    edges = (offsets + seq_length * np.arange(len(offsets))[:, None]).ravel()
    edges = edges[np.diff(edges, prepend=-1) > 0]
    boundaries = row_on_device(edges.tolist(), torch.device(torch.cuda.current_device()))
    training.update_seqlen_stats_from_cu_seqlens(boundaries)
    longest = int(np.diff(edges).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=seq_length,
    )
    # Context parallelism splits the row as one sequence (`use_per_sequence_balancing` in `get_batch`).
    packed.s2_zigzag_over_row = True
    return packed


def loss_function(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the summed loss of a micro-batch, its number of unmasked tokens, and both for the log.

    Megatron divides the sum of the losses by that of the tokens, over micro-batches and data-parallel ranks.

    Args:
        loss_mask, token_losses: `[batch, seq]`.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(token_losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def _check_loss(loss: torch.Tensor) -> None:
    """Validates the loss by Megatron's rerun state machine, which stops at NaN or Inf and reports spikes."""
    args = get_args()
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_bad, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(rerun.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def _straggler_detection(**section) -> AbstractContextManager:
    """Returns Megatron's straggler detector with `--log-straggler`; otherwise it would print exceptions."""
    return _straggler_timer(**section) if get_args().log_straggler else nullcontext()


def forward_step(data_iterator, model):
    """Runs the forward pass of a pipeline stage; returns its output, and a function from it to the loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_detection(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()

    with _straggler_detection():
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed,
        )
    return output, partial(loss_function, batch.loss_mask)


def _needs_data(vp_stage: int | None = None) -> bool:
    """Whether this rank reads samples: tensor-parallel rank 0 of the first and the last stage or, with packed
    documents, of every stage."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return get_args().dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage)


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    path = args.per_dataset_sequences_path
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=None if path is None else json.loads(Path(path).read_text()),
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None):
    """Builds the training, validation and test datasets on the ranks that read samples."""
    args = get_args()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(_needs_data, vp_stage=vp_stage),
        _dataset_config(args),
    ).build()


# Megatron calls a provider with this attribute on every rank; it decides itself which ranks build.
datasets.is_distributed = True
