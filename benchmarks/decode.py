"""Attention of a decoded token: over the small S2 cache, and dense over a cache of everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import decode_report
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import DTYPES, SHAPES, Case
from benchmarks.environment import code_hash
from benchmarks.exactness import visible_keys
from benchmarks.measure import Company, interleaved_times, kernel_times, summary
from megatron_s2.kernels.compare import require_as_exact_as_plain, require_equal
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.kv_cache.cache import KVCache, cache_bytes, dense_cache_bytes
from megatron_s2.kv_cache.cached_attention import cached_attention

DEFAULT_SHAPES = {"cpu": SHAPES["cpu"], "cuda": SHAPES["grouped"]}
DEFAULT_CONTEXTS = {"cpu": [32768], "cuda": [2**n for n in range(13, 18)]}
_CODE = ("megatron_s2/generation/*.py", "megatron_s2/kernels/triton_decode.py", "benchmarks/decode.py")

_PYTORCH = 1e-5  # error of its own kernels: over so many keys they are less exact than plain float32


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=_lengths,
        metavar="N,N,…",
        help="tokens in the cache before the first decoded one (default: 32768; on cuda every power of two "
        "from 8192 to 131072)",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs (default: %(default)s)")


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be numbers of tokens, such as 8192,32768") from None


class Decoding(ABC):
    """Attention of one token after another, behind a context.

    Args:
        case: shape, and the context's length and device.
        k, v: `[1, tokens, kv_heads, head_dim]` of the context.
        tokens: that will be decoded.
    """

    sparse = False

    @abstractmethod
    def __init__(self, case: Case, k: Tensor, v: Tensor, tokens: int): ...

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

    def __init__(self, case: Case, k: Tensor, v: Tensor, tokens: int):
        most = case.seq_length + tokens
        self._cache = KVCache(case.pattern, 1, case.shape.head_dim, k.dtype, k.device, max_tokens=most)
        self._cache.append(k, v)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cached_attention(q, k, v, self._cache)

    @property
    def bytes(self) -> dict[str, int]:
        return {"kept": self._cache.bytes, "set_aside": self._cache.capacity_bytes}


class FullCache(Decoding):
    """Dense, through PyTorch's own grouped-query attention."""

    def __init__(self, case: Case, k: Tensor, v: Tensor, tokens: int):
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
    """Rows of one context after the other; what is stored of some implementations only is measured again.

    Raises:
        WrongResultError: when all is measured, because an implementation was wrong.
    """
    contexts = args.context or DEFAULT_CONTEXTS[args.device]
    for name, least in (("context", min(contexts)), ("repeats", args.repeats)):
        if least < 1:
            raise ValueError(f"--{name} {least}: must be >= 1")
    found = []
    for context in contexts:
        case = Case(DEFAULT_SHAPES[args.device], context, args.device)
        shared = {**case.row(), "decode_code": code_hash(_CODE)}
        of_it = {row["implementation"]: row for row in stored if shared.items() <= row.items()}
        if of_it.keys() < set(IMPLEMENTATIONS):
            of_it = {}
            for row in measure(case, args.repeats):
                of_it[row["implementation"]] = shared | row
                yield shared | row
        found += of_it.values()
    require_none_wrong(found)


