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
from megatron_s2.checkpoint.atomic_directory import atomic_directory, check_new
from megatron_s2.checkpoint.families import (
    EMBEDDING,
    FAMILIES,
    OUTPUT,
    extra_state_keys,
    model_tensors,
)
from megatron_s2.checkpoint.longer_context import LongerContext
from megatron_s2.checkpoint.model_config import ModelConfig
from megatron_s2.checkpoint.safetensors_files import DTYPES, SafetensorsReader, read_json, write_safetensors
from megatron_s2.checkpoint.tensors import ModelTensor
from megatron_s2.checkpoint.torch_dist import CheckpointReader, write_release
from megatron_s2.data.tokenizer import GROW_MODEL, has_tokenizer, stored_number_of_ids
from megatron_s2.errors import InputError, flag_name
from megatron_s2.layers.arguments import PATTERN_FILE, pattern_differences
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file
from megatron_s2.pattern.settings import pattern_fields

RESUME = "resume.args"
_PATTERN = "pattern.json"  # a pattern file, if the model has a pattern for each layer
# Directory in a Megatron checkpoint that keeps what a Hugging Face directory has besides weights.
HF_FILES = "huggingface"
_CONFIG = "config.json"
# Every file that a tokenizer, a chat template or generation reads; globs within the directory.
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
[_HF_EMBEDDING] = EMBEDDING.hf_dims
[_HF_OUTPUT] = OUTPUT.hf_dims
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class ImportSummary:
    """What `to_megatron` wrote.

    Args:
        flags: flags to train the model with, one per line of `resume.args`.
        note: message about a tokenizer with more tokens than the model; None otherwise.
        note_on_sinks: message about a dense model whose pattern has no sinks; None otherwise.
    """

    flags: list[str]
    note: str | None
    note_on_sinks: str | None


@dataclass(frozen=True)
class ExportSummary:
    """The model that `to_hugging_face` has written.

    Args:
        settings: S2 settings of the model; None for dense attention.
        family_source: what the family was inferred from.
        tokenizer: directory that the tokenizer was copied from; None without a tokenizer.
        note: message about a tokenizer with more tokens than the model; None otherwise.
    """

    model: ModelConfig
    settings: S2Settings | None
    family_source: str
    tokenizer: Path | None
    note: str | None


def to_megatron(
    source: Path, output: Path, s2_flags: Namespace, context: LongerContext | None = None
) -> ImportSummary:
    """Writes the model in a Hugging Face directory as a Megatron checkpoint.

    Args:
        source: directory with config.json, safetensors and, optionally, a tokenizer.
        output: new directory, for `--load`.
        s2_flags: parsed `--s2-…` flags (`add_s2_args`).
        context: changes of the model's positions; None for none.

    Raises:
        InputError: the model cannot be converted, or `output` exists.
        OSError: a file cannot be read or written.
    """
    _check_paths(source, output)
    _check_no_shell_characters(output)
    config = read_json(source / _CONFIG)
    own = hf_config.model_from_config(config)
    model = own if context is None else context.of(own)
    if model != own:
        config = hf_config.with_architecture(config, model)
    settings = _choose_settings(config, model, s2_flags)
    window = hf_config.sliding_window(config)
    if window is not None and settings is None:
        raise InputError(
            f"config.json: sliding_window {window}: the converted model would see everything; convert with "
            "--s2-attention to train it with S2 attention instead, or set it to null"
        )
    reader = SafetensorsReader(source)
    tensors = list(model_tensors(model))
    _check_weights(reader, tensors, model)
    dtypes = {key: reader.dtype(next(iter(tensor.hf_shapes))) for tensor in tensors for key in tensor.keys}
    size = sum(math.prod(tensor.shape) * dtypes[key].itemsize for tensor in tensors for key in tensor.keys)
    args = megatron_args.args_from_model(model)
    if model.experts is not None:
        args["moe_aux_loss_coeff"] = hf_config.aux_loss_coefficient(config)
    args |= megatron_args.args_from_s2_settings(settings, s2_flags.s2_anneal_steps or 0)
    if has_tokenizer(source):
        tokenizer = os.path.join(os.path.abspath(output), HF_FILES)
        args |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
    flag_args = args | {"bf16": dtypes[EMBEDDING.key] == torch.bfloat16}
    has_pattern_file = settings is not None and settings.layers is not None
    if has_pattern_file:
        for name in pattern_fields(settings):
            del flag_args[f"s2_{name}"]
        flag_args[PATTERN_FILE] = os.path.join(os.path.abspath(output), _PATTERN)
    flags = megatron_args.flags_from_args(flag_args)
    lines = [" ".join(words) for words in flags]

    def load(tensor: ModelTensor) -> torch.Tensor:
        return tensor.fusion.fuse([reader.read(name) for name in tensor.hf_shapes], model)

    with atomic_directory(output, size) as directory:
        saved_args = megatron_args.checkpoint_args(args)
        write_release(directory, tensors, dtypes, load, extra_state_keys(model), saved_args)
        _copy(source, directory / HF_FILES, (*_COPIED_FILES, _CONFIG))
        if model != own:
            _write_json(directory / HF_FILES / _CONFIG, config)
        (directory / RESUME).write_text("".join(line + "\n" for line in lines))
        if has_pattern_file:
            write_pattern_file(directory / _PATTERN, settings)
    was_dense = hf_config.s2_settings_from_config(config, model) is None
    return ImportSummary(
        lines, _note_on_tokenizer(source, model.vocab_size), _note_on_sinks(settings) if was_dense else None
    )


