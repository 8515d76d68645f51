"""What attention patterns cost a pretrained model without training: loss on held-out text, needles found."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import display
from benchmarks.benchmark import Benchmark, Row
from benchmarks.environment import ROOT, code_hash
from benchmarks.options import require_positive
from benchmarks.results import newest_match
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file
from megatron_s2.pattern.settings import pattern_fields

FILES = ROOT / "benchmarks" / "patterns"  # pattern files that were calibrated, for --hf of get_small_model.sh
_CODE = (
    *(f"megatron_s2/calibration/{name}.py" for name in ("layered_model", "judge", "needles")),
    "benchmarks/patterns.py",
)
# Window blocks, stride, sink blocks.
UNIFORM = (
    *((8, 16, 0), (8, 16, 1), (8, 0, 1), (4, 48, 1), (16, 4, 1), (8, 4, 1)),
    *((16, 16, 1), (8, 2, 1), (16, 2, 1), (4, 16, 1), (2, 32, 1)),
)
DEPTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="a dense model: scripts/get_small_model.sh DIR")
    add("--data-path", required=True, metavar="PREFIX", help="held-out text in the model's tokens")
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens of a text (default: %(default)s)")
    add("--texts", type=int, default=8, metavar="N", help="texts of the loss (default: %(default)s)")
    add("--kinds", nargs="+", default=["code", "assignment", "comment"], help="of needles (default: all)")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="patterns to measure, as the table names them (default: all)",
    )
    add("--pattern-files", type=Path, default=FILES, metavar="DIR", help="default: benchmarks/patterns")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s")


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields a row for each pattern, dense first."""
    from megatron_s2.calibration.source import load_source

    require_positive(seq_length=args.seq_length, texts=args.texts)
    source = load_source(args.hf, None, args.dtype)
    model = source.model
    patterns = named_patterns(model.num_layers, model.num_kv_heads, args.pattern_files)
    if args.only:
        if unknown := set(args.only) - patterns.keys():
            raise ValueError(f"--only {min(unknown)}: must be one of {', '.join(patterns)}")
        patterns = {name: settings for name, settings in patterns.items() if name in ("dense", *args.only)}
    setting = {
        "model": args.hf.name,
        "layers": model.num_layers,
        "kv_heads": model.num_kv_heads,
        "dtype": args.dtype,
        "data": Path(args.data_path).name,
        "seq_length": args.seq_length,
        "texts": args.texts,
        "kinds": args.kinds,
        "patterns_code": code_hash(_CODE),
    }
    dense_loss = None
    for name, settings in patterns.items():
        named = setting | {"pattern": name, "pattern_hash": pattern_hash(settings)}
        row = newest_match(stored, named)
        if row is None:
            needles = {args.seq_length: args.kinds}
            row = named | measure(
                source, settings, args.data_path, args.seq_length, args.texts, needles, dense_loss
            )
            yield row
        if name == "dense":
            dense_loss = row["loss"]


def named_patterns(num_layers: int, num_kv_heads: int, directory: Path) -> dict[str, S2Settings | None]:
    """Returns the uniform patterns and those in the files of a directory, by name; None is dense."""
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads}
    patterns: dict[str, S2Settings | None] = {"dense": None}
    for window, stride, sinks in UNIFORM:
        name = f"uniform w{window} v{stride} s{sinks}"
        patterns[name] = S2Settings(**sizes, local_blocks=window, vert_stride=stride, sink_blocks=sinks)
    for path in sorted(directory.glob("*.json")):
        patterns[path.stem] = read_pattern_file(path, **sizes, source="--pattern-files")
    return patterns