@torch.no_grad()
def measure(case: Case, repeats: int) -> Iterator[Row]:
    """Checks all implementations, then times them in turns, but for those that are wrong.

    A run is a block of tokens, so that a window moves on once in each. Times are those of the wall, with all
    that the host does to launch kernels; on CUDA the seconds in which kernels ran are told apart, and a token
    is decoded with each of `caches_beyond_l2` caches in turn: in a model those of other layers come between.
    """
    checked, wrong = {}, {}
    for name in IMPLEMENTATIONS:
        try:
            checked[name] = check(name, case)
        except WrongResultError as error:
            wrong[name] = f"{WRONG}{error}"
    block = case.pattern.block_size
    tokens = block * (repeats + 1 + (case.device == "cuda"))
    inputs = _inputs(case, tokens)
    decodings = {}
    for name in checked:
        first = _begun(name, case, inputs, tokens)
        more = caches_beyond_l2(first.bytes["kept"], case.device) - 1
        decodings[name] = [first, *(_begun(name, case, inputs, tokens) for _ in range(more))]
    places = dict.fromkeys(IMPLEMENTATIONS, case.seq_length)

    def decode_block(name: str) -> None:
        start = places[name]
        for position in range(start, start + block):
            for decoding in decodings[name]:
                decoding.step(*(x[:, position : position + 1] for x in inputs))
        places[name] += block

    def timed(name: str) -> Iterator[None]:
        decode_block(name)
        if case.device == "cuda":
            torch.cuda.synchronize()
        yield

    with Company() as company:
        times = interleaved_times({name: partial(timed, name) for name in checked}, repeats)
    for name, caches in decodings.items():
        decoding, kernels, decoded = caches[0], None, block * len(caches)
        if case.device == "cuda":
            found = kernel_times(partial(decode_block, name), "cuda")
            kernels = sum(kernel["seconds"] for kernel in found) / decoded
        yield {
            "implementation": name,
            "not_measured": None,
            "checked_tokens": checked[name],
            "tokens_per_run": block,
            "caches": len(caches),
            "other_cpus": company.cpus,
            "seconds_per_token": summary(times[name][:, 0] / decoded),
            "kernel_seconds_per_token": kernels,
            "cache_bytes": decoding.bytes,
            "closed_form_bytes": closed_form_bytes(case, decoding.sparse, case.seq_length + tokens),
        }
    for name, reason in wrong.items():
        unknown = ("checked_tokens", "tokens_per_run", "caches", "other_cpus", "seconds_per_token")
        unknown += ("kernel_seconds_per_token", "cache_bytes", "closed_form_bytes")
        yield {"implementation": name, "not_measured": reason, **dict.fromkeys(unknown)}


def caches_beyond_l2(bytes_of_one: int, device: str) -> int:
    """How many caches it takes for a GPU's L2 cache to hold none when its turn comes again."""
    if device != "cuda":
        return 1
    return -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_of_one)


def closed_form_bytes(case: Case, sparse: bool, tokens: int) -> int:
    """What a cache of so many tokens keeps, by formula."""
    head_dim, dtype = case.shape.head_dim, DTYPES[case.shape.dtype]
    if sparse:
        return cache_bytes(case.pattern, tokens, head_dim, dtype)
    return dense_cache_bytes(case.pattern.num_kv_heads, tokens, head_dim, dtype)


def _inputs(case: Case, tokens: int) -> tuple[Tensor, ...]:
    """Of the context and so many tokens behind it."""
    q, k, v, _ = Case(case.shape, case.seq_length + tokens, case.device).inputs()
    return q.detach(), k.detach(), v.detach()


def _begun(name: str, case: Case, inputs: tuple[Tensor, ...], tokens: int) -> Decoding:
    _, k, v = inputs
    context = case.seq_length
    return IMPLEMENTATIONS[name](case, k[:, :context], v[:, :context], tokens)


def check(name: str, case: Case) -> int:
    """Compares a block of decoded tokens with plain masked attention in float64.

    Returns:
        How many tokens were compared.

    Raises:
        WrongResultError: an error of ours is larger than the house's rule allows, or one of PyTorch's is no
            rounding.
    """
    context, pattern, block = case.seq_length, case.pattern, case.pattern.block_size
    inputs = _inputs(case, block)
    decoding = _begun(name, case, inputs, block)
    rows = torch.arange(context, context + block)
    got = torch.cat([decoding.step(*(x[:, row : row + 1] for x in inputs)) for row in rows.tolist()], 1)
    if decoding.sparse:
        visible = visible_keys(pattern, rows, context + block)
    else:
        visible = (torch.arange(context + block) <= rows[:, None]).expand(pattern.num_kv_heads, -1, -1)
    visible = visible.to(case.device)

    def plain(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in inputs)
        return masked_attention(q[:, rows], k, v, visible, case.shape.head_dim**-0.5, None)[0]

    exact, dtype = {"out": plain(torch.float64)}, DTYPES[case.shape.dtype]
    try:
        if decoding.sparse or dtype != torch.float32:
            require_as_exact_as_plain({"out": got}, {"out": plain(dtype)}, exact)
        else:
            require_equal({"out": got}, exact, _PYTORCH)
    except AssertionError as error:
        raise WrongResultError(f"{name} at {context} tokens: {error}") from error
    return len(rows)


BENCHMARK = Benchmark(
    name="decode",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=decode_report.table,
    plot=decode_report.plot,
    takes_device=True,
)
