"""Prefill, decoding and the KV cache of a pretrained model: dense, as transformers runs it, and sparse."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import display, patterns
from benchmarks.benchmark import Benchmark, Row
from benchmarks.environment import code_hash
from benchmarks.measure import OtherLoad, summary
from benchmarks.options import require_positive
from benchmarks.results import newest_match
from megatron_s2.generation.decoding import GenerationRequest, GenerationResult, generate
from megatron_s2.pattern import S2Settings

DENSE = "dense, transformers"
_CODE = (
    "megatron_s2/hf.py",
    "megatron_s2/kv_cache/*.py",
    "megatron_s2/generation/decoding.py",
    "megatron_s2/generation/hugging_face.py",
    "benchmarks/generation.py",
)


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="a dense model: scripts/get_small_model.sh DIR")
    add("--data-path", required=True, metavar="PREFIX", help="text in the model's tokens")
    for flag, default, text in (
        ("--prompt", 8000, "tokens of the prompt"),
        ("--new-tokens", 65, "tokens to generate, the first of which prefill computes"),
        ("--repeats", 5, "timed runs"),
    ):
        add(flag, type=int, default=default, help=f"{text} (default: %(default)s)")
    add(
        "--pattern-files",
        type=Path,
        default=patterns.FILES,
        metavar="DIR",
        help="default: benchmarks/patterns",
    )
    add("--only", nargs="+", metavar="NAME", default=["uniform w8 v16 s1"], help="patterns beside dense")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields a row for dense and each pattern, measured side by side, unless all are stored."""
    from megatron_s2.generation.evaluation import windows
    from megatron_s2.generation.hugging_face import load_pretrained

    names = ("prompt", "new_tokens", "repeats")
    require_positive(**{name: getattr(args, name) for name in names})
    model = load_pretrained(args.hf, args.dtype)
    sizes = model.config.num_hidden_layers, model.config.num_key_value_heads
    known = patterns.named_patterns(*sizes, args.pattern_files)
    if unknown := set(args.only) - known.keys():
        raise ValueError(f"--only {min(unknown)}: must be one of {', '.join(known)}")
    chosen = {DENSE: None, **{name: known[name] for name in args.only}}
    setting = {name: getattr(args, name) for name in names[:-1]}
    setting |= {"model": args.hf.name, "dtype": args.dtype, "device": args.device}
    setting["generation_code"] = code_hash(_CODE)
    settings = {
        name: setting | {"pattern": name, "pattern_hash": patterns.pattern_hash(pattern)}
        for name, pattern in chosen.items()
    }
    if all(newest_match(stored, one) for one in settings.values()):
        return
    [text] = next(windows(args.data_path, args.prompt, 1, seed=0))
    request = GenerationRequest([text[:-1].tolist()], args.new_tokens)
    runs: dict[str, Callable[[], GenerationResult]] = {
        name: partial(_sparse, model, pattern, request) if pattern else partial(_dense, model, request)
        for name, pattern in chosen.items()
    }
    results: dict[str, list[GenerationResult]] = {name: [] for name in runs}
    with OtherLoad() as load:
        for repeat in range(-1, args.repeats):  # the first warms the process up
            for name, measure in runs.items():
                result = measure()
                if repeat >= 0:
                    results[name].append(result)
    for name, row in settings.items():
        done = results[name]
        yield row | {
            "prefill_seconds": summary(np.array([result.prefill_seconds for result in done])),
            "decode_seconds": summary(np.array([result.decode_seconds for result in done])),
            "decoded_tokens": done[0].decoded_tokens,
            "cache_bytes": done[0].kept_bytes,
            "other_cpus": load.cpus(),
        }


def _sparse(model, settings: S2Settings, request: GenerationRequest) -> GenerationResult:
    from megatron_s2.generation.hugging_face import HuggingFaceDecoder
    from megatron_s2.hf import set_pattern

    set_pattern(model, settings)
    return generate(HuggingFaceDecoder(model, request.first_batch, request.max_tokens), request)


@torch.no_grad()
def _dense(model, request: GenerationRequest) -> GenerationResult:
    """Returns what `generate` does, by the cache and the attention (SDPA) of transformers."""
    from transformers import DynamicCache

    from megatron_s2.hf import CACHE_ARGUMENT, set_pattern

    set_pattern(model, None)
    cache = DynamicCache(config=model.config)
    result = GenerationResult([[]])
    tokens, start = torch.tensor(request.prompts, device=model.device), time.perf_counter()
    for step in range(request.max_new_tokens):
        logits = model(tokens, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        result.rows[0].append(tokens.item())
        if step == 0:
            result.prefill_seconds, start = time.perf_counter() - start, time.perf_counter()
    result.decode_seconds = time.perf_counter() - start
    result.decoded_tokens = request.max_new_tokens - 1
    result.kept_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return result


_SETTING = ("model", "dtype", "device", "prompt", "new_tokens")
_COLUMNS = display.columns(
    ("", "prefill s", "p20", "p80", "ms/token", "p20", "p80", "cache MiB"), "<28 >9 >7 >7 >9 >7 >7 >9"
)


def table(rows: list[Row]) -> str:
    lines = []
    for newest in display.newest_rows(rows, _SETTING, ("pattern",), "prefill_seconds"):
        row = display.any_row(newest)
        lines.append(
            f"{row['model']}, {row['dtype']}, {row['device']}: a prompt of {row['prompt']} tokens, then "
            f"{row['new_tokens']} new ones"
        )
        lines += display.format_table(_COLUMNS, map(_cells, newest.values()))
        lines += display.load_notes(newest.values(), lambda row: row["pattern"])
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    per_token = 1e3 / row["decoded_tokens"]
    return [
        row["pattern"],
        *(f"{row['prefill_seconds'][name]:.2f}" for name in display.PERCENTILES),
        *(f"{per_token * row['decode_seconds'][name]:.1f}" for name in display.PERCENTILES),
        f"{row['cache_bytes'] / 2**20:.1f}",
    ]


BENCHMARK = Benchmark(name="generation", help=__doc__, add_arguments=add_arguments, run=run, table=table)
