"""S2 attention against dense causal attention and others: forward and backward on the same inputs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks import display
from benchmarks.attention_trial import Trial, measure_on_cpu, measure_on_cuda
from benchmarks.benchmark import Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import (
    DEFAULT_LENGTHS,
    DEFAULT_SHAPES,
    DTYPES,
    PASSES,
    SHAPES,
    Case,
    Shape,
    describe_shape,
    shape_name,
)
from benchmarks.implementations import DENSE, IMPLEMENTATIONS, names_on
from benchmarks.options import add_integers, add_names, require_positive
from megatron_s2.errors import flag_name

# Options that replace fields of a case's shape and of its pattern.
_SHAPE = ("batch", "heads", "head_dim", "dtype")
_PATTERN = {"kv_heads": "num_kv_heads"} | {
    name: name for name in ("block_size", "local_blocks", "vert_stride", "sink_blocks")
}


def add_arguments(parser: ArgumentParser) -> None:
    add_names(parser, "--cases", SHAPES, "shapes and patterns (default: cpu; on cuda grouped and dkernel)")
    text = "tokens (default: 4096,16384; on cuda every power of two from 4096 to 262144)"
    add_integers(parser, "--seq-lengths", "numbers of tokens, such as 4096,16384", text)
    add_names(parser, "--implementations", IMPLEMENTATIONS, "default: all that run on the device")
    text = "do not measure dense attention beyond this length"
    parser.add_argument("--dense-up-to", type=int, metavar="TOKENS", help=text)
    text = "numbers of other processes that compute meanwhile, such as 0,2; only on the cpu (default: 0)"
    add_integers(parser, "--busy-loops", "numbers of processes, such as 0,2", text, default=[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs, at least (default: %(default)s)")
    group = parser.add_argument_group("shape and pattern, in place of the case's")
    for name in (*_SHAPE, *_PATTERN):
        kind = {"choices": DTYPES} if name == "dtype" else {"type": int, "metavar": "N"}
        group.add_argument(flag_name(name), **kind)


def cases(args: Namespace) -> list[Case]:
    """Returns the cases to measure, in order, or raises ValueError if an option is out of range."""
    lengths = args.seq_lengths or DEFAULT_LENGTHS[args.device]
    counts = ("batch", "heads", "head_dim", "kv_heads", "repeats")
    require_positive(**_given(args, {name: name for name in counts}), seq_lengths=min(lengths))
    if min(args.busy_loops) < 0 or (any(args.busy_loops) and args.device != "cpu"):
        raise ValueError(f"--busy-loops {max(args.busy_loops, key=abs)}: must be >= 0, and 0 on cuda")
    shapes = [_shape(args, SHAPES[name]) for name in args.cases or DEFAULT_SHAPES[args.device]]
    return [
        Case(shape, length, args.device, busy_loops)
        for shape, busy_loops in product(dict.fromkeys(shapes), args.busy_loops)
        for length in lengths
    ]


def _given(args: Namespace, names: dict[str, str]) -> dict:
    """Returns the values of the given options, under other names."""
    return {other: x for name, other in names.items() if (x := getattr(args, name)) is not None}


def _shape(args: Namespace, shape: Shape) -> Shape:
    pattern = replace(shape.pattern, **_given(args, _PATTERN))
    shape = replace(shape, pattern=pattern, **_given(args, {name: name for name in _SHAPE}))
    if shape.heads % pattern.num_kv_heads:
        raise ValueError(f"--heads {shape.heads}: must be a multiple of --kv-heads {pattern.num_kv_heads}")
    return shape


def _implementations(args: Namespace) -> list[str]:
    available = names_on(args.device)
    names = args.implementations or available
    for name in names:
        if name not in available:
            raise ValueError(
                f"--implementations {name}: must be of {', '.join(available)} with --device {args.device}"
            )
    return [name for name in available if name in names]


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the rows of one case after another; on CUDA each pass of an implementation as soon as it ends.

    On the CPU, whose speed drifts, all implementations of a case are timed in turns, all of them if a row of
    one is missing. Failures and wrong results are stored and not repeated by the same code. A process that
    lost the GPU ends at once.
    """
    names, rows = _implementations(args), []
    for case in cases(args):
        for group in [names] if case.device == "cpu" else [[name] for name in names]:
            trials = [Trial(IMPLEMENTATIONS[name], case, args.dense_up_to) for name in group]
            known = [row for trial in trials for row in trial.stored(stored)]
            rows += known
            if len(known) == len(PASSES) * len(trials):
                continue
            if case.device == "cpu":
                new = measure_on_cpu(trials, case, args.repeats)
            else:
                missing = [name for name in PASSES if name not in {row["pass"] for row in known}]
                new = measure_on_cuda(trials[0], missing, args.repeats)
            for row in new:
                rows.append(row)
                yield row
            if any(trial.lost_gpu for trial in trials):
                raise WrongResultError(f"{trials[0].failure}; the same command continues after it")
    require_none_wrong(rows)


# Tables and pictures.

_SETTING = ("batch", "heads", "kv_heads", "head_dim", "dtype", "pattern", "busy_loops")
_KEY = ("pass", "seq_length", "implementation")
_COLUMNS = display.columns(
    ("pass", "tokens", "", "median", "p20", "p80", "GFLOP/s"), "<17 >8 <10 >12 >12 >12 >9"
)


