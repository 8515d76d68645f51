"""Attention of a decoded token: over the small S2 cache, and dense over a cache of everything."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import display
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import DTYPES, SHAPES, Case, describe_shape
from benchmarks.environment import code_hash
from benchmarks.exactness import visible_keys
from benchmarks.measure import OtherLoad, interleaved_times, kernel_times, summary
from benchmarks.options import add_integers, require_positive
from benchmarks.results import newest_match
from megatron_s2.kernels.compare import require_as_exact_as_plain, require_equal
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.kv_cache.cache import KVCache, cache_bytes, dense_cache_bytes
from megatron_s2.kv_cache.cached_attention import cached_attention

DEFAULT_SHAPES = {"cpu": SHAPES["cpu"], "cuda": SHAPES["grouped"]}
DEFAULT_CONTEXTS = {"cpu": [32768], "cuda": [2**n for n in range(13, 18)]}
_CODE = ("megatron_s2/kv_cache/*.py", "benchmarks/decode.py")
# Fields of a row that a wrong implementation does not have.
_MEASURED = (
    *("checked_tokens", "tokens_per_run", "caches", "other_cpus", "seconds_per_token"),
    *("kernel_seconds_per_token", "cache_bytes", "closed_form_bytes"),
)
# Largest error of PyTorch's own kernels: over so many keys they are less exact than plain float32.
_PYTORCH_ERROR = 1e-5


def add_arguments(parser: ArgumentParser) -> None:
    text = (
        "tokens in the cache before the first decoded one (default: 32768; on cuda every power of two from "
    )
    text += "8192 to 131072)"
    add_integers(parser, "--context", "numbers of tokens, such as 8192,32768", text)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs (default: %(default)s)")


# Attention of one token after another, behind a context. An implementation is made from case, keys and
# values of the context `[1, context, kv_heads, head_dim]`, and the number of tokens to decode. `step` adds
# key and value of the next token to the cache, `[1, 1, kv_heads, head_dim]`, and returns its output `[1, 1,
# heads, head_dim]`. `bytes` has the size of the cache: bytes that are `kept`, and bytes of memory that are
# `set_aside`.


class SmallCache:
    """S2: a cache of each head's shard and window."""

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


class FullCache:
    """Dense, by PyTorch's own grouped-query attention."""

    sparse = False

    def __init__(self, case: Case, k: Tensor, v: Tensor, tokens: int):
        self._length = k.shape[1]
        self._k, self._v = (F.pad(x.transpose(1, 2), (0, 0, 0, tokens)) for x in (k, v))

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._k[:, :, self._length], self._v[:, :, self._length] = k[:, 0], v[:, 0]
        self._length += 1
        out = self.attend(q.transpose(1, 2), self._k[:, :, : self._length], self._v[:, :, : self._length])
        return out.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends to all keys; all tensors are `[1, heads, tokens, head_dim]`."""
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    @property
    def bytes(self) -> dict[str, int]:
        kept = 2 * self._k[:, :, : self._length].numel() * self._k.element_size()
        return {"kept": kept, "set_aside": 2 * self._k.nbytes}


class GroupedFullCache(FullCache):
    """Dense, with the query heads of a KV head as rows, so that keys are read once, as ours are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q[:, :, 0].unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, :, None]


