"""The two conversions: Hugging Face directory to Megatron checkpoint and back."""

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_s2.checkpoint import hf_config, megatron_args
from megatron_s2.checkpoint.model import Model
from megatron_s2.checkpoint.safetensors_files import DTYPES, Weights, read_json, write_weights
from megatron_s2.checkpoint.tensors import LAYERS, Placed, extra_state_keys, placed_tensors
from megatron_s2.checkpoint.torch_dist import Checkpoint, Chunk, write_release
from megatron_s2.checkpoint.whole import check_new, whole_directory
from megatron_s2.data.tokenizer import has_tokenizer
from megatron_s2.errors import InputError
from megatron_s2.pattern.settings import S2Settings

RESUME = "resume.args"
# What a Hugging Face directory holds besides weights; kept beside a Megatron checkpoint, under this name.
COMPANIONS = "huggingface"
_CONFIG = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPANION_FILES = (*_TOKENIZER_FILES, "generation_config.json")
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
# Families that are the same in Megatron.
NAMES_OF_LLAMA = ("llama", "mistral")
_MARKS = {"qwen2": "--add-qkv-bias", "qwen3": "--qk-layernorm"}


@dataclass(frozen=True)
class Exported:
    """What `to_hugging_face` wrote.

    Args:
        settings: None for dense attention.
        reason: what the family follows from.
        tokenizer: where the tokenizer's files came from; None where there are none.
    """

    model: Model
    settings: S2Settings | None
    reason: str
    tokenizer: Path | None


def to_megatron(source: Path, output: Path, s2_flags: Namespace) -> list[str]:
    """Writes the model in the Hugging Face directory `source` as a Megatron checkpoint.

    Args:
        source: with config.json, safetensors, and maybe a tokenizer.
        output: a new directory, for `--load`.
        s2_flags: parsed `--s2-…` flags (`add_s2_args`).

    Returns:
        The flags to train it with, one per line of `output/resume.args`.

    Raises:
        InputError: the model is none that can be converted, or `output` exists.
        OSError: something cannot be read or written.
    """
    check_new(output)
    _check_words(output)
    if not source.is_dir():
        raise InputError(f"--input {source}: there is no such directory")
    config = read_json(source / _CONFIG)
    model = hf_config.model_of(config)
    settings = _settings(config, model, s2_flags)
    window = hf_config.sliding_window(config)
    if window is not None and settings is None:
        raise InputError(
            f"config.json: sliding_window {window}: the converted model would see everything; convert with "
            "--s2-attention to train it with S2 attention instead, or set it to null"
        )
    weights = Weights(source)
    placed = list(placed_tensors(model))
    _check_weights(weights, placed, model)
    chunks = [_chunk(tensor, weights, model) for tensor in placed]
    size = sum(math.prod(chunk.sizes) * chunk.dtype.itemsize for chunk in chunks)
    tokenizer = {}
    if has_tokenizer(source):
        place = Path(os.path.abspath(output), COMPANIONS)
        tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(place)}
    pattern = megatron_args.arguments_of_s2(settings, s2_flags.s2_anneal_steps or 0)
    arguments = megatron_args.arguments_of(model) | pattern | tokenizer
    flags = megatron_args.flags(arguments | {"bf16": chunks[0].dtype == torch.bfloat16})
    lines = [" ".join(words) for words in flags]
    args = megatron_args.saved_arguments(arguments)
    with whole_directory(output, size) as directory:
        write_release(directory, chunks, extra_state_keys(model), args)
        _copy(source, directory / COMPANIONS, (*_COMPANION_FILES, _CONFIG))
        (directory / RESUME).write_text("".join(line + "\n" for line in lines))
    return lines


def to_hugging_face(
    source: Path,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    vocab_size: int | None,
    family: str | None,
) -> Exported:
    """Writes the model in the Megatron checkpoint `source` as a Hugging Face directory.

    Args:
        source: what a training was given as `--save`, or `to_megatron` wrote.
        output: a new directory.
        dtype: of all weights, a name in `DTYPES`; by default each has the one that it has in the checkpoint,
            and config.json names that of the embedding.
        max_shard_size: most bytes of a file of weights.
        vocab_size: tokens that have an embedding, without padding, where neither the checkpoint nor the model
            that training began with says it.
        family: one of `NAMES_OF_LLAMA`, where the config.json of the model that training began with does not
            say which.

    Raises:
        InputError: the checkpoint holds a model that none of the families is, or `output` exists.
        OSError: something cannot be read or written.
    """
    check_new(output)
    if not source.is_dir():
        raise InputError(f"--input {source}: there is no such directory")
    checkpoint = Checkpoint(source)
    companions = _companions(source, checkpoint.args)
    base = read_json(companions / _CONFIG) if (companions / _CONFIG).is_file() else {}
    said = (getattr(checkpoint.args, "vocab_size", None), base.get("vocab_size"))
    tokens = next((number for number in said if isinstance(number, int) and number > 0), vocab_size)
    if vocab_size not in (None, tokens):
        raise InputError(
            f"--vocab-size {vocab_size}: the checkpoint, or the model that it began with, says {tokens}; "
            "leave it out"
        )
    known = base.get("model_type") if base.get("model_type") in NAMES_OF_LLAMA else None
    model = megatron_args.model_of(checkpoint.args, family or known or "llama", tokens)
    if model.family in _MARKS:
        reason = f"from the checkpoint's {_MARKS[model.family]}"
    elif family or known:
        reason = "from --family" if family else f"from {companions / _CONFIG}"
    else:
        reason = "or Mistral, the same in Megatron: --family mistral"
    if family not in (None, model.family):
        raise InputError(f"--family {family}: the model is {model.family}, {reason}")
    settings = megatron_args.settings_of(checkpoint.args, model)
    if settings is not None:
        megatron_args.check_annealed(checkpoint.args, checkpoint.iteration)
    placed = list(placed_tensors(model))
    _check_tensors(checkpoint, placed, model)
    stored = {key: DTYPES[dtype] if dtype else its for key, (_, its) in checkpoint.tensors().items()}
    sizes = {
        name: math.prod(shape) * stored[tensor.key].itemsize
        for tensor in placed
        for name, shape in tensor.parts.items()
    }
    config = hf_config.config_of(model, base, settings, _name(stored[placed[0].key]))
    with whole_directory(output, sum(sizes.values())) as directory:
        write_weights(directory, sizes, _parts(checkpoint, placed, model, stored), max_shard_size)
        _copy(companions, directory, _COMPANION_FILES)
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Exported(model, settings, reason, companions if has_tokenizer(companions) else None)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, its in DTYPES.items() if its == dtype)


