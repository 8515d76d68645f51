"""Attention of a decoded token: over the small S2 cache, and dense over a cache of everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.cases import DTYPES, Case, Shape
from benchmarks.environment import code_hash
from benchmarks.exactness import visible_keys
from benchmarks.measure import Company, interleaved_times, summary
from megatron_s2 import S2Pattern
from megatron_s2.generation.attention import cached_attention
from megatron_s2.generation.cache import KVCache
from megatron_s2.kernels.compare import require_as_exact_as_plain, require_equal
from megatron_s2.kernels.reference import masked_attention

SHAPE = Shape(S2Pattern(2, 64, 8, 16), batch=1, heads=8, head_dim=64, dtype="float32")
_CODE = ("megatron_s2/generation/*.py", "benchmarks/decode.py")
_BLOCK = SHAPE.pattern.block_size  # tokens of a timed run: a window moves on once in each

_PYTORCH = 1e-5  # error of its own kernels: over so many keys they are less exact than plain float32


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=int,
        default=32768,
        metavar="N",
        help="tokens in the cache before the first decoded one (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs (default: %(default)s)")


class Decoding(ABC):
    """Attention of one token after another, behind a context.

    Args:
        k, v: `[1, tokens, kv_heads, head_dim]` of the context.
        tokens: that will be decoded.
    """

    sparse = False

    @abstractmethod
    def __init__(self, k: Tensor, v: Tensor, tokens: int): ...

    @abstractmethod
    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output `[1, 1, heads, head_dim]` of the next token, whose key and value stay."""

    @property
    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Of the cache: what is kept, and what memory is set aside."""


class SmallCache(Decoding):
    """S2: shard and window of each head."""

    sparse = True

    def __init__(self, k: Tensor, v: Tensor, tokens: int):
        _, context, _, head_dim = k.shape
        self._cache = KVCache(SHAPE.pattern, 1, head_dim, k.dtype, max_tokens=context + tokens)
        self._cache.append(k, v)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cached_attention(q, k, v, self._cache)

    @property
    def bytes(self) -> dict[str, int]:
        return {"kept": self._cache.bytes, "set_aside": self._cache.capacity_bytes}


class FullCache(Decoding):
    """Dense, through PyTorch's own grouped-query attention."""

    def __init__(self, k: Tensor, v: Tensor, tokens: int):
        self._length = k.shape[1]
        self._k, self._v = (F.pad(x.transpose(1, 2), (0, 0, 0, tokens)) for x in (k, v))

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._k[:, :, self._length], self._v[:, :, self._length] = k[:, 0], v[:, 0]
        self._length += 1
        out = self.attend(q.transpose(1, 2), self._k[:, :, : self._length], self._v[:, :, : self._length])
        return out.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    @property
    def bytes(self) -> dict[str, int]:
        kept = 2 * self._k[:, :, : self._length].numel() * self._k.element_size()
        return {"kept": kept, "set_aside": 2 * self._k.nbytes}


class GroupedFullCache(FullCache):
    """Dense, the query heads of a KV head as rows: keys are read once, as ours are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q[:, :, 0].unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, :, None]


IMPLEMENTATIONS: dict[str, type[Decoding]] = {
    "s2-cache": SmallCache,
    "sdpa": FullCache,
    "sdpa-grouped": GroupedFullCache,
}


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    for name in ("context", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be >= 1")
    shared = {**Case(SHAPE, args.context, "cpu").row(), "decode_code": code_hash(_CODE)}
    found = {row["implementation"] for row in stored if all(row.get(k) == v for k, v in shared.items())}
    if found < set(IMPLEMENTATIONS):
        yield from (shared | row for row in measure(args.context, args.repeats))


@torch.no_grad()
def measure(context: int, repeats: int) -> Iterator[Row]:
    """Checks all implementations, then times them in turns."""
    checked = {name: check(name, context) for name in IMPLEMENTATIONS}
    tokens = _BLOCK * (repeats + 1)
    inputs = _inputs(context + tokens)
    decodings = {name: _begun(name, inputs, context, tokens) for name in IMPLEMENTATIONS}
    places = dict.fromkeys(IMPLEMENTATIONS, context)

    def block(name: str) -> Iterator[None]:
        start = places[name]
        for position in range(start, start + _BLOCK):
            decodings[name].step(*(x[:, position : position + 1] for x in inputs))
        places[name] += _BLOCK
        yield

    with Company() as company:
        times = interleaved_times({name: partial(block, name) for name in IMPLEMENTATIONS}, repeats)
    for name, decoding in decodings.items():
        yield {
            "implementation": name,
            "checked_tokens": checked[name],
            "tokens_per_run": _BLOCK,
            "other_cpus": company.cpus,
            "seconds_per_token": summary(times[name][:, 0] / _BLOCK),
            "cache_bytes": decoding.bytes,
        }


def _inputs(tokens: int) -> tuple[Tensor, ...]:
    q, k, v, _ = Case(SHAPE, tokens, "cpu").inputs()
    return q.detach(), k.detach(), v.detach()


def _begun(name: str, inputs: tuple[Tensor, ...], context: int, tokens: int) -> Decoding:
    _, k, v = inputs
    return IMPLEMENTATIONS[name](k[:, :context], v[:, :context], tokens)


def check(name: str, context: int) -> int:
    """Compares a block of decoded tokens with plain masked attention in float64.

    Returns:
        How many tokens were compared.

    Raises:
        WrongResultError: an error of ours is larger than the house's rule allows, or one of PyTorch's is no
            rounding.
    """
    inputs = _inputs(context + _BLOCK)
    decoding = _begun(name, inputs, context, _BLOCK)
    rows = torch.arange(context, context + _BLOCK)
    got = torch.cat([decoding.step(*(x[:, row : row + 1] for x in inputs)) for row in rows.tolist()], 1)
    if decoding.sparse:
        visible = visible_keys(SHAPE.pattern, rows, context + _BLOCK)
    else:
        visible = (torch.arange(context + _BLOCK) <= rows[:, None]).expand(SHAPE.pattern.num_kv_heads, -1, -1)

    def plain(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in inputs)
        return masked_attention(q[:, rows], k, v, visible, SHAPE.head_dim**-0.5, None)[0]

    exact = {"out": plain(torch.float64)}
    try:
        if decoding.sparse:
            require_as_exact_as_plain({"out": got}, {"out": plain(DTYPES[SHAPE.dtype])}, exact)
        else:
            require_equal({"out": got}, exact, _PYTORCH)
    except AssertionError as error:
        raise WrongResultError(f"{name} at {context} tokens: {error}") from error
    return len(rows)


def table(rows: list[Row]) -> str:
    newest = {(row["seq_length"], row["implementation"]): row for row in rows}
    lines = [
        f"{'context':>8} {'':<13} {'us/token':>10} {'p20':>10} {'p80':>10} {'cache bytes':>12} {'of sdpa':>8}"
    ]
    for (context, name), row in sorted(newest.items()):
        times = [1e6 * row["seconds_per_token"][which] for which in ("median", "p20", "p80")]
        dense = newest[context, "sdpa"]
        share = row["seconds_per_token"]["median"] / dense["seconds_per_token"]["median"]
        shown = " ".join(f"{time:>10.1f}" for time in times)
        lines.append(f"{context:>8} {name:<13} {shown} {row['cache_bytes']['kept']:>12} {share:>8.3f}")
    return "\n".join(lines)


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Three numbers need no picture."""
    return []


BENCHMARK = Benchmark(
    name="decode", help=__doc__, add_arguments=add_arguments, run=run, table=table, plot=plot
)
