"""The GPTModel in a Megatron checkpoint, built from the arguments that the checkpoint holds."""

from __future__ import annotations

import atexit
import os
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s2.checkpoint.convert import COMPANIONS
from megatron_s2.checkpoint.megatron_args import flags
from megatron_s2.checkpoint.torch_dist import Checkpoint
from megatron_s2.errors import InputError
from megatron_s2.generation.text import Text, has_tokenizer, megatron_text, stop_tokens

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# What describes a model, or its tokenizer, and Megatron's --use-checkpoint-args does not take over.
_DESCRIBING = (
    "activation_func_clamp_value",
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "layernorm_epsilon",
    "make_vocab_size_divisible_by",
    "qk_l2_norm",
    "qk_layernorm",
    "quick_geglu",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "softmax_type",
    "use_rope_scaling",
    "vocab_size",
)
_TOKEN_IDS = "NullTokenizer"
_EMBEDDING = "embedding.word_embeddings.weight"
_RUN = [
    *("--use-checkpoint-args", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"),
    "--no-use-tokenizer-model-from-checkpoint-args",  # it may lie elsewhere
    # Megatron's parser wants a training; none takes place.
    *("--skip-train", "--train-iters", "1", "--eval-iters", "0", "--lr", "1", "--mock-data"),
    *("--micro-batch-size", "1", "--global-batch-size", "1", "--num-workers", "0", "--no-rope-fusion"),
]


@dataclass(frozen=True)
class LoadedGPT:
    """A model in evaluation mode and its tokenizer.

    Args:
        vocab_size: tokens, without the padding of the vocabulary.
        padded_vocab_size: with it.
        positions: that the model was made for, `--max-position-embeddings`.
        note: what a user should know of its attention: that it is still being annealed; None for nothing.
    """

    model: GPTModel
    text: Text
    vocab_size: int
    padded_vocab_size: int
    positions: int
    note: str | None


def load_gpt(
    directory: Path,
    tokenizer_model: str | None = None,
    *,
    needs_cache: bool = True,
    needs_tokenizer: bool = True,
) -> LoadedGPT:
    """Loads a `torch_dist` checkpoint onto this machine's GPU, or its CPU, as one rank.

    Megatron's own loader reads it, which trusts the file as `--load` of a training does. Megatron's global
    state and a process group are there until the process ends: once per process.

    Args:
        directory: what was given to the training as `--save`.
        tokenizer_model: replaces the checkpoint's `--tokenizer-model`.
        needs_cache: refuse a model without S2 attention, which has no small cache.
        needs_tokenizer: False reads token ids only.

    Raises:
        ValueError: it is no checkpoint, or one of a model that cannot be built here.
    """
    try:
        checkpoint = Checkpoint(directory)
        saved, tensors = checkpoint.args, checkpoint.tensors()
    except InputError as error:
        raise ValueError(str(error).replace("--input", "--load", 1)) from None
    is_dense = not getattr(saved, "s2_attention", False) and getattr(saved, "spec", None) is None
    if needs_cache and is_dense:
        raise ValueError(f"--load {directory}: was trained without S2 attention, and has no small cache")
    kind, place = _tokenizer_of(directory, saved, tokenizer_model) if needs_tokenizer else (_TOKEN_IDS, None)
    companions = Path(place) if place is not None and Path(place).is_dir() else directory / COMPANIONS
    stop = stop_tokens(companions)
    # Megatron tells what it does in dozens of lines; what is wrong, it raises.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return _build(arguments_of(directory, saved, _dtype(directory, tensors), kind, place), stop)


def _tokenizer_of(directory: Path, saved: Namespace, given: str | None) -> tuple[str, str | None]:
    """`--tokenizer-type` and `--tokenizer-model`: of the given one, or the run's, or the one that lies beside
    the checkpoint, where that was moved."""
    kind, place = getattr(saved, "tokenizer_type", None), getattr(saved, "tokenizer_model", None)
    beside = directory / COMPANIONS
    if given is not None:
        place = given
    elif place is not None and not Path(place).exists() and has_tokenizer(beside):
        place = str(beside)
    if kind in (None, _TOKEN_IDS):
        kind = _TOKEN_IDS if place is None else "HuggingFaceTokenizer"
    return kind, place


def _dtype(directory: Path, tensors: dict) -> torch.dtype:
    if _EMBEDDING not in tensors:
        raise ValueError(f"--load {directory}: has no {_EMBEDDING}: it is no checkpoint of a GPT")
    _, dtype = tensors[_EMBEDDING]
    return dtype


def arguments_of(
    directory: Path,
    saved: Namespace,
    dtype: torch.dtype,
    tokenizer_type: str = _TOKEN_IDS,
    tokenizer_model: str | None = None,
) -> list[str]:
    """The command line of a run that loads a checkpoint.

    Args:
        saved: the arguments that the checkpoint holds.
        dtype: of its weights.
        tokenizer_type, tokenizer_model: of the run.
    """
    describing = {name: getattr(saved, name, None) for name in _DESCRIBING}
    if tokenizer_type == _TOKEN_IDS:
        describing["vocab_size"] = describing["vocab_size"] or saved.padded_vocab_size
    describing |= {
        "tokenizer_type": tokenizer_type,
        "tokenizer_model": tokenizer_model,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    length = getattr(saved, "seq_length", None) or saved.max_position_embeddings
    given = [word for words in flags(describing) for word in words]
    return [*_RUN, "--load", str(directory), "--seq-length", str(length), *given]


def _build(argv: list[str], stop: frozenset[int]) -> LoadedGPT:
    from megatron_s2.training.machine import Machine, runnable_arguments
    from megatron_s2.training.patches import apply_patches

    machine = Machine.detect()
    argv, _ = runnable_arguments(argv, machine)
    if not machine.gpu:
        from megatron_s2.training.cpu_runtime import enable_cpu_runtime

        enable_cpu_runtime()
    apply_patches(cpu=not machine.gpu)

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import get_tokenizer
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_s2.pretrain import configure

    try:
        args, container = configure(argv)
    except AssertionError as error:
        raise ValueError(f"--load: Megatron refuses the checkpoint's arguments: {error}") from error
    initialize_megatron(allow_no_cuda=not machine.gpu, store=torch.distributed.HashStore())
    atexit.register(_leave_process_group)
    builder = container.model.get_builder_cls()(container.model)
    models = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    try:
        load_checkpoint(models, None, None)
    except CheckpointException as error:  # no Exception
        reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise ValueError(f"--load {args.load}: Megatron does not read it: {reasons}") from error
    [model] = (unwrap_model(model).eval() for model in models)
    tokenizer = get_tokenizer()
    return LoadedGPT(
        model,
        megatron_text(tokenizer, args.tokenizer_type, stop),
        min(args.vocab_size or tokenizer.vocab_size, args.padded_vocab_size),
        args.padded_vocab_size,
        args.max_position_embeddings,
        _note(model),
    )


def _leave_process_group() -> None:
    """While the interpreter is whole: later NCCL's threads are ended in any order, with a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _note(model: GPTModel) -> str | None:
    from megatron_s2.layers.core_attention import S2CoreAttention

    layers = (module for module in model.modules() if isinstance(module, S2CoreAttention))
    annealings = {layer.annealing for layer in layers}
    notes = {annealing.note() for annealing in annealings if annealing is not None}
    return next(iter(notes), None)
