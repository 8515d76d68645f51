"""Loads a model and continues prompts: the body of `scripts/generate.py`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch.distributed import ProcessGroup, group

from megatron_s2.generation.decoding import (
    Decoder,
    GenerationRequest,
    GenerationResult,
    beyond_positions,
    generate,
)
from megatron_s2.generation.prompts import Prompt, excerpt, read_prompts
from megatron_s2.generation.ranks import RankLayout, join_ranks, launched_ranks
from megatron_s2.generation.sampling import Sampling
from megatron_s2.generation.text_codec import (
    TextCodec,
    TokenStreamer,
    hugging_face_codec,
    stop_tokens,
    token_id_codec,
)
from megatron_s2.training.environment import rank


def generate_text(args: Namespace) -> None:
    """Continues the prompts; rank 0 writes the text to stdout and statistics to stderr.

    Args:
        args: parsed arguments of `scripts/generate.py`.

    Raises:
        ValueError: bad input; the message starts with the flag.
    """
    prompts = _prompts(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    GenerationRequest([[0]], args.max_new_tokens)  # checks the flag before a model is loaded
    layout = RankLayout(args.tensor_model_parallel_size, args.context_parallel_size)
    layout.require_ranks(launched_ranks())
    model = (_hugging_face if args.hf is not None else _megatron)(args, layout)
    ids = [_encode(prompt, model) for prompt in prompts]
    stop = frozenset() if args.ignore_eos else model.codec.stop
    request = GenerationRequest(ids, args.max_new_tokens, stop, sampling)
    for note in (model.note, beyond_positions(request.max_tokens, model.positions)):
        if note is not None:
            _write(f"note: {note}\n", sys.stderr)
    try:
        result = _write_continuations(model, request)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: must be less, or prompts fewer: there is not enough "
            f"memory for {len(ids)} x {request.max_tokens} tokens: {error}"
        ) from error
    _write(f"{statistics(result, layout.ranks)}\n", sys.stderr)


def _write_continuations(model: _GenerationModel, request: GenerationRequest) -> GenerationResult:
    """Streams the continuation of a single prompt; writes those of a batch when all have ended."""
    codec, batch = model.codec, len(request.prompts)
    decoder = model.decoder_for(request.first_batch, request.max_tokens)
    if batch == 1:
        streamer = TokenStreamer(codec, _write)
        result = generate(decoder, request, lambda _, token: streamer.add(token), model.ranks)
        streamer.end()
        _write("\n")
        return result
    result = generate(decoder, request, ranks=model.ranks)
    for row, tokens in enumerate(result.rows):
        _write(f"[{row + 1}] {codec.decode(tokens)}\n")
    return result


def statistics(result: GenerationResult, ranks: int = 1) -> str:
    """Returns the speed of a generation and the size of the cache of this rank, in three lines."""
    share = result.kept_bytes / result.dense_bytes if result.dense_bytes else 1.0
    shared = result.prompt_tokens - result.prefill_tokens
    once = f"; {result.prefill_tokens} ran through the model, {shared} are shared" if shared else ""
    of_rank = f" of rank {rank()}" if ranks > 1 else ""
    return "\n".join(
        [
            f"prefill: {_rate(result.prompt_tokens, result.prefill_seconds)}{once}",
            f"decode: {_rate(result.decoded_tokens, result.decode_seconds)}",
            f"cache{of_rank}: {result.kept_bytes} bytes, dense {result.dense_bytes} bytes ({share:.1%}), "
            f"allocated {result.capacity_bytes} bytes",
        ]
    )


def _rate(tokens: int, seconds: float) -> str:
    rate = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
    return f"{tokens} tokens in {seconds:.2f} s{rate}"


def _write(text: str, file: TextIO | None = None) -> None:
    """Writes to stdout, or to `file`, on rank 0 alone."""
    if rank() == 0:
        print(text, end="", file=file, flush=True)


def _prompts(args: Namespace) -> list[Prompt]:
    """Returns the prompts of all flags, in their order."""
    if args.prompt is not None:
        return [Prompt(text, f"--prompt {excerpt(text)}") for text in args.prompt]
    return [prompt for path in args.prompt_file for prompt in read_prompts(Path(path))]


def _encode(prompt: Prompt, model: _GenerationModel) -> list[int]:
    try:
        tokens = model.codec.encode(prompt.text)
    except ValueError as error:
        raise ValueError(f"{prompt.source}: {error}") from error
    if not tokens:
        raise ValueError(f"{prompt.source}: must have at least one token")
    if bad := [token for token in tokens if not 0 <= token < model.vocab_size]:
        raise ValueError(
            f"{prompt.source}: token {bad[0]} is not in the model's vocabulary of {model.vocab_size}"
        )
    return tokens


@dataclass(frozen=True)
class _GenerationModel:
    """A loaded model that can generate.

    Args:
        vocab_size: number of tokens of the model.
        positions: number of positions that the model was made for.
        decoder_for: returns a decoder for a batch size and a number of tokens per sequence.
        ranks: ranks that generate together; None for one.
        note: a message for the user before generation; None for no message.
    """

    codec: TextCodec
    vocab_size: int
    positions: int
    decoder_for: Callable[[int, int], Decoder]
    ranks: ProcessGroup | None = None
    note: str | None = None


def _hugging_face(args: Namespace, layout: RankLayout) -> _GenerationModel:
    if layout.tensor > 1:
        raise ValueError(
            f"--tensor-model-parallel-size {layout.tensor}: must be 1 with --hf; convert the model "
            "(scripts/convert_checkpoint.py hf-to-megatron) and give --load"
        )
    from megatron_s2.generation.hugging_face import HuggingFaceDecoder, load_pretrained
    from megatron_s2.parallel.collectives import ContextParallelGroup

    ranks = join_ranks() if layout.context > 1 else None
    model = load_pretrained(args.hf, needs_s2=True, pattern_file=args.s2_pattern_file)
    stop = stop_tokens(args.hf)
    if args.token_ids:
        codec = token_id_codec(stop)
    else:
        codec = hugging_face_codec(Path(args.tokenizer_model or args.hf), stop)
    return _GenerationModel(
        codec,
        model.config.vocab_size,
        model.config.max_position_embeddings,
        partial(HuggingFaceDecoder, model, context=None if ranks is None else ContextParallelGroup(ranks)),
        ranks,
    )


def _megatron(args: Namespace, layout: RankLayout) -> _GenerationModel:
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: is not a directory")
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder

    loaded = load_gpt(
        args.load,
        args.tokenizer_model,
        needs_tokenizer=not args.token_ids,
        pattern_file=args.s2_pattern_file,
        layout=layout,
    )
    return _GenerationModel(
        loaded.codec,
        loaded.vocab_size,
        loaded.positions,
        partial(GPTDecoder, loaded.model, vocab_size=loaded.vocab_size, context=loaded.context),
        group.WORLD if layout.ranks > 1 else None,
        loaded.note,
    )
