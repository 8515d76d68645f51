"""What `scripts/generate.py` does with its arguments."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_s2.generation.decoding import Decoder, Generation, Request, beyond_positions, generate
from megatron_s2.generation.sampling import Sampling
from megatron_s2.generation.text import Stream, Text, hugging_face_text, stop_tokens, token_ids


def run(args: Namespace) -> None:
    """Loads a model, continues the prompts, writes the text to stdout and what it took to stderr.

    Raises:
        ValueError: bad input; the message starts with the flag.
    """
    prompts = _prompts(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    Request([[0]], args.max_new_tokens)  # before a model is loaded
    model = _hugging_face(args) if args.hf is not None else _megatron(args)
    ids = [model.text.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids):
        if bad := [token for token in tokens if not 0 <= token < model.vocab_size]:
            raise ValueError(
                f"--prompt {prompt[:40]!r}: token {bad[0]} is none of the model's {model.vocab_size}"
            )
    stop = frozenset() if args.ignore_eos else model.text.stop
    request = Request(ids, args.max_new_tokens, stop, sampling)
    for note in (model.note, beyond_positions(request.max_tokens, model.positions)):
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
    try:
        done = _continued(model, request)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: must be less, or prompts fewer: the memory for "
            f"{len(ids)} x {request.max_tokens} tokens is not there: {error}"
        ) from error
    print(report(done), file=sys.stderr)


def _continued(model: _Model, request: Request) -> Generation:
    """Writes the continuations: of one prompt as they come, of several when all have ended."""
    text, batch = model.text, len(request.prompts)
    decoder = model.decoder_for(batch, request.max_tokens)
    if batch == 1:
        stream = Stream(text, _write)
        done = generate(decoder, request, on_token=lambda _, token: stream.add(token))
        stream.end()
        _write("\n")
        return done
    done = generate(decoder, request)
    for row, tokens in enumerate(done.rows):
        _write(f"[{row + 1}] {text.decode(tokens)}\n")
    return done


def report(done: Generation) -> str:
    """What a generation took, in three lines."""
    share = done.kept_bytes / done.dense_bytes if done.dense_bytes else 1.0
    return "\n".join(
        [
            f"prefill: {_rate(done.prompt_tokens, done.prefill_seconds)}",
            f"decode: {_rate(done.decoded_tokens, done.decode_seconds)}",
            f"cache: {done.kept_bytes} bytes, dense {done.dense_bytes} bytes ({share:.1%}), "
            f"set aside {done.capacity_bytes} bytes",
        ]
    )


def _rate(tokens: int, seconds: float) -> str:
    rate = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
    return f"{tokens} tokens in {seconds:.2f} s{rate}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompts(args: Namespace) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    path = Path(args.prompt_file)
    if not path.exists() or path.is_dir():
        raise ValueError(f"--prompt-file {path}: is no file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {path}: must be UTF-8: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {path}: has no prompts")
    return prompts


@dataclass(frozen=True)
class _Model:
    """A loaded model.

    Args:
        vocab_size: tokens that it knows.
        positions: that it knows.
        decoder_for: the decoder of a number of sequences and of tokens.
        note: what to know of it.
    """

    text: Text
    vocab_size: int
    positions: int
    decoder_for: Callable[[int, int], Decoder]
    note: str | None = None


def _hugging_face(args: Namespace) -> _Model:
    from megatron_s2.generation.hugging_face import HuggingFaceDecoder, load_pretrained

    model = load_pretrained(args.hf, needs_s2=True)
    stop = stop_tokens(args.hf)
    text = (
        token_ids(stop) if args.token_ids else hugging_face_text(Path(args.tokenizer_model or args.hf), stop)
    )
    config = model.config
    return _Model(text, config.vocab_size, config.max_position_embeddings, partial(HuggingFaceDecoder, model))


def _megatron(args: Namespace) -> _Model:
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: is no directory")
    from megatron_s2.generation.loading import load_gpt
    from megatron_s2.generation.megatron_model import GPTDecoder

    loaded = load_gpt(args.load, args.tokenizer_model, needs_tokenizer=not args.token_ids)
    return _Model(
        loaded.text,
        loaded.vocab_size,
        loaded.positions,
        partial(GPTDecoder, loaded.model, vocab_size=loaded.vocab_size),
        loaded.note,
    )
