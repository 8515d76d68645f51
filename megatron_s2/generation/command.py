"""What `scripts/generate.py` does with its arguments."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_s2.generation.decoding import Decoder, Generation, Request, generate
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
    text, vocab_size, decoder_for = _hugging_face(args) if args.hf is not None else _megatron(args)
    ids = [text.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids):
        if bad := [token for token in tokens if not 0 <= token < vocab_size]:
            raise ValueError(f"--prompt {prompt[:40]!r}: token {bad[0]} is none of the model's {vocab_size}")
    request = Request(ids, args.max_new_tokens, frozenset() if args.ignore_eos else text.stop, sampling)
    decoder = decoder_for(len(ids), request.max_tokens)
    if len(ids) == 1:
        stream = Stream(text, _write)
        done = generate(decoder, request, on_token=lambda _, token: stream.add(token))
        stream.end()
        _write("\n")
    else:
        done = generate(decoder, request)
        for row, tokens in enumerate(done.rows):
            _write(f"[{row + 1}] {text.decode(tokens)}\n")
    print(report(done), file=sys.stderr)


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
    if not path.is_file():
        raise ValueError(f"--prompt-file {path}: is no file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {path}: must be UTF-8: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {path}: has no prompts")
    return prompts


_Model = tuple[Text, int, Callable[[int, int], Decoder]]


def _hugging_face(args: Namespace) -> _Model:
    from megatron_s2.generation.hugging_face import HuggingFaceDecoder, load_pretrained

    model = load_pretrained(args.hf, needs_s2=True)
    stop = stop_tokens(args.hf)
    text = (
        token_ids(stop) if args.token_ids else hugging_face_text(Path(args.tokenizer_model or args.hf), stop)
    )
    return text, model.config.vocab_size, lambda batch, tokens: HuggingFaceDecoder(model, batch, tokens)


def _megatron(args: Namespace) -> _Model:
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: is no directory")
    from megatron_s2.generation.checkpoint import load_gpt
    from megatron_s2.generation.gpt import GPTDecoder

    loaded = load_gpt(args.load, args.tokenizer_model, needs_tokenizer=not args.token_ids)
    if loaded.note is not None:
        print(f"note: {loaded.note}", file=sys.stderr)
    return (
        loaded.text,
        loaded.vocab_size,
        lambda batch, tokens: GPTDecoder(loaded.model, batch, tokens, loaded.vocab_size),
    )