def _settings(rows: list[Row]) -> list[display.Newest]:
    """Groups rows by setting; those from before there were busy loops had none."""
    return display.newest_rows([{"busy_loops": 0, **row} for row in rows], _SETTING, _KEY)


def _describe(row: Row) -> str:
    text = f"batch {row['batch']}, {describe_shape(row)}, sinks {row['pattern']['sink_blocks']}"
    return f"{text}; beside {row['busy_loops']} busy loops" if row["busy_loops"] else text


def _names(newest: display.Newest) -> list[str]:
    return [name for name in IMPLEMENTATIONS if any(key[2] == name for key in newest)]


def table(rows: list[Row]) -> str:
    lines = []
    for newest in _settings(rows):
        row, names = display.any_row(newest), _names(newest)
        baselines = [name for name in names if name in DENSE]
        columns = [
            *_COLUMNS,
            *((f"over {name}", ">15") for name in baselines),
            ("bound", ">6"),
            ("peak", ">10"),
        ]
        keys = [(*key, name) for key in sorted({key[:2] for key in newest}) for name in names]
        cells = [[*key, *_cells(newest, key, baselines)] for key in keys]
        name = shape_name(row)
        lines += [f"{name}: {_describe(row)}" if name else _describe(row)]
        lines += display.format_table(columns, cells)
    unasked = [row for row in rows if not row.get("busy_loops")]
    lines += display.load_notes(unasked, lambda row: f"{row['seq_length']} tokens, {row['date']}")
    return "\n".join(lines)


def _cells(newest: display.Newest, key: tuple[str, int, str], baselines: list[str]) -> list[str]:
    row = newest.get(key)
    seconds = display.median(row)
    if seconds is None:
        return [display.reason(row)]
    peak = row["peak_bytes_above_inputs"]
    return [
        *display.milliseconds(row["seconds"], 2),
        f"{row['flops'] / seconds / 1e9:.1f}",
        *(display.cell(display.speedup(row, newest.get((*key[:2], name))), "{:.2f}") for name in baselines),
        f"{row['speedup_bound']:.2f}",
        display.mebibytes(None if peak is None else row["input_bytes"] + peak),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws a picture for each shape: time and speed-up over the length, a line of panels for each pass.

    Dotted lines show what the pattern's FLOPs allow: the ratio of FLOPs, and the dense time divided by it.
    """
    paths, unnamed = [], 0
    for newest in _settings(rows):
        if not any(map(display.median, newest.values())):
            continue
        row = display.any_row(newest)
        name = shape_name(row)
        unnamed += name is None
        load = f"-busy-{row['busy_loops']}" if row["busy_loops"] else ""
        paths.append(directory / f"attention-{name or f'other-{unnamed}'}{load}.png")
        title = f"{directory.name}: {_describe(row)}"
        with display.picture(paths[-1], (11, 8), (2, 2), title, fontsize=10) as axes:
            for pass_name, (time, ratio) in zip(PASSES, axes):
                _draw_pass(newest, pass_name, time, ratio)
    return paths


def _draw_pass(newest: display.Newest, pass_name: str, time, ratio) -> None:
    """Draws the times of a pass on one axis, and the speed-ups over dense on another."""
    names = _names(newest)
    baseline = next((name for name in DENSE if name in names), None)
    rows = {key[1:]: row for key, row in newest.items() if key[0] == pass_name and row["seconds"]}
    if not rows:
        time.set_title(f"{pass_name}: not measured")
        return
    dense = {n: row for (n, name), row in rows.items() if name == baseline}
    for name in names:
        style = {"color": f"C{list(IMPLEMENTATIONS).index(name)}", "marker": "o", "label": name}
        curve = sorted((n, row) for (n, other), row in rows.items() if other == name)
        if not curve:
            time.plot([], [], color=style["color"], label=f"{name}: not measured")
            continue
        display.plot_times(time, [n for n, _ in curve], [row["seconds"] for _, row in curve], **style)
        ratios = display.speedup_curve(curve, dense)
        if ratios and name != baseline:
            ratio.plot(*zip(*ratios), **style)
    bounds = {n: row["speedup_bound"] for (n, name), row in rows.items() if IMPLEMENTATIONS[name].sparse}
    dotted = {"color": "gray", "linestyle": ":", "marker": "."}
    best = [(n, display.median(dense[n]) / bounds[n]) for n in sorted(bounds.keys() & dense.keys())]
    if best:
        time.plot(*zip(*best), label=f"{baseline} / ratio of FLOPs", **dotted)
    if bounds:
        ratio.plot(*zip(*sorted(bounds.items())), label="ratio of FLOPs", **dotted)
    time.set(yscale="log", ylabel="seconds", title=pass_name)
    ratio.set(ylabel=f"speed-up over {baseline}", title=pass_name, ylim=(0, None))
    for axis in (time, ratio):
        display.scale_by_length(axis, (key[1] for key, row in newest.items() if row["seconds"]))


BENCHMARK = Benchmark(
    name="attention", help=__doc__, add_arguments=add_arguments, run=run, table=table, plot=plot
)