def to_hugging_face(
    source: Path,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    vocab_size: int | None,
    family: str | None,
) -> ExportSummary:
    """Writes the model in a Megatron checkpoint as a Hugging Face directory.

    Args:
        source: directory that a training was given as `--save`, or that `to_megatron` wrote.
        output: new directory.
        dtype: dtype of all weights, a key of `DTYPES`. None keeps the dtype that each has in the checkpoint;
            config.json then names the dtype of the embedding.
        max_shard_size: largest size of a safetensors file in bytes.
        vocab_size: number of tokens without padding, where neither the checkpoint nor the config.json that
            the model came with contains it, or the tokenizer has more tokens than they say.
        family: Hugging Face's `model_type`, where Megatron cannot tell the families apart and the config.json
            that the model came with does not name it.

    Raises:
        InputError: no family has the model in the checkpoint, its padding has rows for tokens of the
            tokenizer that may have been trained and `vocab_size` does not say what to do about them, or
            `output` exists.
        OSError: a file cannot be read or written.
    """
    _check_paths(source, output)
    reader = CheckpointReader(source)
    hf_files = _hf_files(source, reader.args)
    base = read_json(hf_files / _CONFIG) if (hf_files / _CONFIG).is_file() else {}
    vocab_size = _choose_vocab_size(reader, base, hf_files, vocab_size)
    family, family_source = _choose_family(reader.args, base, hf_files / _CONFIG, family)
    model = megatron_args.model_from_args(reader.args, family, vocab_size)
    settings = megatron_args.s2_settings_from_args(reader.args, model)
    if settings is not None:
        megatron_args.check_annealed(reader.args, reader.iteration)
    tensors = _check_tensors(reader, model)
    dtypes = {key: DTYPES[dtype] if dtype else stored for key, (_, stored) in reader.tensors().items()}
    sizes = {
        name: math.prod(shape) * dtypes[tensor.key].itemsize
        for tensor in tensors
        for name, shape in tensor.hf_shapes.items()
    }
    config = hf_config.config_from_model(model, base, settings, _dtype_name(dtypes[EMBEDDING.key]))
    with atomic_directory(output, sum(sizes.values())) as directory:
        write_safetensors(directory, sizes, _hf_tensors(reader, tensors, model, dtypes), max_shard_size)
        _copy(hf_files, directory, _COPIED_FILES)
        _write_json(directory / _CONFIG, config)
    tokenizer = hf_files if has_tokenizer(hf_files) else None
    note = _note_on_tokenizer(hf_files, model.vocab_size)
    return ExportSummary(model, settings, family_source, tokenizer, note)


def _check_paths(source: Path, output: Path) -> None:
    check_new(output)
    if not source.is_dir():
        raise InputError(f"--input {source}: there is no such directory")


