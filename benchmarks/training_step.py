"""A whole training step: S2 attention against dense, through the real entry point.

All cases are the same model and command but for the layers that stay dense. Dense attention is
`S2CoreAttention` with every layer dense, which forces PyTorch's SDPA to its flash kernel: Megatron's local
core attention makes a matrix of all scores, which takes 0.5 TB in bf16 for 16 heads at 131072 tokens.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import display
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, is_wrong, require_none_wrong
from benchmarks.environment import code_hash, package_version
from benchmarks.measure import summary
from benchmarks.options import add_integers, add_names, add_size_arguments, chosen_sizes, require_positive
from benchmarks.results import newest_match
from benchmarks.training_process import MODEL_FLAGS, Training, train
from megatron_s2.errors import flag_name
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.block_pattern import attention_flops

OUT_OF_MEMORY = "out of memory"
CASES = {
    "dense": ("--s2-dense-layer-freq", "1"),
    "s2-first-two-dense": ("--s2-dense-layers", "1,2"),
    "s2": (),
}
CHECK = "check"  # the case of a row that has the result of the check and no times
CHECKED_STEPS = 4
CHECK_SHARE = 0.1  # kernels sum in different orders, and 16-bit weights carry the differences on
_CODE = (
    "megatron_s2/pretrain.py",
    "megatron_s2/training/*.py",
    "megatron_s2/layers/*.py",
    "benchmarks/training_step.py",
    "benchmarks/training_process.py",
)


@dataclass(frozen=True)
class Model:
    """Sizes of the trained model; a step trains on one sequence."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    block_size: int
    local_blocks: int
    vert_stride: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """Length in tokens of the window."""
        return self.local_blocks * self.block_size

    def settings(self, case: str) -> S2Settings:
        """Returns the S2 attention of a case."""
        return S2Settings(
            self.num_layers,
            self.num_query_groups,
            self.block_size,
            self.local_blocks,
            self.vert_stride,
            dense_layers=(1, 2) if case == "s2-first-two-dense" else (),
            dense_layer_freq=int(case == "dense"),
        )

    def flags(self, case: str, seq_length: int) -> list[str]:
        """Returns Megatron's command line, without the number of iterations and where to log."""
        init_std = self.hidden_size**-0.5  # gives scores a variance of about 1, so that attention matters
        return (
            f"{MODEL_FLAGS} --num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.ffn_hidden_size} --num-attention-heads {self.num_attention_heads} "
            f"--group-query-attention --num-query-groups {self.num_query_groups} "
            f"--seq-length {seq_length} --max-position-embeddings {seq_length} --rotary-base 500000 "
            f"--vocab-size {self.vocab_size - 1} --init-method-std {init_std:.4g} "
            "--global-batch-size 1 --use-distributed-optimizer "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
            f"--s2-attention --s2-block-size {self.block_size} --s2-local-blocks {self.local_blocks} "
            f"--s2-vert-stride {self.vert_stride}"
        ).split() + list(CASES[case])


MODELS = {
    "cpu": Model(4, 64, 128, 4, 2, vocab_size=256, block_size=16, local_blocks=8, vert_stride=4),
    "cuda": Model(24, 2048, 6144, 16, 4, vocab_size=32000, block_size=64, local_blocks=8, vert_stride=16),
}
LENGTHS = {"cpu": [512, 2048], "cuda": [8192, 32768, 65536, 131072]}


def step_flops(model: Model, case: str, seq_length: int) -> dict[str, int]:
    """Returns the FLOPs of a step on one sequence: `linear`, of products with weights, and `attention`, on
    visible pairs.

    A multiply-add counts as two; norms, rotations and softmax are not counted. A product with weights is
    done once forward and twice backward; full recomputation does the layers' forward, but not that of the
    output layer, once more.
    """
    h, tokens = model.hidden_size, seq_length
    projections = h * (2 * h + 2 * model.num_query_groups * model.head_dim)
    layers = model.num_layers * (projections + 3 * h * model.ffn_hidden_size)
    pairs = model.num_layers * model.num_attention_heads * model.settings(case).mean_pairs(seq_length)
    forward, backward = attention_flops(round(pairs), model.head_dim)
    return {
        "linear": 2 * tokens * (4 * layers + 3 * h * model.vocab_size),
        "attention": 2 * forward + backward,
    }


def add_arguments(parser: ArgumentParser) -> None:
    add_names(parser, "--cases", CASES, "in the order to measure them (default: all)", list(CASES))
    lengths = "; on cuda ".join(",".join(map(str, LENGTHS[device])) for device in ("cpu", "cuda"))
    text = f"tokens of a step (default: {lengths})"
    add_integers(parser, "--seq-lengths", "numbers of tokens, such as 8192,32768", text)
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s)")
    add_size_arguments(parser, MODELS)


