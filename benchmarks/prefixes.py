"""Prompts with a common prefix, prefilled once and forked or each by itself, in a model of random weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks import display
from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.environment import code_hash
from benchmarks.measure import OtherLoad, summary
from benchmarks.options import require_positive
from benchmarks.results import newest_match
from megatron_s2.generation.decoding import GenerationRequest, GenerationResult, generate
from megatron_s2.generation.prefill import LEAST_SHARED

S2 = {"block_size": 64, "local_blocks": 8, "vert_stride": 16, "sink_blocks": 1}
SHAPES = {
    "cpu": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 640},
    "cuda": {"hidden": 2048, "layers": 16, "heads": 16, "kv_heads": 8, "ffn": 5632},
}
VOCAB = 1024
# Fewest tokens that are shared: those that a user gets, and more than any prompt has.
IMPLEMENTATIONS = {"shared": LEAST_SHARED, "apart": 1 << 40}
_CODE = (
    "megatron_s2/kv_cache/*.py",
    "megatron_s2/generation/decoding.py",
    "megatron_s2/generation/prefill.py",
    "megatron_s2/generation/hugging_face.py",
    "benchmarks/prefixes.py",
)


def add_arguments(parser: ArgumentParser) -> None:
    for flag, default, text in (
        ("--prompts", 32, "number of prompts"),
        ("--prefix", 4096, "tokens that all prompts begin with"),
        ("--tail", 64, "further tokens of each prompt"),
        ("--new-tokens", 17, "tokens to generate per prompt, the first of which prefill computes"),
        ("--repeats", 3, "timed runs"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: %(default)s)")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields a row for each implementation unless both are stored."""
    names = ("prompts", "prefix", "tail", "new_tokens", "repeats")
    require_positive(**{name: getattr(args, name) for name in names})
    setting = {name: getattr(args, name) for name in names[:-1]}
    setting |= {"device": args.device, "dtype": "float32", **SHAPES[args.device], "s2": S2}
    setting["generation_code"] = code_hash(_CODE)
    if all(newest_match(stored, setting | {"implementation": name}) for name in IMPLEMENTATIONS):
        return
    decoders, texts = _decoders(SHAPES[args.device], args.device), _prompts(args)
    results: dict[str, list[GenerationResult]] = {name: [] for name in IMPLEMENTATIONS}
    _generate(decoders, [texts[0][: args.tail]] * 2, 2, LEAST_SHARED)  # warms the process up
    with OtherLoad() as load:
        for _ in range(args.repeats):
            for name, least in IMPLEMENTATIONS.items():
                results[name].append(_generate(decoders, texts, args.new_tokens, least))
    shared, apart = (runs[0].rows for runs in results.values())
    if different := [n for n, (a, b) in enumerate(zip(shared, apart)) if a != b]:
        raise WrongResultError(f"prompt {different[0]} is continued by other tokens if its prefix is shared")
    for name, runs in results.items():
        prefill, decode = (
            summary(np.array([getattr(x, f"{what}_seconds") for x in runs])) for what in ("prefill", "decode")
        )
        yield setting | {
            "implementation": name,
            "prompt_tokens": runs[0].prompt_tokens,
            "prefill_tokens": runs[0].prefill_tokens,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "kept_bytes": runs[0].kept_bytes,
            "capacity_bytes": runs[0].capacity_bytes,
            "other_cpus": load.cpus(),
        }


def _prompts(args: Namespace) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    prefix, *tails = (
        torch.randint(VOCAB, (length,), generator=draw).tolist()
        for length in (args.prefix, *[args.tail] * args.prompts)
    )
    return [prefix + tail for tail in tails]


def _decoders(shape: dict[str, int], device: str):
    """Returns a function that makes a decoder of one model, given a batch and a number of tokens."""
    # Imported here, because the runner of all benchmarks imports this file.
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_s2.generation.hugging_face import HuggingFaceDecoder
    from megatron_s2.hf import set_pattern
    from megatron_s2.pattern import S2Settings

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=1 << 20,
        initializer_range=0.1,  # large enough that rounding does not change greedy tokens
    )
    model = LlamaForCausalLM(config).to(device)
    set_pattern(model, S2Settings(num_layers=shape["layers"], num_kv_heads=shape["kv_heads"], **S2))
    return lambda batch, tokens: HuggingFaceDecoder(model, batch, tokens)


def _generate(decoders, texts: list[list[int]], tokens: int, least: int) -> GenerationResult:
    request = GenerationRequest(texts, tokens, least_shared=least)
    return generate(decoders(request.first_batch, request.max_tokens), request)


_SETTING = ("device", "dtype", "hidden", "layers", "heads", "kv_heads", "ffn", "s2")
_KEY = ("prompts", "prefix", "tail", "new_tokens", "implementation")
_COLUMNS = display.columns(
    ("prompts", "prefix", "tail", "", "tokens run", "prefill s", "p20", "p80", "ms/step", "cache MiB"),
    ">7 >6 >5 <7 >10 >9 >9 >9 >8 >9",
)


def table(rows: list[Row]) -> str:
    lines = []
    for newest in display.newest_rows(rows, _SETTING, _KEY, "prefill_seconds"):
        row = display.any_row(newest)
        lines.append(
            f"{row['layers']} layers of {row['hidden']}, {row['heads']}/{row['kv_heads']} heads, "
            f"{row['dtype']}; {row['device']}"
        )
        lines += display.format_table(_COLUMNS, map(_cells, newest.values()))
        lines += display.load_notes(newest.values(), lambda row: row["implementation"])
    return "\n".join(lines)


def _cells(row: Row) -> list[object]:
    steps = max(row["new_tokens"] - 1, 1)
    return [
        *(row[name] for name in ("prompts", "prefix", "tail", "implementation", "prefill_tokens")),
        *(f"{row['prefill_seconds'][name]:.2f}" for name in display.PERCENTILES),
        f"{1e3 * row['decode_seconds']['median'] / steps:.1f}",
        f"{row['kept_bytes'] / 2**20:.1f}",
    ]


BENCHMARK = Benchmark(name="prefixes", help=__doc__, add_arguments=add_arguments, run=run, table=table)