def _check_no_shell_characters(output: Path) -> None:
    """The path is a word in `resume.args`, which the shell splits and expands in `$(cat …)`."""
    if any(character.isspace() or character in "*?[" for character in os.path.abspath(output)):
        raise InputError(
            f"--output {output}: must be a path without spaces, *, ? and [, because it is part of the flags "
            f"in {RESUME}"
        )


def _choose_settings(config: hf_config.Config, model: ModelConfig, flags: Namespace) -> S2Settings | None:
    """Returns the pattern of the flags, or the one that the model was trained with; they must not differ."""
    megatron_args.check_s2_flags(flags)
    given = megatron_args.s2_settings_from_args(flags, model)
    trained = hf_config.s2_settings_from_config(config, model)
    differences = pattern_differences(given, trained) if given and trained else []
    if differences:
        flag, asked, saved = differences[0]
        raise InputError(f"{flag} {asked}: the model was trained with {saved}; give the same, or no S2 flags")
    return given or trained


def _choose_vocab_size(
    reader: CheckpointReader, base: hf_config.Config, hf_files: Path, requested: int | None
) -> int | None:
    """Returns the number of tokens to write: as in the checkpoint or the model that it began with; or, as
    requested, of the tokenizer, whose further tokens may have been trained in the rows of the padding."""
    known = (getattr(reader.args, "vocab_size", None), base.get("vocab_size"))
    vocab_size = next((size for size in known if isinstance(size, int) and size > 0), requested)
    ids = stored_number_of_ids(hf_files) or 0
    (rows, *_), _ = reader.tensors().get(EMBEDDING.key, ((0,), None))
    if requested not in (None, vocab_size) and not vocab_size < requested <= ids:
        raise InputError(
            f"--vocab-size {requested}: the checkpoint, or the model that it began with, has {vocab_size}; "
            "leave it out"
        )
    if requested is None and vocab_size is not None and vocab_size < ids <= rows:
        raise InputError(
            f"--vocab-size: must be given: the tokenizer in {hf_files} has token ids up to {ids - 1}, the "
            f"model {vocab_size} tokens; {ids} writes a row for each, {vocab_size} leaves out rows from "
            f"{vocab_size} on"
        )
    return requested or vocab_size


def _note_on_tokenizer(directory: Path, vocab_size: int) -> str | None:
    """Returns a message where the tokenizer in a directory has tokens that the model does not."""
    ids = stored_number_of_ids(directory)
    if ids is None or ids <= vocab_size:
        return None
    return (
        f"the tokenizer in {directory} has token ids up to {ids - 1}, the model has {vocab_size} tokens; "
        f"{GROW_MODEL}"
    )


def _note_on_sinks(settings: S2Settings | None) -> str | None:
    """Returns what S2 layers cost a dense model if none of them has sinks."""
    layers = [] if settings is None else settings.sparse_layers
    if not layers or any(settings.pattern(n).sink_blocks for n in layers):
        return None
    return (
        "the pattern has no sinks: before training that costs a pretrained model much (SmolLM2-135M 0.64 nats"
        " per token at 4096 tokens, with one sink block 0.09); --s2-sink-blocks 1 keeps the first block"
    )


def _choose_family(
    args: Namespace, base: hf_config.Config, base_path: Path, requested: str | None
) -> tuple[str, str]:
    """Returns the family of a checkpoint and what it was inferred from."""
    families = megatron_args.families_of(args)
    family, *others = families
    if not others:
        flags = " and ".join(map(flag_name, FAMILIES[family].marks or ["rotary_percent"]))
        inferred_from = f"from the checkpoint's {flags}"
    elif requested in families:
        return requested, "from --family"
    elif base.get("model_type") in families:
        return base["model_type"], f"from {base_path}"
    else:
        names = " or ".join(map(str.capitalize, others))
        inferred_from = f"or {names}, the same in Megatron: --family {' or '.join(others)}"
    if requested not in (None, family):
        raise InputError(f"--family {requested}: the model is {family}, {inferred_from}")
    return family, inferred_from


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_weights(reader: SafetensorsReader, tensors: Iterable[ModelTensor], model: ModelConfig) -> None:
    """Raises InputError unless the directory has exactly the tensors of the model; a tied output layer may be
    stored, too, if it equals the embedding."""
    reader.check(tensors, optional=(_HF_OUTPUT,) if model.tied else ())
    if model.tied and _HF_OUTPUT in reader:
        output, embedding = reader.read(_HF_OUTPUT), reader.read(_HF_EMBEDDING)
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise InputError(
                f"{_HF_OUTPUT}: differs from {_HF_EMBEDDING}, though config.json says tie_word_embeddings "
                "true"
            )