def _check_words(output: Path) -> None:
    """The path stands in `resume.args`, whose words a shell takes apart (`$(cat …)`)."""
    if any(letter.isspace() or letter in "*?[" for letter in os.path.abspath(output)):
        raise InputError(
            f"--output {output}: must be a path without spaces, *, ? and [, because it is part of the flags "
            f"in {RESUME}"
        )


def _settings(config: hf_config.Config, model: Model, flags: Namespace) -> S2Settings | None:
    """The pattern that flags give, or the one that the model was trained with; both must be the same."""
    megatron_args.check_s2_flags(flags)
    given = megatron_args.settings_of(flags, model)
    trained = hf_config.settings_of(config, model)
    difference = megatron_args.first_difference(given, trained) if given and trained else None
    if difference is not None:
        flag, mine, its = difference
        raise InputError(f"{flag} {mine}: the model was trained with {its}; give the same, or no S2 flags")
    return given or trained


def _check_weights(weights: Weights, placed: Iterable[Placed], model: Model) -> None:
    """All tensors are there, and no others; a tied output layer may be, if it is the embedding."""
    weights.check(placed, allowed=(_OUTPUT,) if model.tied else ())
    if model.tied and _OUTPUT in weights:
        output, embedding = weights.read(_OUTPUT), weights.read(_EMBEDDING)
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise InputError(
                f"{_OUTPUT}: differs from {_EMBEDDING}, though config.json says tie_word_embeddings true"
            )


def _chunk(tensor: Placed, weights: Weights, model: Model) -> Chunk:
    def make() -> torch.Tensor:
        return tensor.layout.join([weights.read(name) for name in tensor.parts], model)

    dtype = weights.dtype(next(iter(tensor.parts)))
    offsets, sizes = _place(tensor)
    layers = () if tensor.layer is None else (model.num_layers,)
    return Chunk(tensor.key, (*layers, *tensor.shape), offsets, sizes, dtype, make)


def _place(tensor: Placed) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a tensor begins in the one over all layers, and its sizes there."""
    nowhere = (0,) * len(tensor.shape)
    return (nowhere, tensor.shape) if tensor.layer is None else ((tensor.layer, *nowhere), (1, *tensor.shape))


def _companions(source: Path, args: Namespace) -> Path:
    """Where what the model came with lies: beside the checkpoint, or where the run had its tokenizer."""
    beside = source / COMPANIONS
    tokenizer = getattr(args, "tokenizer_model", None)
    is_one = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer" and tokenizer
    return Path(tokenizer) if is_one and not beside.is_dir() else beside


def _check_tensors(checkpoint: Checkpoint, placed: Iterable[Placed], model: Model) -> None:
    """The checkpoint has the tensors of the model, more rows in the embeddings at most, and no others."""
    stored = {key: of for key, of in checkpoint.tensors().items() if key.startswith(_MODEL_KEYS)}
    for tensor in placed:
        if tensor.key not in stored:
            raise InputError(f"{tensor.key}: missing; the checkpoint's arguments say that the model has it")
        size, dtype = stored[tensor.key]
        expected = tensor.shape if tensor.layer is None else (model.num_layers, *tensor.shape)
        is_padded = not tensor.key.startswith(LAYERS) and size[0] > expected[0] and size[1:] == expected[1:]
        if size != expected and not (is_padded and tensor.shape[0] == model.vocab_size):
            hint = "" if tensor.key.startswith(LAYERS) else " (tokens: --vocab-size)"
            raise InputError(
                f"{tensor.key}: has shape {list(size)}; its arguments say {list(expected)}{hint}"
            )
        if dtype not in DTYPES.values():
            raise InputError(f"{tensor.key}: is stored as {dtype}; must be one of {', '.join(DTYPES)}")
    known = {tensor.key for tensor in placed}
    for key in stored:
        if key not in known:
            raise InputError(f"{key}: no {model.family} model has it; the checkpoint cannot be converted")


def _parts(
    checkpoint: Checkpoint, placed: Iterable[Placed], model: Model, dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of Hugging Face's, one Megatron tensor of one layer read at a time.

    Args:
        dtypes: to write, by Megatron's key.
    """
    for tensor in placed:
        joined = checkpoint.read(tensor.key, *_place(tensor)).reshape(tensor.shape)
        dtype = dtypes[tensor.key]
        for name, part in zip(tensor.parts, tensor.layout.split(joined, model)):
            written = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if dtype != part.dtype and not torch.equal(written.isfinite(), part.isfinite()):
                most = torch.finfo(dtype).max
                raise InputError(
                    f"--dtype {_name(dtype)}: {name} has numbers beyond its largest, {most:g}; give another"
                )
            yield name, written


def _copy(source: Path, destination: Path, names: Iterable[str]) -> None:
    destination.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
