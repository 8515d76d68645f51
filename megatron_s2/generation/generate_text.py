"""Loads a model and continues prompts: the body of `scripts/generate.py`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_s2.generation.decoding import (
    Decoder,
    GenerationRequest,
    GenerationResult,
    beyond_positions,
    generate,
)
from megatron_s2.generation.prompts import Prompt, excerpt, read_prompts
from megatron_s2.generation.sampling import Sampling
from megatron_s2.generation.text_codec import (
    TextCodec,
    TokenStreamer,
    hugging_face_codec,
    stop_tokens,
    token_id_codec,
)


def generate_text(args: Namespace) -> None:
    """Continues the prompts, and writes the text to stdout and statistics to stderr.

    Args:
        args: parsed arguments of `scripts/generate.py`.

    Raises:
        ValueError: bad input; the message starts with the flag.
    """
    prompts = _prompts(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    GenerationRequest([[0]], args.max_new_tokens)  # checks the flag before a model is loaded
    model = _hugging_face(args) if args.hf is not None else _megatron(args)
    ids = [_encode(prompt, model) for prompt in prompts]
    stop = frozenset() if args.ignore_eos else model.codec.stop
    request = GenerationRequest(ids, args.max_new_tokens, stop, sampling)
    for note in (model.note, beyond_positions(request.max_tokens, model.positions)):
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
    try:
        result = _write_continuations(model, request)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: must be less, or prompts fewer: there is not enough "
            f"memory for {len(ids)} x {request.max_tokens} tokens: {error}"
        ) from error
    print(statistics(result), file=sys.stderr)


def _write_continuations(model: _GenerationModel, request: GenerationRequest) -> GenerationResult:
    """Streams the continuation of a single prompt; writes those of a batch when all have ended."""
    codec, batch = model.codec, len(request.prompts)
    decoder = model.decoder_for(batch, request.max_tokens)
    if batch == 1:
        streamer = TokenStreamer(codec, _write)
        result = generate(decoder, request, on_token=lambda _, token: streamer.add(token))
        streamer.end()
        _write("\n")
        return result
    result = generate(decoder, request)
    for row, tokens in enumerate(result.rows):
        _write(f"[{row + 1}] {codec.decode(tokens)}\n")
    return result


def statistics(result: GenerationResult) -> str:
    """Returns the speed and the cache size of a generation, in three lines."""
    share = result.kept_bytes / result.dense_bytes if result.dense_bytes else 1.0
    return "\n".join(
        [
            f"prefill: {_rate(result.prompt_tokens, result.prefill_seconds)}",
            f"decode: {_rate(result.decoded_tokens, result.decode_seconds)}",
            f"cache: {result.kept_bytes} bytes, dense {result.dense_bytes} bytes ({share:.1%}), "
            f"allocated {result.capacity_bytes} bytes",
        ]
    )


def _rate(tokens: int, seconds: float) -> str:
    rate = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
    return f"{tokens} tokens in {seconds:.2f} s{rate}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
        note: a message for the user before generation; None for no message.
    """

    codec: TextCodec
    vocab_size: int
    positions: int
    decoder_for: Callable[[int, int], Decoder]
    note: str | None = None


def _hugging_face(args: Namespace) -> _GenerationModel:
    from megatron_s2.generation.hugging_face import HuggingFaceDecoder, load_pretrained

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
        partial(HuggingFaceDecoder, model),
    )


def _megatron(args: Namespace) -> _GenerationModel:
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: is not a directory")
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder

    loaded = load_gpt(
        args.load,
        args.tokenizer_model,
        needs_tokenizer=not args.token_ids,
        pattern_file=args.s2_pattern_file,
    )
    return _GenerationModel(
        loaded.codec,
        loaded.vocab_size,
        loaded.positions,
        partial(GPTDecoder, loaded.model, vocab_size=loaded.vocab_size),
        loaded.note,
    )