def _hf_files(source: Path, args: Namespace) -> Path:
    """Returns the directory with the tokenizer and config.json of a checkpoint's model: in the checkpoint, or
    that of its `--tokenizer-model`."""
    inside = source / HF_FILES
    tokenizer = getattr(args, "tokenizer_model", None)
    from_hf = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer" and tokenizer
    return Path(tokenizer) if from_hf and not inside.is_dir() else inside


def _check_tensors(reader: CheckpointReader, model: ModelConfig) -> list[ModelTensor]:
    """Returns the tensors of the model, with the keys that the checkpoint has for them.

    Embedding and output layer may have further rows, the padding of the vocabulary.

    Raises:
        InputError: the checkpoint has not exactly these tensors.
    """
    stored = {key: shape for key, shape in reader.tensors().items() if key.startswith(_MODEL_KEYS)}
    known = {key for tensor in model_tensors(model) for key in tensor.keys}
    tensors = [tensor.stored_in(stored) for tensor in model_tensors(model)]
    for tensor in tensors:
        if tensor.key not in stored:
            raise InputError(f"{tensor.key}: missing; the checkpoint's arguments say that the model has it")
        shape, dtype = stored[tensor.key]
        expected = tensor.global_shape
        is_vocab = tensor.key in (EMBEDDING.key, OUTPUT.key)
        is_padded = is_vocab and shape[0] > expected[0] and shape[1:] == expected[1:]
        if shape != expected and not is_padded:
            hint = " (tokens: --vocab-size)" if is_vocab else ""
            raise InputError(
                f"{tensor.key}: has shape {list(shape)}; its arguments say {list(expected)}{hint}"
            )
        if dtype not in DTYPES.values():
            raise InputError(f"{tensor.key}: is stored as {dtype}; must be one of {', '.join(DTYPES)}")
    for key in stored:
        if key not in known:
            raise InputError(f"{key}: no {model.family} model has it; the checkpoint cannot be converted")
    return tensors


def _hf_tensors(
    reader: CheckpointReader,
    tensors: Iterable[ModelTensor],
    model: ModelConfig,
    dtypes: dict[str, torch.dtype],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the Hugging Face tensors of a checkpoint, reading one layer of one Megatron tensor at a time.

    Args:
        dtypes: dtype to convert to, by Megatron's key.
    """
    for tensor in tensors:
        fused = reader.read(tensor.key, tensor.global_offset, tensor.local_shape).reshape(tensor.shape)
        dtype = dtypes[tensor.key]
        for name, values in zip(tensor.hf_shapes, tensor.fusion.split(fused, model)):
            converted = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if dtype != values.dtype and not torch.equal(converted.isfinite(), values.isfinite()):
                largest = torch.finfo(dtype).max
                raise InputError(
                    f"--dtype {_dtype_name(dtype)}: {name} has values beyond its maximum, {largest:g}; give "
                    "another"
                )
            yield name, converted


def left_out(directory: Path) -> list[str]:
    """Returns the names of the files and directories that a conversion of `directory` neither reads nor
    copies; hidden ones are not named."""
    used = {_CONFIG, *(path.name for glob in _WEIGHT_FILES for path in directory.glob(glob))}
    used |= {path.relative_to(directory).parts[0] for glob in _COPIED_FILES for path in directory.glob(glob)}
    return sorted(path.name for path in directory.glob("[!.]*") if path.name not in used)


def _write_json(path: Path, content: hf_config.Config) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _copy(source: Path, destination: Path, globs: Iterable[str]) -> None:
    destination.mkdir(exist_ok=True)
    for path in (path for glob in globs for path in source.glob(glob) if path.is_file()):
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