IMPLEMENTATIONS = {"s2-cache": SmallCache, "sdpa": FullCache, "sdpa-grouped": GroupedFullCache}


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the rows of one context after another: all of a context unless all of them are stored."""
    contexts = args.context or DEFAULT_CONTEXTS[args.device]
    require_positive(context=min(contexts), repeats=args.repeats)
    rows = []
    for context in contexts:
        case = Case(DEFAULT_SHAPES[args.device], context, args.device)
        setting = {**case.row(), "decode_code": code_hash(_CODE)}
        known = [newest_match(stored, setting | {"implementation": name}) for name in IMPLEMENTATIONS]
        if all(known):
            rows += known
            continue
        for row in measure(case, args.repeats):
            rows.append(setting | row)
            yield rows[-1]
    require_none_wrong(rows)


@torch.no_grad()
def measure(case: Case, repeats: int) -> Iterator[Row]:
    """Checks all implementations, then times in turns those that are right, and yields the rows of all.

    One run decodes a block of tokens, so that the window moves on once in each. Times are those of the wall
    clock and include all that the host does to launch kernels. On CUDA the time in kernels is measured
    separately, and each token is decoded with `caches_beyond_l2` caches in turn: in a model, the caches of
    other layers are read in between.
    """
    checked, wrong = {}, {}
    for name in IMPLEMENTATIONS:
        try:
            checked[name] = check(name, case)
        except WrongResultError as error:
            wrong[name] = f"{WRONG}{error}"
    block, on_gpu = case.pattern.block_size, case.device == "cuda"
    tokens = block * (repeats + 1 + on_gpu)
    inputs = _inputs(case, tokens)
    caches = {}
    for name in checked:
        first = _start(name, case, inputs, tokens)
        count = caches_beyond_l2(first.bytes["kept"], case.device)
        caches[name] = [first, *(_start(name, case, inputs, tokens) for _ in range(count - 1))]
    positions = dict.fromkeys(IMPLEMENTATIONS, case.seq_length)

    def decode_block(name: str) -> None:
        start = positions[name]
        for position in range(start, start + block):
            for decoding in caches[name]:
                decoding.step(*(x[:, position : position + 1] for x in inputs))
        positions[name] += block

    def stage(name: str) -> Iterator[None]:
        decode_block(name)
        if on_gpu:
            torch.cuda.synchronize()
        yield

    with OtherLoad() as load:
        times = interleaved_times({name: partial(stage, name) for name in checked}, repeats)
    for name, decodings in caches.items():
        decoded, kernel_seconds = block * len(decodings), None
        if on_gpu:
            kernels = kernel_times(partial(decode_block, name), "cuda")
            kernel_seconds = sum(kernel["seconds"] for kernel in kernels) / decoded
        yield {
            "implementation": name,
            "not_measured": None,
            "checked_tokens": checked[name],
            "tokens_per_run": block,
            "caches": len(decodings),
            "other_cpus": load.cpus(),
            "seconds_per_token": summary(times[name][:, 0] / decoded),
            "kernel_seconds_per_token": kernel_seconds,
            "cache_bytes": decodings[0].bytes,
            "closed_form_bytes": closed_form_bytes(case, decodings[0].sparse, case.seq_length + tokens),
        }
    for name, reason in wrong.items():
        yield {"implementation": name, "not_measured": reason, **dict.fromkeys(_MEASURED)}


def caches_beyond_l2(cache_bytes: int, device: str) -> int:
    """Returns how many caches of a size to use in turn, so that a GPU's L2 cache holds none of them when its
    turn comes again."""
    if device != "cuda":
        return 1
    return -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // cache_bytes)


def closed_form_bytes(case: Case, sparse: bool, tokens: int) -> int:
    """Returns the bytes that a cache of so many tokens keeps, by formula."""
    head_dim, dtype = case.shape.head_dim, DTYPES[case.shape.dtype]
    if sparse:
        return cache_bytes(case.pattern, tokens, head_dim, dtype)
    return dense_cache_bytes(case.pattern.num_kv_heads, tokens, head_dim, dtype)


def _inputs(case: Case, tokens: int) -> tuple[Tensor, ...]:
    """Returns q, k and v of the context and of `tokens` tokens behind it."""
    q, k, v, _ = Case(case.shape, case.seq_length + tokens, case.device).inputs()
    return q.detach(), k.detach(), v.detach()


def _start(name: str, case: Case, inputs: tuple[Tensor, ...], tokens: int) -> SmallCache | FullCache:
    _, k, v = inputs
    context = case.seq_length
    return IMPLEMENTATIONS[name](case, k[:, :context], v[:, :context], tokens)


def check(name: str, case: Case) -> int:
    """Compares a block of decoded tokens with plain masked attention in float64 and returns their number.

    Raises:
        WrongResultError: an error is larger than `require_as_exact_as_plain` allows, or, of PyTorch in
            float32, larger than `_PYTORCH_ERROR`.
    """
    context, pattern, block = case.seq_length, case.pattern, case.pattern.block_size
    inputs = _inputs(case, block)
    decoding = _start(name, case, inputs, block)
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
            require_equal({"out": got}, exact, _PYTORCH_ERROR)
    except AssertionError as error:
        raise WrongResultError(f"{name} at {context} tokens: {error}") from error
    return len(rows)


# Tables and pictures.

_SETTING = ("device", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern")
_KEY = ("seq_length", "implementation")
_COLUMNS = display.columns(
    ("context", "", "us/token", "p20", "p80", "in kernels", "cache bytes", "of sdpa"),
    ">8 <13 >10 >10 >10 >10 >12 >8",
)
_STYLES = {
    "s2-cache": {"color": "#12355b", "marker": "o"},
    "sdpa": {"color": "#f28c28", "marker": "s"},
    "sdpa-grouped": {"color": "#3c9d6b", "marker": "^"},
}


def _describe(row: Row) -> str:
    return f"batch {row['batch']}, {describe_shape(row)}; {row['device']}"


def table(rows: list[Row]) -> str:
    lines = []
    for newest in display.newest_rows(rows, _SETTING, _KEY, "seconds_per_token"):
        cells = [[*key, *_cells(row, newest.get((key[0], "sdpa")))] for key, row in newest.items()]
        lines += [_describe(display.any_row(newest)), *display.format_table(_COLUMNS, cells)]
        if any((row.get("caches") or 1) > 1 for row in newest.values()):
            lines.append(
                "each token is decoded with several caches in turn, more than the GPU's L2 cache holds"
            )
    return "\n".join(lines)


def _cells(row: Row, dense: Row | None) -> list[str]:
    seconds = row["seconds_per_token"]
    if seconds is None:
        return [display.reason(row)]
    kernel_seconds = row.get("kernel_seconds_per_token")
    dense_seconds = display.median(dense, "seconds_per_token")
    share = seconds["median"] / dense_seconds if dense_seconds else None
    return [
        *(f"{1e6 * seconds[name]:.1f}" for name in display.PERCENTILES),
        display.cell(None if kernel_seconds is None else 1e6 * kernel_seconds, "{:.1f}"),
        str(row["cache_bytes"]["kept"]),
        display.cell(share, "{:.3f}"),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws time and size of the cache over the context, a picture for each shape with several contexts."""
    paths = []
    for newest in display.newest_rows(rows, _SETTING, _KEY, "seconds_per_token"):
        measured = [row for row in newest.values() if row["seconds_per_token"]]
        contexts = {row["seq_length"] for row in measured}
        if len(contexts) < 2:
            continue
        paths.append(display.picture_path(directory, "decode", len(paths)))
        title = f"{directory.name}\n{_describe(measured[0])}"
        with display.picture(paths[-1], (11, 4.2), (1, 2), title) as ((time, memory),):
            for name, style in _STYLES.items():
                curve = [row for row in measured if row["implementation"] == name]
                if not curve:
                    continue
                tokens = [row["seq_length"] for row in curve]
                seconds = [row["seconds_per_token"] for row in curve]
                display.plot_times(time, tokens, seconds, unit=1e-6, label=name, **style)
                memory.plot(
                    tokens, [row["cache_bytes"]["kept"] / 2**20 for row in curve], label=name, **style
                )
            time.set(ylabel="microseconds per token", yscale="log")
            memory.set(ylabel="MiB of keys and values", yscale="log")
            for axis in (time, memory):
                display.scale_by_length(axis, contexts, "tokens in the cache")
    return paths


BENCHMARK = Benchmark(
    name="decode", help=__doc__, add_arguments=add_arguments, run=run, table=table, plot=plot
)