def pattern_hash(settings: S2Settings | None) -> str:
    text = "dense" if settings is None else json.dumps(pattern_fields(settings.per_layer))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    source,
    settings: S2Settings | None,
    data_path: str | Path,
    seq_length: int,
    texts: int,
    needles: dict[int, Sequence[str]],
    dense_loss: float | None = None,
) -> Row:
    """Returns the part of a row that is measured. Texts and needles are the same for all patterns.

    Args:
        data_path: prefix of held-out text.
        seq_length, texts: length and number of the texts of the loss.
        needles: kinds of needles, ten depths for each, by the length of their texts.
        dense_loss: that of dense attention on the same texts, in nats per token; None if nobody asks.

    Raises:
        ValueError: the data is missing, damaged or shorter than asked for.
    """
    from megatron_s2.calibration.candidates import cost_of
    from megatron_s2.calibration.judge import answer, text_loss
    from megatron_s2.calibration.layered_model import pattern_attention
    from megatron_s2.calibration.needles import needle_grid
    from megatron_s2.generation.evaluation import windows

    start, attend, tokenizer = time.perf_counter(), pattern_attention(settings), source.required_tokenizer()
    loss = text_loss(source.model, (text for [text] in windows(data_path, seq_length, texts, seed=0)), attend)
    answers = [
        (length, answer(source.model, needle, attend))
        for length, kinds in needles.items()
        for needle in needle_grid(tokenizer, data_path, [length], DEPTHS, kinds, seed=1)
    ]
    return {
        "kv": cost_of(settings, seq_length, "kv"),
        "flops": cost_of(settings, seq_length, "flops"),
        "loss": loss,
        "over_dense": 0.0 if dense_loss is None else loss - dense_loss,
        "needles": [
            {
                "length": length,
                "kind": a.kind,
                "depth": a.depth,
                "found": a.found,
                "log_prob": round(a.log_prob, 4),
            }
            for length, a in answers
        ],
        "seconds": time.perf_counter() - start,
    }


# Tables and pictures.

_SETTING = ("model", "dtype", "data", "seq_length", "texts", "kinds")
_COLUMNS = display.columns(
    ("pattern", "K/V", "pairs", "loss", "over dense", "codes found", "all found", "log-prob"),
    "<28 >7 >7 >8 >11 >12 >10 >9",
)


def newest(rows: list[Row]) -> list[list[Row]]:
    """Returns the newest row of each pattern, cheapest first, for each setting."""
    groups = display.newest_rows(rows, _SETTING, ("pattern",))
    return [sorted(group.values(), key=lambda row: row["kv"]) for group in groups]


def table(rows: list[Row]) -> str:
    lines = []
    for group in newest(rows):
        row = group[0]
        lines.append(
            f"{row['model']}, {row['dtype']}, {row['seq_length']} tokens, untrained; "
            f"loss on {row['texts']} texts of {row['data']}"
        )
        lines += display.format_table(_COLUMNS, map(_cells, group))
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    needles = row["needles"]
    codes = [needle for needle in needles if needle["kind"] == "code"]
    mean = sum(needle["log_prob"] for needle in needles) / len(needles)
    return [
        row["pattern"],
        f"{row['kv']:.3f}",
        f"{row['flops']:.3f}",
        f"{row['loss']:.4f}",
        f"{row['over_dense']:+.4f}",
        *(f"{sum(needle['found'] for needle in some)}/{len(some)}" for some in (codes, needles)),
        f"{mean:.3f}",
    ]


def _series(pattern: str) -> str:
    first = pattern.split()[0]
    return first if first in ("dense", "uniform") else "calibrated"


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws, for each setting, loss and needles found against the share of keys and values."""
    from megatron_s2.report.frontier import Point, draw_frontier

    paths = []
    for group in newest(rows):
        paths.append(display.picture_path(directory, "patterns", len(paths)))
        points = [
            Point(
                series,
                row["pattern"].removeprefix(series).strip(),
                row["kv"],
                row["over_dense"],
                -sum(needle["log_prob"] for needle in row["needles"]) / len(row["needles"]),
                sum(needle["found"] for needle in row["needles"]) / len(row["needles"]),
            )
            for row in group
            for series in [_series(row["pattern"])]
        ]
        shown = [point for point in points if point.loss < 0.5]
        if len(shown) < len(points):
            left_out = [point.name for point in points if point.loss >= 0.5]
            print(f"not drawn, loss over dense of 0.5 or more: {', '.join(left_out)}", file=sys.stderr)
        xlabel = f"share of dense keys and values at {group[0]['seq_length']} tokens"
        draw_frontier(shown, paths[-1], xlabel, "loss over dense, nats per token")
    return paths


BENCHMARK = Benchmark(
    name="patterns",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
    takes_device=False,
)
