"""Loads the GPTModel of a Megatron checkpoint, built from the arguments in the checkpoint."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s2.checkpoint.convert import HF_FILES
from megatron_s2.checkpoint.families import EMBEDDING
from megatron_s2.checkpoint.megatron_args import flags_from_args
from megatron_s2.checkpoint.torch_dist import CheckpointReader
from megatron_s2.data.tokenizer import has_tokenizer
from megatron_s2.errors import InputError
from megatron_s2.generation.ranks import RankLayout, leave_ranks_at_exit
from megatron_s2.generation.text_codec import TextCodec, megatron_codec, stop_tokens

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megatron_s2.parallel.collectives import ContextParallelGroup

# Arguments that describe a model or its tokenizer and that --use-checkpoint-args does not restore.
_NOT_RESTORED = (
    "activation_func_clamp_value",
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "bias_gelu_fusion",
    "glu_linear_offset",
    "layernorm_epsilon",
    "make_vocab_size_divisible_by",
    "mup_attn_scale_power",
    "mup_base_head_dim",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mscale",
    "mscale_all_dim",
    "qk_l2_norm",
    "qk_layernorm",
    "quick_geglu",
    "rope_scaling_factor",
    "rotary_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "softmax_type",
    "use_mup",
    "use_rope_scaling",
    "vocab_size",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "yarn_original_max_position_embeddings",
)
_NO_TOKENIZER = "NullTokenizer"
_LOAD_FLAGS = [
    *("--use-checkpoint-args", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"),
    "--no-use-tokenizer-model-from-checkpoint-args",  # the tokenizer may have been moved
    # Megatron's parser requires the flags of a training.
    *("--skip-train", "--train-iters", "1", "--eval-iters", "0", "--lr", "1", "--mock-data"),
    *("--micro-batch-size", "1", "--num-workers", "0", "--no-rope-fusion"),
]


@dataclass(frozen=True)
class LoadedGPT:
    """A model in evaluation mode and its tokenizer.

    Args:
        vocab_size: number of tokens, without padding.
        padded_vocab_size: number of rows of the embedding.
        positions: `--max-position-embeddings`.
        note: a message for the user if the attention is still being annealed; None otherwise.
        context: ranks over which caches are to be spread; None for caches on one rank.
    """

    model: GPTModel
    codec: TextCodec
    vocab_size: int
    padded_vocab_size: int
    positions: int
    note: str | None
    context: ContextParallelGroup | None


def load_gpt(
    directory: Path,
    tokenizer_model: str | None = None,
    *,
    needs_cache: bool = True,
    needs_tokenizer: bool = True,
    pattern_file: str | None = None,
    layout: RankLayout | None = None,
) -> LoadedGPT:
    """Loads a `torch_dist` checkpoint onto the GPU of each rank, or the CPU where there is none.

    Megatron's own loader reads it, which trusts the file, as `--load` of a training does. Megatron's global
    state and a process group stay until the process ends, so that a process can load only one checkpoint.

    Args:
        directory: the directory of Megatron's `--save`.
        tokenizer_model: replaces the checkpoint's `--tokenizer-model`.
        needs_cache: whether to refuse a model without S2 attention, which has no small cache.
        needs_tokenizer: False to encode and decode token ids only.
        pattern_file: pattern file by which a model that was trained dense attends.
        layout: the ranks that load it; None for one.

    Raises:
        ValueError: the directory has no checkpoint, or one whose model cannot be built; or the pattern file
            is not for it.
    """
    try:
        checkpoint = CheckpointReader(directory)
        saved, tensors = checkpoint.args, checkpoint.tensors()
    except InputError as error:
        raise ValueError(str(error).replace("--input", "--load", 1)) from None
    is_dense = not getattr(saved, "s2_attention", False) and getattr(saved, "spec", None) is None
    if pattern_file is not None and not is_dense:
        raise ValueError(
            f"--s2-pattern-file {pattern_file}: must not be given with --load {directory}, which was trained "
            "with a pattern of its own"
        )
    if needs_cache and is_dense and pattern_file is None:
        raise ValueError(f"--load {directory}: was trained without S2 attention, and has no small cache")
    if EMBEDDING.key not in tensors:
        raise ValueError(f"--load {directory}: has no {EMBEDDING.key}: it is not a checkpoint of a GPT")
    _, dtype = tensors[EMBEDDING.key]
    tokenizer = (
        _choose_tokenizer(directory, saved, tokenizer_model) if needs_tokenizer else (_NO_TOKENIZER, None)
    )
    _, path = tokenizer
    hf_files = Path(path) if path is not None and Path(path).is_dir() else directory / HF_FILES
    stop = stop_tokens(hf_files)
    with _without_output():
        layout = layout or RankLayout()
        argv = _command_line(directory, saved, dtype, *tokenizer, layout)
        if pattern_file is not None:
            argv += ["--s2-attention", "--s2-pattern-file", str(pattern_file), "--finetune"]
        return _build(argv, stop, layout)


@contextmanager
def _without_output() -> Iterator[None]:
    """Context in which nothing is printed: Megatron prints dozens of lines; errors are raised."""
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        try:
            yield
        finally:  # Megatron's log goes to what was stdout when its training was imported
            for handler in list(logging.root.handlers):
                if getattr(handler, "stream", None) is devnull:
                    logging.root.removeHandler(handler)


def _choose_tokenizer(
    directory: Path, saved: Namespace, tokenizer_model: str | None
) -> tuple[str, str | None]:
    """Returns `--tokenizer-type` and `--tokenizer-model`: the given one; or that of the training; or, if that
    does not exist, the one in the checkpoint."""
    tokenizer_type = getattr(saved, "tokenizer_type", None)
    path = getattr(saved, "tokenizer_model", None) if tokenizer_model is None else tokenizer_model
    is_moved = tokenizer_model is None and path is not None and not Path(path).exists()
    if is_moved and has_tokenizer(directory / HF_FILES):
        path = str(directory / HF_FILES)
    if tokenizer_type in (None, _NO_TOKENIZER):
        tokenizer_type = _NO_TOKENIZER if path is None else "HuggingFaceTokenizer"
    return tokenizer_type, path


def _command_line(
    directory: Path,
    saved: Namespace,
    dtype: torch.dtype,
    tokenizer_type: str,
    tokenizer_model: str | None,
    layout: RankLayout,
) -> list[str]:
    """Returns the flags that load a checkpoint, given the arguments and the dtype stored in it."""
    args = {name: getattr(saved, name, None) for name in _NOT_RESTORED}
    if tokenizer_type == _NO_TOKENIZER:
        args["vocab_size"] = args["vocab_size"] or saved.padded_vocab_size
    args |= {
        "load": str(directory),
        "seq_length": getattr(saved, "seq_length", None) or saved.max_position_embeddings,
        "tokenizer_type": tokenizer_type,
        "tokenizer_model": tokenizer_model,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": layout.tensor,
        # To Megatron, ranks that share a context are data-parallel: each runs the model on the same tokens.
        "global_batch_size": layout.context,
    }
    return [*_LOAD_FLAGS, *(word for words in flags_from_args(args) for word in words)]


def _build(argv: list[str], stop: frozenset[int], layout: RankLayout) -> LoadedGPT:
    from megatron_s2.training.environment import Environment, runnable_arguments
    from megatron_s2.training.patches import apply_patches, hide_transformer_engine

    if layout.tensor > 1:
        # Megatron requires it before Blackwell, for an order of kernels that only training relies on.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environment = Environment.detect()
    argv, _ = runnable_arguments(argv, environment)
    if not environment.transformer_engine:
        hide_transformer_engine()
    if not environment.gpu:
        from megatron_s2.training.cpu_runtime import enable_cpu_runtime

        enable_cpu_runtime()
    apply_patches(cpu=not environment.gpu)

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import get_tokenizer
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_s2.training.configure import configure

    try:
        args, container = configure(argv)
    except AssertionError as error:
        raise ValueError(f"--load: Megatron refuses the checkpoint's arguments: {error}") from error
    store = torch.distributed.HashStore() if layout.ranks == 1 else None
    initialize_megatron(allow_no_cuda=not environment.gpu, store=store)
    leave_ranks_at_exit()
    builder = container.model.get_builder_cls()(container.model)
    models = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    try:
        load_checkpoint(models, None, None)
    except CheckpointException as error:  # a BaseException
        reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise ValueError(f"--load {args.load}: Megatron does not read it: {reasons}") from error
    [model] = (unwrap_model(model).eval() for model in models)
    tokenizer = get_tokenizer()
    return LoadedGPT(
        model,
        megatron_codec(tokenizer, args.tokenizer_type, stop),
        min(args.vocab_size or tokenizer.vocab_size, args.padded_vocab_size),
        args.padded_vocab_size,
        args.max_position_embeddings,
        _annealing_note(model),
        _context_group() if layout.context > 1 else None,
    )


def _context_group() -> ContextParallelGroup:
    from megatron.core import parallel_state

    from megatron_s2.parallel.collectives import ContextParallelGroup

    return ContextParallelGroup(parallel_state.get_data_parallel_group())


def _annealing_note(model: GPTModel) -> str | None:
    from megatron_s2.layers.core_attention import S2CoreAttention

    layers = (module for module in model.modules() if isinstance(module, S2CoreAttention))
    annealings = {layer.annealing for layer in layers}
    notes = {annealing.progress() for annealing in annealings if annealing is not None}
    return next(iter(notes), None)
