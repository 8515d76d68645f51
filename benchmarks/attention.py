"""S2 attention against dense causal attention: forward and backward on the same inputs."""

from __future__ import annotations

import dataclasses
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.measure import interleaved_times, peak_memory, summary
from megatron_s2 import S2Pattern, s2_attention
from megatron_s2.kernels.compare import require_as_exact_as_plain
from megatron_s2.kernels.reference import masked_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward+backward")
BASELINE = "sdpa"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Shape and pattern of one attention call."""

    pattern: S2Pattern
    seq_length: int
    batch: int
    heads: int
    head_dim: int
    dtype: str

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, `[batch, seq, heads, head_dim]`, from a fixed seed."""
        draw = torch.Generator().manual_seed(0)
        H = self.heads
        q, k, v, dout = (
            torch.randn(self.batch, self.seq_length, heads, self.head_dim, generator=draw).to(
                DTYPES[self.dtype]
            )
            for heads in (H, self.pattern.num_kv_heads, self.pattern.num_kv_heads, H)
        )
        return *(x.requires_grad_() for x in (q, k, v)), dout

    def input_bytes(self) -> int:
        tokens = self.batch * self.seq_length * 2 * (self.heads + self.pattern.num_kv_heads)
        return tokens * self.head_dim * DTYPES[self.dtype].itemsize

    def flops(self, pattern: S2Pattern) -> dict[str, int]:
        """By pass, on visible pairs only."""
        forward, backward = pattern.flops(self.seq_length, self.heads, self.head_dim)
        return dict(zip(PASSES, (self.batch * forward, self.batch * (forward + backward))))

    def row(self) -> Row:
        p = self.pattern
        return {
            "seq_length": self.seq_length,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": p.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "pattern": {
                "block_size": p.block_size,
                "local_blocks": p.local_blocks,
                "vert_stride": p.strides,
                "phases": p.head_phases,
                "sink_blocks": p.sink_blocks,
            },
        }


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention.

    Args:
        name: as in rows.
        sparse: sees what the case's pattern shows, otherwise the whole past.
        prepare: `prepare(case)` does what is needed once per shape and returns the attention. Timed apart.
    """

    name: str
    sparse: bool
    prepare: Callable[[Case], Attention]

    def pattern(self, case: Case) -> S2Pattern:
        """What this implementation claims to compute."""
        return case.pattern if self.sparse else dataclasses.replace(case.pattern, vert_stride=1, phases=None)


def _s2_torch(case: Case) -> Attention:
    return partial(s2_attention, pattern=case.pattern, return_lse=False, backend="torch")


def _sdpa(case: Case) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attention


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("s2-torch", sparse=True, prepare=_s2_torch),
        Implementation(BASELINE, sparse=False, prepare=_sdpa),
    )
}


def check(implementation: Implementation, case: Case, queries: int = 32) -> None:
    """Compares output and gradients with plain masked attention in float64, at the very size that is timed.

    For some queries only, so that it stays affordable: their output, and all gradients when the loss
    depends on these queries alone.

    Raises:
        WrongResultError: an error is larger than the house's rule allows.
    """
    q, k, v, dout = case.inputs()
    # Not the first query: it sees one key, so its exact gradient is 0 and all else is rounding.
    rows = torch.linspace(0, case.seq_length - 1, queries + 1)[1:].round().long().unique()
    visible = visible_keys(implementation.pattern(case), rows, case.seq_length)
    attention = implementation.prepare(case)

    def results(attend: Attention, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, dout[:, rows].to(dtype))
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q[:, rows], k, v, visible, case.head_dim**-0.5, None)[0]

    try:
        require_as_exact_as_plain(
            got=results(lambda q, k, v: attention(q, k, v)[:, rows], q.dtype),
            plain=results(plain, q.dtype),
            exact=results(plain, torch.float64),
        )
    except AssertionError as error:
        raise WrongResultError(f"{implementation.name} at {case.seq_length} tokens: {error}") from error


def visible_keys(pattern: S2Pattern, rows: Tensor, seq_length: int) -> Tensor:
    """Bool `[kv_heads, rows, seq_length]`: the keys that some queries see."""
    B = pattern.block_size
    blocks = torch.zeros(pattern.num_kv_heads, len(rows), pattern.num_blocks(seq_length), dtype=torch.bool)
    for g in range(pattern.num_kv_heads):
        for n, row in enumerate(rows.tolist()):
            blocks[g, n, pattern.row_blocks(g, row // B)] = True
    return blocks.repeat_interleave(B, 2)[..., :seq_length] & (torch.arange(seq_length) <= rows[:, None])


def time_together(
    implementations: list[Implementation], case: Case, repeats: int
) -> tuple[dict[str, dict[str, dict]], dict[str, float]]:
    """Times by implementation and pass, taken in turns, and seconds of set-up by implementation."""
    *inputs, dout = case.inputs()
    attentions, setup = {}, {}
    for implementation in implementations:
        start = time.perf_counter()
        attentions[implementation.name] = implementation.prepare(case)
        setup[implementation.name] = time.perf_counter() - start

    def run(attention: Attention) -> Iterator[None]:
        out = attention(*inputs)
        yield
        torch.autograd.grad(out, inputs, dout)
        yield

    times = interleaved_times({name: partial(run, a) for name, a in attentions.items()}, repeats)
    by_pass = {name: dict(zip(PASSES, map(summary, seconds.T))) for name, seconds in times.items()}
    return by_pass, setup


def prepare_for_memory(arguments: tuple[str, Case, int]) -> Callable[[], object]:
    """Forward and backward of one implementation, its code loaded and its inputs allocated."""
    name, case, threads = arguments
    torch.set_num_threads(threads)

    def forward_and_backward(case: Case) -> Callable[[], object]:
        attention = IMPLEMENTATIONS[name].prepare(case)
        *inputs, dout = case.inputs()
        return lambda: torch.autograd.grad(attention(*inputs), inputs, dout)

    p = case.pattern
    all_code = (p.local_blocks + max(p.strides) + 1) * p.block_size  # tokens at which shards are seen
    forward_and_backward(dataclasses.replace(case, seq_length=min(all_code, case.seq_length)))()
    return forward_and_backward(case)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--seq-length", type=int, nargs="+", default=[4096, 16384], help="tokens (default: 4096 16384)"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--block-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--local-blocks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--vert-stride", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--sink-blocks", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument(
        "--dense-up-to",
        type=int,
        metavar="TOKENS",
        help="leave dense attention out, as not measured, beyond this length",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")


def cases(args: Namespace) -> list[Case]:
    pattern = S2Pattern(
        args.kv_heads, args.block_size, args.local_blocks, args.vert_stride, sink_blocks=args.sink_blocks
    )
    for name in ("batch", "head_dim", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be >= 1")
    if args.heads < 1 or args.heads % args.kv_heads:
        raise ValueError(f"--heads {args.heads}: must be a multiple of --kv-heads {args.kv_heads}")
    if min(args.seq_length) < 1:
        raise ValueError(f"--seq-length {min(args.seq_length)}: must be >= 1")
    return [
        Case(pattern, seq_length, args.batch, args.heads, args.head_dim, args.dtype)
        for seq_length in args.seq_length
    ]


def run(args: Namespace) -> Iterator[Row]:
    for case in cases(args):
        implementations = [
            implementation
            for implementation in map(IMPLEMENTATIONS.get, args.implementations)
            if implementation.sparse or args.dense_up_to is None or case.seq_length <= args.dense_up_to
        ]
        for implementation in implementations:
            check(implementation, case)
        times, setup = time_together(implementations, case, args.repeats)
        dense = case.flops(IMPLEMENTATIONS[BASELINE].pattern(case))
        for implementation in implementations:
            flops = case.flops(implementation.pattern(case))
            peak = peak_memory(prepare_for_memory, (implementation.name, case, torch.get_num_threads()))
            for which in PASSES:
                yield {
                    "implementation": implementation.name,
                    "pass": which,
                    **case.row(),
                    "seconds": times[implementation.name][which],
                    "setup_seconds": setup[implementation.name],
                    "flops": flops[which],
                    "dense_flops": dense[which],
                    "speedup_bound": dense[which] / flops[which],
                    "input_bytes": case.input_bytes(),
                    "peak_bytes_above_inputs": None if which == "forward" else peak,
                }


# Reports, from rows alone.


def _shape(row: Row) -> str:
    """What must be equal for two rows to be compared, but for length and pass."""
    p = row["pattern"]
    strides = sorted(set(p["vert_stride"]))
    return (
        f"batch {row['batch']}, heads {row['heads']}, KV heads {row['kv_heads']}, "
        f"head_dim {row['head_dim']}, {row['dtype']}; block {p['block_size']}, window {p['local_blocks']}, "
        f"stride {' '.join(map(str, strides))}, sinks {p['sink_blocks']}"
    )


def _latest(rows: list[Row]) -> dict[str, dict[tuple[str, int, str], Row]]:
    """The newest row of each (pass, length, implementation), by shape."""
    shapes: dict[str, dict] = {}
    for row in rows:
        shapes.setdefault(_shape(row), {})[row["pass"], row["seq_length"], row["implementation"]] = row
    return shapes


def table(rows: list[Row]) -> str:
    lines = []
    for shape, newest in _latest(rows).items():
        lines += [
            shape,
            f"{'pass':<17} {'tokens':>8} {'':<10} {'median':>10} {'p20':>10} {'p80':>10} {'GFLOP/s':>8} "
            f"{'speed-up':>8} {'bound':>6} {'peak':>9}",
        ]
        lengths = sorted({(which, tokens) for which, tokens, _ in newest})
        for which, tokens in lengths:
            baseline = newest.get((which, tokens, BASELINE))
            for name in IMPLEMENTATIONS:
                row = newest.get((which, tokens, name))
                lines.append(f"{which:<17} {tokens:>8} {name:<10} {_cells(row, baseline)}")
    return "\n".join(lines)


def _cells(row: Row | None, baseline: Row | None) -> str:
    if row is None:
        return "not measured"
    seconds = row["seconds"]
    times = " ".join(f"{seconds[key] * 1e3:>7.1f} ms" for key in ("median", "p20", "p80"))
    speedup = f"{baseline['seconds']['median'] / seconds['median']:.2f}" if baseline else "-"
    peak = row["peak_bytes_above_inputs"]
    memory = "-" if peak is None else f"{(row['input_bytes'] + peak) / 2**20:.0f} MiB"
    rate = row["flops"] / seconds["median"] / 1e9
    return f"{times} {rate:>8.1f} {speedup:>8} {row['speedup_bound']:>6.2f} {memory:>9}"


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Time and speed-up over the length, one picture for each shape; the bound is that of the FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for number, (shape, newest) in enumerate(_latest(rows).items(), 1):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for which, style in zip(PASSES, ("--", "-")):
            for color, name in enumerate(IMPLEMENTATIONS):
                curve = sorted((t, row) for (w, t, n), row in newest.items() if (w, n) == (which, name))
                if not curve:
                    continue
                tokens = [t for t, _ in curve]
                median, p20, p80 = (
                    [row["seconds"][key] for _, row in curve] for key in ("median", "p20", "p80")
                )
                label, look = f"{name} {which}", {"color": f"C{color}", "linestyle": style}
                axes[0].plot(tokens, median, marker="o", label=label, **look)
                axes[0].fill_between(tokens, p20, p80, color=f"C{color}", alpha=0.2)
                pairs = [(t, row, newest.get((which, t, BASELINE))) for t, row in curve]
                pairs = [(t, row, base) for t, row, base in pairs if base is not None and name != BASELINE]
                if pairs:
                    speedups = [
                        base["seconds"]["median"] / row["seconds"]["median"] for _, row, base in pairs
                    ]
                    axes[1].plot([t for t, *_ in pairs], speedups, marker="o", label=label, **look)
        sparse = {t: row["speedup_bound"] for (_, t, n), row in newest.items() if n != BASELINE}
        axes[1].plot(*zip(*sorted(sparse.items())), color="gray", linestyle=":", label="bound of the FLOPs")
        axes[0].set(yscale="log", xlabel="tokens", ylabel="seconds")
        axes[1].set(xlabel="tokens", ylabel=f"speed-up over {BASELINE}", ylim=(0, None))
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"{directory.name}: {shape}", fontsize=9)
        paths.append(directory / f"attention-{number}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


BENCHMARK = Benchmark("attention", __doc__, add_arguments, run, table, plot)