def model_of(args: Namespace) -> Model:
    """Returns the model that the options describe, or raises ValueError if one is out of range."""
    model = chosen_sizes(args, MODELS)
    require_positive(**vars(model), seq_lengths=min(args.seq_lengths), repeats=args.repeats)
    if args.warm_up < 1:
        raise ValueError(f"--warm-up {args.warm_up}: must be >= 1, the first step compiles")
    if model.local_blocks < 2:
        raise ValueError("--local-blocks 1: must be >= 2, for the check in the window to show anything")
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_query_groups")):
        if getattr(model, whole) % getattr(model, part):
            flag, other = (f"{flag_name(name)} {getattr(model, name)}" for name in (whole, part))
            raise ValueError(f"{flag}: must be a multiple of {other}")
    return model


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the row of `checked_losses`, then those of one length after another, a fresh process for each.

    If the check fails, times of S2 are stored as `unproven_seconds`, which no table shows.
    """
    args.seq_lengths = args.seq_lengths or LENGTHS[args.device]
    model, rows = model_of(args), []
    base = _base_setting(model, args)
    check = newest_match(stored, base | {"case": CHECK})
    for seq_length, case in ((n, case) for n in args.seq_lengths for case in args.cases):
        setting = _setting(case, model, seq_length, args)
        row = newest_match(stored, setting)
        if row is None:
            if check is None:
                check = base | check_row(model, args)
                yield check
            row = setting | measure(case, model, seq_length, args) | {"checked": check["checked"]}
            if is_wrong(check) and case != "dense" and row["seconds"]:
                row |= {"not_measured": check["not_measured"], "unproven_seconds": row["seconds"]}
                row["seconds"] = None
            yield row
        rows.append(row)
    require_none_wrong([*([check] if check else []), *rows])


def check_row(model: Model, args: Namespace) -> Row:
    """Returns the row of `checked_losses`."""
    row = {"case": CHECK, "seq_length": model.window, "checked": None, "not_measured": None, "seconds": None}
    try:
        return row | {"checked": checked_losses(model, args)}
    except WrongResultError as error:
        return row | {"not_measured": f"{WRONG}{error}"}


def _base_setting(model: Model, args: Namespace) -> Row:
    """What the check, once done, holds for."""
    return {
        "device": args.device,
        "model": vars(model),
        "packages": {"megatron-core": package_version("megatron-core")},
        "step_code": code_hash(_CODE),
    }


def _setting(case: str, model: Model, seq_length: int, args: Namespace) -> Row:
    """What a stored row must have in common with a new one to be used in its place."""
    return _base_setting(model, args) | {
        "case": case,
        "seq_length": seq_length,
        "warm_up": args.warm_up,
        "repeats": args.repeats,
        "flags": model.flags(case, seq_length),
    }


def checked_losses(model: Model, args: Namespace) -> Row:
    """Trains dense and S2 on sequences as long as the window: both see all tokens, and losses must agree.

    How far losses move if attention is wrong is known from a third training, which sees little but its own
    blocks. At the timed lengths dense and S2 compute different things: there losses are checked to be finite,
    and the attention benchmark checks the kernels.

    Raises:
        WrongResultError: a training failed, or the losses of S2 differ too much.
    """
    forgetful = replace(model, local_blocks=1, vert_stride=2 * model.local_blocks)
    losses = {}
    for name, one, case in (("dense", model, "dense"), ("s2", model, "s2"), ("own blocks", forgetful, "s2")):
        flags = one.flags(case, model.window)
        training = train(flags, 1, CHECKED_STEPS - 1, args.device, args.threads, time_optimizer=False)
        if training.status:
            raise WrongResultError(f"{name} at {model.window} tokens: {training.failure}")
        losses[name] = training.losses
    s2_off, own_blocks_off = (_distance(losses[name], losses["dense"]) for name in ("s2", "own blocks"))
    if not s2_off <= CHECK_SHARE * own_blocks_off:
        raise WrongResultError(
            f"s2 at {model.window} tokens, where it sees all: losses are {s2_off:.3g} off dense ones; "
            f"allowed is {CHECK_SHARE:g} of {own_blocks_off:.3g}, by which they are off where it sees its "
            "own blocks"
        )
    return {
        "seq_length": model.window,
        "losses": {name: list(values) for name, values in losses.items()},
        "s2_off": s2_off,
        "own_blocks_off": own_blocks_off,
    }


def _distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, others, strict=True)) / len(others))


def measure(case: str, model: Model, seq_length: int, args: Namespace) -> Row:
    """Trains a case and returns the fields of its row that `_setting` does not have."""
    flags = model.flags(case, seq_length)
    training = train(flags, args.warm_up, args.repeats, args.device, args.threads, time_optimizer=False)
    reason = not_measured(case, seq_length, training)
    flops, dense = (step_flops(model, name, seq_length) for name in (case, "dense"))
    return {
        "not_measured": reason,
        "losses": list(training.losses),
        "seconds": None if reason else summary(np.array(training.step_seconds)),
        "flops": flops,
        "dense_flops": dense,
        "speedup_bound": sum(dense.values()) / sum(flops.values()),
        "host_peak_bytes": training.host_peak_bytes,
        "gpu_peak_bytes": training.gpu_peak_bytes,
        "other_cpus": training.other_cpus,
    }


def not_measured(case: str, seq_length: int, training: Training) -> str | None:
    """Returns why a training has no times: it lacked memory, failed, or had losses that are not finite; None
    if it has times."""
    where = f"{case} at {seq_length} tokens"
    if training.status:
        texts = ("OutOfMemoryError", "can't allocate memory", "CUDA out of memory")
        if any(text in training.output for text in texts):
            return OUT_OF_MEMORY
        return f"{WRONG}{where} ended with status {training.status}: {training.failure}"
    if not all(map(math.isfinite, training.losses)):
        return f"{WRONG}{where}: losses must be finite, are {list(training.losses)}"
    return None


# Tables and pictures.

_COLUMNS = display.columns(
    ("tokens", "", "step", "p20", "p80", "tokens/s", "TFLOP/s", "over dense", "bound", "peak"),
    ">8 <19 >12 >12 >12 >10 >9 >10 >7 >11",
)
_STYLES = {
    "dense": {"color": "#333333", "marker": "s", "linestyle": "--"},
    "s2-first-two-dense": {"color": "#5b9bd5", "marker": "^"},
    "s2": {"color": "#12355b", "marker": "o"},
}
_LEGEND = (
    "TFLOP/s: of all FLOPs done, recomputation included. bound: the FLOPs of dense over those of the case. "
    "dense: every layer uses SDPA's flash kernel."
)


def by_model(rows: list[Row]) -> list[display.Newest]:
    """Returns the newest row of each (length, case), for each device and model."""
    timed = (row for row in rows if row["case"] != CHECK)
    return display.newest_rows(timed, ("device", "model"), ("seq_length", "case"))


def _describe(row: Row) -> str:
    m = row["model"]
    return (
        f"{m['num_layers']} layers, hidden {m['hidden_size']}, {m['num_attention_heads']} heads, "
        f"{m['num_query_groups']} KV groups, bf16, full recomputation; block {m['block_size']}, "
        f"window {m['local_blocks']}, stride {m['vert_stride']}; {row['device']}"
    )


def table(rows: list[Row]) -> str:
    lines = []
    for newest in by_model(rows):
        cells = [[*key, *_cells(row, newest.get((key[0], "dense")))] for key, row in newest.items()]
        lines += [_describe(display.any_row(newest)), *display.format_table(_COLUMNS, cells)]
        lines += display.load_notes(newest.values(), lambda row: f"{row['case']}, {row['seq_length']} tokens")
    return "\n".join([*lines, _LEGEND])


def _cells(row: Row, dense: Row | None) -> list[str]:
    seconds = display.median(row)
    if seconds is None:
        return [display.reason(row)]
    return [
        *display.milliseconds(row["seconds"]),
        f"{row['seq_length'] / seconds:.0f}",
        f"{sum(row['flops'].values()) / seconds / 1e12:.3f}",
        display.cell(display.speedup(row, dense), "{:.2f}x"),
        f"{row['speedup_bound']:.2f}x",
        display.mebibytes(row["gpu_peak_bytes" if row["device"] == "cuda" else "host_peak_bytes"]),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws a picture for each model: tokens per second, and speed-up over dense, by length. Dotted lines are
    the ratios of FLOPs."""
    paths = []
    for newest in by_model(rows):
        measured = [row for row in newest.values() if row["seconds"]]
        if not measured:
            continue
        paths.append(display.picture_path(directory, "step", len(paths)))
        title = f"{directory.name}\n{_describe(measured[0])}"
        dense = {n: row for (n, case), row in newest.items() if case == "dense"}
        with display.picture(paths[-1], (11, 4.2), (1, 2), title) as ((rate, ratio),):
            for case, style in _STYLES.items():
                curve = [row for row in measured if row["case"] == case]
                if not curve:
                    continue
                tokens = [row["seq_length"] for row in curve]
                rates = [row["seq_length"] / display.median(row) for row in curve]
                rate.plot(tokens, rates, label=case, **style)
                ratios = display.speedup_curve(zip(tokens, curve), dense)
                if case != "dense" and ratios:
                    ratio.plot(*zip(*ratios), label=case, **style)
                    bounds = [row["speedup_bound"] for row in curve]
                    dotted = {**style, "linestyle": ":", "marker": "."}
                    ratio.plot(tokens, bounds, label=f"{case}: ratio of FLOPs", **dotted)
            rate.set(ylabel="tokens per second")
            ratio.set(ylabel="speed-up over dense")
            for axis in (rate, ratio):
                axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
                display.scale_by_length(axis, (row["seq_length"] for row in measured))
    return paths


BENCHMARK = Benchmark(
    name="step",
    help="a whole training step: S2 attention against dense, through the real entry point",
    add_arguments=add_arguments,
    run=run,
    table=table,
    plot=plot,
)
